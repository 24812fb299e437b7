"""Run a model on documents in batches of similar length, longest first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.arrays import Floats32, objects
from llmcache.indexes.format.rows import Keys
from llmcache.model.async_batch import AsyncBatch
from llmcache.model.keys import Seed
from llmcache.model.tokens import TokenRows

_TOKENS = 2048
"""Tokens of a batch on a CPU, so that intermediate results fit into the processor's cache.

Measured with MiniLM on two cores, milliseconds per document of 256 tokens: 24.8 in batches of 8, 29.6 in batches of 32;
of 128 tokens: 12.0 in batches of 16, 13.3 in batches of 32.
"""


@dataclass(frozen=True, slots=True)
class Computed:
    """One computed batch.

    chosen: numbers of its token rows. outputs: on the host, float32 [n, width]; of a model with matrices an array of n
    objects, each float32 [rows, width]. seconds: of the model. vectors: the model's own output, [n, width], on its
    device; None for matrices.
    """

    chosen: list[int]
    outputs: NDArray[Any]
    seconds: float
    vectors: torch.Tensor | None


class Model(Protocol):
    """Interface of a model that computes one vector, or one matrix with any number of rows, per document."""

    matrices: bool
    """True if the outputs are matrices."""

    @property
    def module(self) -> Module:
        """The torch module that computes."""
        ...

    def tokenise(self, texts: Sequence[Any], prompt: str | None, role: str | None) -> TokenRows: ...

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> torch.Tensor | list[torch.Tensor]:
        """Compute the outputs of the chosen rows on the model's device: [chosen, width], or a matrix for each."""
        ...

    def keys(self, seed: Seed, texts: Sequence[Any]) -> Keys:
        """Return the text keys of documents, uint64 [n, 2]. seed: of the call."""
        ...

    def comparable(self, outputs: list[Any]) -> list[Floats32]:
        """Return outputs in a form in which equal outputs differ by rounding alone."""
        ...

    def token_embedding(self) -> torch.Tensor:
        """Return the token embeddings, [vocabulary, width]."""
        ...


@torch.inference_mode()
def compute(
    model: Model, rows: TokenRows, batch_size: int, role: str | None, *, ahead: bool = False
) -> Iterator[Computed]:
    """Compute the vectors of all rows; yields batches, longest rows first.

    On a CPU a batch of long rows has fewer than `batch_size` rows, which is faster there.
    ahead: on a GPU, start the next batch before a batch is yielded, so that the GPU works while the caller does.
    """
    started: AsyncBatch | None = None
    on_cpu = model.token_embedding().device.type == "cpu"
    for chosen in batches(rows.lengths, batch_size, _TOKENS if on_cpu else None):
        if ahead and not model.matrices and model.token_embedding().device.type == "cuda":
            queued: Any = partial(model.vectors, rows, chosen, role)
            last, started = started, AsyncBatch(queued, chosen)
            if last is not None:
                yield Computed(last.chosen, *last.wait())
            continue
        began = time.perf_counter()
        vectors = model.vectors(rows, chosen, role)
        if isinstance(vectors, torch.Tensor):
            outputs = vectors.float().cpu().numpy()
            yield Computed(chosen, outputs, time.perf_counter() - began, vectors)
        else:
            arrays = [matrix.float().cpu().numpy() for matrix in vectors]
            for array in arrays:  # the caller's results and the rows that wait to be stored share their memory
                array.setflags(write=False)
            matrices = objects(arrays)
            yield Computed(chosen, matrices, time.perf_counter() - began, None)
    if started is not None:
        yield Computed(started.chosen, *started.wait())


def batches(lengths: NDArray[np.int64], most: int, tokens: int | None) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches, longest rows first.

    lengths: of the rows, in tokens. most: rows of a batch. tokens: limit of a batch with its padding; a single longer
    row is a batch of its own. None: no limit.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = most if tokens is None else min(most, max(1, tokens // longest))
        yield order[start : start + size]
        start += size


def token_embedding(model: Module) -> torch.Tensor:
    """Return a model's token embeddings, [vocabulary, width]. model: of transformers, or a SentenceTransformer."""
    trunk: Any = getattr(model, "transformers_model", model)
    weight: torch.Tensor = trunk.get_input_embeddings().weight
    return weight

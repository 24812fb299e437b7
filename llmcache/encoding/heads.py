"""Several heads on one trunk: shared layers are computed once, and each head continues from them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.config import CacheConfig
from llmcache.document import Text
from llmcache.encoding.call import EncodeCall, Progress
from llmcache.encoding.executor import Executor
from llmcache.encoding.results import (
    Result,
    Source,
    documents_of,
    results,
)
from llmcache.errors import ConfigError, ModelMismatch
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.layers.attachment import Attachment
from llmcache.layers.registry import Layers
from llmcache.model.architecture import find_trunk
from llmcache.model.batching import Model, compute, token_embedding
from llmcache.model.encoders import Sentences
from llmcache.model.features import feature_width
from llmcache.model.identity import Identity
from llmcache.model.keys import Seed, text_keys
from llmcache.model.tokens import (
    TokenRows,
    batch,
    tokenise,
    tokenise_plainly,
)
from llmcache.near.neighbors.linear_head import LinearHead

log = logging.getLogger("llmcache")

_WINDOW = 512  # documents that all heads answer before the next ones, so that layer states are still in memory


class Head:
    """A transformers model whose output is one vector per document, on token ids of the cache's tokenizer."""

    matrices = False

    def __init__(self, model: Module, source: Module, tokenizer: Any) -> None:
        """source: the cache's own model, which determines tokenisation."""
        self._model, self._source, self._tokenizer = model, source, tokenizer
        parameters = inspect.signature(model.forward).parameters
        self._takes = set(parameters)
        self._takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @property
    def module(self) -> Module:
        return self._model

    def tokenise(self, texts: Sequence[str], prompt: str | None, role: str | None) -> TokenRows:
        if isinstance(self._source, SentenceTransformer):
            return tokenise(self._source, texts, prompt, role)
        if self._tokenizer is None:
            raise ConfigError("texts need a tokenizer; open the cache with tokenizer=...")
        texts = texts if prompt is None else [prompt + text for text in texts]
        return tokenise_plainly(self._tokenizer, texts, self.limit)

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens per text; None for no limit."""
        if isinstance(self._source, SentenceTransformer):
            longest: int | None = self._source.max_seq_length
            return longest
        limit = getattr(self._tokenizer, "model_max_length", None)
        return limit if limit and limit < 1 << 30 else None

    def keys(self, seed: Seed, texts: Sequence[str]) -> Keys:
        return text_keys(seed, texts).view(np.uint64)

    def comparable(self, outputs: list[Floats32]) -> list[Floats32]:
        return outputs

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> torch.Tensor:
        self._model.eval()
        device = next(self._model.parameters()).device
        inputs = batch(self._tokenizer, device, rows, chosen)
        known, highest = len(self.token_embedding()), int(inputs["input_ids"].max())
        if highest >= known:
            raise ConfigError(
                f"the head {type(self._model).__name__} knows {known} tokens and was given number {highest}: heads get "
                "token ids of the cache's tokenizer; use a head that was trained with this tokenizer"
            )
        inputs = {name: inputs[name] for name in rows.fields if self._takes_any or name in self._takes}
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return _vector(self._model(**inputs), len(chosen), self._model)

    def token_embedding(self) -> torch.Tensor:
        return token_embedding(self._model)


class Heads:
    """Heads by name. Each has a bank for its outputs; shared layers have common banks."""

    def __init__(
        self,
        source: Module,
        tokenizer: Any,
        heads: Mapping[str, Module],
        layers: Layers,
        config: CacheConfig,
        follow: Callable[[str, Executor], None],
        check: Callable[[], None],
    ) -> None:
        """source: the cache's own model. follow: loads the calibration of a bank name into an executor.

        check: raises ModelMismatch when tokenisation has changed.
        ConfigError when there is no head, or one cannot be run.
        """
        if not isinstance(heads, Mapping) or not all(isinstance(head, Module) for head in heads.values()):
            raise ConfigError(f'heads are models by name, got {heads!r:.60}; give heads={{"topic": model_a}}')
        if not heads:
            raise ConfigError('no heads were given; name them: heads={"topic": model_a, "tone": model_b}')
        for name, model in heads.items():
            if isinstance(model, BaseModel) and not isinstance(model, SentenceTransformer):
                raise ConfigError(
                    f"the head {name!r} is a {type(model).__name__}; heads are transformers models with logits, or "
                    "SentenceTransformers. Open a cache of its own for it"
                )
        trunks = {name: find_trunk(model) for name, model in heads.items()}
        watches = {name: layers.watch(trunk.module) for name, trunk in trunks.items()}
        identities = {name: watch.identity() for name, watch in watches.items()}
        self._check = check
        self._watches = {name: layers.watch(model, tokenizer) for name, model in heads.items()}
        depths = shared_depths(identities)
        self._executions: dict[str, Executor] = {}
        self._banks: dict[str, str] = {}
        for name, model in heads.items():
            banked = {depth for pair, depth in depths.items() if name in pair and depth >= 0}
            if len(heads) > 1 and not banked:
                log.warning("the head %s shares no layer with another one; it is computed in full", name)
            if config.layers != "output":
                banked |= set(range(len(identities[name].layers)) if config.layers == "all" else config.layers)
            attachment = layers.attachment_at(trunks[name], watches[name], tuple(sorted(banked))) if banked else None
            digest = self._watches[name].identity().digest
            bank, execution = _execution(model, source, tokenizer, attachment, layers, config, digest)
            self._executions[name], self._banks[name] = execution, bank
            follow(bank, execution)

    def only(self) -> tuple[str, Executor]:
        """Return the bank name and the executor of the only head."""
        ((name, execution),) = self._executions.items()
        return self._banks[name], execution

    def check(self) -> None:
        """ModelMismatch when a head or the tokenisation has changed since this object was made."""
        self._check()
        for name, watch in self._watches.items():
            before = watch.identity()
            if watch.changed() and watch.identity().digest != before.digest:
                raise ModelMismatch(
                    f"the head {name!r} has changed while it ran: {watch.changes()}; run the heads again"
                )

    def results(
        self,
        documents: Iterable[Source],
        prompt: str | None,
        role: str | None,
        batch_size: int,
        progress: Progress,
        calls: Callable[[], AbstractContextManager[Any]],
    ) -> Iterator[dict[str, Result]]:
        """Yield the results of all heads for each document, in order. calls: entered to answer a window."""
        stream = documents_of(documents)
        while window := list(islice(stream, _WINDOW)):
            by_head: dict[str, list[Result]] = {}
            with calls():
                self.check()
                for name, execution in self._executions.items():

                    def answer(texts: Sequence[Text], ids: Sequence[str], execution: Executor = execution) -> Any:
                        return execution.answers(EncodeCall(texts, ids, prompt, role, batch_size, progress))

                    def bank(execution: Executor = execution) -> Bank:
                        return execution.bank

                    by_head[name] = list(results(window, answer, bank, "output", _WINDOW))
            yield from (dict(zip(by_head, row, strict=True)) for row in zip(*by_head.values(), strict=True))


def shared_depths(identities: Mapping[str, Identity]) -> dict[tuple[str, str], int]:
    """Return for each pair of names the last layer up to which both models are equal; -1 if they share none."""
    names = list(identities)
    depths: dict[tuple[str, str], int] = {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = identities[first], identities[second]
            count = min(len(a.layers), len(b.layers))
            equal = [layer for layer in range(count) if a.up_to(layer) == b.up_to(layer)]
            depths[first, second] = equal[-1] if equal else -1
    return depths


def _execution(
    model: Module,
    source: Module,
    tokenizer: Any,
    attachment: Attachment | None,
    layers: Layers,
    config: CacheConfig,
    digest: bytes,
) -> tuple[str, Executor]:
    """Return the name of a head's bank, and the executor on it. digest: of the head's identity."""
    runner: Model = Sentences(model) if isinstance(model, SentenceTransformer) else Head(model, source, tokenizer)
    probe = next(compute(runner, runner.tokenise(["a"], None, None), 1, None))
    width = feature_width(runner.token_embedding(), config.fingerprint)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    name = f"head-{digest.hex()[:16]}"
    bank = layers.bank(name, BankFacts(dtype, probe.outputs.shape[1], 1, width))

    def inside() -> AbstractContextManager[Any]:
        return nullcontext() if attachment is None else attachment

    return name, Executor(runner, digest, config, layers.storing, bank, layers.secret, inside, name)


def _vector(output: Any, rows: int, model: Module) -> torch.Tensor:
    """Extract one vector per row from the output of a model with a head."""
    for name in ("logits", "sentence_embedding", "pooler_output"):
        vectors = output.get(name) if isinstance(output, Mapping) else None
        if isinstance(vectors, torch.Tensor) and vectors.ndim == 2 and len(vectors) == rows:
            return vectors
    if isinstance(output, torch.Tensor) and output.ndim == 2 and len(output) == rows:
        return output
    outputs = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
    raise ConfigError(f"a head gives logits [rows, classes]; {type(model).__name__} gives {outputs}")


def head_from_file(path: Path) -> LinearHead:
    """Read a linear head from an .npz file with `weights` [classes, width] and `offset` [classes].

    No code in the file is executed. ConfigError when the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights, offset = (np.asarray(arrays[name], np.float32) for name in ("weights", "offset"))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is no head: {error}; save one with numpy.savez(path, weights=head.coef_, offset=head.intercept_)"
        ) from None
    if weights.ndim != 2 or offset.shape != weights.shape[:1] or not (np.isfinite(weights).all() and len(offset) > 1):
        raise ConfigError(
            f"{path} has weights {weights.shape} and offset {offset.shape}, not [classes, width], [classes]"
        )
    return LinearHead(weights, offset)


def answers_from_file(path: Path) -> NDArray[np.int64]:
    """Read true labels, one class number per line. Returns int64 [n]. ConfigError when the file is something else."""
    try:
        lines = path.read_text("utf-8").split()
        return np.array([int(line) for line in lines], np.int64)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} does not contain right answers: {error}; write one class number per document and line"
        ) from None

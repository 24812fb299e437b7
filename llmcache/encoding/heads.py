"""Several heads on one trunk: the layers that models share are computed once, and each head runs on from there."""

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
from torch.nn import Module

from llmcache.config import CacheConfig
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
from llmcache.layers.attachment import Attachment
from llmcache.layers.registry import Layers
from llmcache.model.architecture import find_trunk
from llmcache.model.batching import (
    Model,
    Sentences,
    compute,
    token_embedding,
)
from llmcache.model.features import feature_width
from llmcache.model.identity import Identity
from llmcache.model.tokens import (
    TokenRows,
    batch,
    tokenise,
    tokenise_plainly,
)
from llmcache.near.neighbors.gate import LinearHead

log = logging.getLogger("llmcache")

_WINDOW = 512  # documents that every head answers before the next: their states are then still in memory


class Head:
    """A transformers model whose output is one vector per document, on token ids of the cache's tokenizer."""

    def __init__(self, model: Module, source: Module, tokenizer: Any) -> None:
        """source: the cache's own model, which says how texts become token ids."""
        self._model, self._source, self._tokenizer = model, source, tokenizer
        parameters = inspect.signature(model.forward).parameters
        self._takes = set(parameters)
        self._open = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

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
        """Tokens of a text that are read; None: all."""
        if isinstance(self._source, SentenceTransformer):
            found: int | None = self._source.max_seq_length
            return found
        limit = getattr(self._tokenizer, "model_max_length", None)
        return limit if limit and limit < 1 << 30 else None

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> torch.Tensor:
        self._model.eval()
        device = next(self._model.parameters()).device
        inputs = batch(self._tokenizer, device, rows, chosen)
        known, highest = len(self.token_embedding()), int(inputs["input_ids"].max())
        if highest >= known:
            raise ConfigError(
                f"the head {type(self._model).__name__} knows {known} tokens and was given number {highest}: heads get "
                "token ids of the cache's tokenizer; give it one that was made with that"
            )
        inputs = {name: inputs[name] for name in rows.fields if self._open or name in self._takes}
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return _vector(self._model(**inputs), len(chosen), self._model)

    def token_embedding(self) -> torch.Tensor:
        return token_embedding(self._model)


class Heads:
    """Models by name, each with a bank of its own for what it gives, and the banks of the layers they share."""

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
        """source: the cache's own model. follow: lets an execution go by what is calibrated for the bank of this name.

        check: raises ModelMismatch when texts become other token ids by now.

        ConfigError when there is no head, or one cannot be run.
        """
        if not isinstance(heads, Mapping) or not all(isinstance(head, Module) for head in heads.values()):
            raise ConfigError(f'heads are models by name, got {heads!r:.60}; give heads={{"topic": model_a}}')
        if not heads:
            raise ConfigError('no heads were given; name them: heads={"topic": model_a, "tone": model_b}')
        trunks = {name: find_trunk(model) for name, model in heads.items()}
        watches = {name: layers.watch(trunk.module) for name, trunk in trunks.items()}
        identities = {name: watch.identity() for name, watch in watches.items()}
        self._check = check
        self._watches = {name: layers.watch(model, tokenizer) for name, model in heads.items()}
        depths = shared_depths(identities)
        self._executions: dict[str, Executor] = {}
        self._banks: dict[str, str] = {}
        for name, model in heads.items():
            kept = {depth for pair, depth in depths.items() if name in pair and depth >= 0}
            if len(heads) > 1 and not kept:
                log.warning("the head %s shares no layer with another one; it is computed whole", name)
            if config.layers != "output":
                kept |= set(range(len(identities[name].layers)) if config.layers == "all" else config.layers)
            attachment = layers.attachment_at(trunks[name], watches[name], tuple(sorted(kept))) if kept else None
            digest = self._watches[name].identity().digest
            bank, execution = _execution(model, source, tokenizer, attachment, layers, config, digest)
            self._executions[name], self._banks[name] = execution, bank
            follow(bank, execution)

    def only(self) -> tuple[str, Executor]:
        """The bank's name and the execution of the one head."""
        ((name, execution),) = self._executions.items()
        return self._banks[name], execution

    def check(self) -> None:
        """ModelMismatch when a head, or what texts become, is not what it was when the heads were given."""
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
        """One result per head and document, in order. calls: entered to answer documents, see `results`."""
        stream = documents_of(documents)
        while window := list(islice(stream, _WINDOW)):
            answered: dict[str, list[Result]] = {}
            with calls():
                self.check()
                for name, execution in self._executions.items():

                    def answer(texts: Sequence[str], ids: Sequence[str], execution: Executor = execution) -> Any:
                        return execution.answers(EncodeCall(texts, ids, prompt, role, batch_size, progress))

                    def bank(execution: Executor = execution) -> Bank:
                        return execution.bank

                    answered[name] = list(results(window, answer, bank, "output", _WINDOW))
            yield from (dict(zip(answered, row, strict=True)) for row in zip(*answered.values(), strict=True))


def shared_depths(identities: Mapping[str, Identity]) -> dict[tuple[str, str], int]:
    """Per pair of names the last layer up to which the two are equal, -1 where they share none."""
    names = list(identities)
    depths: dict[tuple[str, str], int] = {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            mine, theirs = identities[one], identities[other]
            count = min(len(mine.layers), len(theirs.layers))
            equal = [layer for layer in range(count) if mine.up_to(layer) == theirs.up_to(layer)]
            depths[one, other] = equal[-1] if equal else -1
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
    """The name of a head's bank, and what answers from it. digest: of the head's identity."""
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
    """One vector per row, of whatever a model with a head returned."""
    for name in ("logits", "sentence_embedding", "pooler_output"):
        found = output.get(name) if isinstance(output, Mapping) else None
        if isinstance(found, torch.Tensor) and found.ndim == 2 and len(found) == rows:
            return found
    if isinstance(output, torch.Tensor) and output.ndim == 2 and len(output) == rows:
        return output
    has = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
    raise ConfigError(f"a head gives logits [rows, classes]; {type(model).__name__} gives {has}")


def head_from_file(path: Path) -> LinearHead:
    """A linear head out of an .npz file with `weights` [classes, width] and `offset` [classes]; no code is read.

    ConfigError when it is something else.
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
    """Right answers of a head, the number of a class per line, int64 [n]. ConfigError when it is something else."""
    try:
        lines = path.read_text("utf-8").split()
        return np.array([int(line) for line in lines], np.int64)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no right answers: {error}; write the number of a class per document, one on each line"
        ) from None

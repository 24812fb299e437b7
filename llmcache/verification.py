"""Verify a model with the cache: compare outputs uncached, cold, warm from memory, and warm after a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SparseEncoder
from torch.nn import Identity, Module

from llmcache.arrays import Floats32
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.document import Text
from llmcache.errors import ConfigError
from llmcache.model.architecture import find_trunk
from llmcache.model.encoders import ENCODERS
from llmcache.model.tokens import (
    TokenRows,
    batch,
    tokenise_plainly,
)
from llmcache.pipeline.pipeline import Pipeline

Outputs: TypeAlias = list[Floats32]
"""Outputs by document: [width], [labels] of a CrossEncoder, or [tokens, width]. Sparse vectors are dense here."""

_SLACK = 4.0
"""Factor on the re-batching difference that still counts as rounding, since batches differ from both of its runs."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one comparison.

    tier: "output", "layer-3", "prefix", "answers", or "model" for the model against itself. reused: number of documents
    answered from the store; for "prefix" of tokens, for "layer-3" of distinct rows. difference: largest difference to
    the uncached outputs. limit: largest difference allowed. same: True if bitwise equal to the cold run; None where
    equality is not guaranteed.
    """

    tier: str
    run: str
    documents: int
    reused: int
    difference: float
    limit: float
    same: bool | None = None

    @property
    def passed(self) -> bool:
        """True if the outputs are within the limit, and bitwise equal where guaranteed."""
        return self.difference <= self.limit and self.same is not False

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify_model(
    model: Module, tokenizer: Any, texts: Sequence[Text], store: Path, *, layers: Any = "all", batch_size: int = 32
) -> Iterator[Check]:
    """Run all comparisons of a model of sentence-transformers or transformers.

    texts: pairs of texts for a CrossEncoder. store: a folder that does not exist yet. layers: as in `CacheConfig`.
    Yields the checks. ConfigError when the model has no tokenizer, there is no text with a token, or texts are given
    where the model reads pairs, or pairs where it reads texts.
    """
    if not texts:
        raise ConfigError("there is no document to compare; give at least one")
    wanted, what = (tuple, "pairs of texts") if isinstance(model, CrossEncoder) else (str, "single texts")
    if wrong := [place for place, text in enumerate(texts) if not isinstance(text, wanted)]:
        raise ConfigError(f"a {type(model).__name__} reads {what}, and document {wrong[0]} is none; give {what}")
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, so no text can be given to it")
    subject = _Subject(model, tokenizer, texts, batch_size)
    expected = subject.run(batch_size)
    others = [subject.run(size) for size in {1, 7, 2 * batch_size} if size != batch_size]
    scale = max(float(np.abs(output).max(initial=0.0)) for output in expected)
    rounding = max(_difference(outputs, expected) for outputs in others)
    yield Check("model", "re-batched", len(texts), 0, rounding, rounding)
    # allow for rounding in the last bit, also if re-batching changes nothing
    limit = max(_SLACK * rounding, 4 * scale * float(np.finfo(np.float32).eps))
    config = CacheConfig(layers=layers)
    with LLMCache.open(store, model, tokenizer=tokenizer, config=config) as cache:
        cold = subject.cached(cache)
        yield Check(subject.tier, "cold", len(texts), 0, _difference(cold, expected), limit)
        yield subject.warm(cache, "warm", cold, expected, limit)
    with LLMCache.open(store, model, tokenizer=tokenizer, config=config) as cache:
        yield subject.warm(cache, "reloaded", cold, expected, limit)
        yield from subject.by_layer(cache, expected, limit)


def verify_job(
    model: Module, tokenizer: Any, records: Iterable[Any], store: Path, job: Mapping[str, Any], *, batch_size: int = 32
) -> Iterator[Check]:
    """Compare the answers of a language-model job with those of the model alone, one prompt at a time.

    records: of the job. store: a folder that does not exist yet. job: settings of `Pipeline`, with task and template.
    Yields the checks, whose differences are those of log-likelihoods in nats, infinite where tokens differ. The bits of
    warm runs are compared with those of the cold one.
    ConfigError when no record has a prompt.
    """

    def rows(folder: Path, size: int, config: CacheConfig) -> tuple[list[Any], int]:
        with LLMCache.open(folder, model, tokenizer=tokenizer, config=config) as cache:
            found = list(Pipeline(cache, batch_size=size, **job).run(given))
            return found, cache.stats().counters.answers_stored

    given, plain = list(records), CacheConfig(answers=False, prefix_block=0)
    alone, _ = rows(store.with_name("alone"), 1, plain)
    if not alone:
        raise ConfigError("no record has a prompt; give records with the fields of the template")
    together, _ = rows(store.with_name("together"), batch_size, plain)
    rounding = _row_difference(together, alone)
    yield Check("model", "re-batched", len(alone), 0, rounding, rounding)
    scale = max(float(np.abs(row.log_likelihoods).max(initial=0.0)) for row in alone)
    limit = max(_SLACK * rounding, 64 * scale * float(np.finfo(np.float32).eps))
    cold, _ = rows(store, batch_size, CacheConfig())
    yield Check("answers", "cold", len(alone), 0, _row_difference(cold, alone), limit)
    warm, reused = rows(store, batch_size, CacheConfig())
    same = all(_numbers(one) == _numbers(other) for one, other in zip(warm, cold, strict=True))
    yield Check("answers", "reloaded", len(alone), reused, _row_difference(warm, alone), limit, same)


def _numbers(row: Any) -> tuple[Any, ...]:
    """Return the tokens and log-likelihoods of a row of a job."""
    return row.tokens, row.log_likelihoods


def _row_difference(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Return the largest difference of log-likelihoods; infinity where tokens differ."""
    return max(
        float(np.abs(np.subtract(a.log_likelihoods, b.log_likelihoods)).max(initial=0.0))
        if a.tokens == b.tokens
        else np.inf
        for a, b in zip(first, second, strict=True)
    )


class _Subject:
    """Subject of the comparison: a model, its tokenizer and documents."""

    def __init__(self, model: Module, tokenizer: Any, texts: Sequence[Any], batch_size: int) -> None:
        self._model, self._tokenizer, self._texts, self._size = model, tokenizer, texts, batch_size
        self._encodes = isinstance(model, ENCODERS)
        self._trunk = find_trunk(model).module
        config = getattr(model, "config", None)
        # of an encoder-decoder, compare the encoder states
        self._run: Any = self._trunk if getattr(config, "is_encoder_decoder", False) else model
        self.tier = "output" if self._encodes else "layers"
        if self._encodes:
            return
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._rows = _without_empty(tokenise_plainly(tokenizer, texts, limit))
        if getattr(tokenizer, "pad_token_id", None) is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if getattr(config, "is_decoder", False) or type(model).__name__.endswith("ForCausalLM"):
            self.tier = "prefix"

    @torch.inference_mode()
    def run(self, size: int) -> Outputs:
        """Return the model's outputs, computed in batches of this size, sorted by length."""
        if self._encodes:
            return self._encoded(self._model, size)
        self._model.eval()
        order = np.argsort(-self._rows.lengths, kind="stable").tolist()
        outputs: Outputs = [np.zeros(0, np.float32)] * len(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            device = next(self._model.parameters()).device
            inputs = batch(self._tokenizer, device, self._rows, chosen)
            for place, output in zip(chosen, self._outputs(self._run, inputs), strict=True):
                outputs[place] = output
        return outputs

    def _outputs(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Iterator[Floats32]:
        """Yield the output of each row, without padding."""
        output = model(**inputs)
        states = output["logits"] if "logits" in output else output[0]
        visible = inputs["attention_mask"].bool()
        for row, mask in zip(states, visible, strict=True):
            yield (row if states.ndim == 2 else row[mask]).float().cpu().numpy()

    def _encoded(self, model: Any, size: int) -> Outputs:
        """Return the outputs of `encode`, or the logits of `predict`. model: of sentence-transformers, or a cache."""
        texts, settings = list(self._texts), {"batch_size": size, "show_progress_bar": False}
        if isinstance(self._model, CrossEncoder):
            logits = model.predict(texts, activation_fn=Identity(), **settings)
            return list(logits.reshape(len(texts), -1))
        if isinstance(self._model, SparseEncoder):
            return list(model.encode(texts, convert_to_sparse_tensor=False, **settings).float().cpu().numpy())
        return list(model.encode(texts, convert_to_numpy=True, **settings))

    def cached(self, cache: LLMCache) -> Outputs:
        """Return the outputs computed through the cache."""
        if self._encodes:
            return self._encoded(cache, self._size)
        with cache.attached():
            return self.run(self._size)

    def warm(self, cache: LLMCache, run: str, cold: Outputs, expected: Outputs, limit: float) -> Check:
        """Compare a warm run with the uncached and the cold outputs."""
        before = _reused(cache)
        outputs = self.cached(cache)
        same = all(np.array_equal(a, b) for a, b in zip(outputs, cold, strict=True)) if self._encodes else None
        reused = _reused(cache) - before
        return Check(self.tier, run, len(outputs), reused, _difference(outputs, expected), limit, same)

    def by_layer(self, cache: LLMCache, expected: Outputs, limit: float) -> Iterator[Check]:
        """Compare each layer bank: resume from states of that layer or an earlier one, and compute the rest."""
        with cache.attached() as attachment:
            if attachment.decodes:
                return
            for layer in attachment.banks.layers:
                before = _reused(cache)
                attachment.up_to = layer
                try:
                    outputs = self.run(self._size)
                finally:
                    attachment.up_to = None
                reused = _reused(cache) - before
                yield Check(f"layer-{layer}", "reloaded", len(outputs), reused, _difference(outputs, expected), limit)


def _without_empty(rows: TokenRows) -> TokenRows:
    """Return the rows with at least one token, since a plain model cannot run without."""
    nonempty = np.flatnonzero(rows.lengths > 0)
    if not len(nonempty):
        raise ConfigError("no document has a token; give texts")
    return rows.take(nonempty.tolist())


def _difference(first: Outputs, second: Outputs) -> float:
    """Return the largest absolute difference."""
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(first, second, strict=True))


def _reused(cache: LLMCache) -> int:
    """Return the number of documents, rows and tokens that the cache has reused so far."""
    counters = cache.stats().counters
    layers = sum(layer.hits for layer in counters.layers.values())
    return (
        counters.exact_text
        + counters.exact_tokens
        + counters.repeats
        + layers
        + counters.prefix.restored
        + counters.answers_stored
    )

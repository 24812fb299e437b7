"""Measurement of attached models, stored layers and shared trunks: `llmcache bench layers`."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.model.tokens import TokenRows, batch, tokenise

BATCH = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of two ways to compute one result.

    seconds, base_seconds: of every round, taken in turn. ratio: median of base_seconds over seconds, round by round;
    above 1 is faster. difference: the largest, to the uncached model.
    """

    name: str
    base: str
    documents: int
    seconds: tuple[float, ...]
    base_seconds: tuple[float, ...]
    difference: float
    facts: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Speed-up over the base, median over the rounds."""
        return statistics.median(base / own for base, own in zip(self.base_seconds, self.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def squad_paragraphs(path: Path, limit: int) -> list[str]:
    """Read the first distinct paragraphs of a SQuAD file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    every = (paragraph["context"] for article in articles for paragraph in article["paragraphs"])
    return list(islice(dict.fromkeys(every), limit))


def layers(model: SentenceTransformer, texts: Sequence[str], *, repeats: int = 5) -> list[Comparison]:
    """Compare a mixed batch, a second head and an attached model with an empty store with their ideal times.

    ConfigError for fewer than 64 distinct texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < BATCH:
        raise ConfigError(f"the corpus has {len(texts)} different texts; a measurement needs at least {BATCH}")
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder, torch.inference_mode():
        return [
            _mixed(model, texts[:BATCH], Path(folder) / "mixed", repeats),
            _second_head(model, texts, Path(folder) / "heads", repeats),
            *_all_miss(model, texts, Path(folder) / "miss", repeats),
        ]


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def _inputs(model: SentenceTransformer, texts: Sequence[str]) -> dict[str, Any]:
    rows = tokenise(model, texts, None, None)
    return _tensors(model, rows, range(len(texts)))


def _tensors(model: SentenceTransformer, rows: TokenRows, chosen: Sequence[int]) -> dict[str, Any]:
    inputs = batch(model.tokenizer, model.device, rows, chosen)
    return {name: inputs[name] for name in rows.fields}


# -- a mixed batch ------------------------------------------------------------------------------------------


def _mixed(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> Comparison:
    """Measure a batch of which half is stored at the last layer, a quarter at the middle one, a quarter not at all.

    The base is the remaining layers alone, on tensors of the remaining sizes: no look-up, no load.
    """
    trunk: Any = model.transformers_model
    inputs = _inputs(model, texts)
    lengths = inputs["attention_mask"].sum(dim=1).cpu()
    blocks = trunk.encoder.layer
    last, middle = len(blocks) - 1, len(blocks) // 2 - 1
    half, three = BATCH // 2, 3 * BATCH // 4
    order = np.random.default_rng(0).permutation(BATCH)
    at_output, at_middle, new = order[:half], order[half:three], order[three:]
    expected = trunk(**inputs).last_hidden_state

    def selected(rows: NDArray[np.int64]) -> dict[str, Any]:
        width = int(lengths[rows].max())
        return {name: value[rows, :width] for name, value in inputs.items()}

    states = {k: trunk.embeddings(selected(rows)["input_ids"]) for k, rows in (("new", new), ("middle", at_middle))}
    masks = {k: attention(selected(rows)["attention_mask"], trunk) for k, rows in (("new", new), ("middle", at_middle))}

    def remaining() -> None:
        for kind, first in (("new", 0), ("middle", middle + 1)):
            state = states[kind]
            for block in blocks[first:]:
                state = block(state, masks[kind])

    seconds, base, model_seconds, worst = [], [], [], 0.0
    for round_ in range(repeats + 1):
        path = folder / str(round_)
        with LLMCache.open(path, model, config=CacheConfig(layers=(middle,))) as cache, cache.attached():
            trunk(**selected(at_middle))
        with LLMCache.open(path, model, config=CacheConfig(layers=(last,))) as cache, cache.attached():
            trunk(**selected(at_output))
        config = CacheConfig(layers=(middle, last))
        with LLMCache.open(path, model, config=config) as cache, cache.attached() as attachment:
            own, _ = _timed(remaining)
            took, output = _timed(lambda: trunk(**inputs))
            of_model = cache.stats().counters.model_seconds
            entered = attachment.entered
        shutil.rmtree(path)
        worst = max(worst, _difference(output.last_hidden_state, expected, lengths))
        if round_:  # the first round warms up
            seconds.append(took)
            base.append(own)
            model_seconds.append(of_model)
    rows = int((last + 1 - entered).sum())
    padded = BATCH * (last + 1)
    plain = [_timed(lambda: trunk(**inputs))[0] for _ in range(repeats)]
    facts = {
        "entered": {str(layer): int((entered == layer).sum()) for layer in np.unique(entered).tolist()},
        "layer_rows": rows,
        "layer_rows_of_the_model": padded,
        "model_seconds": model_seconds,
        "model_seconds_to_base": statistics.median(a / b for a, b in zip(model_seconds, base, strict=True)),
        "plain_seconds": plain,
    }
    return Comparison("mixed batch", "remaining layers alone", BATCH, tuple(seconds), tuple(base), worst, facts)


def attention(mask: torch.Tensor, trunk: Any) -> torch.Tensor | None:
    """Expand a mask as BERT's layers expect it; None where nothing is hidden."""
    if bool(mask.all()):
        return None
    seen = mask[:, None, None, :].bool()
    if getattr(trunk.config, "_attn_implementation", "") == "sdpa":
        return seen.expand(-1, 1, mask.shape[1], -1)
    return torch.zeros_like(seen, dtype=trunk.dtype).masked_fill(~seen, torch.finfo(trunk.dtype).min)


def _difference(outputs: torch.Tensor, expected: torch.Tensor, lengths: torch.Tensor) -> float:
    seen = torch.arange(expected.shape[1])[None] < lengths[:, None]
    return float((outputs - expected)[seen].abs().max())


# -- two heads ----------------------------------------------------------------------------------------------


class _Classifier(Module):
    """A linear classifier on the last state of the first token."""

    def __init__(self, trunk: Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.classifier = torch.nn.Linear(width, classes)
        random = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(self.classifier.weight, std=0.1, generator=random)

    def get_input_embeddings(self) -> Any:
        trunk: Any = self.trunk
        return trunk.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        logits: torch.Tensor = self.classifier(states[:, 0])
        return logits


def _second_head(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> Comparison:
    """Measure the second of two classifiers whose trunks differ in the last layer; the base is that one alone."""
    trunk: Any = model.transformers_model
    with torch.inference_mode(False):
        other = copy.deepcopy(trunk)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in other.encoder.layer[-1].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter) * 0.01)
        width = trunk.config.hidden_size
        topic, tone = _Classifier(trunk, width, 4, 1).eval(), _Classifier(other, width, 7, 2).eval()

    def alone() -> NDArray[np.float32]:
        rows = tokenise(model, texts, None, None)
        outputs = np.empty((len(texts), 7), np.float32)
        order = np.argsort(-rows.lengths, kind="stable")
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32].tolist()
            outputs[chosen] = tone(**_tensors(model, rows, chosen)).cpu().numpy()
        return outputs

    seconds, base, worst, layer = [], [], 0.0, ""
    for round_ in range(repeats + 1):
        with LLMCache.open(folder / str(round_), model) as cache:
            # both heads are named, so that the shared layers are found and stored by the first
            first, _ = _timed(lambda: list(cache.run_heads(texts, {"topic": topic, "tone": _like(tone)})))
            took, results = _timed(lambda: list(cache.run_heads(texts, {"topic": topic, "tone": tone})))
        own, expected = _timed(alone)
        shutil.rmtree(folder / str(round_))
        worst = max(worst, float(np.abs(np.array([row["tone"].output for row in results]) - expected).max()))
        layer = str(results[0]["tone"].layer)
        if round_:
            seconds.append(took)
            base.append(own)
    facts = {"entered_after": layer, "first_run_of_both_seconds": first}
    return Comparison("second head", "second head alone", len(texts), tuple(seconds), tuple(base), worst, facts)


def _like(head: _Classifier) -> _Classifier:
    """Create a head on the same trunk with another classifier, whose outputs are not stored."""
    with torch.inference_mode(False):
        return _Classifier(head.trunk, head.classifier.in_features, 2, 3).eval()


# -- an empty store --------------------------------------------------------------------------------------


def _all_miss(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> list[Comparison]:
    """Measure `model.encode` while attached to an empty store, storing included, against the model alone.

    Variants: the last output stored; the states of all layers, committed in the background; and at once.
    """
    ways = {
        "attached, all miss": CacheConfig(),
        "all layers stored, all miss": CacheConfig(layers="all"),
        "all layers stored, all miss, no thread": CacheConfig(layers="all", background=False),
    }
    expected = model.encode(list(texts), batch_size=32)
    lengths = tokenise(model, list(texts), None, None).lengths
    base: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    worst, size = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for round_ in range(repeats + 1):
        turns = [None, *ways.items()]
        for turn in (
            turns[round_ % len(turns) :] + turns[: round_ % len(turns)]
        ):  # written pages may slow the next contender
            if turn is None:
                own, _ = _timed(lambda: model.encode(list(texts), batch_size=32))
                base += [own] if round_ else []
                continue
            name, config = turn
            cache = LLMCache.open(folder / name, model, config=config)
            with cache.attached():
                took, outputs = _timed(lambda: model.encode(list(texts), batch_size=32))
            committing, _ = _timed(cache.close)
            size[name] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
            shutil.rmtree(folder / name)
            worst[name] = max(worst[name], float(np.abs(outputs - expected).max()))
            seconds[name] += [took + committing] if round_ else []
    return [
        Comparison(
            name, "plain model", len(texts), tuple(seconds[name]), tuple(base), worst[name],
            {"tokens": float(lengths.mean()), "store_bytes": size[name]},
        )
        for name in ways
    ]  # fmt: skip

"""Measurement of attached models, stored layers and shared trunks: `llmcache bench layers`."""

from __future__ import annotations

import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache.bench.harness.files import folder_bytes
from llmcache.bench.harness.turns import Measurement, Row, Turn, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.model.tokens import TokenRows, batch, tokenise

BATCH = 64


def layers(model: SentenceTransformer, texts: Sequence[str], *, repeats: int = 5) -> list[Row]:
    """Compare a mixed batch, a second head and an attached model with an empty store with their ideal times.

    Returns one row each. ratio: speed-up over the base; above 1 is faster. ConfigError for fewer than 64 distinct
    texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < BATCH:
        raise ConfigError(f"the corpus has {len(texts)} different texts; a measurement needs at least {BATCH}")
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder, torch.inference_mode():
        measured = [
            _mixed(model, texts[:BATCH], Path(folder) / "mixed", repeats),
            _second_head(model, texts, Path(folder) / "heads", repeats),
            *_all_miss(model, texts, Path(folder) / "miss", repeats),
        ]
    names = ("name", "base", "documents", "seconds", "base_seconds", "difference", "facts", "ratio")
    return [one.row(*names) for one in measured]


def _inputs(model: SentenceTransformer, texts: Sequence[str]) -> dict[str, Any]:
    rows = tokenise(model, texts, None, None)
    return _tensors(model, rows, range(len(texts)))


def _tensors(model: SentenceTransformer, rows: TokenRows, chosen: Sequence[int]) -> dict[str, Any]:
    inputs = batch(model.tokenizer, model.device, rows, chosen)
    return {name: inputs[name] for name in rows.fields}


# -- a mixed batch ------------------------------------------------------------------------------------------


def _mixed(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> Measurement:
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

    facts: Row = {}
    model_seconds: list[float] = []

    @contextmanager
    def stored(number: int) -> Iterator[Callable[[], Any]]:
        path = folder / str(number)
        with LLMCache.open(path, model, config=CacheConfig(layers=(middle,))) as cache, cache.attached():
            trunk(**selected(at_middle))
        with LLMCache.open(path, model, config=CacheConfig(layers=(last,))) as cache, cache.attached():
            trunk(**selected(at_output))
        config = CacheConfig(layers=(middle, last))
        with LLMCache.open(path, model, config=config) as cache, cache.attached() as attachment:
            yield lambda: trunk(**inputs)
            model_seconds.append(cache.stats().counters.model_seconds)
            entered = attachment.entered
        facts["entered"] = {str(layer): int((entered == layer).sum()) for layer in np.unique(entered).tolist()}
        facts["layer_rows"] = int((last + 1 - entered).sum())
        shutil.rmtree(path)

    base = "remaining layers alone"
    made = in_turn(
        [
            Turn(base, BATCH, steady(remaining)),
            Turn("mixed batch", BATCH, stored, base, facts=facts),
            Turn("plain", BATCH, steady(lambda: trunk(**inputs))),
        ],
        repeats,
    )
    mixed = made["mixed batch"]
    seen = torch.arange(expected.shape[1])[None] < lengths[:, None]
    mixed.outputs = [output.last_hidden_state[seen].cpu() for output in mixed.outputs]
    mixed.compare([expected[seen].cpu()] * repeats)
    facts |= {
        "layer_rows_of_the_model": BATCH * (last + 1),
        "model_seconds": model_seconds[1:],  # without the round that warms up
        "model_seconds_to_base": statistics.median(map(truediv, model_seconds[1:], mixed.base_seconds)),
        "plain_seconds": made["plain"].seconds,
    }
    return mixed


def attention(mask: torch.Tensor, trunk: Any) -> torch.Tensor | None:
    """Expand a mask as BERT's layers expect it; None where nothing is hidden."""
    if bool(mask.all()):
        return None
    seen = mask[:, None, None, :].bool()
    if getattr(trunk.config, "_attn_implementation", "") == "sdpa":
        return seen.expand(-1, 1, mask.shape[1], -1)
    return torch.zeros_like(seen, dtype=trunk.dtype).masked_fill(~seen, torch.finfo(trunk.dtype).min)


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


def _second_head(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> Measurement:
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

    facts: Row = {}

    @contextmanager
    def shared(number: int) -> Iterator[Callable[[], Any]]:
        with LLMCache.open(folder / str(number), model) as cache:
            # both heads are named, so that the shared layers are found and stored by the first
            began = time.perf_counter()
            list(cache.run_heads(texts, {"topic": topic, "tone": _like(tone)}))
            facts["first_run_of_both_seconds"] = time.perf_counter() - began
            yield lambda: list(cache.run_heads(texts, {"topic": topic, "tone": tone}))
        shutil.rmtree(folder / str(number))

    base = "second head alone"
    turns = [Turn(base, len(texts), steady(alone)), Turn("second head", len(texts), shared, base, facts=facts)]
    made = in_turn(turns, repeats)
    second = made["second head"]
    facts["entered_after"] = str(second.outputs[-1][0]["tone"].layer)
    second.outputs = [np.array([row["tone"].output for row in results]) for results in second.outputs]
    second.compare(made[base].outputs)
    return second


def _like(head: _Classifier) -> _Classifier:
    """Create a head on the same trunk with another classifier, whose outputs are not stored."""
    with torch.inference_mode(False):
        return _Classifier(head.trunk, head.classifier.in_features, 2, 3).eval()


# -- an empty store --------------------------------------------------------------------------------------


def _all_miss(model: SentenceTransformer, texts: Sequence[str], folder: Path, repeats: int) -> list[Measurement]:
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
    base = "plain model"
    turns = [Turn(base, len(texts), steady(lambda: model.encode(list(texts), batch_size=32)))]
    for name, config in ways.items():
        facts: Row = {"tokens": float(lengths.mean())}
        prepared = partial(_attached, model, texts, folder / name, config, facts)
        turns.append(Turn(name, len(texts), prepared, base, facts=facts))
    made = in_turn(turns, repeats)
    for row in made.values():
        row.compare([expected] * repeats)
    return [made[name] for name in ways]


@contextmanager
def _attached(
    model: SentenceTransformer, texts: Sequence[str], folder: Path, config: CacheConfig, facts: Row, _: int
) -> Iterator[Callable[[], Any]]:
    with LLMCache.open(folder, model, config=config) as cache, cache.attached():

        def encode() -> Any:
            outputs = model.encode(list(texts), batch_size=32)
            cache.commit()
            return outputs

        yield encode
    facts["store_bytes"] = folder_bytes(folder)
    shutil.rmtree(folder)

"""End-to-end measurement of calibrated near reuse: a cache beside the model alone, on held-out documents."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.datasets import labelled_texts
from llmcache.bench.harness.turns import Action, Row, Turn, in_turn, steady
from llmcache.bench.near import fitted_head
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.near.calibration.drift import cosine_drift

BATCH = 64


def reusing(
    model: SentenceTransformer,
    folder: Path,
    *,
    drift: str = "accuracy",
    budget: float = 0.005,
    confidence: float | None = None,
    guard: bool = True,
    seeds: int = 1,
    repeats: int = 3,
) -> list[Row]:
    """Measure a run over the test documents. Returns one row per seed of the folds.

    The cache holds the train documents, and is calibrated on them. ratio: uncached seconds over cached ones, median of
    repeats in turn, each on a copy of the store; cached includes tokenising, look-up, loading, correction, audits
    at the default share, and storing. with_first: the same with the loading of the entries in the first call. All
    results are compared with the model's own.
    """
    known, asked = labelled_texts(folder)
    texts = [text for text, _ in asked]
    right = np.array([label for _, label in asked])
    answers = np.array([label for _, label in known])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        with LLMCache.open(store, model) as cache:
            outputs = np.asarray(cache.encode([text for text, _ in known], batch_size=BATCH))
        head = fitted_head(outputs, answers)
        for seed in range(seeds):
            with LLMCache.open(store, model) as cache:
                began = time.perf_counter()
                calibration = cache.calibrate(
                    [text for text, _ in known] if drift == "accuracy" else None,
                    truth=answers if drift == "accuracy" else None,
                    budget=budget, drift=drift, head=head, confidence=confidence, guard=guard, seed=seed,  # type: ignore[arg-type]
                )  # fmt: skip
                calibrating = time.perf_counter() - began
            facts: dict[str, list[Any]] = {"first": [], "look_up": [], "audits": [], "state": []}
            cached_by = partial(_cached, store, Path(name) / "copy", model, texts, facts)
            made = in_turn(
                [
                    Turn("model", len(texts), steady(lambda: model.encode(texts, batch_size=BATCH))),
                    Turn("cache", len(texts), cached_by, "model"),
                ],
                repeats,
                warm=0,
            )
            alone, cached = made["model"], made["cache"]
            plain, results = np.asarray(alone.outputs[0]), cached.outputs[0]
            reused = np.array([result.output for result in results])
            near = np.array([result.tier == "near" for result in results])
            given, was = head.predict(reused), head.predict(plain)
            cosine = cosine_drift(plain, reused)[near]
            times = zip(alone.seconds, cached.seconds, facts["first"], strict=True)
            rows.append({
                "seed": seed, "drift": drift, "budget": budget, "confidence": confidence, "guard": guard,
                "threshold": calibration.threshold, "reason": calibration.reason, "calibrating_seconds": calibrating,
                "calibrated_hits": calibration.hits,
                "hits": float(near.mean()), "flips": float((given != was).mean()),
                "accuracy_drop": float((was == right).mean() - (given == right).mean()),
                "cosine_mean": float(cosine.mean()) if len(cosine) else 0.0,
                "largest_difference_of_computed": float(np.abs(plain - reused)[~near].max(initial=0)),
                "audits": facts["audits"], "state": facts["state"], "uncached_per_second": alone.rate,
                "ratio": cached.ratio, "ratios": cached.ratios,
                "with_first": median(uncached / (own + first) for uncached, own, first in times),
                "look_up_milliseconds": median(facts["look_up"]), "loading_seconds": median(facts["first"]),
            })  # fmt: skip
    return rows


@contextmanager
def _cached(
    store: Path, copy: Path, model: SentenceTransformer, texts: list[str], facts: dict[str, list[Any]], _: int
) -> Iterator[Action]:
    """Open a copy of the store and load the entries for near reuse."""
    shutil.copytree(store, copy)
    with LLMCache.open(copy, model, config=CacheConfig(recalibrate=False)) as cache:
        began = time.perf_counter()
        cache.explain(texts[0])  # loads the entries
        facts["first"].append(time.perf_counter() - began)
        yield lambda: list(cache.run(texts, batch_size=BATCH))
        counters, state = cache.stats().counters, cache.stats().near[0]
    facts["audits"].append(counters.audits)
    facts["state"].append(f"{state.state} {state.why}".strip())
    facts["look_up"].append(1e3 * counters.near_seconds / max(1, counters.near_asked))
    shutil.rmtree(copy)

"""End-to-end measurement of calibrated near reuse: a cache beside the model alone, on held-out documents."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.rounds import Row
from llmcache.bench.near import fitted_head, labelled_texts
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
            runs = [_run(store, Path(name) / "copy", model, texts) for _ in range(repeats)]
            first, plain = runs[0], np.asarray(model.encode(texts, batch_size=BATCH))
            near = first["near"]
            given, was = head.predict(first["outputs"]), head.predict(plain)
            cosine = cosine_drift(plain, first["outputs"])[near]
            rows.append({
                "seed": seed, "drift": drift, "budget": budget, "confidence": confidence, "guard": guard,
                "threshold": calibration.threshold, "reason": calibration.reason, "calibrating_seconds": calibrating,
                "calibrated_hits": calibration.hits,
                "hits": float(near.mean()), "flips": float((given != was).mean()),
                "accuracy_drop": float((was == right).mean() - (given == right).mean()),
                "cosine_mean": float(cosine.mean()) if len(cosine) else 0.0,
                "largest_difference_of_computed": float(np.abs(plain - first["outputs"])[~near].max(initial=0)),
                "audits": [run["audits"] for run in runs], "state": [run["state"] for run in runs],
                "uncached_per_second": len(texts) / float(np.median([run["uncached"] for run in runs])),
                "ratio": float(np.median([run["uncached"] / run["cached"] for run in runs])),
                "ratios": [run["uncached"] / run["cached"] for run in runs],
                "with_first": float(np.median([run["uncached"] / (run["cached"] + run["first"]) for run in runs])),
                "look_up_milliseconds": float(np.median([run["look_up"] for run in runs])),
                "loading_seconds": float(np.median([run["first"] for run in runs])),
            })  # fmt: skip
    return rows


def _run(store: Path, copy: Path, model: SentenceTransformer, texts: list[str]) -> Row:
    """Time the model alone, and then a cache on a copy of the store."""
    began = time.perf_counter()
    model.encode(texts, batch_size=BATCH)
    uncached = time.perf_counter() - began
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    with LLMCache.open(copy, model, config=CacheConfig(recalibrate=False)) as cache:
        began = time.perf_counter()
        cache.explain(texts[0])  # loads the entries for near reuse
        first = time.perf_counter() - began
        began = time.perf_counter()
        results = list(cache.run(texts, batch_size=BATCH))
        cached = time.perf_counter() - began
        counters = cache.stats().counters
        state = cache.stats().near[0]
    return {
        "uncached": uncached, "cached": cached, "first": first, "state": f"{state.state} {state.why}".strip(),
        "near": np.array([result.tier == "near" for result in results]), "audits": counters.audits,
        "outputs": np.array([result.output for result in results]),
        "look_up": 1e3 * counters.near_seconds / max(1, counters.near_asked),
    }  # fmt: skip

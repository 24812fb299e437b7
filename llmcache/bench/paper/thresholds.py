"""Tau ablation: hits, wrong hits, accuracy and speed of the paper's rule for tau from 0.70 to 0.98."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.arrays import Floats32
from llmcache.bench.harness.rounds import Row
from llmcache.bench.paper.models import classifier
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig

TAUS = tuple(round(0.70 + 0.02 * step, 2) for step in range(15))
BATCH = 64


def taus(
    model: SentenceTransformer, workload: Workload, folder: Path, rounds: int = 3, values: Sequence[float] = TAUS
) -> list[Row]:
    """Measure reuse of the nearest neighbour's output by the PCA fingerprint. Returns one row per tau.

    hits: share of queries. flips: share of all queries whose label by a logistic head changes. drop: of accuracy, as
    a share. ratio: speed-up over the model alone, median over rounds with different parts of the queries, each within
    its round; look-up and storing are in the time, opening and the final commit are not.
    """
    with LLMCache.open(folder / "known", model) as cache:
        known = np.asarray(cache.encode(workload.known, batch_size=BATCH), np.float32)
    head = classifier(known, workload.known_labels)
    right = np.array(workload.asked_labels)
    parts = [part.tolist() for part in np.array_split(np.arange(len(workload.asked)), rounds) if len(part)]
    own, alone, given = _in_turn(model, workload, parts, folder, values)
    answers = head.predict(own)
    base = float((answers == right).mean())
    rows = []
    for tau, (outputs, near, seconds) in given.items():
        decided = head.predict(outputs)
        flips = decided != answers
        ratios = [one / other for one, other in zip(alone, seconds, strict=True)]
        rows.append({
            "data": workload.name, "model": "MiniLM", "weights": "real", "tau": tau, "known": len(workload.known),
            "asked": len(right), "hits": float(near.mean()), "flips": float(flips.mean()),
            "wrong_of_hits": float(flips[near].mean()) if near.any() else None,
            "accuracy": float((decided == right).mean()), "drop": base - float((decided == right).mean()),
            "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
            "rounds": len(parts),
        })  # fmt: skip
    return rows


def _in_turn(
    model: SentenceTransformer,
    workload: Workload,
    parts: Sequence[Sequence[int]],
    folder: Path,
    values: Sequence[float],
) -> tuple[Floats32, list[float], dict[float, tuple[Floats32, NDArray[np.bool_], list[float]]]]:
    """Run each part by the model alone, and then by a cache at each tau, all on copies of one store.

    Returns outputs and seconds of the model alone, and by tau outputs, near hits (bool), and seconds.
    """
    outputs: dict[float, list[NDArray[np.float32]]] = {tau: [] for tau in values}
    near: dict[float, list[bool]] = {tau: [] for tau in values}
    seconds: dict[float, list[float]] = {tau: [] for tau in values}
    own, alone = [], []
    with ExitStack() as stack:
        caches = {tau: stack.enter_context(_copy(model, folder, tau)) for tau in values}
        model.encode(workload.asked[:BATCH], batch_size=BATCH)  # warms up
        for cache in caches.values():
            cache.explain(workload.asked[0])  # loads the entries
        for part in parts:
            texts = [workload.asked[i] for i in part]
            began = time.perf_counter()
            own.append(np.asarray(model.encode(texts, batch_size=BATCH), np.float32))
            alone.append(time.perf_counter() - began)
            for tau, cache in caches.items():
                began = time.perf_counter()
                results = list(cache.run(texts, batch_size=BATCH))
                seconds[tau].append(time.perf_counter() - began)
                outputs[tau] += [result.output for result in results]
                near[tau] += [result.tier == "near" for result in results]
    return (
        np.concatenate(own),
        alone,
        {tau: (np.array(outputs[tau]), np.array(near[tau]), seconds[tau]) for tau in values},
    )


def _copy(model: SentenceTransformer, folder: Path, tau: float) -> LLMCache:
    place = folder / f"tau-{tau}"
    snapshot.save(folder / "known", place)
    return LLMCache.open(place, model, config=CacheConfig(tau=tau, stand_aside=False))

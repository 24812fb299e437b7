"""Tau ablation: hits, wrong hits, accuracy and speed of the paper's rule as tau goes from 0.70 to 0.98."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.bench.near import fitted_head
from llmcache.bench.paper.latency import Row
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig

TAUS = tuple(round(0.70 + 0.02 * step, 2) for step in range(15))
BATCH = 64


def taus(model: SentenceTransformer, workload: Workload, folder: Path, rounds: int = 3) -> list[Row]:
    """One row per tau: the nearest neighbour's output by the PCA fingerprint, from that similarity on.

    hits: share of documents asked. flips: share of all whose label by a logistic head changes. drop: of accuracy, in
    shares. ratio: times as fast as the model alone, median of rounds over parts of the documents, each in its own
    round; look-up and storing of what is computed included, opening not.
    """
    with LLMCache.open(folder / "known", model) as cache:
        known = np.asarray(cache.encode(workload.known, batch_size=BATCH), np.float32)
    head = fitted_head(known, np.array(workload.known_labels))
    right = np.array(workload.asked_labels)
    parts = [part for part in np.array_split(np.arange(len(workload.asked)), rounds) if len(part)]
    model.encode(workload.asked[:BATCH], batch_size=BATCH)  # warms up
    own, alone = _timed(model, workload, parts)
    answers = head.predict(own)
    base = float((answers == right).mean())
    rows = []
    for tau in TAUS:
        outputs, near, seconds = _with_tau(model, workload, parts, folder, tau)
        given = head.predict(outputs)
        flips = given != answers
        ratios = [one / other for one, other in zip(alone, seconds, strict=True)]
        rows.append({
            "data": workload.name, "model": "MiniLM", "weights": "real", "tau": tau, "known": len(workload.known),
            "asked": len(right), "hits": float(near.mean()), "flips": float(flips.mean()),
            "wrong_of_hits": float(flips[near].mean()) if near.any() else None,
            "accuracy": float((given == right).mean()), "drop": base - float((given == right).mean()),
            "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
            "rounds": len(parts),
        })  # fmt: skip
    return rows


def _timed(
    model: SentenceTransformer, workload: Workload, parts: list[NDArray[np.int64]]
) -> tuple[NDArray[np.float32], list[float]]:
    """The model alone: outputs of all, and seconds of each part."""
    outputs, seconds = [], []
    for part in parts:
        began = time.perf_counter()
        outputs.append(np.asarray(model.encode([workload.asked[i] for i in part], batch_size=BATCH), np.float32))
        seconds.append(time.perf_counter() - began)
    return np.concatenate(outputs), seconds


def _with_tau(
    model: SentenceTransformer, workload: Workload, parts: list[NDArray[np.int64]], folder: Path, tau: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_], list[float]]:
    """A fresh copy of the store at this tau: outputs, which were near hits, and seconds of each part."""
    place = folder / "copy"
    snapshot.save(folder / "known", place)
    outputs, near, seconds = [], [], []
    with LLMCache.open(place, model, config=CacheConfig(tau=tau)) as cache:
        cache.explain(workload.asked[0])  # loads what a look-up needs
        for part in parts:
            began = time.perf_counter()
            results = list(cache.run([workload.asked[i] for i in part], batch_size=BATCH))
            seconds.append(time.perf_counter() - began)
            outputs += [one.output for one in results]
            near += [one.tier == "near" for one in results]
    shutil.rmtree(place)
    return np.array(outputs), np.array(near), seconds

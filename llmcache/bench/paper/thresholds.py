"""Tau ablation: hits, wrong hits, accuracy and speed of the paper's rule for tau from 0.70 to 0.98."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.bench.harness.turns import Action, Row, Turn, in_turn
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
    texts = [[workload.asked[i] for i in part] for part in parts]

    def asked(cache: LLMCache, number: int) -> AbstractContextManager[Action]:
        return nullcontext(lambda: list(cache.run(texts[number], batch_size=BATCH)))

    with ExitStack() as stack:
        turns = [Turn("alone", 1, lambda number: nullcontext(lambda: model.encode(texts[number], batch_size=BATCH)))]
        model.encode(workload.asked[:BATCH], batch_size=BATCH)  # warms up
        for tau in values:
            cache = stack.enter_context(_copy(model, folder, tau))
            cache.explain(workload.asked[0])  # loads the entries
            turns.append(Turn(str(tau), 1, partial(asked, cache), "alone"))
        made = in_turn(turns, len(texts), warm=0)
    answers = head.predict(np.concatenate(made["alone"].outputs))
    base = float((answers == right).mean())
    rows = []
    for tau in values:
        results = [result for part in made[str(tau)].outputs for result in part]
        decided = head.predict(np.array([result.output for result in results]))
        near = np.array([result.tier == "near" for result in results])
        flips = decided != answers
        rows.append({
            "data": workload.name, "model": "MiniLM", "weights": "real", "tau": tau, "known": len(workload.known),
            "asked": len(right), "hits": float(near.mean()), "flips": float(flips.mean()),
            "wrong_of_hits": float(flips[near].mean()) if near.any() else None,
            "accuracy": float((decided == right).mean()), "drop": base - float((decided == right).mean()),
            **made[str(tau)].ratio_range(), "rounds": len(parts),
        })  # fmt: skip
    return rows


def _copy(model: SentenceTransformer, folder: Path, tau: float) -> LLMCache:
    place = folder / f"tau-{tau}"
    snapshot.save(folder / "known", place)
    return LLMCache.open(place, model, config=CacheConfig(tau=tau, stand_aside=False))

"""Cross-fitting: measure the drift of held-out documents, by looking up each fold among the entries of the others.

In each fold, predictor and head are fitted on the other folds. Settings that do not depend on drift are the same in all
folds and in live look-ups: kind, kernel width and penalty of the predictor, and the weights of the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.near.calibration.drift import DriftMeasure
from llmcache.near.neighbors.correction import (
    Voting,
    choose_voting,
)
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, Neighbors
from llmcache.near.neighbors.predictor import LEAST, Predictor

_VOTED = 1000  # most held-out entries for the choice of temperature and strength


@dataclass(frozen=True, slots=True, eq=False)
class CrossFitResult:
    """Drift and score of held-out documents, for `risk_control.choose`.

    drift: of each document if it were reused, float64 [n] in [0, 1]. score: from `gate.safety`, float64 [n].
    found: results of the look-ups. fold: fold of each document, int8 [n]; all 0 without folds.
    """

    drift: NDArray[np.float64]
    score: NDArray[np.float64]
    found: Neighbors = field(repr=False)
    fold: NDArray[np.int8] = field(repr=False)


def cross_fit(
    entries: Entries,
    judge_of: Callable[[Rows], DriftMeasure],
    *,
    folds: int = 5,
    seed: int = 0,
    voting: Voting | None = None,
    like: Predictor | None = None,
) -> CrossFitResult:
    """Look up every entry among the entries of the other folds, with predictor and head fitted on those.

    judge_of: from rows of entries to the drift measure for the rest; fits the head to these rows where possible. A head
        that was trained on the entries underestimates their drift; use a sample that it has not seen instead.
    like: the predictor of live look-ups; the folds use its settings.
    ConfigError when there are too few entries for the folds.
    """
    if folds < 2 or len(entries) * (folds - 1) // folds < LEAST:
        raise ConfigError(
            f"{len(entries)} entries in {folds} folds are too few; a predictor needs {LEAST} outside of its fold"
        )
    fold = np.random.default_rng(seed).permutation(np.arange(len(entries)) % folds).astype(np.int8)
    parts: list[tuple[Rows, Neighbors, NDArray[np.float64]]] = []
    for number in range(folds):
        queries, known = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        measure = judge_of(known)
        index = HostNeighborIndex.fit(entries.take(known), seed, voting, like)
        found = index.look_up(entries.take(queries), measure.scores)
        found = Neighbors(found.results, known[found.neighbours], found.similarities, found.evidence)
        parts.append((queries, found, measure.drift(entries.outputs[queries], found.results)))
    order = np.argsort(np.concatenate([queries for queries, _, _ in parts]))
    drift = np.concatenate([drifts for _, _, drifts in parts])[order]
    columns = (np.concatenate([getattr(found, name) for _, found, _ in parts])[order] for name in Neighbors.__slots__)
    neighbors = Neighbors(*columns)
    return CrossFitResult(drift, safety(neighbors.evidence), neighbors, fold)


def ask(memory: HostNeighborIndex, sample: Entries, judge: DriftMeasure) -> CrossFitResult:
    """Look up sample documents that are not in the cache (`unseen`) in the live index; nothing is fitted."""
    neighbors = memory.look_up(sample, judge.scores)
    drift = judge.drift(sample.outputs, neighbors.results)
    return CrossFitResult(drift, safety(neighbors.evidence), neighbors, np.zeros(len(sample), np.int8))


def unseen(sample: Keys, known: Keys) -> Rows:
    """Return the positions of sample documents that are not in the cache, int64.

    Exact hits say nothing about near ones. sample, known: keys of the sample and of the cache, uint64 [n, 2].
    ConfigError when all documents are in the cache.
    """
    known_keys = {key.tobytes() for key in known}
    places = np.flatnonzero([key.tobytes() not in known_keys for key in sample])
    if not len(places):
        raise ConfigError(
            f"all {len(sample)} documents of the sample are in the cache and would be exact hits; calibrate without a "
            "sample, on the cache's own entries, or give documents that are not in the cache"
        )
    return places


def held_out_voting(entries: Entries, seed: int = 0) -> Voting:
    """Choose temperature and strength on a held-out tenth of the entries (at most 1,000)."""
    order = np.random.default_rng(seed + 1).permutation(len(entries))
    cut = min(_VOTED, len(entries) // 10)
    held_out = entries.take(order[:cut])
    index = HostNeighborIndex.fit(entries.take(order[cut:]), seed)
    predicted, outputs, predictions, similarity, _ = index.neighbours(held_out)
    return choose_voting(predicted, outputs, predictions, similarity, held_out.outputs)

"""Evidence that nothing fitted has seen: the entries of a cache looked up among the others, fold by fold.

In each fold predictor and head are fitted on the other folds. Settings that look at no drift are the same in all
folds and in the cache that answers afterwards: kind, kernel width and penalty of the predictor, and how neighbours are
weighed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Rows
from llmcache.near.calibration.drift import DriftMeasure
from llmcache.near.neighbors.correction import (
    Voting,
    choose_voting,
)
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, Neighbors
from llmcache.near.neighbors.predictor import LEAST, Predictor

if TYPE_CHECKING:
    pass

_VOTED = 1000  # held-out entries that temperature and strength are chosen by


@dataclass(frozen=True, slots=True, eq=False)
class CrossFitResult:
    """Drift and score of documents that were looked up among entries without them, for `calibration.choose`.

    drift: float64 [n] in [0, 1], of each document were it reused. score: float64 [n], of `gate.safety`.
    found: what their look-ups gave. fold: int8 [n], the fold each document was looked up in; all 0 without folds.
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
    """Every entry as if it were asked and not known, with all that is fitted coming from the other folds.

    judge_of: the judge for some entries (by row): fits the head to them where it can be fitted again. A head that was
    trained on the entries judges them too kindly; give documents it has not seen, then. like: the predictor that
    answers later, whose settings those of the folds take.
    ConfigError: too few entries for so many folds.
    """
    if folds < 2 or len(entries) * (folds - 1) // folds < LEAST:
        raise ConfigError(f"{len(entries)} entries in {folds} folds; a predictor needs {LEAST} outside of its fold")
    fold = np.random.default_rng(seed).permutation(np.arange(len(entries)) % folds).astype(np.int8)
    parts: list[tuple[Rows, Neighbors, NDArray[np.float64]]] = []
    for number in range(folds):
        apart, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        judge = judge_of(rest)
        found = HostNeighborIndex.fit(entries.take(rest), seed, voting, like).look_up(entries.take(apart), judge.scores)
        found = Neighbors(found.results, rest[found.neighbours], found.similarities, found.evidence)
        parts.append((apart, found, judge.drift(entries.outputs[apart], found.results)))
    order = np.argsort(np.concatenate([apart for apart, _, _ in parts]))
    drift = np.concatenate([moved for _, _, moved in parts])[order]
    columns = (np.concatenate([getattr(found, name) for _, found, _ in parts])[order] for name in Neighbors.__slots__)
    whole = Neighbors(*columns)
    return CrossFitResult(drift, safety(whole.evidence), whole, fold)


def ask(memory: HostNeighborIndex, sample: Entries, judge: DriftMeasure) -> CrossFitResult:
    """Documents that are not in the cache (`unseen`), looked up in the memory that answers: nothing is fitted."""
    found = memory.look_up(sample, judge.scores)
    drift = judge.drift(sample.outputs, found.results)
    return CrossFitResult(drift, safety(found.evidence), found, np.zeros(len(sample), np.int8))


def unseen(sample: NDArray[np.uint64], known: NDArray[np.uint64]) -> Rows:
    """Places of the sample's documents that the cache does not hold; both are keys, uint64 [n, 2].

    What it holds is an exact hit and says nothing about near ones. ConfigError: it holds all of them.
    """
    held = {one.tobytes() for one in known}
    places = np.flatnonzero([one.tobytes() not in held for one in sample])
    if not len(places):
        raise ConfigError(
            f"all {len(sample)} documents of the sample are in the cache and would be exact hits; calibrate on the "
            "cache's own entries (no sample), or give documents that it does not hold"
        )
    return places


def held_out_voting(entries: Entries, seed: int = 0) -> Voting:
    """Temperature and strength for these entries, chosen on a tenth of them (at most 1,000)."""
    order = np.random.default_rng(seed + 1).permutation(len(entries))
    cut = min(_VOTED, len(entries) // 10)
    apart = entries.take(order[:cut])
    predicted, outputs, predictions, similarity, _ = HostNeighborIndex.fit(entries.take(order[cut:]), seed).neighbours(
        apart
    )
    return choose_voting(predicted, outputs, predictions, similarity, apart.outputs)

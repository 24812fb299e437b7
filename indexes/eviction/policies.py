"""Eviction policies: functions over arrays that rank rows, and the choice of the rows to evict.

A policy ranks rows; `choose` takes as many as needed. This module does not access files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.eviction.dependents import dependents_first, needed_elsewhere
from llmcache.indexes.format.rows import Rows

HALF_LIFE = 7 * 86400.0
"""Default half-life of a use, in seconds."""
DRIFT_LIMIT = 0.05
"""Default drift (1 - cosine to a fresh computation) above which an audited entry is divergent."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of rows; every array is [n], in the order in which the rows were stored.

    last_use, created: seconds since the epoch; last_use is 0 if the row was never read. uses: number of reads.
    nbytes: bytes on the disk, above 0. cost: seconds of the model. drift: NaN if never audited.
    segment: number of the row's segment. previous: place of the row that a row continues, -1 for none; None: no row
    continues another.
    """

    last_use: NDArray[np.int64]
    uses: NDArray[np.int64]
    created: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    cost: NDArray[np.float64]
    drift: NDArray[np.float64]
    segment: NDArray[np.int64]
    previous: Rows | None = None

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def seen(self) -> NDArray[np.int64]:
        """Time of the last use, or of storage if that is later, which a clock that jumped back can cause."""
        return np.maximum(self.last_use, self.created)

    @property
    def age(self) -> NDArray[np.int64]:
        """Seconds from `seen` of each row to the latest `seen` of all: never negative, whatever the clock shows now."""
        seen = self.seen
        age: NDArray[np.int64] = seen.max(initial=0) - seen
        return age


@dataclass(frozen=True, slots=True)
class Terms:
    """Parameters of policies. half_life: seconds, for "decay". drift_limit: for "divergence" and `choose`."""

    half_life: float = HALF_LIFE
    drift_limit: float = DRIFT_LIMIT


def least_recently_used(usage: Usage, terms: Terms) -> Rows:
    """Rank least recently used rows first; of equals, the row that was stored first."""
    return np.argsort(-usage.age, kind="stable")


def least_frequently_used(usage: Usage, terms: Terms) -> Rows:
    """Rank least frequently used rows first; of equals, the least recently used."""
    return np.lexsort((-usage.age, usage.uses))


def stalest(usage: Usage, terms: Terms) -> Rows:
    """Rank by uses with exponential decay, (1 + uses) * 0.5 ** (age / half-life), smallest first.

    Logarithms are compared, so that rows of many half-lives of age still have an order.
    """
    weight = np.log2(1.0 + usage.uses) - usage.age / terms.half_life
    return np.lexsort((-usage.age, weight))


def least_saving(usage: Usage, terms: Terms) -> Rows:
    """Rank by seconds saved per byte, cost * (1 + uses) / bytes, smallest first; the 1 stands for the next use."""
    return np.lexsort((-usage.age, usage.cost * (1.0 + usage.uses) / usage.nbytes))


def most_divergent(usage: Usage, terms: Terms) -> Rows:
    """Rank rows with an audited drift above the limit first, the largest drift at the front; the rest as LRU."""
    return np.lexsort((-usage.age, -_excess_drift(usage, terms)))


def _excess_drift(usage: Usage, terms: Terms) -> NDArray[np.float64]:
    """Return the drift where it is above the limit, else 0; float64 [n]."""
    drift = np.nan_to_num(usage.drift, nan=0.0, posinf=np.inf)
    return np.where(drift > terms.drift_limit, drift, 0.0)


Policy: TypeAlias = Callable[[Usage, Terms], Rows]
POLICIES: dict[str, Policy] = {
    "lru": least_recently_used,
    "lfu": least_frequently_used,
    "decay": stalest,
    "cost": least_saving,
    "divergence": most_divergent,
}


def choose(
    usage: Usage, bytes_to_free: int, policy: str = "lru", terms: Terms | None = None, *, only_whole: bool = False
) -> Rows:
    """Choose rows to evict, in order, so that at least this many bytes are freed; all rows if that is not enough.

    Rows are first picked one by one: under any policy those with an audited drift above the limit come first, the
    largest drift at the front, then the others in the policy's order. A segment with more than half of its bytes
    picked is evicted whole, because dropping a file costs nothing and rewriting half of it does; such segments come
    first, the one with the largest picked share at the front. The bytes that are then still missing are evicted row by
    row, in the order above, or, with `only_whole`, as further segments.

    A row that others continue (`Usage.previous`) comes after these in the order. The bytes of rows that are not picked
    and continue rows of another segment count as bytes of that segment too, since they are useless without it; of the
    further segments, those that are continued come last.
    """
    terms = terms or Terms()
    order = POLICIES[policy](usage, terms)
    order = order[np.argsort(-_excess_drift(usage, terms)[order], kind="stable")]
    if usage.previous is not None:
        order = dependents_first(order, usage.previous)
    enough = np.searchsorted(np.cumsum(usage.nbytes[order]), bytes_to_free) + 1 if bytes_to_free > 0 else 0
    picked = np.zeros(len(usage), np.bool_)
    picked[order[:enough]] = True
    segments = _segments(usage, picked, only_whole)
    total = np.bincount(usage.segment, usage.nbytes) if len(usage) else np.zeros(0)
    before = np.cumsum(total[segments]) - total[segments]
    place = np.full(len(total), -1)
    needed = segments[before < bytes_to_free] if len(segments) else segments
    place[needed] = np.arange(len(needed))
    in_whole = place[usage.segment] >= 0
    whole = order[in_whole[order]]
    whole = whole[np.argsort(place[usage.segment[whole]], kind="stable")]
    missing = bytes_to_free - int(usage.nbytes[in_whole].sum())
    rest = order[:enough][~in_whole[order[:enough]]]
    ahead = np.cumsum(usage.nbytes[rest]) - usage.nbytes[rest]
    return np.concatenate([whole, rest[ahead < missing]])


def _segments(usage: Usage, picked: NDArray[np.bool_], every: bool) -> NDArray[np.int64]:
    """Return segments with over half their bytes picked, the largest share first; with `every`, then all others.

    Bytes of rows that are not picked and depend on a segment are added to its own.
    """
    if not len(usage):
        return np.zeros(0, np.int64)
    total = np.bincount(usage.segment, usage.nbytes)
    of_dependents: NDArray[Any] = np.zeros(len(total))
    if usage.previous is not None:
        below, above = needed_elsewhere(usage.previous, usage.segment, ~picked)
        of_dependents = np.bincount(usage.segment[above], usage.nbytes[below], len(total))
    share = np.bincount(usage.segment, usage.nbytes * picked) / np.maximum(total + of_dependents, 1)
    further = (of_dependents > 0) & (share <= 0.5)
    ranked = np.lexsort((np.arange(len(total)), -share, further))
    chosen: Rows = ranked[(share[ranked] > 0.5) | (every & (total[ranked] > 0))]
    return chosen

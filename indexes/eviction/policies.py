"""Which entries go when there is no room for all: the eviction policies, as functions over arrays.

A policy ranks; `choose` takes as many as are needed. Nothing here knows of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.int64]

HALF_LIFE = 7 * 86400.0
"""Seconds after which a use counts half as much, unless it is said otherwise."""
DRIFT_LIMIT = 0.05
"""Audited drift (1 - cosine to a fresh computation) from which on an entry is divergent."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What is known of each row; every array is [n], in the order in which the rows were stored.

    last_use, created: seconds since the epoch; last_use is 0 where a row was never read. uses: times it was read.
    nbytes: what it takes on the disk, above 0. cost: seconds the model took. drift: NaN if never audited.
    segment: a number for each segment; rows of one segment share it.
    """

    last_use: NDArray[np.int64]
    uses: NDArray[np.int64]
    created: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    cost: NDArray[np.float64]
    drift: NDArray[np.float64]
    segment: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def seen(self) -> NDArray[np.int64]:
        """When each row was last needed. A clock that jumped back cannot make a use older than its row."""
        return np.maximum(self.last_use, self.created)

    @property
    def age(self) -> NDArray[np.int64]:
        """Seconds since then, before the latest thing that was seen: never negative, whatever a clock says now."""
        seen = self.seen
        age: NDArray[np.int64] = seen.max(initial=0) - seen
        return age


@dataclass(frozen=True, slots=True)
class Terms:
    """half_life: seconds, for `decay`. drift_limit: for `divergence`."""

    half_life: float = HALF_LIFE
    drift_limit: float = DRIFT_LIMIT


def least_recently_used(usage: Usage, terms: Terms) -> Rows:
    """The longest unneeded first; of equals the one that was stored first."""
    return np.argsort(-usage.age, kind="stable")


def least_frequently_used(usage: Usage, terms: Terms) -> Rows:
    """The least read first; of equals the least recently used."""
    return np.lexsort((-usage.age, usage.uses))


def stalest(usage: Usage, terms: Terms) -> Rows:
    """By uses with exponential temporal decay: (1 + uses) * 0.5 ** (age / half-life), least first.

    The logarithm is compared, so that what is many half-lives old still has an order.
    """
    weight = np.log2(1.0 + usage.uses) - usage.age / terms.half_life
    return np.lexsort((-usage.age, weight))


def least_saving(usage: Usage, terms: Terms) -> Rows:
    """By seconds saved per byte, least first: cost * (1 + uses) / bytes; the 1 is for the use that is to come."""
    return np.lexsort((-usage.age, usage.cost * (1.0 + usage.uses) / usage.nbytes))


def most_divergent(usage: Usage, terms: Terms) -> Rows:
    """What is audited to drift above the limit first, the worst of it at the front; the rest as least recently used."""
    return np.lexsort((-usage.age, -_beyond(usage, terms)))


def _beyond(usage: Usage, terms: Terms) -> NDArray[np.float64]:
    """Drift where it is above the limit, else 0."""
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
    """Rows that are to go, in order, so that at least this many bytes are freed; all rows when they are fewer.

    The policy's order gives the rows that would go one by one, but for those audited to drift above the limit: under
    any policy they are the first, the worst at the front. A segment of which they make up more than half the bytes goes
    whole, since dropping a file costs nothing and rewriting half of it does; these go first, the most chosen one at the
    front. What is then still missing goes row by row, in the policy's order, or, with
    `only_whole`, as further segments.
    """
    terms = terms or Terms()
    order = POLICIES[policy](usage, terms)
    order = order[np.argsort(-_beyond(usage, terms)[order], kind="stable")]
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
    """Segments of which more than half the bytes are picked, the most picked first; with `every`, all others behind."""
    if not len(usage):
        return np.zeros(0, np.int64)
    total = np.bincount(usage.segment, usage.nbytes)
    share = np.bincount(usage.segment, usage.nbytes * picked) / np.maximum(total, 1)
    ranked = np.lexsort((np.arange(len(total)), -share))
    return ranked[(share[ranked] > 0.5) | (every & (total[ranked] > 0))]

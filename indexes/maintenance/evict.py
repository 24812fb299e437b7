"""Eviction: bring a store below a number of bytes by removing the rows that a policy ranks first.

Eviction, compaction and garbage collection may run concurrently with readers and writers. Each step is one commit, so a
process that is killed leaves the generation before the step or after it. One process maintains a store at a time, to
avoid wasted work; a second one gets Busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.eviction.budget import GRACE
from llmcache.indexes.eviction.garbage import disk_bytes, garbage
from llmcache.indexes.eviction.policies import DRIFT_LIMIT, HALF_LIFE, POLICIES, Terms, choose
from llmcache.indexes.maintenance.compact import groups, try_rewrite
from llmcache.indexes.maintenance.exclusive import locked
from llmcache.indexes.store import Store

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Evicted:
    """Result of an eviction: rows evicted, segments among them evicted whole, bytes of the store before and after.

    A dry run estimates the latter.
    """

    rows: int
    segments: int
    bytes_before: int
    bytes_after: int
    dry_run: bool


def evict(
    store: Store,
    max_bytes: int,
    *,
    policy: str = "lru",
    half_life: float = HALF_LIFE,
    drift_limit: float = DRIFT_LIMIT,
    dry_run: bool = False,
) -> Evicted:
    """Bring the store's files to at most `max_bytes`, by evicting the rows that the policy ranks first.

    Superseded files are removed first, whatever their age. Evicted rows of segments that stay are marked dead; segments
    with dead rows are then rewritten, the largest dead share first, until the bytes are free. This needs disk space for
    one new segment. Files of dropped segments are removed at once.
    half_life: seconds, for the policy "decay". drift_limit: for "divergence".
    ConfigError for an invalid policy or number; Busy while another process maintains the store; StoreFull or
    StoreFenced when a write fails.
    """
    terms = _terms(max_bytes, policy, half_life, drift_limit)
    with locked(store, dry_run):
        if not dry_run:
            store.write_uses()
        before = disk_bytes(store.folder)
        rows, evicted = 0, set[str]()
        unneeded = garbage(store.folder, GRACE, 0)
        if unneeded.blocked:
            raise SnapshotDamaged(
                f"{store.folder.path}: {unneeded.blocked[0]} is damaged, so the files it needs are unknown and "
                "none can be removed; repair the store first"
            )
        after = before - sum(unneeded.sizes.values())
        if dry_run:
            rows, segments, freed = _planned(store, after - max_bytes, policy, terms)
            return Evicted(rows, segments, before, after - freed, dry_run)
        try:
            eviction.tidy(store.folder)
            for _ in range(_ROUNDS):
                if (need := disk_bytes(store.folder) - max_bytes) <= 0:
                    break
                rows += _evict_once(store, need, max_bytes, policy, terms, evicted)
        finally:
            store.forget(evicted)
        return Evicted(rows, len(evicted), before, disk_bytes(store.folder), dry_run)


def _terms(max_bytes: int, policy: str, half_life: float, drift_limit: float) -> Terms:
    if policy not in POLICIES:
        raise ConfigError(f"policy is one of {', '.join(POLICIES)}, got {policy!r}")
    if max_bytes < 0 or not half_life > 0 or not drift_limit >= 0:
        raise ConfigError(
            f"max_bytes and drift_limit are at least 0 and half_life is above 0 seconds, got {max_bytes}, "
            f"{drift_limit} and {half_life}"
        )
    return Terms(half_life, drift_limit)


def _planned(store: Store, need: int, policy: str, terms: Terms) -> tuple[int, int, int]:
    """Return the rows, whole segments and bytes that the first round would evict."""
    candidates = eviction.candidates(store.folder, eviction.current(store.folder))
    chosen = choose(candidates.usage, need, policy, terms)
    numbers, counts = np.unique(candidates.usage.segment[chosen], return_counts=True)
    whole = sum(candidates.places[number][2].live == count for number, count in zip(numbers, counts, strict=True))
    return len(chosen), int(whole), int(candidates.usage.nbytes[chosen].sum())


def _evict_once(store: Store, need: int, max_bytes: int, policy: str, terms: Terms, evicted: set[str]) -> int:
    """Evict rows worth `need` bytes, and rewrite segments until their bytes are free. Returns the number of rows.

    evicted: set to which the ids of segments that were evicted whole are added.
    """
    candidates = eviction.candidates(store.folder, eviction.current(store.folder))
    chosen = choose(candidates.usage, need, policy, terms)
    evicted |= eviction.drop(store.folder, store.publish, candidates, chosen)
    eviction.tidy(store.folder)
    after = eviction.current(store.folder)
    wanted = groups(after, lambda segment: segment.dead > 0, most=0)
    for group in sorted(wanted, key=lambda group: group.sources[0].live / group.sources[0].rows):
        if disk_bytes(store.folder) <= max_bytes:
            break
        try_rewrite(store, group)
        eviction.tidy(store.folder)
    return len(chosen)

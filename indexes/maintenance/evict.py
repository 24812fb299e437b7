"""What is done to a store as a whole: evict rows, compact segments, collect files.

All of it may run beside readers and writers. Each step is one commit, so a process that is killed leaves the
generation before it or the one after; one maintainer works at a time (`Busy` for the second), to save wasted work.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcache.indexes.commits.publish import fencing
from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.eviction import garbage as collection
from llmcache.indexes.eviction.budget import GRACE
from llmcache.indexes.eviction.garbage import disk_bytes, garbage
from llmcache.indexes.eviction.policies import (
    DRIFT_LIMIT,
    HALF_LIFE,
    POLICIES,
    Terms,
    choose,
)
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.maintenance import compact as compaction
from llmcache.indexes.maintenance.duplicates import drop_duplicates
from llmcache.indexes.stats import counters as counting
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Evicted:
    """rows and segments that went; bytes of the whole store, before and after. A dry run estimates the latter."""

    rows: int
    segments: int
    bytes_before: int
    bytes_after: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Compacted:
    """segments that were rewritten, rows copied, damaged rows left behind; bytes that `gc` may now remove.

    duplicates: further copies of an entry that were dropped before.
    """

    segments: int
    rows: int
    damaged: int
    bytes: int
    dry_run: bool
    duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Collected:
    """files removed, manifests among them, and their bytes; writers whose advisory files were made one.

    blocked: damaged manifests because of which nothing was removed.
    """

    files: int
    manifests: int
    bytes: int
    folded: int
    blocked: tuple[str, ...]
    dry_run: bool


@contextlib.contextmanager
def _locked(store: Store, dry_run: bool) -> Iterator[None]:
    with fencing(), contextlib.nullcontext() if dry_run else store.folder.lock():
        yield


# -- evict --------------------------------------------------------------------------------------------------


def evict(
    store: Store,
    max_bytes: int,
    *,
    policy: str = "lru",
    half_life: float = HALF_LIFE,
    drift_limit: float = DRIFT_LIMIT,
    dry_run: bool = False,
) -> Evicted:
    """Bring the store's files down to at most `max_bytes`, giving up the rows that the policy names first.

    Files that nobody needs go first, whatever their age. Rows of segments that stay are marked dead, and segments
    with dead rows are then rewritten, those with most of them first, until the bytes are really free; for that, room
    for one new segment is needed on the disk. Dropped files are removed at once.
    ConfigError for a policy or a number that cannot be; Busy; StoreFull or StoreFenced when a write fails.
    """
    terms = _terms(max_bytes, policy, half_life, drift_limit)
    with _locked(store, dry_run):
        if not dry_run:
            store.write_uses()
        before = disk_bytes(store.folder)
        rows, gone = 0, set[str]()
        unneeded = garbage(store.folder, GRACE, 0)
        if unneeded.blocked:
            raise SnapshotDamaged(
                f"{store.folder.path}: {unneeded.blocked[0]} is damaged, so what it needs is not known, and nothing "
                "can be removed; repair the store first"
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
                rows += _evict_once(store, need, max_bytes, policy, terms, gone)
        finally:
            store.forget(gone)
        return Evicted(rows, len(gone), before, disk_bytes(store.folder), dry_run)


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
    """Rows, whole segments and bytes that the first round would evict."""
    found = eviction.candidates(store.folder, eviction.current(store.folder))
    chosen = choose(found.usage, need, policy, terms)
    numbers, counts = np.unique(found.usage.segment[chosen], return_counts=True)
    whole = sum(found.places[number][2].live == count for number, count in zip(numbers, counts, strict=True))
    return len(chosen), int(whole), int(found.usage.nbytes[chosen].sum())


def _evict_once(store: Store, need: int, max_bytes: int, policy: str, terms: Terms, gone: set[str]) -> int:
    """Mark as many rows dead as are needed, and rewrite segments until their bytes are free. Returns how many rows.

    gone: takes in the ids of the segments that went whole.
    """
    found = eviction.candidates(store.folder, eviction.current(store.folder))
    chosen = choose(found.usage, need, policy, terms)
    gone |= eviction.drop(store.folder, store.publish, found, chosen)
    eviction.tidy(store.folder)
    after = eviction.current(store.folder)
    wanted = compaction.groups(after, lambda one: one.dead > 0, most=0)
    for group in sorted(wanted, key=lambda group: group.sources[0].live / group.sources[0].rows):
        if disk_bytes(store.folder) <= max_bytes:
            break
        _rewritten(store, group)
        eviction.tidy(store.folder)
    return len(chosen)


def _rewritten(store: Store, group: compaction.Group) -> compaction.Rewritten:
    try:
        return compaction.rewrite(store.folder, store.publish, eviction.current(store.folder), group)
    except SnapshotDamaged as error:
        log.warning("segments stay as they are: %s", error)
        return compaction.Rewritten(0, 0, False)


# -- compact ------------------------------------------------------------------------------------------------


def _under_half_alive(facts: SegmentFacts) -> bool:
    return 2 * facts.live < facts.rows


def compact(store: Store, *, duplicates: bool = False, small: bool = False, dry_run: bool = False) -> Compacted:
    """Rewrite the segments of which less than half the rows are alive. What they were is left for `gc`.

    duplicates: first drop what is stored more than once, because several writers computed it at the same time.
    small: make one of many small segments of a writer, too.
    Rows that do not agree with their checksums are left behind, and counted; segments that cannot be read stay as
    they are. Busy; StoreFull or StoreFenced when a write fails.
    """
    with _locked(store, dry_run):
        dropped = drop_duplicates(store, dry_run=dry_run) if duplicates else 0
        planned = _planned_groups(store, small)
        if dry_run:
            segments = sum(len(group.sources) for group in planned)
            rows, freed = sum(g.rows for g in planned), sum(g.bytes for g in planned)
            return Compacted(segments, rows, 0, freed, dry_run, dropped)
        segments = rows = damaged = freed = 0
        for group in planned:
            done = _rewritten(store, group)
            rows, damaged = rows + done.rows, damaged + done.damaged
            if done.replaced:
                segments, freed = segments + len(group.sources), freed + group.bytes
        return Compacted(segments, rows, damaged, freed, dry_run, dropped)


def _planned_groups(store: Store, small: bool) -> list[compaction.Group]:
    def wanted(facts: SegmentFacts) -> bool:
        return _under_half_alive(facts) or (small and 4 * facts.payload < compaction.SEGMENT_BYTES)

    found = compaction.groups(eviction.current(store.folder), wanted)
    return [one for one in found if len(one.sources) > 1 or _under_half_alive(one.sources[0])]


# -- gc -----------------------------------------------------------------------------------------------------


def gc(store: Store, grace_seconds: float = GRACE, *, dry_run: bool = False) -> Collected:
    """Remove what no reader needs any more, and has not needed for `grace_seconds`.

    That is: files in no manifest, which a killed writer left; manifests that have a successor, but for the newest
    one's predecessor; files that only such manifests name; temporary files. The advisory files of writers that have
    not written for that long become one. With a damaged manifest in the store nothing is removed, since what it names
    is not known. What a living process is writing stays whatever the grace is, where the file system has locks.
    """
    if not grace_seconds >= 0:
        raise ConfigError(f"the grace is a number of seconds from 0 on, got {grace_seconds}")
    with _locked(store, dry_run):
        found = garbage(store.folder, grace_seconds, grace_seconds)
        old = _old_writers(store, grace_seconds)
        if not dry_run:
            collection.remove(store.folder, list(found.sizes))
            if len(old) > 1:
                _fold(store, old)
        folded = len(old) if len(old) > 1 else 0
        return Collected(len(found.sizes), found.manifests, sum(found.sizes.values()), folded, found.blocked, dry_run)


def _old_writers(store: Store, grace: float) -> list[str]:
    """Writers, this one excepted, of whose advisory files none was written within the grace."""
    now = store.folder.now()
    changed: dict[str, float] = {}
    for name, (_, when) in store.folder.listing("stat").items():
        writer, _, ending = name.rpartition(".")
        if ending in {"json", "use", "runs"} and counting.WRITER.fullmatch(writer) and writer != store.writer:
            changed[writer] = max(changed.get(writer, 0), when)
    return sorted(writer for writer, when in changed.items() if now - when > grace)


def _fold(store: Store, writers: list[str]) -> None:
    try:
        counting.fold(store.folder, writers, uuid.uuid4().hex)
    except OSError as error:
        log.warning("the counters of %d writers were not made one: %s", len(writers), error)

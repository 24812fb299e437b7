"""Eviction of rows: find candidates, commit their removal, and make room for a commit under a byte budget."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmcache.indexes.commits.generations import generation_name, generations, newest
from llmcache.indexes.commits.publish import Publish
from llmcache.indexes.errors import Busy, SnapshotDamaged
from llmcache.indexes.eviction.dependents import holds_chains, previous_rows
from llmcache.indexes.eviction.garbage import disk_bytes, garbage, remove
from llmcache.indexes.eviction.policies import Terms, Usage, choose
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, Manifest, SegmentFacts
from llmcache.indexes.format.rows import ALIGN, ROW, Keys, Rows
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.segment_writer import write_alive
from llmcache.indexes.search.index_coverage import index_stands
from llmcache.indexes.stats.counters import use_files
from llmcache.indexes.stats.usage import UseTable, read_uses

log = logging.getLogger("llmcache")


GRACE = 3600.0
"""Seconds for which a file in no manifest is kept."""
_RESERVE = 0.02  # share of the budget that is not used
_AHEAD = 0.05  # share of the budget that an eviction frees beyond the need
_PATIENCE = 10.0  # seconds to wait for the maintainer lock


@dataclass(frozen=True, slots=True)
class Budget:
    """Byte budget of a store. max_bytes: limit for all its files together. policy: a name in policies.POLICIES."""

    max_bytes: int
    policy: str = "lru"
    terms: Terms = field(default_factory=Terms)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that could be evicted, with their usage.

    rows: numbers inside their segments, int64 [n]. places: namespace, bank and segment, by `usage.segment`.
    keys: uint64 [n, 2].
    """

    usage: Usage
    rows: Rows
    places: list[tuple[str, str, SegmentFacts]]
    keys: Keys


KEPT = ("fitted",)
"""Banks that are never evicted: they hold a few numbers of a calibration, which would be useless without them."""


def current(folder: Folder) -> Manifest:
    """Read the newest manifest; an empty one if nothing was ever committed."""
    listed = generations(folder)
    return newest(folder, listed)[0] if listed else Manifest()


def candidates(folder: Folder, manifest: Manifest) -> Candidates:
    """Collect the live rows of all readable segments with their usage, except those of the banks in `KEPT`."""
    uses = UseTable.of(read_uses(folder, use_files(folder)))
    places: list[tuple[str, str, SegmentFacts]] = []
    records, rows, extra_bytes, numbers = [np.zeros(0, ROW)], [np.zeros(0, np.int64)], [], []
    previous: list[Rows] = []
    for namespace, space in sorted(manifest.namespaces.items()):
        for name, bank in sorted(space.banks.items()):
            sources: list[str] = []
            first, before = len(records), sum(map(len, rows))
            for facts in bank.segments if name not in KEPT else ():
                try:
                    segment = Segment.open(folder, facts)
                    live = segment.live()
                    named = segment.sources(live) if holds_chains(name) else [""] * len(live)
                except (SnapshotDamaged, OSError) as error:
                    log.warning("segment %s cannot be read, so it is not evicted: %s", facts.id, error)
                    continue
                sources += named
                records.append(segment.rows[live])
                rows.append(live)
                extra_bytes.append(2 * bank.feature_width + (0 if segment.marks is None else segment.marks.itemsize))
                numbers.append(len(places))
                places.append((namespace, name, facts))
            if sources:
                places_before = previous_rows(np.concatenate(records[first:])["key"], sources)
                previous.append(np.where(places_before >= 0, places_before + before, -1))
    counts = [len(live_rows) for live_rows in rows[1:]]
    extra = np.repeat(np.array(extra_bytes, np.int64), counts)
    all_records = np.concatenate(records)
    usage = _usage(all_records, uses, extra, np.repeat(np.array(numbers, np.int64), counts))
    if any(holds_chains(name) for _, name, _ in places):
        usage = replace(usage, previous=np.concatenate(previous))
    return Candidates(usage, np.concatenate(rows), places, all_records["key"])


def _usage(records: Any, uses: UseTable, extra: Rows, segment: Rows) -> Usage:
    """Combine records of ROW with usage records. extra: bytes of the features and mark of each row, int64 [n]."""
    used = uses.find(records["key"])
    created = records["created"].astype(np.int64)
    aligned = -(-records["nbytes"].astype(np.int64) // ALIGN) * ALIGN
    return Usage(
        last_use=used["last"].astype(np.int64),
        uses=used["uses"].astype(np.int64),
        created=created,
        nbytes=aligned + ROW.itemsize + 4 * records["tokens"].astype(np.int64) + records["source"] + extra,
        cost=np.nan_to_num(records["cost"].astype(np.float64)),
        # ignore an audit of an earlier copy of the entry
        drift=np.where(used["last"] >= created, used["drift"].astype(np.float64), np.nan),
        segment=segment,
    )


def drop(folder: Folder, publish: Publish, found: Candidates, chosen: Rows) -> set[str]:
    """Commit the eviction of candidates. chosen: positions in `found`.

    Segments without live rows are dropped from the manifest. Returns their ids. OSError when a bitmap cannot be
    written; nothing is evicted then.
    """
    emptied: set[str] = set()
    if not len(chosen):
        return emptied
    with_bitmap: dict[str, tuple[SegmentFacts, SegmentFacts]] = {}
    id = uuid.uuid4().hex
    for number in np.unique(found.usage.segment[chosen]).tolist():
        facts = found.places[number][2]
        dead = found.rows[chosen[found.usage.segment[chosen] == number]]
        if len(dead) == facts.live:
            emptied.add(facts.id)
            continue
        alive = np.zeros(facts.rows, np.bool_)
        alive[found.rows[found.usage.segment == number]] = True
        alive[dead] = False
        with_bitmap[facts.id] = facts, write_alive(folder, facts, alive, id)
    if with_bitmap:
        folder.sync_folder("seg")

    def change(base: Manifest) -> Manifest:
        for namespace, name in sorted({place[:2] for place in found.places}):
            space = base.namespaces.get(namespace)
            facts = space.banks.get(name) if space else None
            if facts is not None and (new := _without(facts, emptied, with_bitmap)) != facts:
                base = base.with_bank(namespace, name, new)
        return base

    publish(change)
    return emptied


def _without(
    facts: BankFacts, emptied: set[str], with_bitmap: dict[str, tuple[SegmentFacts, SegmentFacts]]
) -> BankFacts:
    """Return the facts of a bank after an eviction. Segments that changed since the choice of rows stay as they are."""
    remaining = (segment for segment in facts.segments if segment.id not in emptied)
    segments = tuple(
        with_bitmap[segment.id][1] if segment.id in with_bitmap and segment == with_bitmap[segment.id][0] else segment
        for segment in remaining
    )
    new = replace(facts, segments=segments)
    return new if segments == facts.segments or index_stands(new) else replace(new, index=None, projection=None)


# -- the budget ---------------------------------------------------------------------------------------------


def free_bytes(folder: Folder, budget: Budget) -> int:
    """Return the bytes that may be added now, negative if the store is over its budget.

    A reserve of 2% of the budget, and at least three manifests, is not available: the eviction's own commit needs it.
    """
    return budget.max_bytes - _reserve_bytes(folder, budget) - disk_bytes(folder)


def _reserve_bytes(folder: Folder, budget: Budget) -> int:
    listed = generations(folder)
    size = folder.size(generation_name(listed[0])) if listed else 0
    return max(int(_RESERVE * budget.max_bytes), 3 * size + 8192)


def make_room(folder: Folder, publish: Publish, budget: Budget, nbytes: int, evicted: set[str]) -> int | None:
    """Evict whole segments until `nbytes` are free. Returns the free bytes, None if `nbytes` cannot fit.

    evicted: set to which the ids of evicted segments are added.
    Their files are removed at once: processes that have them open can still read them, others have misses.
    """
    free = free_bytes(folder, budget)
    if free < nbytes and not _make_free(folder, publish, budget, nbytes, evicted):
        return None
    return free_bytes(folder, budget)


def _make_free(folder: Folder, publish: Publish, budget: Budget, nbytes: int, evicted: set[str]) -> bool:
    tidy(folder)
    if garbage(folder, GRACE, 0).blocked:  # no file can be removed, so eviction would free nothing
        return False
    while (free := free_bytes(folder, budget)) < nbytes:
        rows_found = candidates(folder, current(folder))
        if free + int(rows_found.usage.nbytes.sum()) < nbytes or not len(rows_found.rows):
            return False
        ahead = min(int(_AHEAD * budget.max_bytes), int(rows_found.usage.nbytes.sum()) // 4)
        chosen = choose(rows_found.usage, nbytes - free + ahead, budget.policy, budget.terms, only_whole=True)
        evicted |= drop(folder, publish, rows_found, chosen)
        tidy(folder)
        if free_bytes(folder, budget) <= free:
            return False
    return True


def tidy(folder: Folder) -> None:
    """Remove superseded files at once, except the newest manifest and its predecessor with their files."""
    remove(folder, list(garbage(folder, GRACE, 0).sizes))


@contextmanager
def waiting_lock(folder: Folder) -> Iterator[None]:
    """Hold the maintainer lock inside the block. Waits up to 10 seconds for it, then raises Busy."""
    deadline = time.monotonic() + _PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder.lock())
                break
            except Busy:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)
        yield

"""Commits of a bank: write pending rows as a segment, or the index as a file, and publish a manifest that names it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TypeAlias

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.background import PendingSegment
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.presence import lost, missing, without
from llmcache.indexes.commits.publish import Publish, Republished
from llmcache.indexes.errors import LLMCacheError, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, Manifest, SegmentFacts
from llmcache.indexes.format.pending import FlushBatch
from llmcache.indexes.search.index_coverage import index_stands

log = logging.getLogger("llmcache")

Place: TypeAlias = tuple[str, str]  # names of a namespace and of a bank in it
_TRIES = 3  # attempts at a segment when its files or its commit are collected meanwhile


def commit_rows(
    folder: Folder,
    publish: Publish,
    writer: str,
    place: Place,
    bank: Bank,
    flush: FlushBatch,
    started: PendingSegment | None = None,
) -> None:
    """Write a batch of the bank as a segment, publish the segment, and read from it from then on.

    When files of the segment are missing after a manifest named them, the rows, which are still in memory, are written
    again, and the next manifest names the new segment in place of the missing one.

    publish: with `once`, since no second manifest may name the segment's files.
    started: the segment that the background writer is writing from this batch; None: write it here.
    OSError when the segment cannot be written. Collected after three attempts; the rows then stay in memory.
    """
    missing_ids: set[str] = set()  # ids of segments that were published and whose files are missing
    for attempt in range(_TRIES):
        with started.lease if started and not attempt else Lease(folder) as lease:
            try:
                written = started.written.result() if started and not attempt else bank.seal(lease.new(), flush)
                segment = replace(written, writer=writer)
                manifest = _published(folder, publish, place, bank.facts, segment, missing_ids)
                if name := lost(folder, [file.name for file in segment.files]):
                    missing_ids.add(segment.id)
                    raise Collected(_COLLECTED.format(folder.path, name))
                break
            except (Collected, Republished) as error:  # this process was suspended, or another evicted the commit
                if attempt == _TRIES - 1:
                    if missing_ids:
                        publish(lambda base: without(base, missing_ids))
                    raise
                log.info("a segment is written again: %s", error)
    namespace, name = place
    try:
        bank.sealed(manifest.namespaces[namespace].banks[name], segment, flush)
    except (SnapshotDamaged, OSError) as error:
        # the commit is valid; the rows stay pending and are committed once more, and a second copy is harmless
        log.warning("a segment that was just committed cannot be opened, so its rows are committed again: %s", error)


def _published(
    folder: Folder,
    publish: Publish,
    place: Place,
    new_facts: BankFacts,
    segment: SegmentFacts,
    missing_ids: Collection[str],
) -> Manifest:
    """Publish a segment in place of those in `missing_ids`. Returns the manifest. Collected when files are missing."""

    def change(base: Manifest) -> Manifest:
        facts = _bank_in(base, place, new_facts)
        if segment.id in {other.id for other in facts.segments}:
            return base
        if name := missing(folder, [file.name for file in segment.files]):
            raise Collected(_COLLECTED.format(folder.path, name))
        others = tuple(other for other in facts.segments if other.id not in missing_ids)
        return base.with_bank(*place, replace(facts, segments=(*others, segment)))

    return publish(change)


def commit_index(folder: Folder, publish: Publish, place: Place, bank: Bank, room: int | None) -> None:
    """Write the bank's projection and index and publish them, unless they take more than `room` bytes (None: no limit).

    OSError when they cannot be written.
    """
    with Lease(folder) as lease:
        _commit_index(folder, publish, place, bank, room, lease)


def _commit_index(folder: Folder, publish: Publish, place: Place, bank: Bank, room: int | None, lease: Lease) -> None:
    saved = bank.near.save(lease.new(), room)
    if saved is None:
        log.info("the index of %s is not saved, because it does not fit the budget", place[1])
        return
    projection, index = saved
    replaced: list[str] = []

    def change(base: Manifest) -> Manifest:
        facts = _bank_in(base, place, bank.facts)
        if facts.index == index:
            return base
        new = replace(facts, projection=projection, index=index)
        if not index_stands(new):
            replaced[:] = [projection.name, index.file.name]  # it has rows that were evicted or purged meanwhile
            return base
        replaced[:] = [old.name for old in (facts.projection, facts.index and facts.index.file) if old]
        return base.with_bank(*place, new)

    namespace, name = place
    bank.facts = publish(change).namespaces[namespace].banks[name]
    for old in replaced:  # a reader that finds them missing builds the index itself
        try:
            folder.remove(old)
        except OSError as error:
            log.info("%s was not removed: %s", old, error)


_COLLECTED = (
    "{}: {} was removed while it was being committed, by another program, or by a garbage collection on a file system "
    "without locks; commit again"
)


class Collected(LLMCacheError):
    """Commit whose files were removed before or just after it was published."""


def _bank_in(base: Manifest, place: Place, new_facts: BankFacts) -> BankFacts:
    namespace, name = place
    space = base.namespaces.get(namespace)
    if space is None:
        raise LLMCacheError(f"the namespace {namespace!r} was removed by another process; open the store again")
    return space.banks.get(name, replace(new_facts, segments=(), projection=None, index=None))

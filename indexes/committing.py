"""Commits of a bank: what is in memory becomes a segment, or an index file, that the next manifest names."""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeAlias

from llmcache.indexes.bank import Bank, Lot
from llmcache.indexes.errors import LLMCacheError, SnapshotDamaged
from llmcache.indexes.eviction import Publish, index_stands
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import BankFacts, Manifest, SegmentFacts
from llmcache.indexes.publishing import Republished

log = logging.getLogger("llmcache")

Place: TypeAlias = tuple[str, str]  # names of a namespace and of a bank in it
_TRIES = 3  # times a segment is written anew whose files, or whose commit, were collected


def commit_rows(
    folder: Folder,
    publish: Publish,
    writer: str,
    place: Place,
    bank: Bank,
    lot: Lot,
    begun: Future[SegmentFacts] | None = None,
) -> None:
    """Seal a lot of the bank, publish it and serve from it. OSError when it could not be written.

    publish: with `once`, since the segment's files must not be named by a second manifest.
    begun: the lot on its way into a segment, to wait for; None: it is written here.
    """
    for round in range(_TRIES):
        try:
            written = begun.result() if begun and not round else bank.seal(uuid.uuid4().hex, lot)
            segment = replace(written, writer=writer)
            manifest = _published(folder, publish, place, bank.facts, segment)
            break
        except (Collected, Republished):  # it slept, or others have evicted the commit since
            if round == _TRIES - 1:
                raise
    namespace, name = place
    try:
        bank.sealed(manifest.namespaces[namespace].banks[name], segment, lot)
    except (SnapshotDamaged, OSError) as error:
        # committed all the same. What is pending goes on serving, and is committed once more: a copy is harmless
        log.warning("what was just committed cannot be opened: %s", error)


def _published(folder: Folder, publish: Publish, place: Place, fresh: BankFacts, segment: SegmentFacts) -> Manifest:
    def change(base: Manifest) -> Manifest:
        facts = _bank_in(base, place, fresh)
        if segment.id in {one.id for one in facts.segments}:
            return base
        _check_files(folder, segment)
        return base.with_bank(*place, replace(facts, segments=(*facts.segments, segment)))

    return publish(change)


def commit_index(folder: Folder, publish: Publish, place: Place, bank: Bank, room: int | None) -> None:
    """Write the bank's projection and index, if they take no more than `room` bytes, and publish them.

    OSError when they could not be written.
    """
    saved = bank.near.save(uuid.uuid4().hex, room)
    if saved is None:
        log.info("the index of %s is not kept: the budget has no room for it", place[1])
        return
    projection, index = saved
    replaced: list[str] = []

    def change(base: Manifest) -> Manifest:
        facts = _bank_in(base, place, bank.facts)
        if facts.index == index:
            return base
        new = replace(facts, projection=projection, index=index)
        if not index_stands(new):
            replaced[:] = [projection.name, index.file.name]  # it has rows that were removed, or purged, meanwhile
            return base
        replaced[:] = [old.name for old in (facts.projection, facts.index and facts.index.file) if old]
        return base.with_bank(*place, new)

    namespace, name = place
    bank.facts = publish(change).namespaces[namespace].banks[name]
    for old in replaced:  # a reader that is about to open one of these builds its index itself
        try:
            folder.remove(old)
        except OSError as error:
            log.info("%s was not removed: %s", old, error)


def _check_files(folder: Folder, segment: SegmentFacts) -> None:
    """A process that was stopped between writing and publishing may find its files collected: never name those."""
    try:
        for file in segment.files:
            folder.size(file.name)
    except FileNotFoundError:
        raise Collected(
            f"{folder.path}: the files of this commit were collected before they were published, "
            "because this process was stopped for longer than the grace; commit again"
        ) from None


class Collected(LLMCacheError):
    """The files of a commit are gone."""


def _bank_in(base: Manifest, place: Place, fresh: BankFacts) -> BankFacts:
    namespace, name = place
    space = base.namespaces.get(namespace)
    if space is None:
        raise LLMCacheError(f"the namespace {namespace!r} was removed by another process; open the store again")
    return space.banks.get(name, replace(fresh, segments=(), projection=None, index=None))

"""Compaction: segments with many dead rows are written anew, without them.

Live rows of several segments become one new segment. Each is compared with its checksum on the way; what fails is
left behind. Everything else about a row comes along: key, tokens, source, features, cost, time, and its aliases.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits.publish import Publish
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.manifest import BankFacts, Manifest, SegmentFacts
from llmcache.indexes.format.rows import ALIAS
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.duplicates import drop_duplicates
from llmcache.indexes.maintenance.exclusive import locked
from llmcache.indexes.maintenance.rewrite import Pick
from llmcache.indexes.maintenance.rewrite import rewrite as write_anew
from llmcache.indexes.search.index_coverage import index_stands
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")

SEGMENT_BYTES = 256 << 20
"""Activations that go into one new segment, about."""


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of one bank that become one."""

    namespace: str
    bank: str
    sources: tuple[SegmentFacts, ...]

    @property
    def rows(self) -> int:
        """Live rows."""
        return sum(one.live for one in self.sources)

    @property
    def bytes(self) -> int:
        """What the sources take up on the disk."""
        return sum(file.size for one in self.sources for file in one.all_files)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """rows: copied. damaged: live rows that failed their checksums. replaced: False if somebody else came first."""

    rows: int
    damaged: int
    replaced: bool


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


def _under_half_alive(facts: SegmentFacts) -> bool:
    return 2 * facts.live < facts.rows


def compact(store: Store, *, duplicates: bool = False, small: bool = False, dry_run: bool = False) -> Compacted:
    """Rewrite the segments of which less than half the rows are alive. What they were is left for `gc`.

    duplicates: first drop what is stored more than once, because several writers computed it at the same time.
    small: make one of many small segments of a writer, too.
    Rows that do not agree with their checksums are left behind, and counted; segments that cannot be read stay as
    they are. Busy; StoreFull or StoreFenced when a write fails.
    """
    with locked(store, dry_run):
        dropped = drop_duplicates(store, dry_run=dry_run) if duplicates else 0
        planned = _planned_groups(store, small)
        if dry_run:
            segments = sum(len(group.sources) for group in planned)
            rows, freed = sum(g.rows for g in planned), sum(g.bytes for g in planned)
            return Compacted(segments, rows, 0, freed, dry_run, dropped)
        segments = rows = damaged = freed = 0
        for group in planned:
            done = rewritten(store, group)
            rows, damaged = rows + done.rows, damaged + done.damaged
            if done.replaced:
                segments, freed = segments + len(group.sources), freed + group.bytes
        return Compacted(segments, rows, damaged, freed, dry_run, dropped)


def _planned_groups(store: Store, small: bool) -> list[Group]:
    def wanted(facts: SegmentFacts) -> bool:
        return _under_half_alive(facts) or (small and 4 * facts.payload < SEGMENT_BYTES)

    found = groups(eviction.current(store.folder), wanted)
    return [one for one in found if len(one.sources) > 1 or _under_half_alive(one.sources[0])]


def groups(manifest: Manifest, wanted: Callable[[SegmentFacts], bool], most: int = SEGMENT_BYTES) -> list[Group]:
    """The segments that are wanted, bank by bank, in groups of about `most` bytes of live activations.

    A group is of one writer: all that one has stored can then still be told from the rest, and purged.
    """
    found = []
    for namespace, space in sorted(manifest.namespaces.items()):
        for name, bank in sorted(space.banks.items()):
            held: list[SegmentFacts] = []
            for facts in sorted(filter(wanted, bank.segments), key=lambda one: one.writer):
                if held and held[0].writer != facts.writer:
                    found.append(Group(namespace, name, tuple(held)))
                    held = []
                held.append(facts)
                if sum(one.payload * one.live // max(1, one.rows) for one in held) >= most:
                    found.append(Group(namespace, name, tuple(held)))
                    held = []
            if held:
                found.append(Group(namespace, name, tuple(held)))
    return found


def rewrite(folder: Folder, publish: Publish, manifest: Manifest, group: Group) -> Rewritten:
    """Write the group's live rows as one new segment, and commit it in the place of the group's first.

    SnapshotDamaged when a source cannot be opened, OSError when the new one cannot be written; nothing is changed
    then. A group that another process has changed in the meantime stays as that left it.
    """
    bank = manifest.namespaces[group.namespace].banks[group.bank]
    segments = [Segment.open(folder, facts) for facts in group.sources]
    chosen = [_intact(one) for one in segments]
    damaged = group.rows - sum(map(len, chosen))
    new = None
    if sum(map(len, chosen)):
        names = [_aliases(folder, bank, segments, chosen), *[np.zeros(0, ALIAS)] * (len(segments) - 1)]
        picks = [Pick(one, rows, some) for one, rows, some in zip(segments, chosen, names, strict=True)]
        new = write_anew(folder, uuid.uuid4().hex, picks, bank.feature_width)
    after = publish(lambda base: _replaced(base, group, new))
    now = {one.id for one in after.namespaces[group.namespace].banks[group.bank].segments}
    replaced = not any(one.id in now for one in group.sources)
    if new and new.id not in now:
        for file in new.files:
            folder.remove(file.name)
    return Rewritten(sum(map(len, chosen)) if replaced else 0, damaged, replaced)


def rewritten(store: Store, group: Group) -> Rewritten:
    try:
        return rewrite(store.folder, store.publish, eviction.current(store.folder), group)
    except SnapshotDamaged as error:
        log.warning("segments stay as they are: %s", error)
        return Rewritten(0, 0, False)


def _replaced(base: Manifest, group: Group, new: SegmentFacts | None) -> Manifest:
    space = base.namespaces.get(group.namespace)
    facts = space.banks.get(group.bank) if space else None
    if facts is None or not set(group.sources) <= set(facts.segments):
        return base
    segments = list(facts.segments)
    place = segments.index(group.sources[0])
    kept = [one for one in segments[:place] if one not in group.sources]
    rest = [one for one in segments[place:] if one not in group.sources]
    changed = replace(facts, segments=(*kept, *([new] if new else []), *rest))
    if not index_stands(changed):
        changed = replace(changed, index=None, projection=None)
    return base.with_bank(group.namespace, group.bank, changed)


def _intact(segment: Segment) -> NDArray[np.int64]:
    """Live rows whose bytes agree with their checksums."""
    live = segment.live()
    found = live[segment.whole(live)]
    if len(found) < len(live):
        log.warning("%d rows of segment %s are damaged, and left behind", len(live) - len(found), segment.facts.id)
    return found


def _aliases(
    folder: Folder, bank: BankFacts, sources: Sequence[Segment], chosen: Sequence[NDArray[np.int64]]
) -> NDArray[np.void]:
    """The sources' aliases that still lead somewhere, each text once: the newest of several is believed."""
    old = np.concatenate([np.zeros(0, ALIAS), *(one.aliases for one in sources)])
    if not len(old):
        return old
    mine = {one.facts.id for one in sources}
    keys = [one.rows["key"][rows] for one, rows in zip(sources, chosen, strict=True)]
    for facts in bank.segments:
        if facts.id not in mine:
            try:
                other = Segment.open(folder, facts)
            except (SnapshotDamaged, OSError):  # its rows are misses, so nothing leads there
                continue
            keys.append(other.rows["key"][other.live()])
    there = KeyTable()
    every = np.concatenate(keys)
    there.extend(every, np.arange(len(every)))
    old = old[there.find(old["row"]) >= 0][::-1]
    _, first = np.unique(old["text"], axis=0, return_index=True)
    return old[np.sort(first)][::-1]

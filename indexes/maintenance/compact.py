"""Compaction: rewrite segments with many dead rows without them, and join small segments.

The live rows of several segments become one new segment. Each row is checked against its checksum on the way, and
damaged rows are dropped. Everything else about a row is copied: key, tokens, source, features, cost, time, aliases.
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
"""Approximate bytes of activations in one new segment."""


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of one bank to rewrite as one segment."""

    namespace: str
    bank: str
    sources: tuple[SegmentFacts, ...]

    @property
    def rows(self) -> int:
        """Number of live rows."""
        return sum(segment.live for segment in self.sources)

    @property
    def bytes(self) -> int:
        """Bytes of the sources on the disk."""
        return sum(file.size for segment in self.sources for file in segment.all_files)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Result of rewriting a group. rows: copied. damaged: live rows that failed their checksums.

    replaced: False if another process changed the group first.
    """

    rows: int
    damaged: int
    replaced: bool


@dataclass(frozen=True, slots=True)
class Compacted:
    """Result of a compaction: segments rewritten, rows copied, damaged rows dropped, bytes that `gc` may now remove.

    duplicates: further copies of entries that were dropped before.
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
    """Rewrite the segments with less than half of their rows alive. The old files stay until `gc`.

    duplicates: first drop entries that are stored more than once, because several writers computed them at once.
    small: also join small segments of one writer.
    Rows that fail their checksums are dropped and counted. Segments that cannot be read stay as they are.
    Busy while another process maintains the store; StoreFull or StoreFenced when a write fails.
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
            done = try_rewrite(store, group)
            rows, damaged = rows + done.rows, damaged + done.damaged
            if done.replaced:
                segments, freed = segments + len(group.sources), freed + group.bytes
        return Compacted(segments, rows, damaged, freed, dry_run, dropped)


def _planned_groups(store: Store, small: bool) -> list[Group]:
    def wanted(facts: SegmentFacts) -> bool:
        return _under_half_alive(facts) or (small and 4 * facts.payload < SEGMENT_BYTES)

    candidates = groups(eviction.current(store.folder), wanted)
    return [group for group in candidates if len(group.sources) > 1 or _under_half_alive(group.sources[0])]


def groups(manifest: Manifest, wanted: Callable[[SegmentFacts], bool], most: int = SEGMENT_BYTES) -> list[Group]:
    """Group the segments for which `wanted` is true, bank by bank, into about `most` bytes of live activations each.

    A group has segments of one writer only, so that all rows of a writer can still be identified and purged.
    """
    result = []
    for namespace, space in sorted(manifest.namespaces.items()):
        for name, bank in sorted(space.banks.items()):
            collected: list[SegmentFacts] = []
            for facts in sorted(filter(wanted, bank.segments), key=lambda segment: segment.writer):
                if collected and collected[0].writer != facts.writer:
                    result.append(Group(namespace, name, tuple(collected)))
                    collected = []
                collected.append(facts)
                if sum(segment.payload * segment.live // max(1, segment.rows) for segment in collected) >= most:
                    result.append(Group(namespace, name, tuple(collected)))
                    collected = []
            if collected:
                result.append(Group(namespace, name, tuple(collected)))
    return result


def rewrite(folder: Folder, publish: Publish, manifest: Manifest, group: Group) -> Rewritten:
    """Write the group's live rows as one new segment, and commit it in the place of the group's first segment.

    A group that another process changed meanwhile stays as it is then. SnapshotDamaged when a source cannot be opened,
    OSError when the new segment cannot be written; nothing has changed then.
    """
    bank = manifest.namespaces[group.namespace].banks[group.bank]
    segments = [Segment.open(folder, facts) for facts in group.sources]
    chosen = [_intact(segment) for segment in segments]
    damaged = group.rows - sum(map(len, chosen))
    new = None
    if sum(map(len, chosen)):
        alias_lists = [_aliases(folder, bank, segments, chosen), *[np.zeros(0, ALIAS)] * (len(segments) - 1)]
        picks = [
            Pick(segment, rows, aliases) for segment, rows, aliases in zip(segments, chosen, alias_lists, strict=True)
        ]
        new = write_anew(folder, uuid.uuid4().hex, picks, bank.feature_width)
    after = publish(lambda base: _with_replacement(base, group, new))
    current_ids = {segment_now.id for segment_now in after.namespaces[group.namespace].banks[group.bank].segments}
    replaced = not any(source.id in current_ids for source in group.sources)
    if new and new.id not in current_ids:
        for file in new.files:
            folder.remove(file.name)
    return Rewritten(sum(map(len, chosen)) if replaced else 0, damaged, replaced)


def try_rewrite(store: Store, group: Group) -> Rewritten:
    """Rewrite a group as `rewrite`. A group with damage is logged and stays as it is."""
    try:
        return rewrite(store.folder, store.publish, eviction.current(store.folder), group)
    except SnapshotDamaged as error:
        log.warning("segments stay as they are: %s", error)
        return Rewritten(0, 0, False)


def _with_replacement(base: Manifest, group: Group, new: SegmentFacts | None) -> Manifest:
    space = base.namespaces.get(group.namespace)
    facts = space.banks.get(group.bank) if space else None
    if facts is None or not set(group.sources) <= set(facts.segments):
        return base
    segments = list(facts.segments)
    place = segments.index(group.sources[0])
    earlier = [segment for segment in segments[:place] if segment not in group.sources]
    later = [segment for segment in segments[place:] if segment not in group.sources]
    changed = replace(facts, segments=(*earlier, *([new] if new else []), *later))
    if not index_stands(changed):
        changed = replace(changed, index=None, projection=None)
    return base.with_bank(group.namespace, group.bank, changed)


def _intact(segment: Segment) -> NDArray[np.int64]:
    """Return the live rows that match their checksums, int64, in order."""
    live = segment.live()
    intact = live[segment.whole(live)]
    if len(intact) < len(live):
        log.warning("%d rows of segment %s are damaged and dropped", len(live) - len(intact), segment.facts.id)
    return intact


def _aliases(
    folder: Folder, bank: BankFacts, sources: Sequence[Segment], chosen: Sequence[NDArray[np.int64]]
) -> NDArray[np.void]:
    """Return the sources' aliases whose row still exists in the bank, the newest of each text key; records of ALIAS."""
    aliases = np.concatenate([np.zeros(0, ALIAS), *(segment.aliases for segment in sources)])
    if not len(aliases):
        return aliases
    own_ids = {segment.facts.id for segment in sources}
    keys = [segment.rows["key"][rows] for segment, rows in zip(sources, chosen, strict=True)]
    for facts in bank.segments:
        if facts.id not in own_ids:
            try:
                other = Segment.open(folder, facts)
            except (SnapshotDamaged, OSError):  # its rows are misses, so their aliases are useless
                continue
            keys.append(other.rows["key"][other.live()])
    row_table = KeyTable()
    all_keys = np.concatenate(keys)
    row_table.extend(all_keys, np.arange(len(all_keys)))
    aliases = aliases[row_table.find(aliases["row"]) >= 0][::-1]
    _, first = np.unique(aliases["text"], axis=0, return_index=True)
    return aliases[np.sort(first)][::-1]

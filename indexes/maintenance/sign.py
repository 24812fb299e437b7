"""Signing of a whole store: give its rows checksums that cannot be forged, and its manifest a signature."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.publish import fencing
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.format.manifest import BankFacts, Manifest, NamespaceFacts, SegmentFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.rewrite import readable, rewrite
from llmcache.indexes.store import Store


@dataclass(slots=True)
class Signed:
    """Result of signing. segments: rewritten. damaged: entries that could not be read and are dropped."""

    segments: int = 0
    damaged: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def sign(store: Store, *, dry_run: bool = False) -> Signed:
    """Rewrite all segments without unforgeable checksums, and commit a signed manifest that names the new segments.

    store: of trust "own", opened with a key. The old files stay until garbage collection.
    StoreFenced or StoreFull when a write fails; the store is then unchanged.
    """
    result = Signed()
    replaced: dict[str, SegmentFacts | None] = {}
    with fencing(), Lease(store.folder) as lease:
        for space in store.latest().namespaces.values():
            for bank in space.banks.values():
                for facts in bank.segments:
                    _strengthen(store, facts, replaced, result, lease, dry_run=dry_run)
        if not dry_run:
            store.publish(lambda base: _with_copies(base, replaced))
    return result


def _strengthen(
    store: Store,
    facts: SegmentFacts,
    replaced: dict[str, SegmentFacts | None],
    result: Signed,
    lease: Lease,
    *,
    dry_run: bool,
) -> None:
    try:
        segment = Segment.open(store.folder, facts)
    except SnapshotDamaged:
        result.damaged += facts.live
        replaced[facts.id] = None
        return
    if segment.strong:
        return
    result.segments += 1
    if dry_run:
        return
    pick = readable(segment, segment.living(), np.ones(len(segment.aliases), np.bool_))
    copy = rewrite(store.folder, lease.new(), [pick], segment.feature_width, strong=True)
    result.damaged += facts.live - copy.rows
    replaced[facts.id] = copy


def _with_copies(base: Manifest, replaced: dict[str, SegmentFacts | None]) -> Manifest:
    def space(facts: NamespaceFacts) -> NamespaceFacts:
        return replace(facts, banks={name: bank(bank_facts) for name, bank_facts in facts.banks.items()})

    def bank(facts: BankFacts) -> BankFacts:
        segments = tuple(new for segment in facts.segments if (new := replaced.get(segment.id, segment)) is not None)
        if segments == facts.segments:
            return facts
        return replace(facts, segments=segments, projection=None, index=None)  # the index covers segments by their ids

    return replace(base, namespaces={name: space(space_facts) for name, space_facts in base.namespaces.items()})

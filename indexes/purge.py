"""Purging: entries leave the store with everything that could still hold them, at once.

Rows are copied, without those that go, into new segments; a manifest names these; then every other generation and every
file that the new manifest does not name is removed: old segments, indexes and projections, bitmaps, files of commits
that never ended, and what a repair put aside. Stop the writers before: what they have not committed is removed too.
"""

from __future__ import annotations

import logging
import re
import uuid
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.eviction import waiting_lock
from llmcache.indexes.generations import generation_name, generations
from llmcache.indexes.manifest import BankFacts, Manifest, SegmentFacts
from llmcache.indexes.places import QUARANTINE
from llmcache.indexes.publishing import fencing
from llmcache.indexes.records import Keys
from llmcache.indexes.rewrite import readable, rewrite
from llmcache.indexes.segment import Segment
from llmcache.indexes.signatures import signatures
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")

Replaced: TypeAlias = dict[str, SegmentFacts | None]  # by the old segment's id: the new one, None where nothing is left
Mask: TypeAlias = NDArray[np.bool_]

_OURS = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{32})?\.[a-z]{1,8}|t-.*")


@dataclass(frozen=True, slots=True)
class Doomed:
    """What is to go: a whole namespace; or all that a writer sealed, or all that keys lead to, there or everywhere.

    keys: uint64 [n, 2], of rows or of texts.
    """

    namespace: str | None = None
    writer: str | None = None
    keys: Keys | None = None

    def __post_init__(self) -> None:
        if self.writer == "" or (self.namespace is None and self.writer is None and self.keys is None):
            raise ConfigError("say what to purge: a namespace, a writer, or keys")

    @property
    def whole(self) -> str | None:
        """The namespace that goes as a whole, if one does."""
        return self.namespace if self.writer is None and self.keys is None else None


@dataclass(slots=True)
class Purged:
    """What a purge removed, or would remove.

    rows: entries, among them evicted ones whose bytes were still there. aliases: other names of entries. damaged: rows
    that had to be copied and could not be read, which are gone too. segments: copied or dropped. files, bytes: off the
    disk, with all old generations. written: bytes of the copies.
    """

    rows: int = 0
    aliases: int = 0
    damaged: int = 0
    segments: int = 0
    files: int = 0
    bytes: int = 0
    written: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def purge(store: Store, doomed: Doomed, *, dry_run: bool = False) -> Purged:
    """Remove entries and every file that could hold them. The store lets its open banks go, with what is pending.

    A writer may commit meanwhile, so it is looked again until the newest manifest has nothing of it.
    ConfigError: no such namespace. StoreFenced or StoreFull when the disk fails: what was to go may then still be
    there, and all that was to stay is. Busy: another process evicts, compacts or collects.
    """
    with fencing(), nullcontext() if dry_run else waiting_lock(store.folder):
        return _purged(store, doomed, dry_run=dry_run)


def _purged(store: Store, doomed: Doomed, *, dry_run: bool) -> Purged:
    if doomed.namespace is not None and doomed.namespace not in store.latest().namespaces:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {doomed.namespace!r}; it has {known}")
    purged, before = Purged(), store.latest()
    if dry_run:
        leaving = _replaced(store, before, doomed, purged, dry_run=True)
        _sweep(store, doomed, purged, before.generation, leaving, dry_run=True)
        return purged
    store.let_go()  # or closing the store would write down which rows it has used
    store.publish(lambda base: base)  # raises why nothing may be written, before anything is; every base below is ours
    while replaced := _replaced(store, store.manifest, doomed, purged, dry_run=False):
        _change(store, replaced, doomed.whole)
    if doomed.whole is not None and doomed.whole in store.manifest.namespaces:  # it had no segments
        _change(store, {}, doomed.whole)
    _sweep(store, doomed, purged, before.generation, {}, dry_run=False)
    return purged


def _change(store: Store, replaced: Replaced, whole: str | None) -> None:
    store.publish(lambda base: _without(base, replaced, whole))


def _without(base: Manifest, replaced: Replaced, whole: str | None) -> Manifest:
    """The manifest with segments replaced, and without one namespace."""
    spaces = {
        name: replace(space, banks={layer: _bank_without(bank, replaced) for layer, bank in space.banks.items()})
        for name, space in base.namespaces.items()
        if name != whole
    }
    return replace(base, namespaces=spaces)


def _bank_without(bank: BankFacts, replaced: Replaced) -> BankFacts:
    segments = tuple(new for one in bank.segments if (new := replaced.get(one.id, one)) is not None)
    covered = {name.partition("-")[0] for name in bank.index.segments} if bank.index else set()
    if segments == bank.segments and covered <= {one.id for one in segments}:
        return bank
    # fingerprints give documents away as activations do, and a PCA is made of them
    return replace(bank, segments=segments, projection=None, index=None)


# -- what goes ----------------------------------------------------------------------------------------------


def _replaced(store: Store, manifest: Manifest, doomed: Doomed, purged: Purged, *, dry_run: bool) -> Replaced:
    """What has to take the place of which segments of this manifest, written already unless it is a dry run."""
    replaced: Replaced = {}
    for name, space in manifest.namespaces.items():
        if doomed.namespace in {None, name}:
            for bank in space.banks.values():
                replaced |= _replaced_in(store, bank, doomed, purged, dry_run=dry_run)
    return replaced


def _replaced_in(store: Store, bank: BankFacts, doomed: Doomed, purged: Purged, *, dry_run: bool) -> Replaced:
    dropped = [one for one in bank.segments if doomed.whole is not None or one.writer == doomed.writer]
    for facts in dropped:
        _count(purged, facts.rows, facts.aliases)
    replaced: Replaced = dict.fromkeys((one.id for one in dropped), None)
    if doomed.keys is None:
        return replaced
    segments = []
    for facts in bank.segments:
        if facts.id in replaced:
            continue
        try:
            segments.append(Segment.open(store.folder, facts))
        except (SnapshotDamaged, FileNotFoundError) as error:  # what the disk does not give now may be whole
            log.warning("segment %s goes too, since nobody can tell what is in it: %s", facts.id, error)
            _count(purged, 0, 0)
            purged.damaged += facts.rows
            replaced[facts.id] = None
    rows = _row_keys(segments, doomed.keys)
    for segment in segments:
        going, names = among(segment.rows["key"], rows), among(segment.aliases["row"], rows)
        if going.any() or names.any():
            _count(purged, int(going.sum()), int(names.sum()))
            staying = segment.living() & ~going
            replaced[segment.facts.id] = None if dry_run else _copied(store, segment, staying, ~names, purged)
    return replaced


def _count(purged: Purged, rows: int, aliases: int) -> None:
    purged.segments, purged.rows, purged.aliases = purged.segments + 1, purged.rows + rows, purged.aliases + aliases


def _row_keys(segments: list[Segment], keys: Keys) -> Keys:
    """Keys of the rows that these keys lead to, as keys of rows or of texts. An alias may be in another segment."""
    led = [segment.aliases["row"][among(segment.aliases["text"], keys)] for segment in segments]
    return np.concatenate([keys, *led])


def among(keys: Keys, wanted: Keys) -> Mask:
    """Which of these keys are among the others. Both uint64 [n, 2]; returns bool [n]."""
    found = np.isin(keys[:, 0], wanted[:, 0])
    known = {one.tobytes() for one in np.ascontiguousarray(wanted)}
    places = np.flatnonzero(found)
    found[places] = [keys[i].tobytes() in known for i in places.tolist()]
    return found


# -- copying ------------------------------------------------------------------------------------------------


def _copied(store: Store, old: Segment, rows: Mask, aliases: Mask, purged: Purged) -> SegmentFacts | None:
    """A new segment with these rows and aliases of an old one; None where there are none."""
    if not rows.any() and not aliases.any():
        return None
    facts = rewrite(
        store.folder, uuid.uuid4().hex, [readable(old, rows, aliases)], old.feature_width, strong=store.signs
    )
    purged.damaged += int(rows.sum()) - facts.rows
    purged.written += sum(file.size for file in facts.files)
    return facts


# -- sweeping -----------------------------------------------------------------------------------------------


def _sweep(store: Store, doomed: Doomed, purged: Purged, before: int, leaving: Replaced, *, dry_run: bool) -> None:
    """Remove all files that the newest manifest does not need.

    before: generation at which the purge began; its own steps since are not counted. leaving: what a dry run would
    have replaced.
    """
    folder = store.folder
    own = f"{doomed.writer}.json"
    listed = {sub: folder.names(sub) for sub in ("seg", "idx", QUARANTINE)}  # before the manifest: later files are new
    older, signed = generations(folder), signatures(folder)
    manifest = store.latest()
    needed = _without(manifest, leaving, doomed.whole).files
    strangers = [f"{sub}/{name}" for sub in ("seg", "idx") for name in listed[sub] if not _OURS.fullmatch(name)]
    if strangers:
        log.warning("%d files that are not the store's own were left, the first is %s", len(strangers), strangers[0])
    going = [f"{sub}/{name}" for sub, names in listed.items() for name in names]
    going = [name for name in going if name not in needed and name not in strangers]
    passed = {name: one for name, one in signed.items() if one != manifest.generation}
    passed |= {generation_name(one): one for one in older if one != manifest.generation}
    going += passed
    # records of use list the keys of rows; nothing but the choice of what to evict depends on them
    listing = (".use", ".runs") if doomed.whole is not None else (".use",)  # records of runs name corpora, not entries
    going += [f"stat/{name}" for name in folder.names("stat") if name.endswith(listing) or name == own]
    for name in going:
        if passed.get(name, 0) <= before:
            purged.bytes += folder.size(name)
            purged.files += 1
        if not dry_run:
            folder.remove(name)
    for sub in () if dry_run else ("", *(sub for sub, names in listed.items() if names)):
        folder.sync_folder(sub)  # a power loss must not bring them back

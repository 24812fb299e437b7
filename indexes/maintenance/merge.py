"""Merge of the stores of many workers into one store, without a model and without duplicates."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.create import found
from llmcache.indexes.commits.generations import generations, newest
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.presence import lost, without
from llmcache.indexes.errors import LLMCacheError, ModelMismatch, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.new_folder import new_folder
from llmcache.indexes.format.manifest import BankFacts, FileFacts, Manifest, NamespaceFacts, SegmentFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.write_once import sync_files
from llmcache.indexes.maintenance.mergeable import check_same, same_identity
from llmcache.indexes.maintenance.rewrite import Pick, rewrite
from llmcache.indexes.maintenance.snapshot import advised, banks, check_free, failing
from llmcache.indexes.maintenance.transfer import carry, carry_segment, files_of, living
from llmcache.indexes.store import Store

_ROUNDS = 20  # attempts of a merge when files are removed meanwhile
_REWRITE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Merged:
    """Result of a merge for one bank. entries: added. duplicates: skipped, since the target has them already.

    whole: segments linked or copied unchanged. rewritten: new segments, with the new rows of other segments.
    """

    namespace: str
    bank: str
    entries: int
    duplicates: int
    whole: int
    rewritten: int


@dataclass(slots=True)
class _SourceSegment:
    """One source segment. living: its live rows. rows, aliases: those to take over; all bool."""

    segment: Segment
    living: NDArray[np.bool_]
    rows: NDArray[np.bool_]
    aliases: NDArray[np.bool_]
    fixed: bool  # belongs to the target

    @property
    def whole(self) -> bool:
        return bool(self.rows.any() and (self.rows == self.living).all())


@dataclass(slots=True)
class _Plan:
    """Plan for one bank of the result. stores: one list of pieces per store, the target's first."""

    namespace: str
    bank: str
    space: NamespaceFacts
    facts: BankFacts
    stores: list[list[_SourceSegment]] = field(default_factory=list)

    @property
    def pieces(self) -> list[_SourceSegment]:
        return [piece for pieces in self.stores for piece in pieces if not piece.fixed]


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    copy: bool = False,
    dry_run: bool = False,
) -> list[Merged]:
    """Add the entries of all sources to `target`, a new folder or an existing store. Needs no model.

    Rows whose key the target already has are skipped, unless the target's copy is damaged. Segments without such rows
    are hard-linked (copied with `copy`, or on another file system). The new rows of other segments are rewritten.
    ModelMismatch when a namespace belongs to different models, SnapshotDamaged when a file of a source is damaged,
    StoreFull or LLMCacheError when the target cannot be written; nothing has changed then.
    """
    where = Path(target)
    if not (where / "FORMAT").exists():
        check_free(where)
    with failing(where), ExitStack() as stack:
        base = stack.enter_context(closing(Store.open(where, uses=False))) if (where / "FORMAT").exists() else None
        stores = [stack.enter_context(closing(Store.open(path, uses=False))) for path in sources]
        return join(base, stores, lambda: new_folder(where), copy=copy, dry_run=dry_run)


def join(
    base: Store | None,
    stores: Sequence[Store],
    new: Callable[[], AbstractContextManager[Folder]],
    *,
    copy: bool = False,
    dry_run: bool = False,
) -> list[Merged]:
    """Merge open stores into the store `base`, or, if that is None, into the folder that `new` makes. See `merge`."""
    check_same([*([base] if base else []), *stores])
    for attempt in range(_ROUNDS):
        try:
            return _join(base, stores, new, copy=copy, dry_run=dry_run)
        except publishing.Republished:
            if base is None or attempt == _ROUNDS - 1:
                raise
            base.reload()  # the number was reused while this process was suspended; the new files were removed again
        except SnapshotDamaged:  # damaged, or collected after the store was opened: then a newer generation is intact
            opened = [*([base] if base else []), *stores]
            before = [store.manifest.generation for store in opened]
            if [store.reload().generation for store in opened] == before or attempt == _ROUNDS - 1:
                raise
    raise AssertionError("the last round returns or raises")


def _join(
    base: Store | None,
    stores: Sequence[Store],
    new: Callable[[], AbstractContextManager[Folder]],
    *,
    copy: bool,
    dry_run: bool,
) -> list[Merged]:
    plans = [_plan(place, base, stores) for place in _places(stores)]
    if dry_run:
        pass
    elif base is None:
        with new() as folder, Lease(folder) as lease:
            found(folder)
            _write_and_commit(folder, plans, stores, lease, link=not copy, derived=True)
    else:
        with Lease(base.folder) as lease:
            _write_and_commit(base.folder, plans, stores, lease, link=not copy, derived=False)
    return [_result_of(plan) for plan in plans]


def _places(stores: Sequence[Store]) -> list[tuple[str, str]]:
    return sorted({place for store in stores for place in banks(store.manifest)})


# -- planning -----------------------------------------------------------------------------------------------


def _plan(place: tuple[str, str], base: Store | None, stores: Sequence[Store]) -> _Plan:
    holders = [store for store in ([base] if base else []) + list(stores) if place in banks(store.manifest)]
    facts = banks(holders[0].manifest)[place]
    plan = _Plan(*place, holders[0].manifest.namespaces[place[0]], facts)
    for store in holders:
        plan.stores.append([_piece(store, segment, store is base) for segment in banks(store.manifest)[place].segments])
    _choose_rows(plan)
    _choose_aliases(plan)
    return plan


def _piece(store: Store, facts: SegmentFacts, fixed: bool) -> _SourceSegment:
    try:
        segment = Segment.open(store.folder, facts)
        alive = living(store.folder, facts)
    except SnapshotDamaged as error:
        raise advised(error, store.folder) from error
    except FileNotFoundError as error:
        raise advised(SnapshotDamaged(f"{error.filename} is missing"), store.folder) from error
    return _SourceSegment(
        segment, alive, np.zeros(len(segment), np.bool_), np.zeros(len(segment.aliases), np.bool_), fixed
    )


def _choose_rows(plan: _Plan) -> None:
    """Choose the first intact copy of each key: the target's, then source by source, in each the newest first."""
    order = [piece for pieces in plan.stores for piece in reversed(pieces)]
    if not order:
        return
    alive = [np.flatnonzero(piece.living)[::-1] for piece in order]
    piece_of = np.repeat(np.arange(len(order)), [len(rows) for rows in alive])
    row_of = np.concatenate(alive)
    keys = np.concatenate([piece.segment.rows["key"][rows] for piece, rows in zip(order, alive, strict=True)])
    by_key, fresh = _sorted(keys)
    # of the target's own copies only the newest counts, since readers use no other
    own = np.array([piece.fixed for piece in order])[piece_of[by_key]]
    kept = fresh | ~own | ~np.roll(own, 1)
    by_key, fresh = by_key[kept], fresh[kept]
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(fresh)) - 1
    place = first.copy()
    doubtful = np.flatnonzero(last > first)
    while len(doubtful):
        at = by_key[place[doubtful]]
        doubtful = doubtful[~_intact(order, piece_of[at], row_of[at])]
        place[doubtful] += 1
        none = doubtful[place[doubtful] > last[doubtful]]  # no copy is intact: keep the first, as without this merge
        place[none] = first[none]
        doubtful = np.setdiff1d(doubtful, none)
    chosen = by_key[place]
    for i, piece in enumerate(order):
        piece.rows[row_of[chosen[piece_of[chosen] == i]]] = True


def _sorted(table: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort so that equal rows are adjacent, earlier ones first. Returns the order, and where in it new values start."""
    order = np.argsort(table[:, 0], kind="stable")
    fresh = _first_of_equal(table, order)
    same = table[order[1:], 0] == table[order[:-1], 0]
    if (fresh[1:] & same).any():  # equal in the first column only: a collision of 1 in 2^64, or one text with two rows
        order = np.lexsort(table.T[::-1])
        fresh = _first_of_equal(table, order)
    return order, fresh


def _first_of_equal(table: NDArray[np.uint64], order: NDArray[np.int64]) -> NDArray[np.bool_]:
    fresh = np.ones(len(table), np.bool_)
    fresh[1:] = (table[order[1:]] != table[order[:-1]]).any(axis=1)
    return fresh


def _intact(order: Sequence[_SourceSegment], pieces: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of these rows match their checksums, bool [n]."""
    good = np.zeros(len(rows), np.bool_)
    for i in np.unique(pieces).tolist():
        positions = np.flatnonzero(pieces == i)
        good[positions] = order[i].segment.whole(rows[positions])
    return good


def _choose_aliases(plan: _Plan) -> None:
    """Choose the first of equal aliases."""
    pieces = [piece for pieces in plan.stores for piece in pieces]
    pairs = [piece.segment.aliases.view("<u8").reshape(-1, 4) for piece in pieces]
    table = np.concatenate([np.zeros((0, 4), np.uint64), *pairs])
    order, fresh = _sorted(table)
    chosen = np.zeros(len(table), np.bool_)
    chosen[order[fresh]] = True
    ends = np.cumsum([len(part) for part in pairs])
    for piece, part in zip(pieces, np.split(chosen, ends[:-1]) if pieces else (), strict=True):
        piece.aliases = part


# -- writing ------------------------------------------------------------------------------------------------


def _write_and_commit(
    folder: Folder, plans: Sequence[_Plan], stores: Sequence[Store], lease: Lease, *, link: bool, derived: bool
) -> None:
    """Write the planned segments and commit them. After an error before the commit no new file remains."""
    made: list[str] = []
    committing = False
    try:
        added = [(plan, _segments(folder, plan, made, lease, link=link)) for plan in plans]
        indexes = (
            {id(plan): _index(folder, plan, segments, stores, link) for plan, segments in added} if derived else {}
        )
        derived_files = [file.name for facts in indexes.values() if facts for file in _derived(facts)]
        sync_files(folder, [*made, *derived_files])
        folder.sync_folder("seg")
        folder.sync_folder("idx")
        spaces = {name: space for store in reversed(stores) for name, space in store.manifest.namespaces.items()}

        def change(base: Manifest) -> Manifest:
            return _with_segments(base, spaces, [(plan, segments, indexes.get(id(plan))) for plan, segments in added])

        listed = generations(folder)
        now = newest(folder, listed)[0] if listed else Manifest()
        if derived or change(now) != now:
            committing = True
            publishing.commit(folder, uuid.uuid4().hex, change, once=True)
            if name := lost(folder, made):
                publishing.commit(folder, uuid.uuid4().hex, lambda now: without(now, {path[4:36] for path in made}))
                raise LLMCacheError(f"{folder.path}: another program removed {name} during the merge; merge again")
    except BaseException:
        if not (committing and _was_published(folder, made)):
            for name in made:
                folder.remove(name)
        raise


def _was_published(folder: Folder, made: Sequence[str]) -> bool:
    """Return whether the newest manifest names these files, as when only the last sync of a commit failed."""
    try:
        listed = generations(folder)
        named = {file.name for file in files_of(newest(folder, listed)[0])} if listed else set()
    except (OSError, LLMCacheError):
        return True
    return not named.isdisjoint(made)


def _segments(folder: Folder, plan: _Plan, made: list[str], lease: Lease, *, link: bool) -> list[SegmentFacts]:
    segments: list[SegmentFacts] = []
    taken = {name.partition(".")[0].partition("-")[0] for name in folder.names("seg")}
    for piece in plan.pieces:
        if piece.whole:
            old = piece.segment.facts
            id = uuid.uuid4().hex if old.id in taken else old.id
            taken.add(id)
            lease.add(id)
            try:
                facts, _ = carry_segment(piece.segment.folder, folder, old, id, link=link)
            except SnapshotDamaged as error:
                raise advised(error, piece.segment.folder) from error
            segments.append(facts)
            made += [file.name for file in files_of(facts)]
    for picks in _batches(plan.pieces):
        try:
            facts = rewrite(folder, lease.new(), picks, plan.facts.feature_width)
        except SnapshotDamaged as error:
            raise advised(error, picks[0].segment.folder) from error
        segments.append(facts)
        made += [file.name for file in files_of(facts)]
    return segments


def _batches(pieces: Sequence[_SourceSegment]) -> Iterator[list[Pick]]:
    """Yield the new rows of segments that are not taken over whole, in batches of 256 MiB, each of one writer."""
    batch: list[Pick] = []
    for piece in sorted(pieces, key=lambda piece: piece.segment.facts.writer):
        if piece.whole or not (piece.rows.any() or piece.aliases.any()):
            continue
        if batch and batch[0].segment.facts.writer != piece.segment.facts.writer:
            yield batch
            batch = []
        batch.append(Pick(piece.segment, np.flatnonzero(piece.rows), piece.segment.aliases[piece.aliases]))
        if sum(pick.payload for pick in batch) >= _REWRITE_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _index(
    folder: Folder, plan: _Plan, segments: Sequence[SegmentFacts], stores: Sequence[Store], link: bool
) -> BankFacts | None:
    """Carry the index files of the first source whose index covers only segments taken over. Returns its facts."""
    ids = {facts.id for facts in segments}
    for store in stores:
        facts = banks(store.manifest).get((plan.namespace, plan.bank))
        if facts and facts.index and facts.projection and ids.issuperset(facts.index.segments):
            for file in _derived(facts):
                carry(store.folder, folder, file, file.name, link=link)
            return facts
    return None


def _derived(facts: BankFacts) -> list[FileFacts]:
    return list(files_of((facts.projection, facts.index)))


def _with_segments(
    base: Manifest,
    spaces: Mapping[str, NamespaceFacts],
    added: Sequence[tuple[_Plan, list[SegmentFacts], BankFacts | None]],
) -> Manifest:
    new = base
    for name, space in spaces.items():
        if name not in new.namespaces:
            new = replace(new, namespaces={**new.namespaces, name: replace(space, banks={})})
        elif not same_identity(new.namespaces[name], space):
            raise ModelMismatch(f"the namespace {name!r} was replaced by one of another model meanwhile; merge again")
    for plan, segments, index in added:
        empty = replace(plan.facts, segments=(), projection=None, index=None)
        if index:
            empty = replace(empty, projection=index.projection, index=index.index)
        facts = new.namespaces[plan.namespace].banks.get(plan.bank, empty)
        known_ids = {segment.id for segment in facts.segments}  # the change must be idempotent
        new_segments = [segment for segment in segments if segment.id not in known_ids]
        new = new.with_bank(plan.namespace, plan.bank, replace(facts, segments=(*facts.segments, *new_segments)))
    return new


def _result_of(plan: _Plan) -> Merged:
    pieces = plan.pieces
    entries = sum(int(piece.rows.sum()) for piece in pieces)
    living_rows = sum(int(piece.living.sum()) for piece in pieces)
    whole = sum(piece.whole for piece in pieces)
    return Merged(plan.namespace, plan.bank, entries, living_rows - entries, whole, sum(1 for _ in _batches(pieces)))

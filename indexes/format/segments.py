"""Segment list of a bank: its rows in sealed segments and in pending batches, and tombstones of evicted segments."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format import codec
from llmcache.indexes.format.manifest import BankFacts, SegmentFacts
from llmcache.indexes.format.marks import Marks, kinds_of, put_marks, unmarked
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.format.segment import Segment, Tombstone
from llmcache.indexes.format.segment_writer import PendingRows

log = logging.getLogger("llmcache")

Piece: TypeAlias = Segment | PendingRows | Tombstone


class SegmentList:
    """List of segments, pending batches and tombstones ("pieces"), in the order of their rows.

    Rows are numbered from 0, piece after piece. Iterating yields the pieces.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._become(pieces)

    def _become(self, pieces: Iterable[Piece]) -> None:
        self._pieces = list(pieces)
        self._starts = np.cumsum([0, *map(len, self._pieces)])

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    @property
    def rows(self) -> int:
        """Number of rows of all pieces, including evicted ones."""
        return int(self._starts[-1])

    @property
    def pending(self) -> list[PendingRows]:
        """Pending batches, in order."""
        return [piece for piece in self._pieces if isinstance(piece, PendingRows)]

    def runs(self) -> list[list[PendingRows]]:
        """Group the pending batches into runs of consecutive row numbers; dropped batches leave gaps."""
        runs: list[list[PendingRows]] = []
        for before, piece in zip([None, *self._pieces], self._pieces, strict=False):
            if isinstance(piece, PendingRows):
                if not isinstance(before, PendingRows):
                    runs.append([])
                runs[-1].append(piece)
        return runs

    def placed(self) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces, each with the number of its first row."""
        return zip(self._pieces, self._starts.tolist(), strict=False)

    # -- changing -------------------------------------------------------------------------------------------

    def append(self, entries: PendingRows) -> Rows:
        """Append rows. Returns their numbers."""
        first = self.rows
        self._pieces.append(entries)
        self._starts = np.append(self._starts, first + len(entries))
        return np.arange(first, first + len(entries))

    def seal(self, segment: Segment, run: Sequence[PendingRows]) -> None:
        """Replace a run of pending batches by the segment that holds their rows."""
        first = next((n for n, piece in enumerate(self._pieces) if run and piece is run[0]), len(self._pieces))
        self._become([*self._pieces[:first], segment, *self._pieces[first + len(run) :]])

    def drop_pending(self, after: int = 0) -> int:
        """Drop the pending batches except the first `after`. Returns the number of rows dropped.

        Their numbers are not used again.
        """
        dropped = set(map(id, self.pending[after:]))
        rows = sum(map(len, self.pending[after:]))
        self._pieces = [Tombstone(len(piece)) if id(piece) in dropped else piece for piece in self._pieces]
        return rows

    def forget(self, facts: BankFacts, evicted: Container[str]) -> bool:
        """Drop the segments with ids in `evicted`, and rows that are dead in `facts`. Returns whether any changed."""
        newer, changed = {segment.id: segment for segment in facts.segments}, False
        for place, piece in enumerate(self._pieces):
            if not isinstance(piece, Segment):
                continue
            now = newer.get(piece.facts.id)
            if piece.facts.id in evicted:
                self._pieces[place], changed = Tombstone(len(piece)), True
            if now is None or piece.facts.alive == now.alive:
                continue
            changed = True
            try:
                piece.mark_deleted(now)
            except (SnapshotDamaged, OSError) as error:
                log.warning("segment %s is left out: %s", piece.facts.id, error)
                self._pieces[place] = Tombstone(len(piece))
        return changed

    def follow(self, segments: Iterable[Segment]) -> Rows:
        """Replace the segments; pending batches follow them. Returns new numbers of old rows, int64, -1: dropped."""
        old, rows = list(self.placed()), self.rows
        self._become([*segments, *self.pending])
        places = {_identity(piece): start for piece, start in self.placed()}
        moved = np.full(rows, -1, np.int64)
        for piece, start in old:
            if _identity(piece) in places:
                moved[start : start + len(piece)] = places[_identity(piece)] + np.arange(len(piece))
        return moved

    # -- rows -----------------------------------------------------------------------------------------------

    def at(self, row: int) -> tuple[Piece, int]:
        """Return the piece of a row, and the row's number in it."""
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._pieces[place], row - int(self._starts[place])

    def groups(self, rows: Rows) -> Iterator[tuple[Piece, Rows, Rows]]:
        """Group rows by piece. Yields each piece, positions in `rows` of its rows, and their numbers in the piece."""
        if len(self._pieces) == 1 and len(rows):
            yield self._pieces[0], np.arange(len(rows)), rows
            return
        places = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(places, kind="stable")  # one sort, since there may be hundreds of pending batches
        placed = places[order]
        ends = [*np.flatnonzero(np.diff(placed)) + 1, len(rows)] if len(rows) else []
        start = 0
        for end in ends:
            chosen, place = order[start:end], placed[start]
            yield self._pieces[place], chosen, rows[chosen] - self._starts[place]
            start = end

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Return the token ids of a row, int32 [tokens]; empty when they cannot be read."""
        piece, local = self.at(row)
        if isinstance(piece, PendingRows):
            return piece.tokens[local]
        if isinstance(piece, Tombstone):
            return np.zeros(0, np.int32)
        try:
            return piece.tokens(local)
        except (SnapshotDamaged, OSError) as error:
            log.warning("%s: its rows are found by text only", error)
            return np.zeros(0, np.int32)

    def tokens_of(self, rows: Rows) -> list[NDArray[np.int32]]:
        """Return `tokens` of each row."""
        tokens: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(rows)
        for piece, chosen, local in self.groups(rows):
            try:
                read = piece.tokens_of(local) if isinstance(piece, Segment) else None
            except (SnapshotDamaged, OSError):  # most rows may still be readable one by one
                read = None
            for i, place in enumerate(chosen.tolist()):
                tokens[place] = self.tokens(int(rows[place])) if read is None else read[i]
        return tokens

    def source(self, row: int) -> str:
        """Return the id of the document that a row was computed from; empty when it cannot be read."""
        return self._source(*self.at(row))

    def _source(self, piece: Piece, local: int) -> str:
        if isinstance(piece, PendingRows):
            return piece.sources[local]
        if isinstance(piece, Tombstone):
            return ""
        try:
            return piece.source(local)
        except (SnapshotDamaged, OSError) as error:
            log.warning("%s: the sources of its rows are not known", error)
            return ""

    def sources(self, rows: Rows) -> list[str]:
        """Return `source` of each row."""
        names = [""] * len(rows)
        for piece, chosen, local in self.groups(rows):
            for place, source in zip(chosen.tolist(), self._sources(piece, local), strict=True):
                names[place] = source
        return names

    def _sources(self, piece: Piece, local: Rows) -> list[str]:
        if isinstance(piece, Tombstone):
            return [""] * len(local)
        if isinstance(piece, PendingRows):
            return [piece.sources[i] for i in local.tolist()]
        try:
            return piece.sources(local)
        except (SnapshotDamaged, OSError):  # most rows may still be readable one by one
            return [self._source(piece, i) for i in local.tolist()]

    def keys(self, rows: Rows) -> NDArray[np.uint64]:
        """Return the keys of rows, uint64 [n, 2]; zeros for rows of evicted segments."""
        keys = np.zeros((len(rows), 2), np.uint64)
        for piece, chosen, local in self.groups(rows):
            if not isinstance(piece, Tombstone):
                keys[chosen] = (piece.keys if isinstance(piece, PendingRows) else piece.rows["key"])[local]
        return keys

    def created(self, rows: Rows) -> Rows:
        """Return when rows were put, int64 [n], seconds since the epoch; 0 for rows of evicted segments."""
        times = np.zeros(len(rows), np.int64)
        for piece, chosen, local in self.groups(rows):
            if isinstance(piece, PendingRows):
                times[chosen] = 0 if piece.created is None else piece.created[local]
            elif not isinstance(piece, Tombstone):
                times[chosen] = piece.rows["created"][local]
        return times

    def marks(self, rows: Rows) -> Marks:
        """Return the marks of rows, [n], with as many kinds as the piece with most; zeros for rows without marks."""
        parts = []
        for piece, chosen, local in self.groups(rows):
            if (known := marks_in(piece)) is not None:
                parts.append((chosen, known[local]))
        marks_found = unmarked(len(rows), max((kinds_of(marks) for _, marks in parts), default=0))
        for chosen, marks in parts:
            put_marks(marks_found, chosen, marks)
        return marks_found

    def key(self, row: int) -> str:
        """Return the key of a row in hexadecimal; empty if its segment was evicted."""
        piece, local = self.at(row)
        if isinstance(piece, Tombstone):
            return ""
        keys = piece.keys if isinstance(piece, PendingRows) else piece.rows["key"]
        return bytes(keys[local].tobytes()).hex()

    def cost(self, rows: Rows) -> float:
        """Return the seconds that the model took to compute these rows."""
        total = 0.0
        for piece, _, local in self.groups(rows):
            if isinstance(piece, Tombstone):
                continue
            cost = piece.cost if isinstance(piece, PendingRows) else piece.rows["cost"]
            total += float(cost[local].sum())
        return total


def marks_in(piece: Piece) -> Marks | None:
    """Return the marks of the rows of a piece; None if they have none."""
    return None if isinstance(piece, Tombstone) else piece.marks


def _identity(piece: Piece) -> str | int:
    return piece.facts.id if isinstance(piece, Segment) else id(piece)


def opened(
    folder: Folder, facts: BankFacts, known: Mapping[SegmentFacts, Segment], trust: str
) -> tuple[list[Segment], int]:
    """Open the segments of a bank, reusing `known` ones. Returns them, and the number that could not be opened.

    A segment that cannot be opened is logged as a warning, and its entries are misses.
    """
    segments, lost = [], 0
    for one in facts.segments:
        try:
            segments.append(known.get(one) or _checked_for(Segment.open(folder, one), facts, trust))
        except (SnapshotDamaged, OSError) as error:
            lost += 1
            log.warning("segment %s is left out, its %d entries are misses: %s", one.id, one.rows, error)
    return segments, lost


def _checked_for(segment: Segment, facts: BankFacts, trust: str) -> Segment:
    """Check a segment against its bank and return it.

    SnapshotDamaged when its rows cannot be of this bank, or when it lacks the checksums that a signed store needs.
    """
    unit = facts.width * codec.DTYPES[facts.dtype]
    sizes = segment.rows["nbytes"]
    odd = not unit or bool((sizes != unit if facts.rank == 1 else sizes % unit).any())
    if odd or segment.feature_width != facts.feature_width:
        raise SnapshotDamaged("its rows do not have the size of its bank's rows")
    if trust == "signed" and not segment.strong:
        raise SnapshotDamaged(
            "it was written without a key, so the signature does not cover its rows; `llmcache sign` rewrites it"
        )
    return segment

"""Segments: sealed, memory-mapped files of activations with all that is needed to find and trust them.

One segment is five files with one id (docs/format.md):

    .seg  activations, row after row, each at a multiple of 64 bytes
    .row  a header and one fixed-width record per row: key, checksum, where the bytes are; behind the records the marks
          of the rows, which say what near matches they may answer
    .key  pairs (text key, row key): other names under which a row is found
    .var  token ids and source id of each row
    .fp   the raw features that fingerprints are made of, float16 [rows, width]

Rows that were evicted stay in their segment, marked in a sixth file, until the segment is compacted:

    .alive  a bitmap, little bit order: 1 where the row is alive
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.sealed_file import Sealed
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.format.marks import Marks, kinds_in, mark_type
from llmcache.indexes.format.rows import (
    ALIAS,
    HEADER,
    MAGIC,
    ROW,
    STRONG,
    agree,
    portions,
)
from llmcache.indexes.format.write_once import verified

_NEAR = 512 << 10  # bytes that are copied and then compared: no more than a processor's own cache holds


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The place of a segment that was evicted while its bank was open: nobody else gets its row numbers."""

    rows: int

    def __len__(self) -> int:
        return self.rows


@dataclass(slots=True)
class Segment:
    """A sealed segment, opened. `rows` and `aliases` are verified; the larger files when they are first needed."""

    facts: SegmentFacts
    folder: Folder
    rows: NDArray[Any]  # records of ROW
    aliases: NDArray[Any]  # records of ALIAS
    pitch: int
    feature_width: int
    data: Sealed  # the activations
    _mapped: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    alive: NDArray[np.bool_] | None = None  # bool [rows]; None while all are
    marks: Marks | None = None  # of the rows; None where they have none

    @classmethod
    def open(cls, folder: Folder, facts: SegmentFacts) -> Segment:
        """SnapshotDamaged when a file is missing, has another size, or differs from its sha256."""
        raw_rows, pitch, feature_width, marks = _row_file(folder, facts)
        aliases = verified(folder, facts.file("key"))
        if aliases.nbytes != facts.aliases * ALIAS.itemsize:
            raise SnapshotDamaged(f"{facts.file('key').name} does not hold the {facts.aliases} aliases of its manifest")
        payload = facts.file("seg")
        try:
            data = folder.sealed(payload.name, payload.size)
        except FileNotFoundError:
            raise SnapshotDamaged(f"{payload.name} is missing") from None
        if pitch and (pitch * len(raw_rows) != payload.size or (raw_rows["nbytes"] != raw_rows["nbytes"][:1]).any()):
            raise SnapshotDamaged(f"{facts.file('row').name} says that all rows are equally long, and they are not")
        sizes = raw_rows["nbytes"].astype(np.uint64)
        if int(sizes.sum()) != facts.payload or facts.payload > payload.size:  # rows on top of each other
            raise SnapshotDamaged(f"{facts.file('row').name} has rows that do not fill {payload.name}")
        alive = _alive(folder, facts)
        named = aliases.view(ALIAS)
        return cls(facts, folder, raw_rows, named, pitch, feature_width, data, alive=alive, marks=marks)

    def __len__(self) -> int:
        return len(self.rows)

    def mark_deleted(self, facts: SegmentFacts) -> None:
        """Take over the bitmap of newer facts of the same segment; SnapshotDamaged when it cannot be read."""
        self.facts, self.alive = facts, _alive(self.folder, facts)

    def live(self) -> NDArray[np.int64]:
        """Numbers of the rows that were not evicted."""
        return np.arange(len(self.rows)) if self.alive is None else np.flatnonzero(self.alive)

    def living(self) -> NDArray[np.bool_]:
        """Which rows were not evicted; bool [rows]."""
        return np.ones(len(self.rows), np.bool_) if self.alive is None else self.alive

    @property
    def strong(self) -> bool:
        """Whether every row's checksum holds against forgery."""
        return bool((self.rows["flags"] & STRONG).all())

    def _file(self, kind: str) -> NDArray[np.uint8]:
        if kind not in self._mapped:
            self._mapped[kind] = verified(self.folder, self.facts.file(kind))
        return self._mapped[kind]

    def payload(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
        """Stored bytes of some rows: a copy, uint8 [n, bytes], where all rows are equally long, else one array each."""
        if self.pitch and len(rows):
            return self.data.table(rows, self.pitch, int(self.rows["nbytes"][rows[0]]))
        return self.views(rows)

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Stored bytes of some rows, one array each: a view of a mapped file, or a copy."""
        return [self.data.part(int(one["offset"]), int(one["nbytes"])) for one in self.rows[rows]]

    def intact(
        self, rows: NDArray[np.int64], payload: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Which of these rows' bytes, as `payload` gave them, agree with their checksums; bool [n]."""
        return np.array(agree(self.rows[rows], payload), np.bool_)

    def whole(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows agree with their checksums, reading a few at a time; bool [n]."""
        good, order = np.zeros(len(rows), np.bool_), np.argsort(rows, kind="stable")
        for part in portions(self.rows["nbytes"][rows[order]]):
            some = order[part]
            good[some] = self.intact(rows[some], self.payload(rows[some]))
        return good

    def fetch(self, rows: NDArray[np.int64], into: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[bool]:
        """Copy rows that are all equally long to where `into` has a place for each; which agree with their checksums.

        `into`: uint8 [n, bytes], or one array [bytes] per row. A few rows at a time are copied and at once compared,
        while they are near the processor. What does not agree is left there and is not to be used.
        """
        good: list[bool] = []
        records = self.rows[rows]
        if not self.pitch:  # each where its record says
            for record, place in zip(records, into, strict=True):
                place[:] = self.data.part(int(record["offset"]), int(record["nbytes"]))
            return agree(records, into)
        step = max(1, _NEAR // self.pitch)
        for start in range(0, len(rows), step):
            parts = into[start : start + step]
            self.data.fill(rows[start : start + step], self.pitch, parts)
            good += agree(records[start : start + step], parts)
        return good

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of one row. SnapshotDamaged when they are not where the row says."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} has token ids beyond the end of {self.facts.file('var').name}")
        return data[start:end].view("<i4")

    def tokens_of(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """`tokens` of each of some rows, in one go. SnapshotDamaged when those of one are not where its row says."""
        records, data = self.rows[rows], self._file("var")
        starts = records["var"].astype(np.int64)
        ends = starts + 4 * records["tokens"].astype(np.int64)
        lost = (records["var"] > data.nbytes) | (ends > data.nbytes)
        if lost.any():
            raise SnapshotDamaged(
                f"row {rows[lost.argmax()]} has token ids beyond the end of {self.facts.file('var').name}"
            )
        return [data[start:end].view("<i4") for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def variable(self, row: int) -> bytes:
        """Token ids and source id of one row, as they are stored. SnapshotDamaged when they are not there."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"]) + int(record["source"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} ends beyond the end of {self.facts.file('var').name}")
        return data[start:end].tobytes()

    def source(self, row: int) -> str:
        """Id of the document that made the row. SnapshotDamaged when it is not where the row says."""
        return self.variable(row)[4 * int(self.rows[row]["tokens"]) :].decode("utf-8", "replace")

    def sources(self, rows: NDArray[np.int64]) -> list[str]:
        """`source` of each of some rows, read in one go. SnapshotDamaged when one is not where its row says."""
        records, data = self.rows[rows], self._file("var")
        starts = records["var"].astype(np.int64) + 4 * records["tokens"].astype(np.int64)
        ends = starts + records["source"]
        lost = (records["var"] > data.nbytes) | (ends > data.nbytes)
        if lost.any():
            raise SnapshotDamaged(f"row {rows[lost.argmax()]} ends beyond the end of {self.facts.file('var').name}")
        held = data.data
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        return [str(held[start:end], "utf-8", "replace") for start, end in places]

    def features(self) -> NDArray[np.float16]:
        """float16 [rows, feature width], a view of the file."""
        stored = self._file("fp")
        if stored.nbytes != 2 * len(self.rows) * self.feature_width:
            raise SnapshotDamaged(
                f"{self.facts.file('fp').name} has {stored.nbytes:,} bytes, which is not float16 "
                f"[{len(self.rows)}, {self.feature_width}]"
            )
        return stored.view("<f2").reshape(len(self.rows), self.feature_width)


def records_of(folder: Folder, facts: SegmentFacts) -> tuple[NDArray[Any], int, int]:
    """Records of ROW, pitch and feature width of a segment; SnapshotDamaged when its .row is not what it should be."""
    return _row_file(folder, facts)[:3]


def marks_of(folder: Folder, facts: SegmentFacts) -> Marks | None:
    """Marks of the rows of a segment, None where they have none; SnapshotDamaged as `records_of`."""
    return _row_file(folder, facts)[3]


def mark_bytes(folder: Folder, name: str) -> int:
    """Bytes of the mark of each row as the header of a .row file says, unchecked; 0 where the rows have none."""
    header = np.zeros(HEADER.itemsize, np.uint8)
    descriptor, _ = folder.open(name)
    try:
        folder.read_at(descriptor, header, 0)
    finally:
        folder.close_file(descriptor)
    return int(header.view(HEADER)[0]["mark"])


def _row_file(folder: Folder, facts: SegmentFacts) -> tuple[NDArray[Any], int, int, Marks | None]:
    """Read a .row file: records of ROW, pitch, feature width, and the marks of the rows."""
    raw = verified(folder, facts.file("row"))
    if raw.nbytes < HEADER.itemsize:
        raise SnapshotDamaged(f"{facts.file('row').name} is shorter than its header")
    header = raw[: HEADER.itemsize].view(HEADER)[0]
    mark, end = int(header["mark"]), HEADER.itemsize + facts.rows * ROW.itemsize
    if (
        header["magic"] != MAGIC
        or header["record"] != ROW.itemsize
        or int(header["rows"]) != facts.rows
        or raw.nbytes != end + facts.rows * mark
    ):
        raise SnapshotDamaged(f"{facts.file('row').name} has a header that does not fit its manifest")
    rows = raw[HEADER.itemsize : end].view(ROW)
    marks = raw[end:].view(mark_type(kinds_in(mark, facts.file("row").name))) if mark else None
    return rows, int(header["pitch"]), int(header["feature_width"]), marks


def _alive(folder: Folder, facts: SegmentFacts) -> NDArray[np.bool_] | None:
    """The segment's bitmap. A damaged one is damage of the segment: it could give an evicted row back."""
    if facts.alive is None:
        return None
    raw = verified(folder, facts.alive)
    bits = np.unpackbits(raw, bitorder="little")
    if len(raw) != -(-facts.rows // 8) or bits[facts.rows :].any() or int(bits.sum()) != facts.live:
        raise SnapshotDamaged(f"{facts.alive.name} does not have {facts.live} of {facts.rows} rows alive")
    return bits[: facts.rows].astype(np.bool_)

"""Segments: sealed, memory-mapped files of activations, with the data needed to find and verify them.

One segment is five files with one id (docs/format.md):

    .seg  activations, row after row, each at a multiple of 64 bytes
    .row  a header and one fixed-width record per row: key, checksum, offsets; then the marks of the rows, which tell
          the near matches they may answer
    .key  aliases, pairs (text key, row key) under which a row is also found
    .var  token ids and source id of each row
    .fp   raw features that fingerprints are computed from, float16 [rows, width]

Evicted rows stay in their segment until it is compacted; a sixth file marks them:

    .alive  a bitmap, little bit order: 1 for live rows
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
from llmcache.indexes.format.rows import ALIAS, HEADER, MAGIC, ROW, STRONG, agree, portions
from llmcache.indexes.format.write_once import verified

_NEAR = 512 << 10  # bytes that are copied and then verified, chosen to fit a core's cache


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Placeholder of a segment that was evicted while its bank was open: its row numbers are not used again."""

    rows: int

    def __len__(self) -> int:
        return self.rows


@dataclass(slots=True)
class Segment:
    """Open segment. `rows` and `aliases` are verified at opening, the larger files when they are first read.

    pitch: bytes from one row to the next if all rows have the same size, else 0.
    """

    facts: SegmentFacts
    folder: Folder
    rows: NDArray[Any]  # records of ROW
    aliases: NDArray[Any]  # records of ALIAS
    pitch: int
    feature_width: int
    data: Sealed  # the activations
    _mapped: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    alive: NDArray[np.bool_] | None = None  # bool [rows]; None if no row was evicted
    marks: Marks | None = None  # of the rows; None if they have none

    @classmethod
    def open(cls, folder: Folder, facts: SegmentFacts) -> Segment:
        """Open a segment. SnapshotDamaged when a file is missing, has another size, or differs from its sha256."""
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
            raise SnapshotDamaged(f"{facts.file('row').name} claims that all rows have the same size, and they do not")
        sizes = raw_rows["nbytes"].astype(np.uint64)
        if int(sizes.sum()) != facts.payload or facts.payload > payload.size:  # overlapping rows
            raise SnapshotDamaged(f"{facts.file('row').name} has rows that do not fill {payload.name}")
        alive = _alive(folder, facts)
        named = aliases.view(ALIAS)
        return cls(facts, folder, raw_rows, named, pitch, feature_width, data, alive=alive, marks=marks)

    def __len__(self) -> int:
        return len(self.rows)

    def mark_deleted(self, facts: SegmentFacts) -> None:
        """Load the bitmap of newer facts of the same segment. SnapshotDamaged when it cannot be read."""
        self.facts, self.alive = facts, _alive(self.folder, facts)

    def live(self) -> NDArray[np.int64]:
        """Return the numbers of live rows, int64, in order."""
        return np.arange(len(self.rows)) if self.alive is None else np.flatnonzero(self.alive)

    def living(self) -> NDArray[np.bool_]:
        """Return which rows are live, bool [rows]."""
        return np.ones(len(self.rows), np.bool_) if self.alive is None else self.alive

    @property
    def strong(self) -> bool:
        """Return whether all rows have checksums that cannot be forged."""
        return bool((self.rows["flags"] & STRONG).all())

    def _file(self, kind: str) -> NDArray[np.uint8]:
        if kind not in self._mapped:
            self._mapped[kind] = verified(self.folder, self.facts.file(kind))
        return self._mapped[kind]

    def payload(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
        """Read the stored bytes of rows: a copy, uint8 [n, bytes], if all have the same size, else one array each."""
        if self.pitch and len(rows):
            return self.data.table(rows, self.pitch, int(self.rows["nbytes"][rows[0]]))
        return self.views(rows)

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read the stored bytes of rows, one array each: a view of a mapped file, or a copy."""
        return [self.data.part(int(record["offset"]), int(record["nbytes"])) for record in self.rows[rows]]

    def intact(
        self, rows: NDArray[np.int64], payload: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Return which rows match their checksums, bool [n]. payload: their bytes, as `payload` returned them."""
        return np.array(agree(self.rows[rows], payload), np.bool_)

    def whole(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Read rows a few at a time. Returns which match their checksums, bool [n]."""
        good, order = np.zeros(len(rows), np.bool_), np.argsort(rows, kind="stable")
        for part in portions(self.rows["nbytes"][rows[order]]):
            chosen = order[part]
            good[chosen] = self.intact(rows[chosen], self.payload(rows[chosen]))
        return good

    def fetch(self, rows: NDArray[np.int64], into: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[bool]:
        """Copy rows of equal size into `into`, and verify them. Returns which rows match their checksums.

        into: uint8 [n, bytes], or one array [bytes] per row. A few rows at a time are copied and verified, while they
        are in the cache. Rows that do not match are left in `into` and must not be used.
        """
        good: list[bool] = []
        records = self.rows[rows]
        if not self.pitch:
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
        """Read the token ids of one row, int32 [tokens]. SnapshotDamaged when they exceed the file."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} has token ids beyond the end of {self.facts.file('var').name}")
        return data[start:end].view("<i4")

    def tokens_of(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Read `tokens` of each row in one pass. SnapshotDamaged when those of any row exceed the file."""
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
        """Read token ids and source id of one row as stored. SnapshotDamaged when they exceed the file."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"]) + int(record["source"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} ends beyond the end of {self.facts.file('var').name}")
        return data[start:end].tobytes()

    def source(self, row: int) -> str:
        """Read the id of the document that a row was computed from. SnapshotDamaged when it exceeds the file."""
        return self.variable(row)[4 * int(self.rows[row]["tokens"]) :].decode("utf-8", "replace")

    def sources(self, rows: NDArray[np.int64]) -> list[str]:
        """Read `source` of each row in one pass. SnapshotDamaged when that of any row exceeds the file."""
        records, data = self.rows[rows], self._file("var")
        starts = records["var"].astype(np.int64) + 4 * records["tokens"].astype(np.int64)
        ends = starts + records["source"]
        lost = (records["var"] > data.nbytes) | (ends > data.nbytes)
        if lost.any():
            raise SnapshotDamaged(f"row {rows[lost.argmax()]} ends beyond the end of {self.facts.file('var').name}")
        content = data.data
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        return [str(content[start:end], "utf-8", "replace") for start, end in places]

    def features(self) -> NDArray[np.float16]:
        """Return a view of the raw features, float16 [rows, feature width]. SnapshotDamaged for another file size."""
        stored = self._file("fp")
        if stored.nbytes != 2 * len(self.rows) * self.feature_width:
            raise SnapshotDamaged(
                f"{self.facts.file('fp').name} has {stored.nbytes:,} bytes, which is not float16 "
                f"[{len(self.rows)}, {self.feature_width}]"
            )
        return stored.view("<f2").reshape(len(self.rows), self.feature_width)


def records_of(folder: Folder, facts: SegmentFacts) -> tuple[NDArray[Any], int, int]:
    """Read the records of ROW, the pitch and the feature width of a segment. SnapshotDamaged when .row is invalid."""
    return _row_file(folder, facts)[:3]


def marks_of(folder: Folder, facts: SegmentFacts) -> Marks | None:
    """Read the marks of the rows of a segment; None if they have none. SnapshotDamaged when .row is invalid."""
    return _row_file(folder, facts)[3]


def mark_bytes(folder: Folder, name: str) -> int:
    """Read the size of a row's mark in bytes from the header of a .row file, unchecked; 0 if rows have no marks."""
    header = np.zeros(HEADER.itemsize, np.uint8)
    descriptor, _ = folder.open(name)
    try:
        folder.read_at(descriptor, header, 0)
    finally:
        folder.close_file(descriptor)
    return int(header.view(HEADER)[0]["mark"])


def _row_file(folder: Folder, facts: SegmentFacts) -> tuple[NDArray[Any], int, int, Marks | None]:
    """Read a .row file. Returns records of ROW, pitch, feature width, and the marks of the rows."""
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
    """Read the bitmap of live rows. SnapshotDamaged when it is damaged, since evicted rows could come back."""
    if facts.alive is None:
        return None
    raw = verified(folder, facts.alive)
    bits = np.unpackbits(raw, bitorder="little")
    if len(raw) != -(-facts.rows // 8) or bits[facts.rows :].any() or int(bits.sum()) != facts.live:
        raise SnapshotDamaged(f"{facts.alive.name} does not have {facts.live} of {facts.rows} rows alive")
    return bits[: facts.rows].astype(np.bool_)

"""Usage of rows, how often and when they were read: counters in memory, and advisory records in the store's folder.

`stat/<writer>.use` has fixed-width records, one per row that its writer has read. A lost record makes the choice of
rows to evict worse, but loses no entry: no reader needs the records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.format.segment import Tombstone
from llmcache.indexes.format.segment_writer import PendingRows
from llmcache.indexes.format.segments import SegmentList
from llmcache.indexes.format.write_once import write_whole

USE = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("last", "<u4"),  # seconds since the epoch
        ("uses", "<u4"),
        ("drift", "<f4"),  # NaN: never audited
    ]
)
_LIMIT = 1 << 30
_MOST = np.iinfo(np.uint32).max


class UsageCounter:
    """Usage counters of one bank since it was opened, one per row.

    last: seconds since the epoch, uint32. uses: uint32. drift: of the last audit, float32, NaN if never audited.
    """

    def __init__(self, rows: int) -> None:
        self.last = np.zeros(rows, np.uint32)
        self.uses = np.zeros(rows, np.uint32)
        self.drift = np.full(rows, np.nan, np.float32)

    def grow(self, rows: int) -> None:
        """Grow the arrays to at least this many rows."""
        if rows > len(self.uses):
            more = max(rows, 2 * len(self.uses)) - len(self.uses)
            zeros = np.zeros(more, np.uint32)
            self.last, self.uses = (np.concatenate([counts, zeros]) for counts in (self.last, self.uses))
            self.drift = np.concatenate([self.drift, np.full(more, np.nan, np.float32)])

    def moved(self, places: NDArray[np.int64], rows: int) -> UsageCounter:
        """Return the counters under new row numbers. places: new row of each old row, int64, -1: dropped."""
        counter, present = UsageCounter(rows), places >= 0
        for name in ("last", "uses", "drift"):
            getattr(counter, name)[places[present]] = getattr(self, name)[: len(places)][present]
        return counter

    def count(self, rows: NDArray[np.int64], now: int) -> None:
        """Count one use of each of these rows; a row that occurs twice in `rows` counts once. now: seconds."""
        self.uses[rows] += 1
        self.last[rows] = now

    def touched(self) -> NDArray[np.int64]:
        """Return the rows that were used or audited, in order."""
        return np.flatnonzero((self.uses > 0) | ~np.isnan(self.drift))

    def records(self, rows: NDArray[np.int64], keys: Keys) -> NDArray[np.void]:
        """Return records of USE for these rows. keys: of the rows, uint64 [n, 2]."""
        records = np.zeros(len(rows), USE)
        records["key"], records["last"] = keys, self.last[rows]
        records["uses"], records["drift"] = self.uses[rows], self.drift[rows]
        return records


@dataclass(frozen=True, slots=True)
class UseTable:
    """Usage records of all writers, one per key."""

    records: NDArray[np.void]
    _places: KeyTable

    @classmethod
    def of(cls, records: NDArray[np.void]) -> UseTable:
        """Merge the records of each key: add the uses, and take the latest use and the latest audited drift."""
        merged = _merged(records)
        places = KeyTable()
        if len(merged):
            places.extend(merged["key"], np.arange(len(merged)))
        return cls(merged, places)

    def find(self, keys: Keys) -> NDArray[np.void]:
        """Return a record of USE for each key, uint64 [n, 2]; a key without a record has no uses and drift NaN."""
        records = np.zeros(len(keys), USE)
        records["drift"] = np.nan
        places = self._places.find(keys)
        records[places >= 0] = self.records[places[places >= 0]]
        return records


def _merged(records: NDArray[np.void]) -> NDArray[np.void]:
    order = np.lexsort((records["last"], records["key"][:, 1], records["key"][:, 0]))
    records = records[order]
    keys = records["key"]
    first = np.ones(len(records), np.bool_)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    merged = records[np.append(starts[1:], len(records)) - 1] if len(records) else records
    if len(records):
        sums = np.add.reduceat(records["uses"].astype(np.uint64), starts)
        merged["uses"] = np.minimum(sums, _MOST)
        audited = np.flatnonzero(~np.isnan(records["drift"]))
        merged["drift"] = np.nan
        merged["drift"][(np.cumsum(first) - 1)[audited]] = records["drift"][audited]  # the latest audit of a key wins
    return merged


def use_records(uses: UsageCounter, segments: SegmentList) -> NDArray[np.void]:
    """Return records of USE for the rows of a bank that were used or audited."""
    rows = uses.touched()
    parts = [np.zeros(0, USE)]
    for piece, start in segments.placed():
        low, high = np.searchsorted(rows, [start, start + len(piece)]).tolist()
        if high > low and not isinstance(piece, Tombstone):
            keys = piece.keys if isinstance(piece, PendingRows) else piece.rows["key"]
            parts.append(uses.records(rows[low:high], keys[rows[low:high] - start]))
    return np.concatenate(parts)


def use_name(writer: str) -> str:
    """Return the name of a writer's file of usage records."""
    return f"stat/{writer}.use"


def write_uses(folder: Folder, writer: str, records: NDArray[np.void]) -> None:
    """Replace this writer's usage records. OSError when they cannot be written; callers may ignore it."""
    temporary = f"stat/t-{writer}"
    folder.remove(temporary)
    write_whole(folder, temporary, [records.tobytes()])
    folder.replace(temporary, use_name(writer))


def read_uses(folder: Folder, names: Iterable[str]) -> NDArray[np.void]:
    """Read the records of these files, one file after the other. Unreadable or malformed files are skipped."""
    parts = [np.zeros(0, USE)]
    for name in names:
        try:
            raw = folder.read(name, _LIMIT)
        except (OSError, SnapshotDamaged):
            continue
        if len(raw) % USE.itemsize == 0:
            records = np.frombuffer(raw, USE)
            drift = records["drift"]
            parts.append(records[np.isnan(drift) | ((drift >= 0) & (drift < np.inf))])
    return np.concatenate(parts)

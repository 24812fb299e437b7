"""How often and when rows were read: counters in memory, and advisory records beside the store.

`stat/<writer>.use` is fixed-width records, one per row that its writer has read. Losing one costs an eviction that is
less well chosen, never an entry: no reader needs them.
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
    """Counters of one bank since it was opened, one place per row."""

    def __init__(self, rows: int) -> None:
        self.last = np.zeros(rows, np.uint32)
        self.uses = np.zeros(rows, np.uint32)
        self.drift = np.full(rows, np.nan, np.float32)

    def grow(self, rows: int) -> None:
        """Make place for this many rows."""
        if rows > len(self.uses):
            more = max(rows, 2 * len(self.uses)) - len(self.uses)
            self.last, self.uses = (np.concatenate([one, np.zeros(more, np.uint32)]) for one in (self.last, self.uses))
            self.drift = np.concatenate([self.drift, np.full(more, np.nan, np.float32)])

    def moved(self, places: NDArray[np.int64], rows: int) -> UsageCounter:
        """The same counters for rows that have other numbers now. places: int64 [old rows], -1: it is gone."""
        found, kept = UsageCounter(rows), places >= 0
        for name in ("last", "uses", "drift"):
            getattr(found, name)[places[kept]] = getattr(self, name)[: len(places)][kept]
        return found

    def count(self, rows: NDArray[np.int64], now: int) -> None:
        """One use of each of these rows; a row that is there twice counts once."""
        self.uses[rows] += 1
        self.last[rows] = now

    def touched(self) -> NDArray[np.int64]:
        """Rows that were used or audited."""
        return np.flatnonzero((self.uses > 0) | ~np.isnan(self.drift))

    def records(self, rows: NDArray[np.int64], keys: Keys) -> NDArray[np.void]:
        """Records of USE for these rows, whose keys are uint64 [n, 2]."""
        found = np.zeros(len(rows), USE)
        found["key"], found["last"] = keys, self.last[rows]
        found["uses"], found["drift"] = self.uses[rows], self.drift[rows]
        return found


@dataclass(frozen=True, slots=True)
class UseTable:
    """Records of all writers, one per key."""

    records: NDArray[np.void]
    _places: KeyTable

    @classmethod
    def of(cls, records: NDArray[np.void]) -> UseTable:
        """Records of one key become one: uses are added, the last use is the latest, so is the drift."""
        merged = _merged(records)
        places = KeyTable()
        if len(merged):
            places.extend(merged["key"], np.arange(len(merged)))
        return cls(merged, places)

    def find(self, keys: Keys) -> NDArray[np.void]:
        """A record of USE for each key, uint64 [n, 2]: one without uses where nothing is known."""
        found = np.zeros(len(keys), USE)
        found["drift"] = np.nan
        places = self._places.find(keys)
        found[places >= 0] = self.records[places[places >= 0]]
        return found


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
        merged["drift"][(np.cumsum(first) - 1)[audited]] = records["drift"][audited]  # the last of several is kept
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
    return f"stat/{writer}.use"


def write_uses(folder: Folder, writer: str, records: NDArray[np.void]) -> None:
    """Replace this writer's records. Raises OSError; the caller decides that it does not matter."""
    temporary = f"stat/t-{writer}"
    folder.remove(temporary)
    write_whole(folder, temporary, [records.tobytes()])
    folder.replace(temporary, use_name(writer))


def read_uses(folder: Folder, names: Iterable[str]) -> NDArray[np.void]:
    """Records of these files, one after the other. A file that is no such file is passed over."""
    parts = [np.zeros(0, USE)]
    for name in names:
        try:
            raw = folder.read(name, _LIMIT)
        except (OSError, SnapshotDamaged):
            continue
        if len(raw) % USE.itemsize == 0:
            found = np.frombuffer(raw, USE)
            drift = found["drift"]
            parts.append(found[np.isnan(drift) | ((drift >= 0) & (drift < np.inf))])
    return np.concatenate(parts)

"""Look-up table from 128-bit keys to row numbers, for whole batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.rows import Keys

_ROUNDS = 64


class KeyTable:
    """Table of sorted arrays (24 bytes a key) for the keys at the start, and a dict for keys that were added later.

    A batch is looked up in the arrays by binary search; `settle` merges the dict into the arrays.
    """

    def __init__(self) -> None:
        self._first = np.zeros(0, np.uint64)
        self._second = np.zeros(0, np.uint64)
        self._rows = np.zeros(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._recent)

    def add(self, keys: Keys, rows: NDArray[np.int64]) -> None:
        """Add keys, uint64 [n, 2], with their rows, int64 [n]. A later row of the same key replaces an earlier one."""
        raw = keys.tobytes()
        for i, row in enumerate(rows.tolist()):
            self._recent[raw[16 * i : 16 * i + 16]] = row

    def extend(self, keys: Keys, rows: NDArray[np.int64]) -> None:
        """Add many keys at once, like `add`, directly to the sorted arrays."""
        # latest first: a stable sort then keeps them before older ones, and look-ups take the first match
        if self._recent:
            self._fold()
        keys, rows = keys[::-1], rows[::-1]
        first = np.concatenate([keys[:, 0], self._first])
        order = np.argsort(first, kind="stable")
        self._first = first[order]
        self._second = np.concatenate([keys[:, 1], self._second])[order]
        self._rows = np.concatenate([rows.astype(np.int64), self._rows])[order]

    def settle(self) -> None:
        """Merge the recently added keys into the arrays, once there are enough of them to pay for a sort."""
        if len(self._recent) > 4096 + len(self._rows) // 8:
            self._fold()

    def _fold(self) -> None:
        recent, self._recent = self._recent, {}
        keys = np.frombuffer(b"".join(recent), np.uint64).reshape(-1, 2)
        self.extend(keys, np.fromiter(recent.values(), np.int64, len(keys)))

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Look up keys, uint64 [n, 2]. Returns the row of each, int64 [n], -1 for a miss."""
        rows = np.full(len(keys), -1, np.int64)
        if len(self._rows) and len(keys):
            place = np.searchsorted(self._first, keys[:, 0])
            # Keys with the same first half are adjacent. More than one is a newer copy of an entry, or a collision of
            # 1 in 2^64, so this loop usually ends after one round.
            searching = np.ones(len(keys), np.bool_)
            for _ in range(_ROUNDS):  # a hostile store may have a million keys with one first half: these are misses
                if not searching.any():
                    break
                inside = np.minimum(place, len(self._first) - 1)
                searching &= (place < len(self._first)) & (self._first[inside] == keys[:, 0])
                match = searching & (self._second[inside] == keys[:, 1])
                rows[match] = self._rows[inside[match]]
                searching &= ~match
                place = place + 1
        if self._recent:
            raw, get = keys.tobytes(), self._recent.get
            recent = np.array([get(raw[i : i + 16], -1) for i in range(0, len(raw), 16)], np.int64)
            rows = np.where(recent >= 0, recent, rows)
        return rows

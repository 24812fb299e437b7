"""From 128-bit keys to row numbers, for whole batches at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.rows import Keys

_ROUNDS = 64


class KeyTable:
    """Sorted arrays (24 bytes a key) for what was there at the start, a dict for what came since.

    The arrays are looked up for a batch by binary search; the dict is folded into them by `settle`.
    """

    def __init__(self) -> None:
        self._first = np.zeros(0, np.uint64)
        self._second = np.zeros(0, np.uint64)
        self._rows = np.zeros(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._recent)

    def add(self, keys: Keys, rows: NDArray[np.int64]) -> None:
        """Let these keys, uint64 [n, 2], lead to these rows; a key added later wins."""
        raw = keys.tobytes()
        for i, row in enumerate(rows.tolist()):
            self._recent[raw[16 * i : 16 * i + 16]] = row

    def extend(self, keys: Keys, rows: NDArray[np.int64]) -> None:
        """`add` for many keys at once, straight into the sorted arrays."""
        # latest first: a stable sort then keeps them before older ones, and the first match is believed
        if self._recent:
            self._fold()
        keys, rows = keys[::-1], rows[::-1]
        first = np.concatenate([keys[:, 0], self._first])
        order = np.argsort(first, kind="stable")
        self._first = first[order]
        self._second = np.concatenate([keys[:, 1], self._second])[order]
        self._rows = np.concatenate([rows.astype(np.int64), self._rows])[order]

    def settle(self) -> None:
        """Fold recent keys into the arrays, once there are enough of them to be worth a sort."""
        if len(self._recent) > 4096 + len(self._rows) // 8:
            self._fold()

    def _fold(self) -> None:
        recent, self._recent = self._recent, {}
        keys = np.frombuffer(b"".join(recent), np.uint64).reshape(-1, 2)
        self.extend(keys, np.fromiter(recent.values(), np.int64, len(keys)))

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Row of each key, -1 where it is not known. keys: uint64 [n, 2]; returns int64 [n]."""
        rows = np.full(len(keys), -1, np.int64)
        if len(self._rows) and len(keys):
            place = np.searchsorted(self._first, keys[:, 0])
            # keys that share their first half are next to each other; more than one is a newer copy of an entry
            # or a coincidence of 1 in 2^64, so this loop ends after one round
            open_ = np.ones(len(keys), np.bool_)
            for _ in range(_ROUNDS):  # a stranger's store may hold a million keys with one first half: they are misses
                if not open_.any():
                    break
                inside = np.minimum(place, len(self._first) - 1)
                open_ &= (place < len(self._first)) & (self._first[inside] == keys[:, 0])
                match = open_ & (self._second[inside] == keys[:, 1])
                rows[match] = self._rows[inside[match]]
                open_ &= ~match
                place = place + 1
        if self._recent:
            raw, get = keys.tobytes(), self._recent.get
            recent = np.array([get(raw[i : i + 16], -1) for i in range(0, len(raw), 16)], np.int64)
            rows = np.where(recent >= 0, recent, rows)
        return rows

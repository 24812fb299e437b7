"""Reader of a bank: choose the requests to look up, find their rows, and load the rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from llmcache.banks.device_cache import DeviceCache
    from llmcache.banks.payoff import Payoff

Loaded: TypeAlias = "Floats32 | list[Floats32] | Tensor"
"""Activations of n rows: float32 [n, width] (rank 1) or n arrays float32 [tokens, width] (rank 2) from the files; from
the device cache a tensor on the device, [n, width], or [n, tokens * width] for rank 2, in the stored dtype."""


class BankReader:
    """Reader of one bank, from its files or through a device cache; its payoff learns what each load took.

    bank: the bank. levels: its device cache; None where there is none.
    """

    def __init__(self, bank: Bank, payoff: Payoff | None = None, levels: DeviceCache | None = None) -> None:
        """payoff: decides which requests are looked up; None looks up all."""
        self.bank, self.levels = bank, levels
        self._payoff = payoff

    @property
    def pays(self) -> bool:
        """True if all requests are looked up, since loading an entry takes less time than computing it."""
        return self._payoff is None or self._payoff.pays

    def select(self, n: int, keys: Keys | None = None, *, texts: bool = False) -> tuple[Rows, Rows]:
        """Choose which of n requests to look up: all, or a few while loading takes longer than computing.

        keys: of the requests, uint64 [n, 2]; with them, entries in the device cache are chosen too. None: the requests
        do not use the device cache. texts: True for keys of texts, False for keys of entries.
        Returns two arrays of ascending indices, int64: requests to look up, and further requests whose entry is in the
        device cache.
        """
        payoff, levels = self._payoff, None if keys is None else self.levels
        none = np.zeros(0, np.int64)
        if payoff is None:
            return np.arange(n), none
        selected = payoff.select_for_lookup(n, memory=levels is not None)
        if keys is None or levels is None or len(selected) == n or not payoff.memory_pays:
            return selected, none
        began = time.perf_counter()
        held = np.flatnonzero(levels.holds((self.bank.find_text if texts else self.bank.find)(keys)))
        payoff.searched_memory(time.perf_counter() - began)
        return selected, np.setdiff1d(held, selected, assume_unique=True)

    def lookup(self, keys: Keys, tokens: Sequence[NDArray[np.int32]], *, in_memory: bool = False) -> Rows:
        """Find rows by key, and verify their token ids.

        keys: of entries, uint64 [n, 2]. tokens: token ids of the requests, int32 [length] each.
        in_memory: find rows in the device cache only.
        Returns row numbers, int64 [n]; -1 where the key is missing or the stored token ids differ.
        """
        rows = self.bank.find(keys)
        if in_memory:
            rows[~self._held(rows)] = -1
        found = np.flatnonzero(rows >= 0)
        stored = self.bank.tokens_of(rows[found])
        differ = [i for i, ids in zip(found.tolist(), stored, strict=True) if ids.tobytes() != tokens[i].tobytes()]
        rows[differ] = -1
        return rows

    def load(self, rows: Rows, *, on_device: bool = False, counted: bool = True) -> tuple[Loaded, NDArray[np.bool_]]:
        """Load the activations of rows, and count one use of each. rows: int64 [n], all >= 0.

        on_device: load through the device cache, where there is one; otherwise from the files.
        counted: False leaves this load out of the payoff.
        Returns the values, and a mask of the intact rows, bool [n]. A row that failed its checksum has no value to use,
        and no later look-up finds it.
        """
        payoff, levels = self._payoff if counted else None, self.levels if on_device else None
        began = time.perf_counter()
        if levels is None:
            reading = self.bank.read(rows)
            if payoff is not None:
                payoff.served(rows, time.perf_counter() - began)
            return reading.values, reading.intact
        held, reading_before = levels.holds(rows), levels.counters.seconds
        values, intact = levels.gather(rows)
        if payoff is not None:
            payoff.gathered(rows, held, time.perf_counter() - began, levels.counters.seconds - reading_before)
        return values, intact

    def _held(self, rows: Rows) -> NDArray[np.bool_]:
        return np.zeros(len(rows), np.bool_) if self.levels is None else self.levels.holds(rows)

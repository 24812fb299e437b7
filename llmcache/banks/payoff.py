"""Payoff of reuse from a bank on this machine, from a short profile at first, then from the seconds of actual calls.

A disk can be slower than the model. Loading an entry then costs more than computing it again, and the cache bypasses
the bank. Entries in the device cache are still reused, for as long as that pays by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.break_even import (
    LEAST,
    BreakEven,
    Decision,
    Profile,
)
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Rows

log = logging.getLogger("llmcache")

PROFILED_ROWS, PROFILED_BYTES = 64, 8 << 20
"""Largest number of entries that a profile reads, and of their bytes."""
_PROBED_SECONDS = 0.05  # recorded model seconds that a profile recomputes at most
_CLEAR = 10  # a profile measures the model unless loading is this many times faster than its recorded seconds
_CHECKED_SECONDS = 0.25  # seconds of loading after which the model is measured here; the recorded may be elsewhere's
_CHECKED_ROWS = 4  # entries recomputed for that


class Payoff:
    """Payoff of reuse from one bank; chooses the documents to look up.

    The first decision comes from a profile before the first look-up, once the bank has 1,024 entries. Later ones
    compare the seconds of loading with those that the model would have taken. While the bank is bypassed, a few
    documents are still looked up.

    Loading also fills the device cache, so the seconds that the device cache saves count in favour of loading: when
    entries recur often enough, files slower than the model are read as well, for as long as both together pay.
    """

    def __init__(self, bank: Bank, name: str, *, on: bool, again: Callable[[Rows], float] | None = None) -> None:
        """on: True if the bank may be bypassed at all. again: recomputes rows and returns the model's seconds."""
        self.bank, self.name, self._on, self._again = bank, name, on, again
        self._balance, self._memory = BreakEven(), BreakEven()
        self._has_memory, self._memory_hits = False, 0
        self._factor = 1.0  # ratio of this machine's model seconds to the recorded ones
        self._loaded_seconds, self._measured = 0.0, again is None
        self.profile: Profile | None = None

    @property
    def pays(self) -> bool:
        """True if entries are looked up and stored."""
        return self._balance.pays

    def select_for_lookup(self, n: int, *, memory: bool = False) -> Rows:
        """Choose the documents to look up. Returns ascending indices in [0, n), int64.

        memory: True if the bank has a device cache.
        """
        self._has_memory |= memory
        if not self._on:
            return np.arange(n)
        if self.profile is None and len(self.bank) >= LEAST:
            self._decide_by_profile()
        return self._balance.select_for_lookup(n)

    @property
    def memory_pays(self) -> bool:
        """True if entries in the device cache are reused although the bank is bypassed."""
        return self._memory.pays

    def searched_memory(self, seconds: float) -> None:
        """Record the seconds of a search for entries in the device cache, as spent."""
        self._memory.observe(0, 0.0, seconds)

    def gathered(self, rows: Rows, held: NDArray[np.bool_], seconds: float, reading: float) -> None:
        """Record entries loaded through the device cache. held: bool [n], entries that were in memory before.

        seconds: time of the whole load. reading: time in which files were read.
        """
        self._has_memory = True
        count = int(held.sum())
        saved = self.bank.cost(rows[held]) * self._factor
        self._memory_hits += count
        if saved:
            self._memory.observe(count, saved, (seconds - reading) * count / len(rows))
        self.served(rows, seconds)

    def served(self, rows: Rows, seconds: float) -> None:
        """Record entries that were loaded, and the seconds that took."""
        self._loaded_seconds += seconds
        if self._on and not self._measured and self._loaded_seconds >= _CHECKED_SECONDS:
            self._measure()
        saved = self.bank.cost(rows) * self._factor
        if not self._on or not saved:  # the model's seconds are unknown
            return
        if self._balance.observe(len(rows), saved, seconds):
            spent, computed = self._balance.spent, self._balance.saved
            self._warn(f"{spent:.3g} seconds to load what the model computes in {computed:.3g}")

    def decision(self) -> Decision:
        """Return the current decision with its figures."""
        state = "on" if self.pays else "memory" if self._from_memory else "aside"
        if self.profile is None and not self._balance.spent:
            state = "too few entries to tell" if self._on else "always on"
        seconds = self._balance.saved, self._balance.spent
        reused = self._memory_hits
        return Decision(self.name, state, self.profile, *seconds, reused, self._memory.saved, self._memory.spent)

    @property
    def _from_memory(self) -> bool:
        """True if entries are reused from the device cache."""
        return self._has_memory and self._memory.pays

    def _decide_by_profile(self) -> None:
        self.profile = profiled(self.bank, self._again)
        recorded = self.profile.compute
        if self.profile.measured:
            rows = sample(self.bank)
            recorded = self.bank.cost(rows) / max(1, len(rows))
            self._measured = True
        self._factor = self.profile.compute / recorded if recorded else 1.0
        if not self.profile.pays:
            self._balance.pays = False
            reuse, compute = self.profile.look_up + self.profile.load, self.profile.compute
            self._warn(f"an entry takes {1e3 * reuse:.3g} ms to load and {1e3 * compute:.3g} ms to compute")

    def _measure(self) -> None:
        """Measure the model on a few entries; called once loading has taken so long that this adds little."""
        self._measured = True
        rows = sample(self.bank)[:_CHECKED_ROWS]
        recorded = self.bank.cost(rows)
        if self._again is None or not recorded:
            return
        before, self._factor = self._factor, self._again(rows) / recorded
        for balance in (self._balance, self._memory):
            balance.saved *= self._factor / before

    def _warn(self, reason: str) -> None:
        exceptions = "a few documents" + (" and entries in memory" if self._from_memory else "")
        change = "pays again" if self.pays else f"costs more than it saves, and is off but for {exceptions}"
        log.warning("reuse from the bank %s %s: %s", self.name, change, reason)


def sample(bank: Bank) -> Rows:
    """Choose rows for a profile, spread evenly over the bank. Returns row numbers, int64."""
    live = bank.near.live()
    stored = bank.pending_bytes + sum(segment.payload for segment in bank.facts.segments)
    each = max(1, stored // max(1, len(live)))
    most = max(1, min(PROFILED_ROWS, PROFILED_BYTES // each))
    return live[:: -(-len(live) // most)] if len(live) else live


def profiled(bank: Bank, again: Callable[[Rows], float] | None = None) -> Profile:
    """Profile a bank by a sample of its entries.

    again: see `Payoff`; called with entries for about 0.05 seconds of model time, unless loading is ten times faster
    than the recorded seconds of the model.
    The sample is read in four parts, and the median counts, since the first read alone may wait for the disk.
    """
    rows = sample(bank)
    keys = bank.keys(rows)
    began = time.perf_counter()
    bank.find(keys)
    look_up = (time.perf_counter() - began) / max(1, len(rows))
    loads, size = [], 0
    for part in np.array_split(rows, min(4, max(1, len(rows)))):
        began = time.perf_counter()
        values = bank.read(part, count=False).values
        loads.append((time.perf_counter() - began) / max(1, len(part)))
        size += sum(value.nbytes for value in values)
    compute, measured = bank.cost(rows) / max(1, len(rows)), False
    in_doubt = compute < _CLEAR * (look_up + float(np.median(loads)))
    probed = rows[: int(_PROBED_SECONDS / compute)] if compute and in_doubt else rows[:0]
    if again is not None and len(probed):
        compute, measured = again(probed) / len(probed), True
    return Profile(len(rows), compute, measured, look_up, float(np.median(loads)), size / max(1, len(rows)))

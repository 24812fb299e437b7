"""Whether reuse from a bank pays on this machine: a short profile first, and then what is seen while it goes on.

A disk can be slower than the model: then loading what is stored costs more than computing it again, and the cache
stands aside. What memory above the files holds is reused all the same, for as long as that pays by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.break_even import (
    LEAST,
    BreakEven,
    Decision,
    Profile,
)
from llmcache.indexes.bank import Bank

if TYPE_CHECKING:
    from llmcache.banks.device_cache import DeviceCache

log = logging.getLogger("llmcache")

PROFILED_ROWS, PROFILED_BYTES = 64, 8 << 20
"""A profile reads at most so many entries, and so many bytes of them."""
_PROBED_SECONDS = 0.05  # of recorded model time that a profile may compute again
_CLEAR = 10  # times as quick as recorded seconds of the model: they are measured again later
_CHECKED_SECONDS = 0.25  # of loading, after which recorded seconds, perhaps of another machine, are measured here
_CHECKED_ROWS = 4

Rows = NDArray[np.int64]


class Payoff:
    """What reuse from one bank is worth; asked before its entries are looked up.

    Decided by a profile before the first look-up, once the bank has 1,024 entries, and from then on by the seconds
    that loading took and the model would have taken. While it stands aside a few documents are still looked up.

    Memory above the files (`DeviceCache`) is filled by what is loaded, so what it saves speaks for loading too: once
    entries come again and again, also a file that is slower than the model is read, for as long as both together pay.
    """

    def __init__(self, bank: Bank, name: str, *, on: bool, again: Callable[[Rows], float] | None = None) -> None:
        """on: whether it may stand aside at all. again: seconds the model takes for these rows, computed again."""
        self.bank, self.name, self._on, self._again = bank, name, on, again
        self._balance, self._memory = BreakEven(), BreakEven()
        self._levelled, self._held = False, 0
        self._factor = 1.0  # of this machine's model seconds to the recorded ones
        self._loaded_seconds, self._measured = 0.0, again is None
        self.profile: Profile | None = None

    @property
    def pays(self) -> bool:
        """Whether entries are looked up, and kept."""
        return self._balance.pays

    def select_for_lookup(self, n: int, *, memory: bool = False) -> Rows:
        """Which of n documents are to be looked up, int64, in order. memory: there is some above the files, and
        `with_memory` is asked next.
        """
        self._levelled |= memory
        if not self._on:
            return np.arange(n)
        if self.profile is None and len(self.bank) >= LEAST:
            self._begin()
        return self._balance.select_for_lookup(n)

    def with_memory(self, some: Rows, levels: DeviceCache, rows: Callable[[], Rows]) -> Rows:
        """Documents to be looked up, int64, in order: some, see `tried`, and those whose rows are in memory.

        rows: gives the row of each document, -1 where there is none; what that takes counts as spent.
        """
        if not self._memory.pays:  # some are enough to notice when it does
            return some
        began = time.perf_counter()
        held = np.flatnonzero(levels.holds(rows()))
        self._memory.observe(0, 0.0, time.perf_counter() - began)
        return np.union1d(some, held)

    @contextmanager
    def loading(self, rows: Rows, levels: DeviceCache | None = None) -> Iterator[None]:
        """Inside, these entries are loaded, from the files or by way of the levels: note is taken of the seconds."""
        held, read = None if levels is None else levels.holds(rows), 0.0 if levels is None else levels.counters.seconds
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if levels is None or held is None:
            self.served(rows, seconds)
        else:
            self.gathered(rows, held, seconds, levels.counters.seconds - read)

    def gathered(self, rows: Rows, held: NDArray[np.bool_], seconds: float, reading: float) -> None:
        """Take note of entries that came by way of the levels. held: which of them were in memory before.

        seconds: that all of it took; reading: those in which files were read.
        """
        self._levelled = True
        count = int(held.sum())
        saved = self.bank.cost(rows[held]) * self._factor
        self._held += count
        if saved:
            self._memory.observe(count, saved, (seconds - reading) * count / len(rows))
        self.served(rows, seconds)

    def served(self, rows: Rows, seconds: float) -> None:
        """Take note of entries that were loaded, and the seconds that took."""
        self._loaded_seconds += seconds
        if self._on and not self._measured and self._loaded_seconds >= _CHECKED_SECONDS:
            self._measure()
        saved = self.bank.cost(rows) * self._factor
        if not self._on or not saved:  # nothing is known of what the model took
            return
        if self._balance.observe(len(rows), saved, seconds):
            self._say(f"{self._balance.spent:.3g} seconds to load what the model computes in {self._balance.saved:.3g}")

    def decision(self) -> Decision:
        state = "on" if self.pays else "memory" if self._from_memory else "aside"
        if self.profile is None and not self._balance.spent:
            state = "too few entries to tell" if self._on else "always on"
        seconds = self._balance.saved, self._balance.spent
        return Decision(self.name, state, self.profile, *seconds, self._held, self._memory.saved, self._memory.spent)

    @property
    def _from_memory(self) -> bool:
        return self._levelled and self._memory.pays

    def _begin(self) -> None:
        self.profile = profiled(self.bank, self._again)
        recorded = self.profile.compute
        if self.profile.measured:
            rows = sample(self.bank)
            recorded = self.bank.cost(rows) / max(1, len(rows))
            self._measured = True
        self._factor = self.profile.compute / recorded if recorded else 1.0
        if not self.profile.pays:
            self._balance.pays = False
            reuse = self.profile.look_up + self.profile.load
            self._say(f"an entry takes {1e3 * reuse:.3g} ms to load and {1e3 * self.profile.compute:.3g} ms to compute")

    def _measure(self) -> None:
        """Measure the model on a few entries, once loading has taken so long that this adds little to it."""
        self._measured = True
        rows = sample(self.bank)[:_CHECKED_ROWS]
        recorded = self.bank.cost(rows)
        if self._again is None or not recorded:
            return
        before, self._factor = self._factor, self._again(rows) / recorded
        for balance in (self._balance, self._memory):
            balance.saved *= self._factor / before

    def _say(self, why: str) -> None:
        but = "but for a few documents" + (" and what memory holds" if self._from_memory else "")
        what = "pays again" if self.pays else f"costs more than it saves, and is left alone {but}"
        log.warning("reuse from the bank %s %s: %s", self.name, what, why)


def sample(bank: Bank) -> Rows:
    """Rows for a profile, spread evenly over the bank, int64."""
    live = bank.near.live()
    stored = bank.pending_bytes + sum(segment.payload for segment in bank.facts.segments)
    each = max(1, stored // max(1, len(live)))
    most = max(1, min(PROFILED_ROWS, PROFILED_BYTES // each))
    return live[:: -(-len(live) // most)] if len(live) else live


def profiled(bank: Bank, again: Callable[[Rows], float] | None = None) -> Profile:
    """A profile of a bank by a sample of its entries. again: see `Payoff`; it is asked for about 0.05 seconds of work,
    where loading is not ten times as quick as what was recorded of the model anyway.

    They are read in four parts, of which the median counts: the first may have to wait for the disk alone.
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
        size += sum(one.nbytes for one in values)
    compute, measured = bank.cost(rows) / max(1, len(rows)), False
    in_doubt = compute < _CLEAR * (look_up + float(np.median(loads)))
    few = rows[: int(_PROBED_SECONDS / compute)] if compute and in_doubt else rows[:0]
    if again is not None and len(few):
        compute, measured = again(few) / len(few), True
    return Profile(len(rows), compute, measured, look_up, float(np.median(loads)), size / max(1, len(rows)))

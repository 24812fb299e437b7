"""Rows of a bank in three levels: memory of a device, page-locked memory of the host, and the store's files.

Which rows answer is decided by the bank alone, call by call: a row that was evicted, purged or found damaged has no
number to ask for. What comes out of a file is compared with its checksum first; the levels hold copies of what passed.
Copies to the device run on a stream of their own, and the host waits for none of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts

log = logging.getLogger("llmcache")

Rows = NDArray[np.int64]

_CHUNK = 32 << 20  # bytes that are read and copied together: while one lot is copied, the next is read
_RUN = 64 << 10  # bytes on end from which on they are copied to the device straight from where they lie


@dataclass(slots=True)
class LevelCounters:
    """Rows asked for, by the level that had them. damaged: of the files, rows that failed their checksum.

    seconds: of reading the files.
    """

    device: int = 0
    pinned: int = 0
    files: int = 0
    damaged: int = 0
    seconds: float = 0.0


class ClockTable:
    """Some rows of a bank in one tensor of a fixed size. Full, it gives up rows that were not asked for lately.

    A clock with a second chance: a row that was asked for since the hand passed it last stays. For many rows at once
    that is near to the least recently used, and no order has to be kept. values: [slots, width].
    """

    def __init__(
        self, slots: int, width: int, dtype: torch.dtype, device: torch.device, *, pinned: bool = False
    ) -> None:
        self.values = torch.zeros((slots, width), dtype=dtype, device=device, pin_memory=pinned)
        self._row_of = np.full(slots, -1, np.int64)
        self._slot_of = np.full(0, -1, np.int64)  # by row
        self._recent = np.zeros(slots, np.bool_)
        self._hand = 0

    def __len__(self) -> int:
        return int((self._row_of >= 0).sum())

    def find(self, rows: Rows) -> Rows:
        """Slot of each row, -1 where it is not held; a use of those that are. int64 [n]."""
        slots = self.slots(rows)
        self._recent[slots[slots >= 0]] = True
        return slots

    def slots(self, rows: Rows) -> Rows:
        """The same, and no use of them."""
        slots = np.full(len(rows), -1, np.int64)
        known = (rows >= 0) & (rows < len(self._slot_of))
        slots[known] = self._slot_of[rows[known]]
        return slots

    def place(self, rows: Rows) -> Rows:
        """Slots for rows that are not held, distinct and no more than there are slots; what was there is given up."""
        slots = self._given_up(len(rows))
        old = self._row_of[slots]
        self._slot_of[old[old >= 0]] = -1
        highest = int(rows.max(initial=-1)) + 1
        if highest > len(self._slot_of):
            room = np.full(highest + highest // 4 - len(self._slot_of), -1, np.int64)
            self._slot_of = np.concatenate([self._slot_of, room])
        self._row_of[slots], self._slot_of[rows], self._recent[slots] = rows, slots, False
        return slots

    def _given_up(self, n: int) -> Rows:
        found, every = np.zeros(0, np.int64), len(self._row_of)
        while len(found) < n:
            span = (self._hand + np.arange(min(every, 2 * n))) % every
            free = np.flatnonzero(~self._recent[span])[: n - len(found)]
            passed = span[: free[-1] + 1] if len(free) == n - len(found) else span
            self._recent[passed] = False  # passed by now; given up when passed again unless asked for meanwhile
            self._recent[span[free]] = True  # not to be found twice
            found = np.concatenate([found, span[free]])
            self._hand = int(passed[-1] + 1) % every
        return found

    def drop(self, rows: Rows) -> None:
        """Give these rows up, as far as they are held, and leave nothing of them in memory."""
        held = rows[rows < len(self._slot_of)]
        slots = self._slot_of[held]
        slots = slots[slots >= 0]
        if not len(slots):
            return
        self._slot_of[self._row_of[slots]] = -1
        self._row_of[slots], self._recent[slots] = -1, False
        self.values[torch.from_numpy(slots).to(self.values.device)] = 0

    def clear(self) -> None:
        """Give every row up."""
        self.drop(self._row_of[self._row_of >= 0])


def dtype_of(facts: BankFacts) -> torch.dtype:
    """The dtype in which a bank's numbers are held in memory: the stored one, which is exact; int8 is held decoded."""
    found: torch.dtype = getattr(torch, "float32" if facts.dtype == "int8" else facts.dtype)
    return found


class DeviceCache:
    """The levels above the files of one bank. For one thread, as the cache is."""

    def __init__(
        self,
        bank: Bank,
        device: torch.device | str,
        *,
        device_bytes: int = 0,
        pinned_bytes: int = 0,
        tokens: int = 1,
    ) -> None:
        """device: where rows are wanted. device_bytes, pinned_bytes: at most so much memory for rows; 0: no such level.

        tokens: of every row that will be asked for, in a bank of rank 2; such a row is [tokens * width] here.
        On a device that is no GPU everything is the same but for the page-locking and the streams.
        ConfigError: there is not so much memory.
        """
        self.bank, self.device = bank, torch.device(device)
        self.dtype = dtype_of(bank.facts)
        self._cuda = self.device.type == "cuda"
        self.width = bank.facts.width * tokens
        self._row = self.width * self.dtype.itemsize  # bytes
        self.on_device = self._table(device_bytes // self._row, self.device)
        self.on_host = self._table(pinned_bytes // self._row, torch.device("cpu"), pinned=self._cuda)
        self.counters = LevelCounters()
        self._moves, self._dead = bank.renumberings, bank.dead
        stream, event = (torch.cuda.Stream, torch.cuda.Event) if self._cuda else (_no_device, _no_device)
        self._copies: Any = stream(self.device)
        self._done: Any = event()  # the last use of the table on the device
        self._read: Any = event()  # the last copy straight out of the one on the host

    def _table(self, slots: int, device: torch.device, *, pinned: bool = False) -> ClockTable | None:
        if not slots:
            return None
        try:
            return ClockTable(slots, self.width, self.dtype, device, pinned=pinned)
        except RuntimeError as error:  # out of memory is one
            raise ConfigError(
                f"{slots:,} rows of {self.width} numbers cannot be kept in memory of {device}: "
                f"{str(error).splitlines()[0]}; give device_bytes and pinned_bytes that fit"
            ) from None

    def holds(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows are in memory, so that no file is read for them; bool [n]. -1 never is. It is no use of them."""
        held = np.zeros(len(rows), np.bool_)
        if (
            self._moves == self.bank.renumberings
        ):  # else rows have other numbers, and everything is given up at the next call
            for table in filter(None, (self.on_device, self.on_host)):
                held |= table.slots(rows) >= 0
        return held

    @torch.inference_mode()
    def gather(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """What is stored in these rows, all >= 0: [n, width] in the stored dtype, on the device; and bool [n], intact.

        Where a row did not agree with its checksum the numbers mean nothing, and the bank knows it from then on. Each
        is counted as a use. The tensor is ready on the current stream.
        """
        self.bank.used(rows)
        intact = np.ones(len(rows), np.bool_)
        with self._in_order():
            self._follow()
            slots = np.full(len(rows), -1) if self.on_device is None else self.on_device.find(rows)
            held, rest = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
            self.counters.device += len(held)
            if self.on_device is not None and not len(rest):
                return self.on_device.values.index_select(0, self._numbers(slots)), intact
            found = torch.empty((len(rows), self.width), dtype=self.dtype, device=self.device)
            if self.on_device is not None and len(held):
                found[self._numbers(held)] = self.on_device.values.index_select(0, self._numbers(slots[held]))
            fetched = []
            chunk = max(1, _CHUNK // self._row)
            for start in range(0, len(rest), chunk):
                part = rest[start : start + chunk]
                values, intact[part] = self._fetched(rows[part])
                fetched.append((part, values))
            self._wait()
            for part, values in fetched:  # after all rows held were read: what comes may take their slots
                found[self._numbers(part)] = values
                self._keep(rows[part], values, intact[part])
        return found, intact

    # -- from host to device --------------------------------------------------------------------------------

    def _fetched(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Rows from the host: [n, width] on the device, when the stream of copies has got there; bool [n], intact."""
        intact = np.ones(len(rows), np.bool_)
        slots = np.full(len(rows), -1) if self.on_host is None else self.on_host.find(rows)
        held, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        self.counters.pinned += len(held)
        if self.on_host is not None and not len(missing):
            runs = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1)
            if len(runs) * _RUN <= len(slots) * self._row or len(runs) == 1:
                parts = [self.on_host.values[int(one[0]) : int(one[-1]) + 1] for one in runs]
                return self._copied(parts, lying=True), intact
        # the allocator of page-locked memory gives this out again only when the copy from it is done
        values = torch.empty((len(rows), self.width), dtype=self.dtype, pin_memory=self._cuda)
        if self.on_host is not None and len(held):
            values[torch.from_numpy(held)] = self.on_host.values[torch.from_numpy(slots[held])]
        if len(missing):
            read, intact[missing] = self._from_files(rows[missing])
            if len(missing) == len(rows):
                values.copy_(read)
            else:
                values[torch.from_numpy(missing)] = read
            self._keep_on_host(rows[missing], read, intact[missing])
        return self._copied([values]), intact

    def _from_files(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """[n, width] on the host, and bool [n], intact."""
        began = time.perf_counter()
        reading = self.bank.read(rows, count=False)
        self.counters.seconds += time.perf_counter() - began
        self.counters.files += len(rows)
        self.counters.damaged += int((~reading.intact).sum())
        if isinstance(reading.values, np.ndarray):
            return tensor_of(reading.values).to(self.dtype), reading.intact
        read = torch.zeros((len(rows), self.width), dtype=self.dtype)
        for i in np.flatnonzero(reading.intact).tolist():
            read[i] = tensor_of(reading.values[i].reshape(-1))
        return read, reading.intact

    def _copied(self, parts: list[Tensor], *, lying: bool = False) -> Tensor:
        """Rows of the host on the device, one after another, by the stream of copies. lying: in the table itself."""
        if self._copies is None:
            return torch.cat(parts)
        with torch.cuda.stream(self._copies):
            whole = torch.empty((sum(map(len, parts)), self.width), dtype=self.dtype, device=self.device)
            at = 0
            for part in parts:
                whole[at : at + len(part)].copy_(part, non_blocking=True)
                at += len(part)
            if lying and self._read is not None:
                self._read.record(self._copies)
        whole.record_stream(torch.cuda.current_stream(self.device))
        return whole

    def _wait(self) -> None:
        """Let what comes next on the current stream wait for the copies; the host does not."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Inside, the table on the device is used after whatever used it before, be it on another stream."""
        with torch.cuda.device(self.device) if self._cuda else nullcontext():
            if self._done is not None:
                self._done.wait()
            yield
            if self._done is not None:
                self._done.record()

    def _numbers(self, numbers: NDArray[np.int64]) -> Tensor:
        return numbers_on(self.device, numbers)

    # -- keeping --------------------------------------------------------------------------------------------

    def _keep(self, rows: Rows, values: Tensor, intact: NDArray[np.bool_]) -> None:
        if self.on_device is None:
            return
        slots, chosen = _placed(self.on_device, rows, intact)
        if len(slots):
            self.on_device.values.index_copy_(0, self._numbers(slots), values.index_select(0, self._numbers(chosen)))

    def _keep_on_host(self, rows: Rows, values: Tensor, intact: NDArray[np.bool_]) -> None:
        if self.on_host is None:
            return
        if self._read is not None:
            self._read.synchronize()  # rows that are still being copied from there may be those that go
        slots, chosen = _placed(self.on_host, rows, intact)
        self.on_host.values[torch.from_numpy(slots)] = values[torch.from_numpy(chosen)]

    def _follow(self) -> None:
        """Give up what the bank has given up, and everything when its rows have other numbers."""
        if self._moves == self.bank.renumberings and self._dead is self.bank.dead:
            return
        if self._read is not None:
            self._read.synchronize()
        for table in filter(None, (self.on_device, self.on_host)):
            if self._moves != self.bank.renumberings:
                table.clear()
            else:
                table.drop(np.setdiff1d(self.bank.dead, self._dead))
        self._moves, self._dead = self.bank.renumberings, self.bank.dead


def levels_of(bank: Bank, device: torch.device, config: CacheConfig, *, tokens: int = 1) -> DeviceCache | None:
    """The levels that the settings ask for. None where they ask for none, or there is not so much memory: a warning."""
    sizes = {"device_bytes": config.device_bytes, "pinned_bytes": config.pinned_bytes}
    if not any(sizes.values()):
        return None
    try:
        return DeviceCache(bank, device, tokens=tokens, **sizes)
    except ConfigError as error:  # the settings may be those of another machine, and a cache is never in the way
        log.warning("%s. Going on with the files alone", error)
        return None


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor of these numbers; a copy of what is only to be read, as what lies in a file is: torch warns of it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def numbers_on(device: torch.device, numbers: NDArray[np.int64]) -> Tensor:
    """Numbers of rows or places as a tensor on a device; the host waits for no copy."""
    found = torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _no_device(*_: object) -> None:
    """There are neither streams nor events without one."""


def _placed(table: ClockTable, rows: Rows, intact: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Slots for the intact ones of some rows, and their places in `rows`: each row once, as many as there are slots."""
    _, first = np.unique(rows[intact], return_index=True)
    chosen = np.flatnonzero(intact)[np.sort(first)][: len(table.values)]
    chosen = chosen[table.find(rows[chosen]) < 0]
    return table.place(rows[chosen]), chosen

"""Device cache: rows of a bank in device memory and page-locked host memory, above the store's files.

The bank alone decides which rows exist, in every call: an evicted, purged or damaged row has no row number, so it
cannot be requested here. Rows read from a file are verified against their checksum before they enter the cache. Copies
to the device run on a CUDA stream of their own; the host never waits for them.
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
from llmcache.indexes.format.rows import Rows

log = logging.getLogger("llmcache")


_CHUNK = 32 << 20  # bytes read and copied at a time: one chunk is copied while the next is read
_RUN = 64 << 10  # smallest mean run of contiguous bytes that is copied straight from the page-locked table


@dataclass(slots=True)
class LevelCounters:
    """Requested rows by the level that had them: device memory, page-locked (pinned) host memory, files.

    damaged: rows of the files that failed their checksum. seconds: time to read the files.
    """

    device: int = 0
    pinned: int = 0
    files: int = 0
    damaged: int = 0
    seconds: float = 0.0


class ClockTable:
    """Table of some rows of a bank, in one tensor of a fixed number of slots, with clock eviction (second chance).

    A row that was requested since the clock hand last passed it is not evicted. For many rows at once this is close to
    least-recently-used eviction, without an order to maintain. values: [slots, width].
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
        """Find the slot of each row, and mark the rows found as recently used. Returns int64 [n], -1 for a miss."""
        slots = self.slots(rows)
        self._recent[slots[slots >= 0]] = True
        return slots

    def slots(self, rows: Rows) -> Rows:
        """Like `find`, without marking the rows as used."""
        slots = np.full(len(rows), -1, np.int64)
        in_range = (rows >= 0) & (rows < len(self._slot_of))
        slots[in_range] = self._slot_of[rows[in_range]]
        return slots

    def place(self, rows: Rows) -> Rows:
        """Assign slots to rows that are not in the table, and evict the rows in these slots.

        rows: distinct, at most as many as there are slots. Returns the slots, int64 [n]; the caller writes the values.
        """
        slots = self._evict(len(rows))
        evicted = self._row_of[slots]
        self._slot_of[evicted[evicted >= 0]] = -1
        needed = int(rows.max(initial=-1)) + 1
        if needed > len(self._slot_of):
            extension = np.full(needed + needed // 4 - len(self._slot_of), -1, np.int64)
            self._slot_of = np.concatenate([self._slot_of, extension])
        self._row_of[slots], self._slot_of[rows], self._recent[slots] = rows, slots, False
        return slots

    def _evict(self, n: int) -> Rows:
        """Advance the clock hand until n slots are chosen. Returns them, int64 [n]."""
        chosen, slots = np.zeros(0, np.int64), len(self._row_of)
        while len(chosen) < n:
            span = (self._hand + np.arange(min(slots, 2 * n))) % slots
            free = np.flatnonzero(~self._recent[span])[: n - len(chosen)]
            passed = span[: free[-1] + 1] if len(free) == n - len(chosen) else span
            self._recent[passed] = False  # evicted at the next pass unless used before
            self._recent[span[free]] = True  # so that the loop does not choose a slot twice
            chosen = np.concatenate([chosen, span[free]])
            self._hand = int(passed[-1] + 1) % slots
        return chosen

    def drop(self, rows: Rows) -> None:
        """Remove those of these rows that are in the table, and overwrite their values with zeros."""
        slots = self._slot_of[rows[rows < len(self._slot_of)]]
        slots = slots[slots >= 0]
        if not len(slots):
            return
        self._slot_of[self._row_of[slots]] = -1
        self._row_of[slots], self._recent[slots] = -1, False
        self.values[torch.from_numpy(slots).to(self.values.device)] = 0

    def clear(self) -> None:
        """Remove all rows, and overwrite their values with zeros."""
        self.drop(self._row_of[self._row_of >= 0])


def dtype_of(facts: BankFacts) -> torch.dtype:
    """Return the dtype of a bank's rows in memory: the stored dtype, or float32 for int8, which is decoded."""
    dtype: torch.dtype = getattr(torch, "float32" if facts.dtype == "int8" else facts.dtype)
    return dtype


class DeviceCache:
    """Device and page-locked host memory above the files of one bank. Used by one thread at a time, like the cache."""

    def __init__(
        self,
        bank: Bank,
        device: torch.device | str,
        *,
        device_bytes: int = 0,
        pinned_bytes: int = 0,
        tokens: int = 1,
    ) -> None:
        """Allocate the tables. ConfigError when there is not enough memory.

        device: where rows are needed; on a device other than a GPU there is neither page-locking nor a stream.
        device_bytes, pinned_bytes: upper bounds of the memory for rows; 0 leaves the level out.
        tokens: tokens of every row that will be requested, in a bank of rank 2; such a row is [tokens * width] here.
        """
        self.bank, self.device = bank, torch.device(device)
        self.dtype = dtype_of(bank.facts)
        self._cuda = self.device.type == "cuda"
        self.width = bank.facts.width * tokens
        self._row_bytes = self.width * self.dtype.itemsize
        self.on_device = self._table(device_bytes // self._row_bytes, self.device)
        self.on_host = self._table(pinned_bytes // self._row_bytes, torch.device("cpu"), pinned=self._cuda)
        self.counters = LevelCounters()
        self._renumberings, self._dead = bank.renumberings, bank.dead
        stream, event = (torch.cuda.Stream, torch.cuda.Event) if self._cuda else (_none, _none)
        self._copy_stream: Any = stream(self.device)
        self._device_used: Any = event()  # the last use of the device table
        self._host_read: Any = event()  # the last copy straight from the host table

    def _table(self, slots: int, device: torch.device, *, pinned: bool = False) -> ClockTable | None:
        if not slots:
            return None
        try:
            return ClockTable(slots, self.width, self.dtype, device, pinned=pinned)
        except RuntimeError as error:  # out-of-memory errors are RuntimeErrors
            raise ConfigError(
                f"{slots:,} rows of {self.width} numbers cannot be kept in memory of {device}: "
                f"{str(error).splitlines()[0]}; give device_bytes and pinned_bytes that fit"
            ) from None

    def holds(self, rows: Rows) -> NDArray[np.bool_]:
        """Tell which rows are in memory, so that no file is read for them. rows: -1 is never in memory.

        Returns bool [n]. Does not mark the rows as used.
        """
        in_memory = np.zeros(len(rows), np.bool_)
        # after a renumbering the tables are stale; the next `gather` clears them
        if self._renumberings == self.bank.renumberings:
            for table in filter(None, (self.on_device, self.on_host)):
                in_memory |= table.slots(rows) >= 0
        return in_memory

    @torch.inference_mode()
    def gather(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Load rows to the device, and count one use of each. rows: all >= 0.

        Returns the values, [n, width] in the stored dtype, on the device and ready on the current stream; and a mask
        of the intact rows, bool [n]. A row that failed its checksum has undefined values; the bank records the damage.
        """
        self.bank.used(rows)
        intact = np.ones(len(rows), np.bool_)
        with self._in_order():
            self._sync_with_bank()
            slots = np.full(len(rows), -1) if self.on_device is None else self.on_device.find(rows)
            hits, misses = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
            self.counters.device += len(hits)
            if self.on_device is not None and not len(misses):
                return self.on_device.values.index_select(0, self._indices(slots)), intact
            gathered = torch.empty((len(rows), self.width), dtype=self.dtype, device=self.device)
            if self.on_device is not None and len(hits):
                gathered[self._indices(hits)] = self.on_device.values.index_select(0, self._indices(slots[hits]))
            chunks = []
            chunk_rows = max(1, _CHUNK // self._row_bytes)
            for start in range(0, len(misses), chunk_rows):
                chunk = misses[start : start + chunk_rows]
                values, intact[chunk] = self._fetch(rows[chunk])
                chunks.append((chunk, values))
            self._wait_for_copies()
            for chunk, values in chunks:  # only now: rows placed in the table may evict the hits read above
                gathered[self._indices(chunk)] = values
                self._keep_on_device(rows[chunk], values, intact[chunk])
        return gathered, intact

    # -- from host to device --------------------------------------------------------------------------------

    def _fetch(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Copy rows from the host. Returns [n, width] on the device, ready on the copy stream; and intact, bool [n]."""
        intact = np.ones(len(rows), np.bool_)
        slots = np.full(len(rows), -1) if self.on_host is None else self.on_host.find(rows)
        hits, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        self.counters.pinned += len(hits)
        if self.on_host is not None and not len(missing):
            runs = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1)
            if len(runs) * _RUN <= len(slots) * self._row_bytes or len(runs) == 1:
                parts = [self.on_host.values[int(run[0]) : int(run[-1]) + 1] for run in runs]
                return self._copy(parts, from_table=True), intact
        # the page-locked allocator does not reuse this memory before the copy from it is done
        values = torch.empty((len(rows), self.width), dtype=self.dtype, pin_memory=self._cuda)
        if self.on_host is not None and len(hits):
            values[torch.from_numpy(hits)] = self.on_host.values[torch.from_numpy(slots[hits])]
        if len(missing):
            read, intact[missing] = self._from_files(rows[missing])
            if len(missing) == len(rows):
                values.copy_(read)
            else:
                values[torch.from_numpy(missing)] = read
            self._keep_on_host(rows[missing], read, intact[missing])
        return self._copy([values]), intact

    def _from_files(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Read rows from the files. Returns [n, width] on the host, and intact, bool [n]."""
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

    def _copy(self, parts: list[Tensor], *, from_table: bool = False) -> Tensor:
        """Copy rows to the device on the copy stream, concatenated. from_table: parts are views of the host table."""
        if self._copy_stream is None:
            return torch.cat(parts)
        with torch.cuda.stream(self._copy_stream):
            copied = torch.empty((sum(map(len, parts)), self.width), dtype=self.dtype, device=self.device)
            start = 0
            for part in parts:
                copied[start : start + len(part)].copy_(part, non_blocking=True)
                start += len(part)
            if from_table and self._host_read is not None:
                self._host_read.record(self._copy_stream)
        copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    def _wait_for_copies(self) -> None:
        """Make the current stream wait for the copy stream; the host does not wait."""
        if self._copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Order uses of the device table: the block runs after earlier uses, which may be on other streams."""
        with torch.cuda.device(self.device) if self._cuda else nullcontext():
            if self._device_used is not None:
                self._device_used.wait()
            yield
            if self._device_used is not None:
                self._device_used.record()

    def _indices(self, numbers: NDArray[np.int64]) -> Tensor:
        return numbers_on(self.device, numbers)

    # -- filling the tables ---------------------------------------------------------------------------------

    def _keep_on_device(self, rows: Rows, values: Tensor, intact: NDArray[np.bool_]) -> None:
        if self.on_device is None:
            return
        slots, chosen = _place_intact(self.on_device, rows, intact)
        if len(slots):
            self.on_device.values.index_copy_(0, self._indices(slots), values.index_select(0, self._indices(chosen)))

    def _keep_on_host(self, rows: Rows, values: Tensor, intact: NDArray[np.bool_]) -> None:
        if self.on_host is None:
            return
        if self._host_read is not None:
            self._host_read.synchronize()  # a copy may still read rows that are evicted now
        slots, chosen = _place_intact(self.on_host, rows, intact)
        self.on_host.values[torch.from_numpy(slots)] = values[torch.from_numpy(chosen)]

    def _sync_with_bank(self) -> None:
        """Remove the rows that the bank has dropped; after a renumbering of its rows, all."""
        if self._renumberings == self.bank.renumberings and self._dead is self.bank.dead:
            return
        if self._host_read is not None:
            self._host_read.synchronize()
        for table in filter(None, (self.on_device, self.on_host)):
            if self._renumberings != self.bank.renumberings:
                table.clear()
            else:
                table.drop(np.setdiff1d(self.bank.dead, self._dead))
        self._renumberings, self._dead = self.bank.renumberings, self.bank.dead


def levels_of(bank: Bank, device: torch.device, config: CacheConfig, *, tokens: int = 1) -> DeviceCache | None:
    """Return the device cache that the settings ask for.

    None if they ask for none, or, with a warning, if there is not enough memory.
    """
    sizes = {"device_bytes": config.device_bytes, "pinned_bytes": config.pinned_bytes}
    if not any(sizes.values()):
        return None
    try:
        return DeviceCache(bank, device, tokens=tokens, **sizes)
    except ConfigError as error:  # the settings may come from another machine, and a cache must not stop a run
        log.warning("%s. Going on with the files alone", error)
        return None


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor; a read-only one (mapped from a file) is copied, since torch warns about those."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def numbers_on(device: torch.device, numbers: NDArray[np.int64]) -> Tensor:
    """Copy row numbers or indices to a device, int64; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _none(*_: object) -> None:
    """Return None, in place of a stream or an event where there is no GPU."""


def _place_intact(table: ClockTable, rows: Rows, intact: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Assign slots to the intact rows, each once, as far as there are slots.

    Returns the slots, and the indices of their rows in `rows`; both int64.
    """
    _, first = np.unique(rows[intact], return_index=True)
    chosen = np.flatnonzero(intact)[np.sort(first)][: len(table.values)]
    chosen = chosen[table.find(rows[chosen]) < 0]
    return table.place(rows[chosen]), chosen

"""Storage of prompt prefixes: KV blocks in a bank, found by keys that are chained from the first token on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.payoff import Payoff
from llmcache.decoders.kv_buffer import KVBuffer
from llmcache.decoders.schedule import TokenSequence, next_key
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.maintenance.chains import block_source
from llmcache.model.keys import Seed

_SHORTEST = 4
"""Tokens after the last full KV block from which a shorter entry is stored where two rows diverge."""

BlockRecords = dict[int, Floats32 | Tensor]
"""Contents of KV blocks by row number of the bank: float32 [tokens, record], on the host or the device."""


class BlockStore:
    """KV blocks of rows of tokens in a bank: full blocks, and one shorter entry where a row ended or two rows diverged.

    block: tokens in a full KV block.
    """

    def __init__(
        self,
        bank: Bank,
        seed: Seed,
        put: Callable[..., Any],
        block: int,
        worth: Payoff | None = None,
        levels: DeviceCache | None = None,
    ) -> None:
        """Make a store on a bank.

        seed: of all keys. put: stores entries, see `PrefixCache`. block: tokens in a full KV block.
        worth: decides which rows are looked up; None looks up all. levels: device and host memory for full KV blocks.
        """
        self.bank, self.block, self.levels = bank, block, levels
        self._seed, self._put, self._payoff = seed, put, worth

    def with_bank(self, bank: Any, block: int = 4) -> BlockStore:
        """Return a copy for another bank, without payoff rules and memory levels. bank: must also have `put`."""
        return BlockStore(bank, self._seed, bank.put, block)

    # -- look-up --------------------------------------------------------------------------------------------

    def look_up(self, rows: Sequence[TokenSequence]) -> BlockRecords:
        """Look up the prefixes of rows. Sets their keys, missing, chain and known; returns the contents of KV blocks.

        Token ids and checksums of an entry are compared before it is used.
        """
        tokens: dict[int, bytes] = {}
        for row in rows:
            row.keys = self._keys(row)
        tried, in_memory = self._tried(rows)
        self._chain(tried, tokens)
        self._look_up_ends(tried, tokens)
        if in_memory:  # no file is read for these rows: they use blocks up to the first missing one, and store none
            self._chain(in_memory, tokens, memory_only=True)
            for row in in_memory:
                row.missing = []
        return self._read([*tried, *in_memory])

    def _tried(self, rows: Sequence[TokenSequence]) -> tuple[Sequence[TokenSequence], Sequence[TokenSequence]]:
        """Return the rows to look up, and further rows to look up in memory only, where their first block is."""
        if self._payoff is None:
            return rows, ()
        selected = self._payoff.select_for_lookup(len(rows), memory=self.levels is not None)
        with_memory = selected
        if self.levels is not None and len(selected) < len(rows):
            with_memory = self._payoff.with_memory(selected, self.levels, lambda: self._first(rows))
        return [rows[i] for i in selected.tolist()], [rows[i] for i in np.setdiff1d(with_memory, selected).tolist()]

    def _first(self, rows: Sequence[TokenSequence]) -> Rows:
        """Return the row number of each row's first KV block, int64 [n]; -1 where there is none."""
        numbers, full = np.full(len(rows), -1, np.int64), [i for i, row in enumerate(rows) if row.keys]
        numbers[full] = self._find([rows[i].keys[0] for i in full])
        return numbers

    def _chain(self, rows: Sequence[TokenSequence], tokens: dict[int, bytes], *, memory_only: bool = False) -> None:
        """Set missing, chain and known of each row, by its full KV blocks. memory_only: use blocks in memory only."""
        found_numbers = self._find([key for row in rows for key in row.keys])
        usable_blocks = [True] * len(found_numbers)
        if memory_only and self.levels:
            usable_blocks = self.levels.holds(np.array(found_numbers, np.int64)).tolist()
        blocks = iter(zip(found_numbers, usable_blocks, strict=True))
        for row in rows:
            numbers = [next(blocks) for _ in row.keys]
            row.missing = [place for place, (number, _) in enumerate(numbers) if number < 0]
            for place, (number, usable) in enumerate(numbers):
                if number < 0 or not usable or not self._same(number, row, place * self.block, self.block, tokens):
                    break
                row.chain += (number,)
            row.known = len(row.chain) * self.block

    def _keys(self, row: TokenSequence) -> list[bytes]:
        """Return the keys of a row's full KV blocks."""
        keys, previous = [], b""
        for at in range(0, len(row) - self.block + 1, self.block):
            previous = self._key(row, at, self.block, previous)
            keys.append(previous)
        return keys

    def _key(self, row: TokenSequence, at: int, tokens: int, previous: bytes) -> bytes:
        return next_key(self._seed, previous, row.start + at, row.ids[at : at + tokens])

    def first_key(self, row: TokenSequence) -> bytes:
        """Return the key of a row's first KV block."""
        return self._key(row, 0, self.block, b"")

    def _end_key(self, row: TokenSequence, stop: int) -> bytes:
        """Return the key of the shorter entry that ends before token `stop`, inside a KV block."""
        full = stop // self.block
        return self._key(row, full * self.block, stop - full * self.block, row.keys[full - 1] if full else b"")

    def _look_up_ends(self, rows: Sequence[TokenSequence], tokens: dict[int, bytes]) -> None:
        """Look up a shorter entry, of any length, after the last known full block of each row: hashing is cheap."""
        stops = [range(row.known + 1, min(row.known + self.block, len(row) + 1)) for row in rows]
        keys = [self._end_key(row, stop) for row, row_stops in zip(rows, stops, strict=True) for stop in row_stops]
        end_numbers = iter(self._find(keys))
        for row, row_stops in zip(rows, stops, strict=True):
            at, longest = row.known, -1
            for stop in row_stops:
                number = next(end_numbers)
                if number >= 0 and self._same(number, row, at, stop - at, tokens):
                    row.known, longest = stop, number
            row.chain += (longest,) if longest >= 0 else ()

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        return self.bank.find(np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)).tolist()  # type: ignore[no-any-return]

    def _same(self, number: int, row: TokenSequence, at: int, length: int, tokens: dict[int, bytes]) -> bool:
        """Return whether an entry has the token ids of this stretch of a row. tokens: ids of entries read before."""
        if number not in tokens:
            tokens[number] = self.bank.tokens(number).tobytes()
        return tokens[number] == row.ids[at : at + length].tobytes()

    def _read(self, rows: Sequence[TokenSequence]) -> BlockRecords:
        """Return the contents of the rows' KV blocks. Shortens a row's chain at the first block that is damaged."""
        numbers = sorted({number for row in rows for number in row.chain})
        if not numbers:
            return {}
        full = {number for row in rows for number in row.chain[: row.known // self.block]} if self.levels else set()
        records = self._gathered(np.array(sorted(full), np.int64))
        numbers = [number for number in numbers if number not in full]
        rest = np.array(numbers, np.int64)
        with nullcontext() if self._payoff is None else self._payoff.loading(rest):
            reading = self.bank.read(rest)
        read = zip(numbers, reading.values, reading.intact.tolist(), strict=True)
        records |= {number: record for number, record, intact in read if intact}
        for row in rows:
            for place, number in enumerate(row.chain):
                if number not in records:
                    row.missing += [place] if place < len(row.keys) else []
                    row.chain, row.known = row.chain[:place], place * self.block
                    break
        return records

    def _gathered(self, numbers: Rows) -> BlockRecords:
        """Return full KV blocks on the device, read through the memory levels."""
        if self.levels is None or not len(numbers):
            return {}
        with nullcontext() if self._payoff is None else self._payoff.loading(numbers, self.levels):
            values, intact = self.levels.gather(numbers)
        blocks = values.view(len(numbers), self.block, -1).unbind(0)
        gathered = zip(numbers.tolist(), blocks, intact.tolist(), strict=True)
        return {number: block for number, block, good in gathered if good}

    # -- storing --------------------------------------------------------------------------------------------

    def store(
        self,
        places: Mapping[TokenSequence, tuple[KVBuffer, int]],
        diverged: Sequence[tuple[TokenSequence, int]],
        seconds: float,
    ) -> None:
        """Store the KV blocks of these rows that the bank does not have.

        places: rows, each with the buffer and the number of its row there. diverged: rows, each with the number of
        tokens that another row of the call shares with it. seconds: of the model for one token.
        """
        wanted: dict[bytes, tuple[TokenSequence, int, int]] = {}  # key -> row, first token, end
        for row in places:
            for place in row.missing:
                wanted.setdefault(row.keys[place], (row, place * self.block, (place + 1) * self.block))
        ends = [(row, len(row)) for row in places if len(row) % self.block]
        ends += [(row, stop) for row, stop in diverged if stop % self.block >= _SHORTEST]
        keys = [self._end_key(row, stop) for row, stop in ends]
        for (row, stop), key, number in zip(ends, keys, self._find(keys), strict=True):
            if number < 0:
                wanted.setdefault(key, (row, stop // self.block * self.block, stop))
        if not wanted:
            return
        self._put(
            self.bank,
            np.frombuffer(b"".join(wanted), np.uint64).reshape(-1, 2),
            _records(list(wanted.values()), places),
            tokens=[row.ids[start:stop].copy() for row, start, stop in wanted.values()],
            sources=[self._source(row, start) for row, start, _ in wanted.values()],
            features=np.zeros((len(wanted), 0), np.float32),
            cost=np.array([seconds * (stop - start) for _, start, stop in wanted.values()], np.float32),
        )

    def _source(self, row: TokenSequence, start: int) -> str:
        """Return the source field of the KV block at token `start` of a row: the key of the block before it."""
        before = start // self.block
        return block_source(row.keys[before - 1] if before else b"")


def _records(
    wanted: Sequence[tuple[TokenSequence, int, int]], places: Mapping[TokenSequence, tuple[KVBuffer, int]]
) -> list[Floats32]:
    """Return the records of these stretches of rows. Adjacent stretches of a row are copied at once."""
    records: list[Floats32] = []
    at = 0
    while at < len(wanted):
        row, start, stop = wanted[at]
        until = at + 1
        while until < len(wanted) and wanted[until][0] is row and wanted[until][1] == stop:
            stop, until = wanted[until][2], until + 1
        buffer, i = places[row]
        whole = buffer.records(i, start, stop)
        records += [whole[low - start : high - start] for _, low, high in wanted[at:until]]
        at = until
    return records

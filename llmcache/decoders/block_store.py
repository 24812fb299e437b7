"""Stored beginnings of rows of tokens: blocks in a bank, found by keys that are chained from the first token on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.payoff import Payoff
from llmcache.decoders.kv_buffer import KVBuffer
from llmcache.decoders.schedule import TokenSequence, next_key
from llmcache.indexes.bank import Bank
from llmcache.indexes.maintenance.chains import block_source
from llmcache.model.keys import Seed

_SHORTEST = 4  # tokens behind the last full block that are worth an entry where rows part

Records = dict[int, NDArray[np.float32] | Tensor]


class BlockStore:
    """Full blocks of a row, and one shorter entry where it ended or where rows were seen to part."""

    def __init__(
        self,
        bank: Bank,
        seed: Seed,
        put: Callable[..., Any],
        block: int,
        worth: Payoff | None = None,
        levels: DeviceCache | None = None,
    ) -> None:
        self.bank, self.block, self.levels = bank, block, levels
        self._seed, self._put, self._worth = seed, put, worth

    def with_bank(self, bank: Any, block: int = 4) -> BlockStore:
        """Copy for another bank, without bypassing. bank: must also have `put`."""
        return BlockStore(bank, self._seed, bank.put, block)

    # -- finding --------------------------------------------------------------------------------------------

    def look_up(self, rows: Sequence[TokenSequence]) -> Records:
        """Set keys, missing, chain and known of each row; what the bank has for them, by its row numbers.

        Token ids are compared, and checksums, before an entry is believed.
        """
        tokens: dict[int, bytes] = {}
        for row in rows:
            row.keys = self._keys(row)
        tried, in_memory = self._tried(rows)
        self._chain(tried, tokens)
        self._look_up_ends(tried, tokens)
        if in_memory:  # of these the files are left alone: up to the first block that is not held, and nothing is kept
            self._chain(in_memory, tokens, held=True)
            for row in in_memory:
                row.missing = []
        return self._read([*tried, *in_memory])

    def _tried(self, rows: Sequence[TokenSequence]) -> tuple[Sequence[TokenSequence], Sequence[TokenSequence]]:
        """Rows to be looked up, and others, whose first block is in memory, to be looked up there alone."""
        if self._worth is None:
            return rows, ()
        some = self._worth.select_for_lookup(len(rows), memory=self.levels is not None)
        held = some
        if self.levels is not None and len(some) < len(rows):
            held = self._worth.with_memory(some, self.levels, lambda: self._first(rows))
        return [rows[i] for i in some.tolist()], [rows[i] for i in np.setdiff1d(held, some).tolist()]

    def _first(self, rows: Sequence[TokenSequence]) -> NDArray[np.int64]:
        """Number of the first block of each row, -1 where there is none; int64 [n]."""
        numbers, full = np.full(len(rows), -1, np.int64), [i for i, row in enumerate(rows) if row.keys]
        numbers[full] = self._find([rows[i].keys[0] for i in full])
        return numbers

    def _chain(self, rows: Sequence[TokenSequence], tokens: dict[int, bytes], *, held: bool = False) -> None:
        """Set missing, chain and known of each row, by its full blocks. held: go by what memory holds alone."""
        found = self._find([key for row in rows for key in row.keys])
        there = self.levels.holds(np.array(found, np.int64)).tolist() if held and self.levels else [True] * len(found)
        blocks = iter(zip(found, there, strict=True))
        for row in rows:
            numbers = [next(blocks) for _ in row.keys]
            row.missing = [place for place, (number, _) in enumerate(numbers) if number < 0]
            for place, (number, usable) in enumerate(numbers):
                if number < 0 or not usable or not self._same(number, row, place * self.block, self.block, tokens):
                    break
                row.chain += (number,)
            row.known = len(row.chain) * self.block

    def _keys(self, row: TokenSequence) -> list[bytes]:
        keys, previous = [], b""
        for at in range(0, len(row) - self.block + 1, self.block):
            previous = self._key(row, at, self.block, previous)
            keys.append(previous)
        return keys

    def _key(self, row: TokenSequence, at: int, tokens: int, previous: bytes) -> bytes:
        return next_key(self._seed, previous, row.start + at, row.ids[at : at + tokens])

    def first_key(self, row: TokenSequence) -> bytes:
        """Key of the first block of a row."""
        return self._key(row, 0, self.block, b"")

    def _end_key(self, row: TokenSequence, stop: int) -> bytes:
        """Key of the shorter entry that ends before token `stop`, which is not where a block ends."""
        full = stop // self.block
        return self._key(row, full * self.block, stop - full * self.block, row.keys[full - 1] if full else b"")

    def _look_up_ends(self, rows: Sequence[TokenSequence], tokens: dict[int, bytes]) -> None:
        """Look behind the last full block of each row for a shorter entry, of any length: hashing is cheap."""
        stops = [range(row.known + 1, min(row.known + self.block, len(row) + 1)) for row in rows]
        keys = [self._end_key(row, stop) for row, each in zip(rows, stops, strict=True) for stop in each]
        found = iter(self._find(keys))
        for row, each in zip(rows, stops, strict=True):
            at, longest = row.known, -1
            for stop in each:
                number = next(found)
                if number >= 0 and self._same(number, row, at, stop - at, tokens):
                    row.known, longest = stop, number
            row.chain += (longest,) if longest >= 0 else ()

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        return self.bank.find(np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)).tolist()  # type: ignore[no-any-return]

    def _same(self, number: int, row: TokenSequence, at: int, length: int, tokens: dict[int, bytes]) -> bool:
        if number not in tokens:
            tokens[number] = self.bank.tokens(number).tobytes()
        return tokens[number] == row.ids[at : at + length].tobytes()

    def _read(self, rows: Sequence[TokenSequence]) -> Records:
        numbers = sorted({number for row in rows for number in row.chain})
        if not numbers:
            return {}
        full = {number for row in rows for number in row.chain[: row.known // self.block]} if self.levels else set()
        records = self._gathered(np.array(sorted(full), np.int64))
        numbers = [number for number in numbers if number not in full]
        rest = np.array(numbers, np.int64)
        with nullcontext() if self._worth is None else self._worth.loading(rest):
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

    def _gathered(self, numbers: NDArray[np.int64]) -> Records:
        """Whole blocks on the device, by way of the levels."""
        if self.levels is None or not len(numbers):
            return {}
        with nullcontext() if self._worth is None else self._worth.loading(numbers, self.levels):
            values, intact = self.levels.gather(numbers)
        parts = values.view(len(numbers), self.block, -1).unbind(0)
        every = zip(numbers.tolist(), parts, intact.tolist(), strict=True)
        return {number: part for number, part, good in every if good}

    # -- storing --------------------------------------------------------------------------------------------

    def store(
        self,
        held: Mapping[TokenSequence, tuple[KVBuffer, int]],
        parted: Sequence[tuple[TokenSequence, int]],
        seconds: float,
    ) -> None:
        """Put what the bank does not have of these rows. parted: rows, and after how many tokens others left them.

        seconds: of the model for one token.
        """
        wanted: dict[bytes, tuple[TokenSequence, int, int]] = {}  # key -> row, and from which token to which
        for row in held:
            for place in row.missing:
                wanted.setdefault(row.keys[place], (row, place * self.block, (place + 1) * self.block))
        ends = [(row, len(row)) for row in held if len(row) % self.block]
        ends += [(row, stop) for row, stop in parted if stop % self.block >= _SHORTEST]
        keys = [self._end_key(row, stop) for row, stop in ends]
        for (row, stop), key, number in zip(ends, keys, self._find(keys), strict=True):
            if number < 0:
                wanted.setdefault(key, (row, stop // self.block * self.block, stop))
        if not wanted:
            return
        self._put(
            self.bank,
            np.frombuffer(b"".join(wanted), np.uint64).reshape(-1, 2),
            _records(list(wanted.values()), held),
            tokens=[row.ids[start:stop].copy() for row, start, stop in wanted.values()],
            sources=[self._source(row, start) for row, start, _ in wanted.values()],
            features=np.zeros((len(wanted), 0), np.float32),
            cost=np.array([seconds * (stop - start) for _, start, stop in wanted.values()], np.float32),
        )

    def _source(self, row: TokenSequence, start: int) -> str:
        """Source field of the block that begins at token `start` of a row: the key of the block before it."""
        before = start // self.block
        return block_source(row.keys[before - 1] if before else b"")


def _records(
    wanted: Sequence[tuple[TokenSequence, int, int]], held: Mapping[TokenSequence, tuple[KVBuffer, int]]
) -> list[NDArray[np.float32]]:
    """Records of these stretches of rows; those next to each other in a row are copied at once."""
    records: list[NDArray[np.float32]] = []
    at = 0
    while at < len(wanted):
        row, start, stop = wanted[at]
        until = at + 1
        while until < len(wanted) and wanted[until][0] is row and wanted[until][1] == stop:
            stop, until = wanted[until][2], until + 1
        memory, i = held[row]
        whole = memory.records(i, start, stop)
        records += [whole[low - start : high - start] for _, low, high in wanted[at:until]]
        at = until
    return records

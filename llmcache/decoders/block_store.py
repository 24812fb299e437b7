"""Storage of prompt prefixes: KV blocks in a bank, found by keys that are chained from the first token on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.banks.reader import BankReader
from llmcache.decoders.kv_buffer import KVBuffer
from llmcache.decoders.kv_encoding import KVEncoding
from llmcache.decoders.schedule import TokenSequence, next_key
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.maintenance.chains import block_source
from llmcache.model.keys import Seed

_SHORTEST = 4
"""Tokens after the last full KV block from which a shorter entry is stored where two rows diverge."""

BlockRecords = dict[int, Floats32 | Tensor]
"""Contents of KV blocks by row number of the bank: [tokens, width] as stored, on the host (float32) or the device."""


class BlockStore:
    """KV blocks of rows of tokens in a bank: full blocks, and one shorter entry where a row ended or two rows diverged.

    block: tokens in a full KV block. encoding: stored form of the records.
    """

    def __init__(
        self, reader: BankReader, seed: Seed, put: Callable[..., Any], block: int, encoding: KVEncoding
    ) -> None:
        """Make a store on a bank.

        reader: of the bank; its device cache, if it has one, is for full KV blocks. seed: of all keys.
        put: stores entries, see `PrefixCache`. block: tokens in a full KV block. encoding: that of the bank.
        """
        self.bank, self.block, self.encoding = reader.bank, block, encoding
        self._reader, self._seed, self._put = reader, seed, put

    def with_bank(self, bank: Any, block: int = 4) -> BlockStore:
        """Return a copy for another bank, without payoff rules, memory levels and rounding.

        bank: must also have `put`.
        """
        return BlockStore(BankReader(bank), self._seed, bank.put, block, KVEncoding.of(self.encoding.shape))

    # -- look-up --------------------------------------------------------------------------------------------

    def look_up(self, rows: Sequence[TokenSequence]) -> BlockRecords:
        """Look up the prefixes of rows. Sets their keys, missing, chain and known; returns the contents of KV blocks.

        Token ids and checksums of an entry are compared before it is used.
        """
        for row in rows:
            row.keys = self._keys(row)
        first = [row.keys[0] if row.keys else self.first_key(row) for row in rows]
        tried, in_memory = ([rows[i] for i in some.tolist()] for some in self._reader.select(len(rows), _joined(first)))
        self._chain(tried)
        self._look_up_ends(tried)
        if in_memory:  # no file is read for these rows: they use blocks up to the first missing one, and store none
            self._chain(in_memory, in_memory=True)
            for row in in_memory:
                row.missing = []
        return self._read([*tried, *in_memory])

    def known(self, rows: Sequence[TokenSequence]) -> list[int]:
        """Return how many leading tokens of each row have full KV blocks in the bank."""
        for row in rows:
            row.keys = self._keys(row)
        self._chain(rows)
        return [row.known for row in rows]

    def _chain(self, rows: Sequence[TokenSequence], *, in_memory: bool = False) -> None:
        """Set missing, chain and known of each row, by its full KV blocks. in_memory: use blocks in memory only."""
        block = self.block
        ids = [row.ids[place * block : (place + 1) * block] for row in rows for place in range(len(row.keys))]
        keys = _joined([key for row in rows for key in row.keys])
        found = iter(self._reader.lookup(keys, ids, in_memory=in_memory).tolist())
        for row in rows:
            numbers = [next(found) for _ in row.keys]
            row.missing = [place for place, number in enumerate(numbers) if number < 0]
            row.chain = tuple(takewhile(lambda number: number >= 0, numbers))
            row.known = len(row.chain) * block

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

    def _look_up_ends(self, rows: Sequence[TokenSequence]) -> None:
        """Look up a shorter entry, of any length, after the last known full block of each row: hashing is cheap."""
        ends = [(row, stop) for row in rows for stop in range(row.known + 1, min(row.known + self.block, len(row) + 1))]
        keys = _joined([self._end_key(row, stop) for row, stop in ends])
        numbers = self._reader.lookup(keys, [row.ids[row.known : stop] for row, stop in ends]).tolist()
        longest = {row: (stop, number) for (row, stop), number in zip(ends, numbers, strict=True) if number >= 0}
        for row, (stop, number) in longest.items():
            row.known = stop
            row.chain += (number,)

    def _read(self, rows: Sequence[TokenSequence]) -> BlockRecords:
        """Return the contents of the rows' KV blocks. Shortens a row's chain at the first block that is damaged."""
        full = {number for row in rows for number in row.chain[: row.known // self.block]}
        short = {number for row in rows for number in row.chain} - full
        records = self._loaded(full, on_device=True) | self._loaded(short)
        for row in rows:
            for place, number in enumerate(row.chain):
                if number not in records:
                    row.missing += [place] if place < len(row.keys) else []
                    row.chain, row.known = row.chain[:place], place * self.block
                    break
        return records

    def _loaded(self, numbers: set[int], *, on_device: bool = False) -> BlockRecords:
        """Return the KV blocks that are intact. on_device: through the device cache, where there is one."""
        if not numbers:
            return {}
        rows = sorted(numbers)
        values, intact = self._reader.load(np.array(rows, np.int64), on_device=on_device)
        records: Any = values.view(len(rows), self.block, -1).unbind(0) if isinstance(values, Tensor) else values
        return {row: record for row, record, good in zip(rows, records, intact.tolist(), strict=True) if good}

    # -- storing --------------------------------------------------------------------------------------------

    def store(
        self,
        places: Mapping[TokenSequence, tuple[KVBuffer, int]],
        diverged: Sequence[tuple[TokenSequence, int]],
        seconds: float,
    ) -> Keys:
        """Store the KV blocks of these rows that the bank does not have. Returns their keys, uint64 [n, 2].

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
        for (row, stop), key, number in zip(ends, keys, self.bank.find(_joined(keys)).tolist(), strict=True):
            if number < 0:
                wanted.setdefault(key, (row, stop // self.block * self.block, stop))
        stored = _joined(wanted)
        if not wanted:
            return stored
        self._put(
            self.bank,
            stored,
            _records(list(wanted.values()), places, self.encoding),
            tokens=[row.ids[start:stop].copy() for row, start, stop in wanted.values()],
            sources=[self._source(row, start) for row, start, _ in wanted.values()],
            features=np.zeros((len(wanted), 0), np.float32),
            cost=np.array([seconds * (stop - start) for _, start, stop in wanted.values()], np.float32),
        )
        return stored

    def _source(self, row: TokenSequence, start: int) -> str:
        """Return the source field of the KV block at token `start` of a row: the key of the block before it."""
        before = start // self.block
        return block_source(row.keys[before - 1] if before else b"")


def _joined(keys: Iterable[bytes]) -> Keys:
    """Return keys as an array, uint64 [n, 2]."""
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


def _records(
    wanted: Sequence[tuple[TokenSequence, int, int]],
    places: Mapping[TokenSequence, tuple[KVBuffer, int]],
    encoding: KVEncoding,
) -> list[Floats32]:
    """Return the encoded records of these stretches of rows. Adjacent stretches of a row are copied at once."""
    records: list[Floats32] = []
    at = 0
    while at < len(wanted):
        row, start, stop = wanted[at]
        until = at + 1
        while until < len(wanted) and wanted[until][0] is row and wanted[until][1] == stop:
            stop, until = wanted[until][2], until + 1
        buffer, i = places[row]
        whole = encoding.encode(buffer.records(i, start, stop))
        records += [whole[low - start : high - start] for _, low, high in wanted[at:until]]
        at = until
    return records

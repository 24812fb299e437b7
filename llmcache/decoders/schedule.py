"""Order of computation for rows with shared prefixes: which rows wait for others, and which share a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmcache.model.keys import KEY_BYTES, Seed, framed


@dataclass(eq=False)
class TokenSequence:
    """A row of a call without its padding.

    ids: int32 [tokens]. start: position of the first token. place: number of the first such row in the batch.
    keys: of its full KV blocks. missing: numbers of the full blocks that the bank does not have.
    chain: row numbers of the bank with its prefix. known: tokens at the start that need not be computed.
    """

    ids: NDArray[np.int32]
    start: int
    place: int
    keys: list[bytes] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    chain: tuple[int, ...] = ()
    known: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def next_key(seed: Seed, previous: bytes, position: int, ids: NDArray[np.int32]) -> bytes:
    """Return the key of a KV block, over its ids, the position of its first token, and the key of the block before."""
    hashed = seed.copy()
    hashed.update(
        framed(previous, position.to_bytes(8, "little", signed=True), ids.astype("<i4", copy=False).tobytes())
    )
    return hashed.digest()[:KEY_BYTES]


def common(one: TokenSequence, other: TokenSequence) -> int:
    """Return the length in tokens of the common prefix of two rows."""
    if one.start != other.start:
        return 0
    n = min(len(one), len(other))
    differ = np.flatnonzero(one.ids[:n] != other.ids[:n])
    return int(differ[0]) if len(differ) else n


class PrefixSchedule:
    """Schedule of rows in waves, by their shared prefixes. Iterating yields the rows of each wave.

    In each wave a row is computed unless another row of the wave shares a long enough prefix with it. Such a row waits
    for the next wave and copies the prefix. All rows are different.
    forward: cost of a forward apart from its tokens, in tokens.
    """

    def __init__(self, rows: Sequence[TokenSequence], forward: int) -> None:
        self._forward = forward
        self.rows = sorted(rows, key=lambda row: (row.start, row.ids.tolist()))
        self._shared = [0, *(common(one, other) for one, other in zip(self.rows, self.rows[1:], strict=False))]
        self._donors: dict[TokenSequence, tuple[TokenSequence, int]] = {}
        self._done: set[TokenSequence] = {row for row in rows if row.known == len(row)}
        self._donating: set[TokenSequence] = set()

    def __iter__(self) -> Iterator[list[TokenSequence]]:
        while len(self._done) < len(self.rows):
            wave = self._chosen()
            yield wave
            self._done.update(wave)
            self._donating.update(wave)
            self._settle(range(len(self.rows)), 0)
            self._settle(range(len(self.rows) - 1, -1, -1), 1)

    def donor(self, row: TokenSequence) -> tuple[TokenSequence, int] | None:
        """Return the row that this row copies its prefix from, and the number of tokens; None without such a row."""
        return self._donors.get(row)

    def _chosen(self) -> list[TokenSequence]:
        """Return the rows of the next wave: all that are pending, unless waiting saves enough tokens."""
        chosen, shared, gained, unknown = [], 0, 0, 0
        pending = [row for row in self.rows if row not in self._done]
        for row, with_previous in zip(self.rows, self._shared, strict=True):
            shared = min(shared, with_previous)
            if row in self._done:
                continue
            rest, gain = len(row) - row.known, shared - row.known
            unknown += rest
            if gain >= max(4, rest // 10):
                gained += gain
                continue
            chosen.append(row)
            shared = len(row)
        return chosen if gained >= max(2 * self._forward, unknown // 10) else pending

    def _settle(self, order: Iterable[int], step: int) -> None:
        """Give waiting rows the prefix of the nearest computed row before them (step 0) or after them (step 1)."""
        donor, shared = None, 0
        for place in order:
            row = self.rows[place]
            if step == 0:
                shared = min(shared, self._shared[place])
            if row in self._donating:
                donor, shared = row, len(row)
            elif donor is not None and row not in self._done and shared > row.known:
                row.known, self._donors[row] = shared, (donor, shared)
            if step:
                shared = min(shared, self._shared[place])


def together(rows: Sequence[TokenSequence], forward: int) -> list[list[TokenSequence]]:
    """Split rows into groups for one forward each, with the least total cost of padding and forwards.

    A forward computes in each row as many tokens as the row with most unknown tokens has, and costs `forward` tokens
    in addition.
    """
    order = sorted(rows, key=lambda row: row.known - len(row))
    need = np.array([len(row) - row.known for row in order], np.int64)
    best, cut = np.zeros(len(order) + 1), [0] * (len(order) + 1)
    for stop in range(1, len(order) + 1):
        starts = np.arange(stop)
        cost = best[:stop] + need[:stop] * (stop - starts) + forward * (need[:stop] > 0)
        cut[stop] = int(cost.argmin())
        best[stop] = cost[cut[stop]]
    groups, stop = [], len(order)
    while stop:
        groups.append(order[cut[stop] : stop])
        stop = cut[stop]
    return groups[::-1]

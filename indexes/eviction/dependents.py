"""Rows that depend on other rows: a KV block of a decoder is useless without the blocks before it.

A bank of prefixes has a row per block of tokens. The source of a row names the previous block, by its key in
hexadecimal, or is `FIRST`. An eviction takes a block after the blocks that continue it, so that the beginnings of many
documents go last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.rows import Keys, Rows

FIRST = "first"
"""Source of the first block of a token sequence."""
KEY = re.compile(r"[0-9a-f]{32}")
"""Source of a block that continues another: the key of that block."""
_BANK = re.compile(r"prefix(-\w+)?")


def holds_chains(bank: str) -> bool:
    """Return whether a bank of this name holds KV blocks: "prefix", or "prefix-" and the type of its numbers."""
    return _BANK.fullmatch(bank) is not None


def previous_rows(keys: Keys, sources: Sequence[str]) -> Rows:
    """Return the place of the block that each block continues; int64 [n], -1 where there is none.

    keys: of the blocks, uint64 [n, 2]. sources: of the blocks.
    """
    previous = np.full(len(keys), -1, np.int64)
    places = np.array([place for place, source in enumerate(sources) if KEY.fullmatch(source)], np.int64)
    if len(places):
        named = bytes.fromhex("".join(sources[place] for place in places.tolist()))
        wanted = np.frombuffer(named, np.uint64).reshape(-1, 2)
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # the first words differ, except in a forged store
        nearest = order[np.minimum(np.searchsorted(keys[order, 0], wanted[:, 0]), len(keys) - 1)]
        previous[places] = np.where((keys[nearest] == wanted).all(axis=1), nearest, -1)
    return previous


def dependents_first(order: Rows, previous: Rows) -> Rows:
    """Move rows back in an order until none comes before a row that continues it, directly or through others.

    order: ranked rows, int64 [n]. previous: see `previous_rows`. Returns int64 [n].
    """
    rank, up = np.empty(len(order), np.int64), previous.copy()
    rank[order] = np.arange(len(order))
    depth = (up >= 0).astype(np.int64)
    for _ in range(len(order).bit_length()):  # twice as many generations each time; ends also for a forged cycle
        below = np.flatnonzero(up >= 0)
        if not len(below):
            break
        above = up[below]
        np.maximum.at(rank, above, rank[below])
        depth[below] += depth[above]
        up[below] = up[above]
    return np.lexsort((-depth, rank))


def needed_elsewhere(previous: Rows, segment: Rows, kept: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Find the kept rows that continue a row of another segment.

    segment: of each row, int64 [n]. kept: rows that an eviction would leave, bool [n].
    Returns the rows, and the nearest row before each that is in another segment; int64 [m] both.
    """
    up = previous.copy()
    for _ in range(len(up).bit_length()):
        inside = np.flatnonzero((up >= 0) & (segment[up] == segment))
        if not len(inside):
            break
        up[inside] = up[up[inside]]
    below = np.flatnonzero((up >= 0) & (segment[up] != segment) & kept)
    return below, up[below]

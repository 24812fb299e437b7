"""Sides of pairs of texts: near matches between a pair and a pair whose sides are exchanged.

The features of a pair are the mean of all its token embeddings, so those of (a, b) and (b, a) are equal although a
CrossEncoder scores them differently. Similarities say nothing about such matches, so they are refused by token ids: a
pair is no near match of entries with the same tokens in another order (`token_bags`), and not answered by entries that
differ from it mainly by tokens on the other side (`exchanged`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.rows import Rows
from llmcache.near.neighbors.correction import Tokens

_BITS = 33  # of a token id and a side
_BLOCK = 4096  # pairs of rows that are compared together, which bounds the memory


def exchanged(
    asked: Tokens, neighbours: Rows, eligible: NDArray[np.bool_], tokens_of: Callable[[Rows], Tokens]
) -> NDArray[np.bool_]:
    """Return which pairs have an eligible neighbour whose sides are exchanged, bool [n].

    asked: token ids of pairs. neighbours: entries that results are made of, int64 [n, k]. eligible: bool [n, k], see
    `correction.eligible_sources`. tokens_of: returns the token ids of entries.
    """
    wrong = np.zeros(len(asked), np.bool_)
    documents, places = np.nonzero(eligible)
    found = neighbours[documents, places]
    for start in range(0, len(documents), _BLOCK):
        part, rows = documents[start : start + _BLOCK], found[start : start + _BLOCK]
        wrong[part[sides_exchanged([asked[i] for i in part.tolist()], tokens_of(rows))]] = True
    return wrong


def token_bags(rows: Tokens) -> NDArray[np.uint64]:
    """Return a digest of the tokens of each row without their order, uint64 [n]."""
    if not len(rows):
        return np.zeros(0, np.uint64)
    ids = np.concatenate(rows).astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64: sums of its values collide as rarely as random numbers do
        ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        ids = (ids ^ ids >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        ids = (ids ^ ids >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        ids ^= ids >> np.uint64(31)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(ids)])  # modulo 2^64, as their differences
        return np.asarray(np.diff(sums[np.cumsum([0, *map(len, rows)])]), np.uint64)


def sides_exchanged(ones: Tokens, others: Tokens) -> NDArray[np.bool_]:
    """Return for pairs of token rows whether they differ mainly by tokens that are on the other side, bool [n].

    Compared are the tokens of each side without their order: `apart` counts those that one row has on a side more often
    than the other row, and `different` those that it has more often in all. A token that moved to the other side counts
    for the first only. Rows with the same tokens in another order count as exchanged too.
    """
    codes = np.concatenate([_coded(ones), _coded(others)])
    signs = np.repeat([1, -1], [sum(map(len, ones)), sum(map(len, others))])
    codes, counts = _sums(codes, signs)
    apart = np.bincount(codes >> _BITS, np.abs(counts), len(ones))
    codes, counts = _sums(codes >> 1, counts)
    different = np.bincount(codes >> _BITS - 1, np.abs(counts), len(ones))
    return np.asarray(2 * different <= apart, np.bool_)


def side_of(row: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which tokens of a pair are on its second side, bool [tokens].

    The sides are separated by the token that also ends the row, as [SEP] of BERT and </s> of RoBERTa do. A row without
    a separator has one side.
    """
    inside = np.flatnonzero(row[:-1] == row[-1]) if len(row) else np.zeros(0, np.int64)
    return np.arange(len(row)) >= (inside[0] if len(inside) else len(row))


def _coded(rows: Tokens) -> NDArray[np.int64]:
    """Pack number of the row, token id and side of every token into one integer, in this order of bits."""
    if not rows:
        return np.zeros(0, np.int64)
    numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    ids, sides = np.concatenate(rows).astype(np.int64), np.concatenate([side_of(row) for row in rows])
    return np.asarray(numbers << _BITS | ids << 1 | sides, np.int64)


def _sums(codes: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct codes, and the sum of the counts of each."""
    distinct, places = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(places, counts, len(distinct)).astype(np.int64)

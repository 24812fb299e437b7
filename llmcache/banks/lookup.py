"""Look documents up in a bank: first occurrences in a call, exact by verified tokens, nearest at similarity tau."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys

if TYPE_CHECKING:
    from torch import Tensor


def first_occurrences(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the first occurrence of each key, in order, and for every place that of its first occurrence.

    keys: uint64 [n, 2]. Returns int64 [distinct] and int64 [n].
    """
    halves = np.sort(keys[:, 0])
    if (halves[1:] != halves[:-1]).all():  # nothing is there twice, as in most calls
        return np.arange(len(keys)), np.arange(len(keys))
    _, first, which = np.unique(keys[:, 0], return_index=True, return_inverse=True)
    first = first[which]
    if np.array_equal(keys[first, 1], keys[:, 1]):  # else two keys have one half in common
        return np.flatnonzero(first == np.arange(len(keys))), first
    raw = keys.tobytes()
    seen: dict[bytes, int] = {}
    first = np.fromiter((seen.setdefault(raw[16 * i : 16 * i + 16], i) for i in range(len(keys))), np.int64, len(keys))
    return np.flatnonzero(first == np.arange(len(keys))), first


def exact_by_tokens(bank: Bank, keys: Keys, tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Rows whose key and whose token ids are those asked for, -1 elsewhere; int64 [n]."""
    rows = bank.find(keys)
    for i in np.flatnonzero(rows >= 0).tolist():
        if not np.array_equal(bank.tokens(int(rows[i])), tokens[i]):
            rows[i] = -1
    return rows


def near(
    bank: Bank, features: NDArray[np.float32] | Tensor, tau: float, scope: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Nearest row of this scope for each document at similarity >= tau, -1 where there is none, and the similarities,
    which may be -inf where there is none.

    Returns int64 [n] and float32 [n].
    """
    rows, similarity = bank.nearest(features, 1, scope=scope, least=tau)
    best, value = rows[:, 0], similarity[:, 0]
    return np.where(value >= tau, best, -1), value

"""Look-ups in a bank: first occurrences in a call, nearest neighbour at similarity tau."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys

if TYPE_CHECKING:
    from torch import Tensor


def first_occurrences(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find repeated keys. keys: uint64 [n, 2].

    Returns the ascending indices of first occurrences, int64 [distinct], and for every index that of the first
    occurrence of the same key, int64 [n].
    """
    halves = np.sort(keys[:, 0])
    if (halves[1:] != halves[:-1]).all():  # no repeats, as in most calls
        return np.arange(len(keys)), np.arange(len(keys))
    _, first, inverse = np.unique(keys[:, 0], return_index=True, return_inverse=True)
    first = first[inverse]
    if np.array_equal(keys[first, 1], keys[:, 1]):  # else two different keys share their first half
        return np.flatnonzero(first == np.arange(len(keys))), first
    raw = keys.tobytes()
    seen: dict[bytes, int] = {}
    first = np.fromiter((seen.setdefault(raw[16 * i : 16 * i + 16], i) for i in range(len(keys))), np.int64, len(keys))
    return np.flatnonzero(first == np.arange(len(keys))), first


def near(
    bank: Bank, features: NDArray[np.float32] | Tensor, tau: float, scope: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find each document's nearest row in this scope. features: float32 [n, feature width].

    Returns row numbers, int64 [n], -1 where no row has a similarity of at least tau; and the similarities,
    float32 [n], which may be -inf where the row is -1.
    """
    rows, similarity = bank.nearest(features, 1, scope=scope, least=tau)
    nearest, value = rows[:, 0], similarity[:, 0]
    return np.where(value >= tau, nearest, -1), value

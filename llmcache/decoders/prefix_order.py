"""Order of prompts by shared beginnings: a depth-first walk through their prefix tree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_DEEPER = 8
"""Tokens that rows must share beyond a node of the tree to be a node of their own. Shorter beginnings are not worth
separating rows of equal length."""


def prefix_order(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the numbers of rows of token ids so that rows with a common beginning stand together.

    Rows are leaves of a prefix tree, whose nodes are beginnings that several rows share. The children of a node are
    ordered by the tokens that they add, most first, so that consecutive rows need about as many new tokens. The order
    depends on the rows alone.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i], i))
    arrays = [np.asarray(rows[i], np.int64) for i in order]
    shared = [_common_prefix(one, other) for one, other in pairwise(arrays)]
    result: list[int] = []
    stack = [(0, len(order), 0)]  # first and last leaf of a subtree, and the tokens that all its leaves share
    while stack:
        first, stop, depth = stack.pop()
        if stop - first == 1:
            result.append(order[first])
            continue
        children = _children(shared, first, stop, depth)
        added = [max(len(arrays[i]) for i in range(low, high)) - depth for low, high, _ in children]
        ranked = sorted(range(len(children)), key=lambda i: (-added[i], i))
        stack += [children[i] for i in reversed(ranked)]
    return result


def _children(shared: Sequence[int], first: int, stop: int, depth: int) -> list[tuple[int, int, int]]:
    """Split the leaves `first` to `stop` of a node into subtrees: first and last leaf, and tokens that they share.

    shared: tokens that each leaf has in common with the next one. depth: tokens that all leaves of the node share.
    """
    children, low = [], first
    for i in range(first, stop):
        if i + 1 == stop or shared[i] < depth + _DEEPER:
            inner = min(shared[low:i], default=depth)
            children.append((low, i + 1, inner))
            low = i + 1
    return children


def _common_prefix(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return the length of the common prefix of two rows."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n

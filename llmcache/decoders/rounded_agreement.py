"""Comparison of rounded keys, values and states with recomputed ones, plane by plane.

A stored number differs from the model's by its own rounding, whose bound is known. A token that was computed after a
restored prefix also differs since that prefix was rounded. Where the first token beyond its bound is found, the rest is
therefore recomputed after the stored tokens before it. What is allowed beyond the bounds is measured on each plane:
noise between batch shapes and kernels (see `llmcache.banks.agreement`), and the effect of prefixes that the model has
computed and that are then rounded. Both are differences between recomputations of one model, so that a changed model
does not widen its own tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.banks.agreement import Agreement, Arrays, Recomputations, compared

_SLACK = 8.0
"""Multiple of the measured difference between batches and kernels that counts as noise, as in banks/agreement.py."""
_ROUNDING_SLACK = 3.0
"""Multiple of the measured effect of a rounded prefix that counts as rounding."""

Table = NDArray[np.float64]


def compared_rounded(
    stored: Arrays,
    errors: Arrays,
    recomputations: Recomputations,
    after: Callable[[int, Floats32], Floats32],
    rounded: Callable[[Floats32], Floats32],
    epsilon: float,
    groups: Sequence[int],
    block: int,
) -> Agreement:
    """Compare stored records with recomputed ones.

    stored: decoded, float32 [tokens, record] each. errors: largest rounding error of each of their numbers.
    recomputations: only the first is computed if it agrees within a few units of the arithmetic's rounding.
    after: `after(i, records)` recomputes the records of entry i after these records of its first tokens.
    rounded: rounds records as the store does. epsilon: of the model's arithmetic. block: tokens per KV block.
    groups: widths of the planes, of which each has its own noise.
    Returns the Agreement of the entry that differs most.
    """
    first = next(recomputations)
    units = compared(first, iter([first]), epsilon, "float32").allowed
    starts = np.concatenate([[0], np.cumsum(groups)[:-1]]).astype(np.int64)
    scales = [np.maximum(_largest(np.abs(records), starts).max(axis=0), np.finfo(np.float32).tiny) for records in first]

    def beyond(i: int, records: Floats32, start: int = 0) -> Table:
        """Return how far entry i differs beyond its rounding, relative to the plane, [tokens from `start`, planes]."""
        distance = _distance(stored[i][start:], records[start:]) - errors[i][start:]
        table: Table = np.maximum(_largest(distance, starts), 0) / scales[i]
        return table

    def apart(i: int, one: Floats32, other: Floats32) -> Table:
        """Return the largest difference of two recomputations of entry i, relative to the plane, [planes]."""
        table: Table = _largest(_distance(one, other), starts).max(axis=0) / scales[i]
        return table

    entries = range(len(stored))
    differences = [beyond(i, first[i]) for i in entries]
    allowed = np.full(len(groups), units)
    if any((table > units).any() for table in differences):
        runs = [first, *recomputations]
        noise = np.max([apart(i, a[i], b[i]) for a, b in combinations(runs, 2) for i in entries], axis=0, initial=0.0)
        effect = np.zeros(len(groups))
        for i in entries:
            for run in runs:
                differences[i] = np.minimum(differences[i], beyond(i, run[i]))
            for split in _splits(block, len(first[i])):
                effect = np.maximum(effect, apart(i, first[i], after(i, rounded(first[i][:split]))))
        allowed = np.maximum(units, _SLACK * noise + _ROUNDING_SLACK * effect)
        for i in entries:
            _explain(differences[i], allowed, lambda start, i=i: beyond(i, after(i, stored[i][:start]), start), block)  # type: ignore[misc]
    ratios = [float((table / allowed).max(initial=0.0)) for table in differences]
    entry = int(np.argmax(ratios))
    plane = int(np.argmax((differences[entry] / allowed).max(axis=0)))
    absolute = float(_distance(stored[entry], first[entry]).max(initial=0.0))
    return Agreement(entry, float(differences[entry][:, plane].max()), float(allowed[plane]), absolute)


def _explain(table: Table, allowed: Table, recomputed: Callable[[int], Table], block: int) -> None:
    """Lower the differences of tokens that were computed after a restored prefix. Ends at the first that stay too high.

    table: differences of an entry, [tokens, planes]; changed. recomputed: `recomputed(start)` returns the differences
    from token `start` on after the stored tokens before it.
    """
    while len(late := np.flatnonzero((table > allowed).any(axis=1))):
        token = int(late[0])
        for start in (token // block * block, token):
            if start and (table[token] > allowed).any():
                table[start:] = np.minimum(table[start:], recomputed(start))
        if (table[token] > allowed).any():
            return


def _splits(block: int, tokens: int) -> list[int]:
    """Return numbers of first tokens to round: 1, 2, 4, ... blocks."""
    return [block << i for i in range(tokens.bit_length()) if block << i < tokens]


def _distance(one: Floats32, other: Floats32) -> Floats32:
    """Return absolute differences; 0 where both are the same infinity or NaN, infinite where one is not a number."""
    with np.errstate(invalid="ignore"):
        distance: Floats32 = np.abs(one - other)
    distance[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    distance[np.isnan(distance)] = np.inf
    return distance


def _largest(numbers: Floats32, starts: NDArray[np.int64]) -> Table:
    """Return the largest number of each plane, [tokens, planes]; NaN counts as 0."""
    return np.maximum.reduceat(np.nan_to_num(numbers, nan=0.0, posinf=np.inf), starts, axis=1).astype(np.float64)

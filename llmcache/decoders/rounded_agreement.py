"""Comparison of rounded keys, values and states with recomputed ones, plane by plane.

A stored number differs from the model's by its own rounding, whose bound is known. Numbers of tokens that were computed
after a restored prefix also differ since that prefix was rounded. This second part is measured, as other noise is (see
`llmcache.banks.agreement`): some tokens are recomputed after a prefix that is rounded in the same way.
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


def compared_rounded(
    stored: Arrays,
    errors: Arrays,
    recomputations: Recomputations,
    after_rounding: Callable[[], Arrays],
    epsilon: float,
    groups: Sequence[int],
) -> Agreement:
    """Compare stored records with recomputed ones.

    stored: decoded, float32 [tokens, record] each. errors: largest rounding error of each of their numbers.
    recomputations: only the first is computed if it agrees within a few units of the arithmetic's rounding.
    after_rounding: recomputes the records with their first tokens rounded as the store rounds them.
    epsilon: of the model's arithmetic. groups: widths of the planes, of which each has its own noise.
    Returns the Agreement of the entry that differs most.
    """
    first = next(recomputations)
    units = compared(first, iter([first]), epsilon, "float32").allowed
    starts = np.concatenate([[0], np.cumsum(groups)[:-1]]).astype(np.int64)
    scales = [np.maximum(_largest(np.abs(records), starts), np.finfo(np.float32).tiny) for records in first]

    def beyond(run: Arrays) -> NDArray[np.float64]:
        """Return the largest difference to a run beyond the rounding, relative to the plane, [entries, planes]."""
        parts = zip(stored, run, errors, scales, strict=True)
        return np.stack([_largest(_distance(a, b) - error, starts) / scale for a, b, error, scale in parts])

    def apart(one: Arrays, other: Arrays) -> NDArray[np.float64]:
        """Return the largest difference of two runs, relative to the plane, [entries, planes]."""
        return np.stack([_largest(_distance(a, b), starts) / s for a, b, s in zip(one, other, scales, strict=True)])

    difference = np.maximum(beyond(first), 0)
    allowed = np.full(difference.shape, units)
    if not (difference <= allowed).all():
        runs = [first, *recomputations]
        noise = np.max([apart(a, b) for a, b in combinations(runs, 2)], axis=(0, 1))
        rounded = after_rounding()
        effect = apart(first, rounded).max(axis=0)
        difference = np.maximum(np.min([beyond(run) for run in [*runs, rounded]], axis=0), 0)
        allowed = np.maximum(units, _SLACK * noise + _ROUNDING_SLACK * effect)[None].repeat(len(stored), axis=0)
    entry, plane = divmod(int(np.argmax(difference / allowed)), difference.shape[1])
    absolute = float(_distance(stored[entry], first[entry]).max(initial=0.0))
    return Agreement(entry, float(difference[entry, plane]), float(allowed[entry, plane]), absolute)


def _distance(one: Floats32, other: Floats32) -> Floats32:
    """Return absolute differences; 0 where both are the same infinity or NaN, infinite where one is not a number."""
    with np.errstate(invalid="ignore"):
        distance: Floats32 = np.abs(one - other)
    distance[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    distance[np.isnan(distance)] = np.inf
    return distance


def _largest(numbers: Floats32, starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the largest number of each plane over all tokens, [planes]."""
    return np.maximum.reduceat(np.nan_to_num(numbers, nan=0.0).max(axis=0), starts).astype(np.float64)

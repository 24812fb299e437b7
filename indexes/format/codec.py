"""Encoding of activations as float32, float16, bfloat16, or int8 with a scale per row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Names of the stored types and their bytes per number."""

_NEAR = 1 << 16  # numbers
_LARGEST = {
    "float32": np.finfo(np.float32).max,
    "float16": np.float32(65504),
    "bfloat16": np.float32(3.3895314e38),
    "int8": np.float32(3.3895314e38),  # 127 times a rounded scale must be finite
}


def encode(values: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Encode rows. values: float32 [n, numbers]. Returns uint8 [n, bytes], and scales, float32 [n], 1 except for int8.

    bfloat16 rounds to nearest even. Values of a bfloat16 or float16 model are restored bit for bit from that dtype.
    """
    values = np.ascontiguousarray(values, np.float32)
    scale = np.ones(len(values), np.float32)
    if dtype == "float32":
        stored: NDArray[np.generic] = values
    elif dtype == "float16":
        with np.errstate(over="ignore"):  # the caller checks for infinities
            stored = values.astype(np.float16)
    elif dtype == "bfloat16":
        bits = values.view(np.uint32)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        peak = np.abs(values).max(axis=1, initial=0.0)
        scale = np.where(peak > 0, np.maximum(peak / 127, np.finfo(np.float32).tiny), 1).astype(np.float32)
        stored = np.rint(values / scale[:, None]).astype(np.int8)
    return stored.view(np.uint8).reshape(len(values), values.shape[1] * DTYPES[dtype]), scale


def decode(stored: NDArray[np.uint8], scale: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Decode the result of `encode`. stored: contiguous uint8 [n, bytes]. Returns float32 [n, numbers]."""
    if dtype == "float32":
        return stored.view("<f4")
    if dtype == "float16":
        return stored.view("<f2").astype(np.float32)
    if dtype == "bfloat16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.int8) * scale[:, None]


def kept(
    values: NDArray[np.float32], dtype: str, place: Callable[[int, int], NDArray[np.uint8]]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8], NDArray[np.float32]]:
    """Encode the rows that are `representable`. The bytes never share memory with `values`.

    place: allocates uint8 [rows, bytes]. Returns which rows are encoded, bool [n], and `encode` of these.
    """
    if dtype != "float32" or not values.size:
        good = representable(values, dtype)
        return good, *encode(values[good], dtype)
    copy, good = place(len(values), 4 * values.shape[1]).view(np.float32), np.ones(len(values), np.bool_)
    for block in _blocks(values):
        copy[block] = values[block]
        good[block] = representable(copy[block], dtype)  # while the block is in the cache
    return good, *encode(copy if good.all() else copy[good], dtype)


def representable(values: NDArray[np.float32], dtype: str) -> NDArray[np.bool_]:
    """Return which rows are finite and within the range of `dtype`, bool [n]."""
    limit, good = _LARGEST[dtype], np.ones(len(values), np.bool_)
    for part in _blocks(values):
        block = values[part]  # small enough that `min` reads from the cache
        with np.errstate(invalid="ignore"):
            good[part] = (block.max(axis=1) <= limit) & (block.min(axis=1) >= -limit)  # NaN fails both comparisons
    return good


def _blocks(values: NDArray[np.float32]) -> list[slice]:
    """Split rows into slices that fit a core's cache. Returns no slices if rows have no numbers."""
    count, width = values.shape
    step = max(1, _NEAR // max(1, width))
    return [slice(start, start + step) for start in range(0, count if width else 0, step)]

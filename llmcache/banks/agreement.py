"""Compare stored outputs with recomputed ones, within the rounding noise that another batch shape causes.

A row that shares its batch with other rows, or was computed by another processor, is summed in another order, so its
numbers move in the last digits. How far is measured on the rows at hand, in batches of several shapes and by other
kernels, and only where a first recomputation does not agree within a few units of rounding anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel

Arrays: TypeAlias = Sequence[NDArray[np.float32]]
"""One array per entry: [width], or [tokens, width]."""
Recomputations: TypeAlias = Iterator[Arrays]
"""The same entries, computed again in batches of one shape after another; each is made when it is asked for."""

_SLACK = 8.0
"""Times the measured difference between batches and kernels that still counts as rounding. all-MiniLM-L6-v2 on a CPU,
entries of batches of 32 against four of them computed again: at most 1.3 times, in float32, float16 and bfloat16. The
rest is room for entries from another processor."""
_UNITS = {"single": 64.0, "half": 4.0}
"""Machine epsilons, relative to the largest number of a vector, that count as rounding without a measurement; for
float32, and for what is coarser. Re-batching alone makes up to 11 in float32 and 1.8 in float16 and bfloat16."""
_TINY = float(np.finfo(np.float32).tiny)
_STORED_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative rounding error of a stored number."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The result of one comparison, of the entry that agrees least.

    entry: its place. difference, allowed: relative to the largest number of the vector; infinite where one is not
    finite and the other is. absolute: largest absolute difference. agrees: whether all entries do. reason: what else
    differs, "" where it is the numbers.
    """

    entry: int
    difference: float
    allowed: float
    absolute: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


def machine_epsilon(module: Module, device: torch.device) -> float:
    """Relative spacing of the coarsest numbers that a module computes with on this device, at least that of float32.

    Counted are floating-point parameters of 16 bits or more, autocast, and reduced precision of float32 products
    (`torch.set_float32_matmul_precision`).
    """
    epsilons = [torch.finfo(torch.float32).eps]
    dtypes = {one.dtype for one in module.parameters() if one.is_floating_point() and one.element_size() > 1}
    epsilons += [torch.finfo(one).eps for one in dtypes]
    if torch.is_autocast_enabled(device.type):
        epsilons.append(torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        epsilons.append(2.0**-7 if precision == "medium" else 2.0**-10)
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32 and any(map(_is_convolution, module.modules())):
        epsilons.append(2.0**-10)
    return max(epsilons)


def _is_convolution(module: Module) -> bool:
    return type(module).__name__.startswith("Conv")


def compared(
    stored: Arrays,
    recomputations: Recomputations,
    epsilon: float,
    dtype: str,
    groups: Sequence[int] | None = None,
) -> Agreement:
    """Compare stored entries with the same entries computed again.

    stored: float32 [width] or [tokens, width] each. recomputations: only the first is asked for where it agrees within
    a few units of rounding; else all of them are, to measure what the shape of a batch changes, and the closest counts.
    epsilon: see `machine_epsilon`. dtype: of the store ("float32", "float16", "bfloat16" or "int8"), whose rounding is
    allowed for. groups: widths of the parts of a vector that have scales of their own (keys, values, states of single
    layers); None for one part. NaN agrees with NaN.
    """
    kind = "single" if epsilon <= torch.finfo(torch.float32).eps else "half"
    allowed = np.full(len(stored), _UNITS[kind] * epsilon)
    first = next(recomputations)
    scales = [_scales(one, groups) for one in first]
    relative = _differences(stored, first, scales, dtype)
    absolute = [float(np.abs(one - other).max(initial=0.0)) for one, other in zip(stored, first, strict=True)]
    if not (relative <= allowed).all():
        runs = [first, *recomputations]
        distances = np.stack([_differences(stored, run, scales, dtype) for run in runs])
        noise = max(
            (float(_finite(_differences(one, other, scales, "float32")).max()) for one, other in combinations(runs, 2)),
            default=0.0,
        )
        relative, allowed = distances.min(axis=0), np.maximum(allowed, _SLACK * noise)
    worst = int(np.argmax(relative / allowed))
    return Agreement(worst, float(relative[worst]), float(allowed[worst]), float(np.nan_to_num(absolute[worst])))


def _scales(array: NDArray[np.float32], groups: Sequence[int] | None) -> NDArray[np.float32]:
    """Largest absolute number of each vector, or of each of its groups, as an array that divides it."""
    magnitudes = np.abs(np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0))
    if groups is None:
        scales = magnitudes.max(axis=-1, keepdims=True, initial=0.0)
    else:
        starts = np.concatenate([[0], np.cumsum(groups)[:-1]])
        scales = np.repeat(np.maximum.reduceat(magnitudes, starts, axis=-1), groups, axis=-1)
    return np.asarray(np.maximum(scales, _TINY), np.float32)


def _differences(one: Arrays, other: Arrays, scales: Arrays, dtype: str) -> NDArray[np.float64]:
    """Largest relative difference of each entry beyond the rounding of the stored dtype, float64 [entries]."""
    return np.array([_difference(*arrays, dtype) for arrays in zip(one, other, scales, strict=True)], np.float64)


def _difference(one: NDArray[np.float32], other: NDArray[np.float32], scale: NDArray[np.float32], dtype: str) -> float:
    if one.shape != other.shape:
        return np.inf
    with np.errstate(invalid="ignore"):
        far = np.abs(one - other)
    far[(one == other) | (np.isnan(one) & np.isnan(other))] = 0  # equal infinities differ by NaN
    far[np.isnan(far)] = np.inf
    return float((np.maximum(far - _rounding(one, dtype), 0) / scale).max(initial=0.0))


def _rounding(stored: NDArray[np.float32], dtype: str) -> NDArray[np.float32] | float:
    """Largest rounding error of the stored dtype for each number."""
    if dtype == "int8":  # half a step, and the largest number is 127 steps
        return float(np.abs(np.nan_to_num(stored)).max(initial=0.0)) / 254 * 1.001
    if dtype in _STORED_EPSILON:
        return np.abs(np.nan_to_num(stored)) * np.float32(_STORED_EPSILON[dtype]) + np.float32(
            6e-8 if dtype == "float16" else 0
        )
    return 0.0


def _finite(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(numbers), numbers, 0.0)


def shapes(count: int, companions: int, run: Callable[[Sequence[int], int], Arrays]) -> Recomputations:
    """Recompute the first `count` of some rows in batches of several shapes, and by other kernels.

    companions: rows behind them that only share their batch. run: `run(places, size)` gives what these rows are, in
    batches of so many; places may repeat.
    """
    audited = list(range(count))
    yield run(audited, count)
    if count > 1:
        yield run(audited, 1)
    if companions:
        yield run(list(range(count + companions)), count + companions)[:count]
    times = max(2, -(-16 // count))
    yield run(audited * times, times * count)[:count]
    with other_kernels():
        yield run(audited, count)


@contextmanager
def other_kernels() -> Iterator[None]:
    """Inside, products and attention are computed by other kernels where there are some: as on another processor."""
    onednn: Any = torch.backends.mkldnn  # its own context manager sets more, and warns of that
    before = onednn.enabled
    onednn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        onednn.enabled = before

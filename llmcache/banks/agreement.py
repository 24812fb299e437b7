"""Compare stored outputs with recomputed ones, up to the rounding noise that another batch shape causes.

Another batch shape or another processor changes the order of summation, which changes the last digits of a row. This
noise is measured on the compared rows, in batches of several shapes and with other kernels, but only if a first
recomputation differs by more than a few units of rounding.
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

from llmcache.arrays import Floats32

Arrays: TypeAlias = Sequence[Floats32]
"""One float32 array per entry: [width], or [tokens, width]."""
Recomputations: TypeAlias = Iterator[Arrays]
"""Recomputed entries, one item per batch shape; computed lazily."""

_SLACK = 8.0
"""Multiple of the measured difference between batches and kernels that still counts as rounding. Measured with
all-MiniLM-L6-v2 on a CPU, entries of batches of 32 against four of them recomputed: at most 1.3 times, in float32,
float16 and bfloat16. The rest allows for entries from another processor."""
_UNITS = {"single": 64.0, "half": 4.0}
"""Machine epsilons, relative to the largest number of a vector, that count as rounding without a measurement: for
float32 ("single") and for coarser dtypes ("half"). Another batch shape alone causes up to 11 in float32 and 1.8 in
float16 and bfloat16."""
_TINY = float(np.finfo(np.float32).tiny)
_STORED_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative rounding error of a stored number."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Result of a comparison, for the entry that differs most.

    entry: its index. difference, allowed: relative to the largest number of the vector; the difference is infinite
    where one value is finite and the other is not. absolute: largest absolute difference. agrees: True if all entries
    agree. reason: text for a mismatch other than the numbers, else "".
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
    """Return the machine epsilon of the coarsest arithmetic that a module uses on this device; at least float32's.

    Considers floating-point parameters of 16 bits or more, autocast, and reduced precision of float32 products
    (`torch.set_float32_matmul_precision`).
    """
    epsilons = [torch.finfo(torch.float32).eps]
    floating = [weight for weight in module.parameters() if weight.is_floating_point()]
    dtypes = {weight.dtype for weight in floating if weight.element_size() > 1}
    epsilons += [torch.finfo(dtype).eps for dtype in dtypes]
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
    """Compare stored entries with recomputed ones.

    stored: float32 [width] or [tokens, width] each.
    recomputations: only the first is computed if it agrees within a few units of rounding. Otherwise all are computed,
        to measure the noise between batch shapes, and each entry is compared with its closest recomputation.
    epsilon: see `machine_epsilon`.
    dtype: dtype of the store ("float32", "float16", "bfloat16" or "int8"), whose rounding error is subtracted.
    groups: widths of the parts of a vector that have a scale of their own (keys, values, states of single layers);
        None for one part.
    Returns the Agreement of the entry that differs most. NaN agrees with NaN.
    """
    kind = "single" if epsilon <= torch.finfo(torch.float32).eps else "half"
    allowed = np.full(len(stored), _UNITS[kind] * epsilon)
    first = next(recomputations)
    scales = [_scales(array, groups) for array in first]
    relative = _differences(stored, first, scales, dtype)
    absolute = [
        float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else np.inf
        for a, b in zip(stored, first, strict=True)
    ]
    if not (relative <= allowed).all():
        runs = [first, *recomputations]
        distances = np.stack([_differences(stored, run, scales, dtype) for run in runs])
        noise = max(
            (float(_finite_or_zero(_differences(a, b, scales, "float32")).max()) for a, b in combinations(runs, 2)),
            default=0.0,
        )
        relative, allowed = distances.min(axis=0), np.maximum(allowed, _SLACK * noise)
    worst = int(np.argmax(relative / allowed))
    return Agreement(worst, float(relative[worst]), float(allowed[worst]), float(np.nan_to_num(absolute[worst])))


def _scales(array: Floats32, groups: Sequence[int] | None) -> Floats32:
    """Return the largest absolute number of each vector, or of each group, in a shape that divides the array."""
    magnitudes = np.abs(np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0))
    if groups is None:
        scales = magnitudes.max(axis=-1, keepdims=True, initial=0.0)
    else:
        starts = np.concatenate([[0], np.cumsum(groups)[:-1]])
        scales = np.repeat(np.maximum.reduceat(magnitudes, starts, axis=-1), groups, axis=-1)
    return np.asarray(np.maximum(scales, _TINY), np.float32)


def _differences(stored: Arrays, computed: Arrays, scales: Arrays, dtype: str) -> NDArray[np.float64]:
    """Return each entry's largest relative difference beyond the rounding of the stored dtype, float64 [entries]."""
    return np.array([_difference(*arrays, dtype) for arrays in zip(stored, computed, scales, strict=True)], np.float64)


def _difference(stored: Floats32, computed: Floats32, scale: Floats32, dtype: str) -> float:
    if stored.shape != computed.shape:
        return np.inf
    with np.errstate(invalid="ignore"):
        distance = np.abs(stored - computed)
    distance[(stored == computed) | (np.isnan(stored) & np.isnan(computed))] = 0  # equal infinities differ by NaN
    distance[np.isnan(distance)] = np.inf
    return float((np.maximum(distance - _rounding(stored, dtype), 0) / scale).max(initial=0.0))


def _rounding(stored: Floats32, dtype: str) -> Floats32 | float:
    """Return the largest rounding error of the stored dtype, for each number or for all."""
    if dtype == "int8":  # half a step, and the largest number is 127 steps
        return float(np.abs(np.nan_to_num(stored)).max(initial=0.0)) / 254 * 1.001
    if dtype in _STORED_EPSILON:
        return np.abs(np.nan_to_num(stored)) * np.float32(_STORED_EPSILON[dtype]) + np.float32(
            6e-8 if dtype == "float16" else 0
        )
    return 0.0


def _finite_or_zero(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(numbers), numbers, 0.0)


def shapes(count: int, companions: int, run: Callable[[Sequence[int], int], Arrays]) -> Recomputations:
    """Recompute rows 0 to `count` - 1 in batches of several shapes, and with other kernels.

    companions: number of rows after these that only fill up a batch.
    run: `run(places, size)` recomputes the rows at these places in batches of `size`; places may repeat.
    Yields the recomputed rows, once per shape.
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
    """Use other kernels for matrix products and attention inside the block, to imitate another processor.

    On a CPU oneDNN is off; attention uses the plain "math" implementation.
    """
    onednn: Any = torch.backends.mkldnn  # its own context manager changes more settings, with a warning
    before = onednn.enabled
    onednn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        onednn.enabled = before

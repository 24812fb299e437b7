"""Type aliases of arrays, arrays of objects, and the few steps by which functions serve arrays and tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats: TypeAlias = NDArray[np.floating]
"""Array of any floating-point dtype."""
Floats32: TypeAlias = NDArray[np.float32]
"""Array of float32."""
Array = TypeVar("Array", Floats32, "Tensor")
"""Array of float32 on the host, or tensor of float32 on any device; the arguments of one call are of one kind."""


def objects(items: Sequence[Any]) -> NDArray[Any]:
    """Return items as a one-dimensional array of objects, also if they are arrays of equal shape."""
    array = np.empty(len(items), object)
    for place, item in enumerate(items):
        array[place] = item
    return array


def namespace(array: Floats | Tensor) -> Any:
    """Return the module whose functions take this array: NumPy, or torch for a tensor."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


@overload
def single(array: NDArray[Any]) -> Floats32: ...
@overload
def single(array: Tensor) -> Tensor: ...
def single(array: NDArray[Any] | Tensor) -> Floats32 | Tensor:
    """Convert to float32; an array of float32 is returned as it is."""
    return np.asarray(array, np.float32) if isinstance(array, np.ndarray) else array.float()

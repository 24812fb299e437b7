"""Shared type aliases of arrays, and arrays of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating]
"""Array of any floating-point dtype."""
Floats32: TypeAlias = NDArray[np.float32]
"""Array of float32."""


def objects(items: Sequence[Any]) -> NDArray[Any]:
    """Return items as a one-dimensional array of objects, also if they are arrays of equal shape."""
    array = np.empty(len(items), object)
    for place, item in enumerate(items):
        array[place] = item
    return array

"""Shared type aliases of arrays."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating]
"""Array of any floating-point dtype."""
Floats32: TypeAlias = NDArray[np.float32]
"""Array of float32."""

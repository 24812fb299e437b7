"""Names of the array types that many modules share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating]
"""An array of any floating dtype."""
Floats32: TypeAlias = NDArray[np.float32]
"""An array of float32."""

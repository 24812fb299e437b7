"""A predictor's arithmetic on a device: from raw features to predicted outputs and fingerprints, in torch.

The same functions over arrays are `llmcache.predictor`; what they give differs by the rounding of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcache.predictor import Predictor

_BLOCK = 4096  # rows at a time: the kernel to all landmarks is [rows, landmarks]


class DevicePredictor:
    """The arrays of a `Predictor` on a device."""

    def __init__(self, predictor: Predictor, device: torch.device | str) -> None:
        names = ("mean", "matrix", "landmarks", "weights", "offset", "basis")
        arrays = {name: torch.from_numpy(getattr(predictor, name)).to(device) for name in names}
        self._mean, self._matrix, self._landmarks = (arrays[name] for name in names[:3])
        self._weights, self._offset, self._basis = (arrays[name] for name in names[3:])
        self._gamma = predictor.gamma

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Predicted outputs, float32 [n, out], of raw features [n, width] rounded as the stored ones are."""
        points = (features.float() - self._mean) @ self._matrix
        if not len(self._landmarks):
            return points @ self._weights + self._offset
        parts = [self._kernel(points[at : at + _BLOCK]) @ self._weights for at in range(0, len(points), _BLOCK)]
        return torch.cat([points.new_empty((0, len(self._offset))), *parts]) + self._offset

    def _kernel(self, points: Tensor) -> Tensor:
        """exp(-gamma d^2) to every landmark, by the product, whose rounding never lets d^2 fall below 0."""
        squares = (
            points.square().sum(1, keepdim=True) + self._landmarks.square().sum(1) - 2 * points @ self._landmarks.T
        )
        return torch.exp(-self._gamma * squares.clamp(min=0))

    @torch.inference_mode()
    def fingerprints(self, predicted: Tensor) -> Tensor:
        """Unit vectors of predicted outputs, float32 [n, dim]."""
        short = predicted @ self._basis
        unit: Tensor = short / short.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return unit

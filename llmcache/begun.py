"""A batch that a GPU computes while the host does something else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Begun:
    """One batch on its way: its kernels and the copy of its outputs to the host are queued, and nobody waits yet."""

    def __init__(self, vectors: Callable[[], Tensor], chosen: list[int]) -> None:
        """vectors: runs the model, [n, width] on a CUDA device. chosen: places of the rows."""
        self.chosen = chosen
        self._began, self._ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._copied = torch.cuda.Event()
        self._began.record()
        self._vectors = vectors()
        self._ended.record()
        self._host = torch.empty(self._vectors.shape, dtype=torch.float32, pin_memory=True)
        self._host.copy_(self._vectors.float(), non_blocking=True)
        self._copied.record()

    def wait(self) -> tuple[NDArray[np.float32], float, Tensor]:
        """Outputs on the host, float32 [n, width]; the seconds that the device took; outputs on the device."""
        self._copied.synchronize()
        seconds = self._began.elapsed_time(self._ended) / 1000
        return self._host.numpy(), seconds, self._vectors

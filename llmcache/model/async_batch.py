"""What is begun before it is needed: a batch on a GPU while the host does something else, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class AsyncBatch:
    """One batch on its way: its kernels and the copy of its outputs to the host are queued, and nobody waits yet."""

    def __init__(self, vectors: Callable[[], Tensor], chosen: list[int]) -> None:
        """vectors: runs the model, [n, width] on a CUDA device. chosen: places of the rows."""
        self.chosen = chosen
        event: Any = torch.cuda.Event  # which torch gives no types
        self._began, self._ended, self._copied = event(enable_timing=True), event(enable_timing=True), event()
        self._began.record()
        self._vectors = vectors()
        self._ended.record()
        self._host = torch.empty(self._vectors.shape, dtype=torch.float32, pin_memory=True)
        self._host.copy_(self._vectors.float(), non_blocking=True)
        self._copied.record()

    def wait(self) -> tuple[NDArray[np.float32], float, Tensor]:
        """Outputs on the host, float32 [n, width]; the seconds that the device took; outputs on the device."""
        self._copied.synchronize()
        seconds = float(self._began.elapsed_time(self._ended)) / 1000
        return self._host.numpy(), seconds, self._vectors


def one_ahead(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`map` whose next result a thread makes while the caller is busy with this one. An error comes in its turn."""
    if not items:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="llmcache-ahead") as thread:
        coming = thread.submit(work, items[0])
        for item in items[1:]:
            ready, coming = coming.result(), thread.submit(work, item)
            yield ready
        yield coming.result()

"""Asynchronous work: run a CUDA batch while the host works, and compute the next item in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcache.arrays import Floats32

T = TypeVar("T")
R = TypeVar("R")


class AsyncBatch:
    """One batch on a CUDA device, whose kernels and copy to the host are queued without waiting."""

    def __init__(self, vectors: Callable[[], Tensor], chosen: list[int]) -> None:
        """Queue a batch. vectors: runs the model, [n, width] on a CUDA device. chosen: numbers of the rows."""
        self.chosen = chosen
        event: Any = torch.cuda.Event  # untyped in torch
        self._began, self._ended, self._copied = event(enable_timing=True), event(enable_timing=True), event()
        self._began.record()
        self._vectors = vectors()
        self._ended.record()
        self._host = torch.empty(self._vectors.shape, dtype=torch.float32, pin_memory=True)
        self._host.copy_(self._vectors.float(), non_blocking=True)
        self._copied.record()

    def wait(self) -> tuple[Floats32, float, Tensor]:
        """Wait for the batch.

        Returns outputs on the host (float32 [n, width]), seconds of the device, and outputs on the device.
        """
        self._copied.synchronize()
        seconds = float(self._began.elapsed_time(self._ended)) / 1000
        return self._host.numpy(), seconds, self._vectors


def one_ahead(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Like `map`, but a thread computes the next result while the caller uses this one. Errors keep their place."""
    if not items:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="llmcache-ahead") as thread:
        pending = thread.submit(work, items[0])
        for item in items[1:]:
            ready, pending = pending.result(), thread.submit(work, item)
            yield ready
        yield pending.result()

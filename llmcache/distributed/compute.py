"""Backend of a cache whose misses are computed by the workers of a Ray cluster.

Look-ups, order and provenance are those of a single process. Only batches are computed elsewhere, by worker processes
that store and commit them. A batch has the same documents wherever it is computed, so results do not depend on the
number of workers, except that torch may round small batches differently with another number of threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from llmcache.cache import LLMCache
from llmcache.distributed.workers import WorkerConfig, Workers, library
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.encoding.compute import ComputedMisses
from llmcache.errors import ConfigError
from llmcache.model.description.process_settings import running_mode
from llmcache.opening import open_parts

_PER_WORKER = 4  # parts of a window per worker, so that no worker waits long for the last one


class RayCompute:
    """Backend whose batches are computed, stored and committed by workers."""

    stores = True

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def check(self, device: torch.device) -> None:
        """Refuse settings of this process that workers do not share, such as autocast, with ConfigError."""
        if mode := running_mode(device.type):
            raise ConfigError(f"workers do not compute under the settings of this process ({mode}); use one process")

    def batches(self, misses: Misses, call: EncodeCall) -> Generator[ComputedMisses]:
        """Compute all misses, longest documents first. Yields parts of whole batches, in this order."""
        order = np.argsort(-misses.tokens.lengths, kind="stable").tolist()
        parts = _parts(order, call.batch_size, self._workers.count)
        settings = EncodeCall([], None, None, call.role, call.batch_size)
        began = time.perf_counter()
        for part, done in zip(parts, self._workers.computed(map(misses.take, parts), settings), strict=True):
            yield ComputedMisses(part, done.outputs, done.cost, time.perf_counter() - began, stored=done.stored)
            began = time.perf_counter()

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started here."""
        self._workers.close()


def _parts(order: list[int], batch_size: int, workers: int) -> list[list[int]]:
    """Split documents into parts of whole batches, some parts per worker. order: their indices, in order."""
    batches = -(-len(order) // batch_size)
    size = batch_size * max(1, -(-batches // (_PER_WORKER * workers)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def open_with_workers(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str] | None,
    workers: int,
    threads: int | None = None,
    gpus: float = 0,
    **keywords: Any,
) -> tuple[LLMCache, Workers]:
    """Open a cache, see `LLMCache.open`, with workers that open the same store; see `ray.open` for the arguments.

    Returns the cache, which closes the workers, and the workers. ConfigError for a model or settings that workers
    cannot compute.
    """
    library()
    if workers < 1:
        raise ConfigError(f"there is at least one worker, got {workers}")
    with ExitStack() as opened:
        parts = open_parts(path, model, **keywords)
        opened.callback(parts.store.close)
        if not isinstance(parts.model, SentenceTransformer) or parts.config.layers != "output":
            raise ConfigError(
                "workers compute embeddings, of a SentenceTransformer and with layers='output'; use one process"
            )
        local = ("config", "tau", "min_generation")  # settings of this process alone
        config = WorkerConfig(
            path=os.fspath(parts.store.folder.path),
            model=None if model is None else os.fspath(model),
            generation=parts.store.manifest.generation,
            keywords={name: value for name, value in keywords.items() if name not in local},
        )
        started = Workers(config, workers, threads, gpus)
        opened.callback(started.close)
        cache = LLMCache(parts, RayCompute(started))
        opened.pop_all()
    return cache, started

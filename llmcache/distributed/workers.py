"""Worker processes of a Ray cluster, which compute batches and commit them to the store before they return them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats32
from llmcache.cache import LLMCache
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.encoding.compute import LocalCompute
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.model.encoders import Sentences

log = logging.getLogger("llmcache")

RESTARTS = 3
"""Number of times that a worker is restarted after it died; its work is then repeated."""
_IN_FLIGHT = 2  # parts of a window queued per worker, so that the next is there when one is done


@dataclass(frozen=True, slots=True)
class WorkResult:
    """Documents that a worker has computed.

    outputs: float32 [n, width]. cost: seconds of the model for each, float32 [n]. stored: True if the entries are
    committed.
    """

    outputs: Floats32
    cost: Floats32
    stored: bool


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Arguments with which workers open the store.

    generation: oldest generation that a worker may see; opening fails otherwise. keywords: of `LLMCache.open`.
    """

    path: str
    model: str | None
    generation: int
    keywords: Mapping[str, Any]


class Worker:
    """Worker with the model loaded once and the store open. Runs as a Ray actor, or as a plain object."""

    def __init__(self, place: WorkerConfig, threads: int) -> None:
        """Only keep the arguments: the first call opens the store, so that an error reaches the caller."""
        self._config, self._threads = place, threads
        self._cache: LLMCache | None = None

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def opened(self) -> LLMCache:
        """Return the cache, opened at the first call."""
        if self._cache is None:
            torch.set_num_threads(self._threads)
            config = self._config
            self._cache = LLMCache.open(
                config.path, config.model, min_generation=config.generation, **dict(config.keywords)
            )
        return self._cache

    def compute(self, misses: Misses, call: EncodeCall) -> WorkResult:
        """Compute documents between two commits, in whole batches, and commit them if the store can be written.

        After a restart they may be documents that the killed worker has committed; nothing is stored twice.
        """
        cache = self.opened()
        assert isinstance(cache.model, SentenceTransformer)
        bank, storing = cache.bank, cache.storing
        new = bank.find(misses.keys) < 0
        outputs, cost = np.empty((len(new), bank.facts.width), np.float32), np.empty(len(new), np.float32)
        for done in LocalCompute(Sentences(cache.model), nullcontext).batches(misses, call):
            outputs[done.chosen], cost[done.chosen] = done.outputs, done.cost
            chosen = [i for i in done.chosen if new[i]]
            if chosen:
                keys, text_keys = misses.keys[chosen], misses.text_keys[chosen]
                storing.put(bank, keys, outputs[chosen], text_keys, cost=cost[chosen], **misses.entry(chosen))
        return WorkResult(outputs, cost, committed(cache))


def committed(cache: LLMCache) -> bool:
    """Commit a cache's entries. Returns True if all are committed; a failure is logged, not raised."""
    store = cache.storing.store
    if not store.writable:
        return False
    try:
        cache.commit()
    except LLMCacheError as error:
        log.warning("%s. Going on without storing", error)
        return False
    return store.pending_bytes == 0


class Workers:
    """Actors of a Ray cluster, started when there is work, and no more than there are parts of it."""

    def __init__(self, place: WorkerConfig, count: int, threads: int | None = None, gpus: float = 0) -> None:
        """Join or start the cluster.

        count: maximum number of workers. threads: torch threads of each; None for an equal part of the cores. gpus:
        GPUs of each.
        """
        self.count = count
        self._config, self._gpus = place, gpus
        self._actors: list[Any] = []
        self._started_cluster = start(count)
        self.threads = threads or max(1, int(library().cluster_resources().get("CPU", 1) / count))

    def computed(self, parts: Iterable[Misses], call: EncodeCall) -> Iterator[WorkResult]:
        """Compute parts of a window, in whole batches. Yields the results in the order of the parts.

        LLMCacheError when workers fail.
        """
        ray = library()
        waiting = deque(enumerate(parts))
        self._start_actors(min(self.count, len(waiting)))
        idle = deque(self._actors * _IN_FLIGHT)
        running: dict[Any, tuple[int, Any]] = {}
        results: dict[int, WorkResult] = {}
        for number in range(len(waiting)):
            while number not in results:
                while waiting and idle:
                    place, part = waiting.popleft()
                    actor = idle.popleft()
                    running[actor.compute.remote(part, call)] = place, actor
                (completed,), _ = ray.wait(list(running), num_returns=1)
                place, actor = running.pop(completed)
                idle.append(actor)
                results[place] = got(completed)
            yield results.pop(number)

    def pids(self) -> list[int]:
        """Return the process ids of the started workers."""
        return [int(got(actor.pid.remote())) for actor in self._actors]

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started here."""
        ray = library()
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
        if self._started_cluster and ray.is_initialized():
            ray.shutdown()
        self._started_cluster = False

    def _start_actors(self, count: int) -> None:
        ray = library()
        kind = ray.remote(num_cpus=self.threads, num_gpus=self._gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(
            Worker
        )
        while len(self._actors) < count:
            self._actors.append(kind.remote(self._config, self.threads))
            log.info("worker %d of %d starts, %d threads", len(self._actors), self.count, self.threads)


def library() -> Any:
    """Import and return the module `ray`. ConfigError when it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; pip install 'llmcache[ray]'")
    import ray

    return ray


def start(workers: int) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine, unless Ray runs already.

    Returns True if this call connected to the cluster, False if Ray was running.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = library()
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        cores = max(workers, len(os.sched_getaffinity(0)))
        ray.init(num_cpus=cores, include_dashboard=False, **quiet)
    return True


def got(reference: Any) -> Any:
    """Wait for a worker's result and return it. Raises the worker's LLMCacheError; others as LLMCacheError."""
    ray = library()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMCacheError):
            raise error.cause from None
        raise LLMCacheError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise LLMCacheError(
            f"a worker died {RESTARTS + 1} times (killed, or out of memory); committed results are kept: give it more "
            "memory or use fewer workers, and run the same command again"
        ) from error

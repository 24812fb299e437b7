"""Worker processes of a Ray cluster, which compute batches and commit them to the store before they return them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.banks.writer import BankWriter
from llmcache.cache import LLMCache
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import Marks
from llmcache.indexes.format.rows import Keys
from llmcache.model.batching import Sentences, compute
from llmcache.model.tokens import TokenRows

log = logging.getLogger("llmcache")

RESTARTS = 3
"""Number of times that a worker is restarted after it died; its work items are then repeated."""
_IN_FLIGHT = 2  # work items queued per worker, so that the next is there when one is done


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Documents that one worker computes between two commits: whole batches, longest documents first.

    Arrays have one row per document. keys, text_keys: uint64 [n, 2]. sources: ids of the documents. features: float32
    [n, feature width]. batch_size: documents per batch of the model. marks: marks of the entries, see `Executor.marks`.
    """

    tokens: TokenRows
    keys: Keys
    text_keys: Keys
    sources: list[str]
    features: NDArray[np.float32]
    batch_size: int
    role: str | None
    marks: Marks | None = None


@dataclass(frozen=True, slots=True)
class WorkResult:
    """Result of a work item.

    outputs: float32 [n, width]. seconds: model time. stored: True if the entries are committed.
    """

    outputs: NDArray[np.float32]
    seconds: float
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


class OpenCache(LLMCache):
    """Cache with a public bank and bank writer, for code that puts batches of its own."""

    @property
    def bank(self) -> Bank:
        """Bank of the outputs."""
        return self._bank

    @property
    def storing(self) -> BankWriter:
        """Writer of the cache's banks."""
        return self._storing


class Worker:
    """Worker with the model loaded once and the store open. Runs as a Ray actor, or as a plain object."""

    def __init__(self, place: WorkerConfig, threads: int) -> None:
        """Only keep the arguments: the first call opens the store, so that an error reaches the caller."""
        self._config, self._threads = place, threads
        self._cache: OpenCache | None = None

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def opened(self) -> OpenCache:
        """Return the cache, opened at the first call."""
        if self._cache is None:
            torch.set_num_threads(self._threads)
            config = self._config
            self._cache = OpenCache.open(
                config.path, config.model, min_generation=config.generation, **dict(config.keywords)
            )
        return self._cache

    def compute(self, share: WorkItem) -> WorkResult:
        """Compute a work item, and commit its entries if the store can be written.

        After a restart the item may be one that the killed worker has committed; nothing is stored twice.
        """
        cache = self.opened()
        bank, storing = cache.bank, cache.storing
        new = bank.find(share.keys) < 0
        lengths = share.tokens.lengths.astype(np.float32)
        outputs, seconds = np.empty((len(new), bank.facts.width), np.float32), 0.0
        for batch in compute(_sentences(cache), share.tokens, share.batch_size, share.role):
            outputs[batch.chosen] = batch.outputs
            seconds += batch.seconds
            chosen = [i for i in batch.chosen if new[i]]
            if chosen:
                storing.put(
                    bank,
                    share.keys[chosen],
                    outputs[chosen],
                    share.text_keys[chosen],
                    tokens=[share.tokens.ids[i] for i in chosen],
                    sources=[share.sources[i] for i in chosen],
                    features=share.features[chosen],
                    cost=lengths[chosen] * np.float32(batch.seconds / max(1.0, lengths[batch.chosen].sum())),
                    marks=None if share.marks is None else share.marks[chosen],
                )
        return WorkResult(outputs, seconds, committed(cache))


def _sentences(cache: LLMCache) -> Sentences:
    assert isinstance(cache.model, SentenceTransformer)
    return Sentences(cache.model)


def committed(cache: OpenCache) -> bool:
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
    """Actors of a Ray cluster, started when there is work, and no more than there are work items."""

    def __init__(self, place: WorkerConfig, count: int, threads: int | None = None, gpus: float = 0) -> None:
        """Join or start the cluster.

        count: maximum number of workers. threads: torch threads of each; None for an equal part of the cores. gpus:
        GPUs of each.
        """
        self.count = count
        self._config, self._gpus = place, gpus
        self._actors: list[Any] = []
        self._started_cluster = start(count)
        cores = library().cluster_resources().get("CPU", 1) / count
        self._cpus = cores if cores < 1 else int(cores)
        self.threads = threads or max(1, int(cores))

    def computed(self, shares: Sequence[WorkItem]) -> Iterator[tuple[int, WorkResult]]:
        """Compute work items. Yields index and result of each, in order of completion.

        LLMCacheError when workers fail.
        """
        ray = library()
        self._start_actors(min(self.count, len(shares)))
        idle = deque(self._actors * _IN_FLIGHT)
        waiting: deque[tuple[int, WorkItem]] = deque(enumerate(shares))
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and idle:
                number, item = waiting.popleft()
                actor = idle.popleft()
                running[actor.compute.remote(item)] = number, actor
            (completed,), _ = ray.wait(list(running), num_returns=1)
            number, actor = running.pop(completed)
            idle.append(actor)
            yield number, got(completed)

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
    if workers < 1:
        raise ConfigError(f"there is at least one worker, got {workers}")
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

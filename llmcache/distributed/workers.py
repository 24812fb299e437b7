"""Processes of a Ray cluster that compute batches, store them and commit before they answer."""

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
"""How often a worker that died is started again; the work it had is then done again."""
_IN_FLIGHT = 2  # shares handed to a worker at a time: the next is there when one is done


@dataclass(frozen=True, slots=True)
class WorkItem:
    """What one worker computes between two commits: whole batches, longest documents first.

    Every array has a row per document. sources: ids. features: float32 [n, feature width]. marks: of the entries, see
    `Execution.marks`.
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
    """outputs: float32 [n, width], of a share's documents. seconds: of the model. stored: they are committed."""

    outputs: NDArray[np.float32]
    seconds: float
    stored: bool


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Where workers find the store. generation: workers that see an older one are refused; keywords: of `open`."""

    path: str
    model: str | None
    generation: int
    keywords: Mapping[str, Any]


class OpenCache(LLMCache):
    """A cache with its bank and its storing in the open, for whoever feeds them batches of its own."""

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def storing(self) -> BankWriter:
        return self._storing


class Worker:
    """One process with the model loaded once and the store open. Runs as a Ray actor, or as a plain object."""

    def __init__(self, place: WorkerConfig, threads: int) -> None:
        """Nothing is opened yet, so that an error of opening is the answer of a call and not a dead process."""
        self._place, self._threads = place, threads
        self._cache: OpenCache | None = None

    def pid(self) -> int:
        return os.getpid()

    def opened(self) -> OpenCache:
        """The cache, opened once."""
        if self._cache is None:
            torch.set_num_threads(self._threads)
            place = self._place
            self._cache = OpenCache.open(
                place.path, place.model, min_generation=place.generation, **dict(place.keywords)
            )
        return self._cache

    def compute(self, share: WorkItem) -> WorkResult:
        """The outputs of a share, committed where the store can be written.

        Started again after a kill it may be handed a share that its predecessor committed: nothing is stored twice.
        """
        cache = self.opened()
        bank, storing = cache.bank, cache.storing
        new = bank.find(share.keys) < 0
        lengths = share.tokens.lengths.astype(np.float32)
        outputs, seconds = np.empty((len(new), bank.facts.width), np.float32), 0.0
        for done in compute(_sentences(cache), share.tokens, share.batch_size, share.role):
            outputs[done.chosen] = done.outputs
            seconds += done.seconds
            chosen = [i for i in done.chosen if new[i]]
            if chosen:
                storing.put(
                    bank,
                    share.keys[chosen],
                    outputs[chosen],
                    share.text_keys[chosen],
                    tokens=[share.tokens.ids[i] for i in chosen],
                    sources=[share.sources[i] for i in chosen],
                    features=share.features[chosen],
                    cost=lengths[chosen] * np.float32(done.seconds / max(1.0, lengths[done.chosen].sum())),
                    marks=None if share.marks is None else share.marks[chosen],
                )
        return WorkResult(outputs, seconds, committed(cache))


def _sentences(cache: LLMCache) -> Sentences:
    assert isinstance(cache.model, SentenceTransformer)
    return Sentences(cache.model)


def committed(cache: OpenCache) -> bool:
    """Commit what a cache has computed; whether nothing is left. Storing never fails an inference."""
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
    """Actors of a Ray cluster; they start when there is something to compute, and no more than are needed."""

    def __init__(self, place: WorkerConfig, count: int, threads: int | None = None, gpus: float = 0) -> None:
        """count: at most so many. threads: of torch, None takes each one's part of the cores. gpus: of each."""
        self.count = count
        self._place, self._gpus = place, gpus
        self._actors: list[Any] = []
        self._own = start(count)
        part = library().cluster_resources().get("CPU", 1) / count
        self._cpus = part if part < 1 else int(part)
        self.threads = threads or max(1, int(part))

    def computed(self, shares: Sequence[WorkItem]) -> Iterator[tuple[int, WorkResult]]:
        """Every share's number and result, in the order in which they are done. LLMCacheError when workers fail."""
        ray = library()
        self._begin(min(self.count, len(shares)))
        idle = deque(self._actors * _IN_FLIGHT)
        waiting: deque[tuple[int, WorkItem]] = deque(enumerate(shares))
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and idle:
                number, share = waiting.popleft()
                actor = idle.popleft()
                running[actor.compute.remote(share)] = number, actor
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, actor = running.pop(done)
            idle.append(actor)
            yield number, got(done)

    def pids(self) -> list[int]:
        """Process ids of the workers that were started."""
        return [int(got(actor.pid.remote())) for actor in self._actors]

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        ray = library()
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
        if self._own and ray.is_initialized():
            ray.shutdown()
        self._own = False

    def _begin(self, count: int) -> None:
        ray = library()
        kind = ray.remote(num_cpus=self.threads, num_gpus=self._gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(
            Worker
        )
        while len(self._actors) < count:
            self._actors.append(kind.remote(self._place, self.threads))
            log.info("worker %d of %d starts, %d threads", len(self._actors), self.count, self.threads)


def library() -> Any:
    """Ray. ConfigError where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; pip install 'llmcache[ray]'")
    import ray

    return ray


def start(workers: int) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine. Whether it was started here."""
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
    """What a worker answered; what it raised is raised here as it was raised there."""
    ray = library()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLMCacheError):
            raise error.cause from None
        raise LLMCacheError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise LLMCacheError(
            f"a worker died {RESTARTS + 1} times (killed, or out of memory); what was committed is kept: give it more "
            "memory or take fewer workers, and run the same command again"
        ) from error

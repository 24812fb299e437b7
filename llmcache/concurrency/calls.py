"""Calls of a cache: one thread at a time, and in each process with a store that was opened there."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch

from llmcache.banks.writer import BankWriter
from llmcache.errors import LLMCacheError
from llmcache.model.locks import CallLock

log = logging.getLogger("llmcache")

F = TypeVar("F", bound=Callable[..., Any])

_EACH = 256  # commits of a worker process that are made at the end of a call, whatever it computed
_TIMES = 5.0  # later ones are made when the model took so many times what a commit takes
_SHARE = 0.02  # and this share of all that it took


def call(method: F) -> F:
    """Wrap a public method of a cache, so that it runs inside `Calls`."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls:
            return method(self, *args, **kwargs)

    return cast(F, wrapped)


class Calls:
    """The context that every call of a cache runs in; may be entered again inside.

    Threads wait for each other. In a child of the process that opened the store, the first call opens it again: the
    parent's connection is not used. In a worker, which may end without notice, a call ends with a commit.
    """

    def __init__(self, lock: CallLock, reopen: Callable[[], None], commit: Callable[[], None]) -> None:
        """reopen: opens the store in this process. commit: makes durable what the call computed; raises nothing."""
        self.lock = lock
        self.pid = os.getpid()
        self.worker = False
        """True if this process was forked from, or sent the cache by, the one that opened it."""
        self._reopen, self._commit = reopen, commit

    @property
    def inherited(self) -> bool:
        """True if the store was opened by the process that this one was forked from."""
        return self.pid != os.getpid()

    def __enter__(self) -> Self:
        self.lock.acquire()
        if self.pid != os.getpid():
            try:
                _one_thread_each()
                self._reopen()
                self.pid, self.worker = os.getpid(), True
            except BaseException:
                self.lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.worker and self.lock.depth == 1:
                self._commit()
        finally:
            self.lock.release()


def _one_thread_each() -> None:
    """Let the libraries compute in one thread: OpenMP would wait for threads that did not come through the fork."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)


class WorkerCommits:
    """When a worker process commits: after each call at first, and then as often as it costs little of the time."""

    def __init__(self) -> None:
        self._count = 0
        self._at_last = 0.0
        self._took = 0.0

    def commit(self, storing: BankWriter) -> None:
        """Commit what waits if it is time to. A failure is a warning: no inference fails for it."""
        if storing.is_held or not storing.store.writable or not storing.store.pending_bytes:
            return
        computed = storing.counters.model_seconds
        waited = computed - self._at_last
        if self._count >= _EACH and waited < max(_TIMES * self._took, _SHARE * computed):
            return
        began = time.perf_counter()
        try:
            storing.commit()
        except LLMCacheError as error:
            log.warning("%s. Going on without storing", error)
        self._count += 1
        self._at_last, self._took = computed, time.perf_counter() - began

"""Context of all cache calls: one thread at a time, and a store opened in the calling process."""

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

_EACH = 256  # first commits of a worker process, made after each call
_TIMES = 5.0  # later commits need model time since the last one of at least this multiple of a commit's time,
_SHARE = 0.02  # and of at least this share of the total model time


def call(method: F) -> F:
    """Wrap a public method of a cache to run inside `Calls`."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls:
            return method(self, *args, **kwargs)

    return cast(F, wrapped)


class Calls:
    """Re-entrant context that every call of a cache runs in.

    Threads wait for each other. In a forked child the first call opens the store again, instead of using the parent's
    connection. In a worker process, which may be terminated at any time, a call ends with a commit.
    """

    def __init__(self, lock: CallLock, reopen: Callable[[], None], commit: Callable[[], None]) -> None:
        """reopen: opens the store in this process. commit: commits the entries of a call; must not raise."""
        self.lock = lock
        self.pid = os.getpid()
        self.worker = False
        """True if this process was forked from the one that opened the cache, or got the cache by pickle."""
        self._reopen, self._commit = reopen, commit

    @property
    def inherited(self) -> bool:
        """True if the store was opened by the process that this one was forked from."""
        return self.pid != os.getpid()

    def __enter__(self) -> Self:
        self.lock.acquire()
        if self.pid != os.getpid():
            try:
                one_thread_each()
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


def one_thread_each() -> None:
    """Limit torch and FAISS to one thread, since OpenMP would wait for threads that do not exist after a fork."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)


class WorkerCommits:
    """Commit policy of a worker process: after each call at first, then only when the model takes far longer."""

    def __init__(self) -> None:
        self._count = 0
        self._model_seconds = 0.0  # at the last commit
        self._commit_seconds = 0.0  # of the last commit

    def commit(self, storing: BankWriter) -> None:
        """Commit pending entries if due. A failure is only logged, so that inference goes on."""
        if storing.is_held or not storing.store.writable or not storing.store.pending_bytes:
            return
        computed = storing.counters.model_seconds
        since_commit = computed - self._model_seconds
        if self._count >= _EACH and since_commit < max(_TIMES * self._commit_seconds, _SHARE * computed):
            return
        began = time.perf_counter()
        try:
            storing.commit()
        except LLMCacheError as error:
            log.warning("%s. Going on without storing", error)
        self._count += 1
        self._model_seconds, self._commit_seconds = computed, time.perf_counter() - began

"""Locks for caches that several threads use: one call at a time, without deadlocks.

Caches of one model object share one lock, since a model that runs in two threads at once may mix up their inputs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

from torch.nn import Module

from llmcache.errors import ConfigError, LLMCacheError
from llmcache.model.architecture import trunk_of


class LockCycle(LLMCacheError):
    """Error raised instead of a deadlock: two threads would wait for each other."""


class CallLock:
    """Re-entrant lock around the calls of a cache.

    Acquiring raises LockCycle where the owner of the lock waits for a lock that this thread owns. That happens when a
    callback of one cache calls another cache, and another thread does the reverse.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        _LOCKS.add(self)

    @property
    def depth(self) -> int:
        """Number of times the lock is held (it is re-entrant); 0 if it is free."""
        return self._depth

    def acquire(self) -> None:
        """Acquire the lock, waiting if necessary; LockCycle where that would be a deadlock."""
        if not self._lock.acquire(blocking=False):
            self._wait()
        self._owner = threading.get_ident()
        self._depth += 1

    def release(self) -> None:
        """Release the lock, once for each `acquire`."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def _wait(self) -> None:
        """Wait for the lock, after a search for a cycle of waiting threads."""
        thread = threading.get_ident()
        with _registry.guard:
            wanted: CallLock | None = self
            while wanted is not None:
                if wanted._owner == thread:
                    raise LockCycle(
                        "this call was made inside a call of another cache, which a thread inside a call of this cache "
                        "waits for; call one cache from the callbacks of another in one thread only"
                    )
                wanted = _registry.waiting.get(wanted._owner) if wanted._owner is not None else None
            _registry.waiting[thread] = self
        try:
            self._lock.acquire()
        finally:
            with _registry.guard:
                _registry.waiting.pop(thread, None)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _renew_after_fork(self) -> None:
        """Replace the lock in a forked child, where only the forking thread exists. That thread keeps its depth."""
        depth = self._depth if self._owner == threading.get_ident() else 0
        self._lock, self._depth = threading.RLock(), depth
        for _ in range(depth):
            self._lock.acquire()
        if not depth:
            self._owner = None


class _Registry:
    """Locks that blocked threads wait for, by thread. guard: protects this table."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.waiting: dict[int, CallLock] = {}


_LOCKS: WeakSet[CallLock] = WeakSet()
_of_models: WeakKeyDictionary[Module, CallLock] = WeakKeyDictionary()
_registry = _Registry()
_after_fork: list[Callable[[], None]] = []


def lock_of(model: Module) -> CallLock:
    """Return the lock that all caches of a model share; models with the same trunk object share it too."""
    try:
        trunk: Any = trunk_of(model)[0]
    except ConfigError:  # the weights belong to another runtime than torch
        trunk = model
    with _registry.guard:
        lock = _of_models.get(trunk)
        if lock is None:
            lock = _of_models[trunk] = CallLock()
    return lock


def after_fork(action: Callable[[], None]) -> None:
    """Register a function to run in every child that is forked from now on, after its locks were replaced."""
    _after_fork.append(action)


def _in_child() -> None:
    _registry.guard, _registry.waiting = threading.Lock(), {}
    for lock in list(_LOCKS):
        lock._renew_after_fork()
    for action in _after_fork:
        action()


os.register_at_fork(after_in_child=_in_child)

"""Caches that nobody closed are closed when their process ends, so that nothing they computed is lost."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

from llmcache.errors import LLMCacheError
from llmcache.model.locks import after_fork

log = logging.getLogger("llmcache")

_LIBRARIES = ("multiprocessing", "multiprocess")
"""Libraries whose processes end without `atexit`. `multiprocess` is that of dill, which `datasets` uses."""


class Closes(Protocol):
    def close(self) -> None: ...

    @property
    def busy(self) -> bool:
        """True if a call is at work."""
        ...


_OPEN: WeakSet[Closes] = WeakSet()
_watched: set[int] = set()


def opened(cache: Closes) -> None:
    """Take note of a cache, which may be closed, or forgotten, before the end."""
    _OPEN.add(cache)
    if os.getpid() not in _watched:
        _watched.add(os.getpid())
        _watch_worker()


def _watch_worker() -> None:
    """In a process that multiprocessing started: close at its end, and when it is asked to end by SIGTERM."""
    for name in _LIBRARIES:
        library: Any = sys.modules.get(name)
        if library is None or library.parent_process() is None:
            continue
        library.util.Finalize(None, _close_all, exitpriority=100)
        in_main_thread = threading.current_thread() is threading.main_thread()
        # a pool ends its idle workers by SIGTERM
        if in_main_thread and not _loads_data() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)


def _loads_data() -> bool:
    """True if this is a worker of a DataLoader, which ends by itself and has its own handler, unknown to Python."""
    loading: Any = sys.modules.get("torch.utils.data")
    return loading is not None and loading.get_worker_info() is not None


def _terminate(number: int, _: FrameType | None) -> None:
    for cache in list(_OPEN):
        if cache.busy:  # this thread may be in the middle of a call
            log.warning("a process was terminated during a call: what that call computed is not stored")
        else:
            _close(cache)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _close(cache: Closes) -> None:
    try:
        cache.close()
    except (LLMCacheError, OSError) as error:
        log.warning("%s", error)


@atexit.register
def _close_all() -> None:
    for cache in list(_OPEN):
        _close(cache)


after_fork(_OPEN.clear)  # a child may not use what its parent opened; what it opens itself is noted anew

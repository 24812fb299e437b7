"""Close open caches when their process ends, so that no computed entry is lost."""

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
"""Libraries whose worker processes end without `atexit`. `multiprocess` belongs to dill, which `datasets` uses."""


class Closes(Protocol):
    """A cache as seen from this module."""

    def close(self) -> None: ...

    @property
    def busy(self) -> bool:
        """True while a call runs."""
        ...


_OPEN: WeakSet[Closes] = WeakSet()
_watched: set[int] = set()


def opened(cache: Closes) -> None:
    """Register a cache to be closed at exit. Only a weak reference is kept."""
    _OPEN.add(cache)
    if os.getpid() not in _watched:
        _watched.add(os.getpid())
        _watch_worker()


def _watch_worker() -> None:
    """Close caches at the end of a multiprocessing worker, and on SIGTERM."""
    for name in _LIBRARIES:
        library: Any = sys.modules.get(name)
        if library is None or library.parent_process() is None:
            continue
        library.util.Finalize(None, _close_all, exitpriority=100)
        in_main_thread = threading.current_thread() is threading.main_thread()
        # a pool terminates idle workers with SIGTERM
        if in_main_thread and not _loads_data() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)


def _loads_data() -> bool:
    """Return True in a DataLoader worker, which installs its own signal handler outside Python."""
    loading: Any = sys.modules.get("torch.utils.data")
    return loading is not None and loading.get_worker_info() is not None


def _terminate(number: int, _: FrameType | None) -> None:
    """Close idle caches, then end the process by the signal."""
    for cache in list(_OPEN):
        if cache.busy:  # the call may run in this very thread
            log.warning("a process was terminated during a call: the results of that call are not stored")
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


after_fork(_OPEN.clear)  # a child must not close caches that its parent opened

"""Close open caches when their process ends, so that no computed entry is lost."""

from __future__ import annotations

import atexit
import ctypes
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
_wakeup: list[int] = []
"""The end of a pipe that Python writes the numbers of signals to, in a worker."""
_terminating = threading.Lock()
_closing = threading.Event()
"""Set while the caches are closed because the process ends."""
_heard: list[int] = []
"""Signals that arrived meanwhile."""


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
            _close_on_sigterm()


def _close_on_sigterm() -> None:
    """Install a handler of SIGTERM, and a thread that does the same where the handler cannot run.

    Python runs a handler in the main thread, between two instructions. A signal that arrives just before an idle worker
    waits for its queue would be handled after that wait, and `Pool.terminate` would wait for the worker forever.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if previous == -1:
        _wakeup.append(writing)
        threading.Thread(target=_wait_for_sigterm, args=(reading,), daemon=True).start()
    else:  # the program has its own
        signal.set_wakeup_fd(previous)
        os.close(reading)
        os.close(writing)
    signal.signal(signal.SIGTERM, _terminate)


def _wait_for_sigterm(reading: int) -> None:
    """Read the numbers of signals from a pipe, and terminate at SIGTERM."""
    while numbers := os.read(reading, 64):
        if signal.SIGTERM in numbers:
            _terminate(signal.SIGTERM, None)


def _loads_data() -> bool:
    """Return True in a DataLoader worker, which installs its own signal handler outside Python."""
    loading: Any = sys.modules.get("torch.utils.data")
    return loading is not None and loading.get_worker_info() is not None


def _terminate(number: int, _: FrameType | None) -> None:
    """Close idle caches, then end the process by the signal."""
    if _closing.is_set():  # a pool terminates workers that are about to end by themselves
        _heard.append(number)
        return
    if not _terminating.acquire(blocking=False):  # the other thread does it
        return
    for cache in list(_OPEN):
        if cache.busy:  # the call may run in this very thread
            log.warning("a process was terminated during a call: the results of that call are not stored")
        else:
            _close(cache)
    ctypes.CDLL(None).signal(number, None)  # SIG_DFL; signal.signal refuses other threads than the main one
    os.kill(os.getpid(), number)


def _close(cache: Closes) -> None:
    try:
        cache.close()
    except (LLMCacheError, OSError) as error:
        log.warning("%s", error)


@atexit.register
def _close_all() -> None:
    _closing.set()
    for cache in list(_OPEN):
        _close(cache)
    _closing.clear()
    if _heard:
        _terminate(_heard[0], None)


def _in_child() -> None:
    """Leave to the parent what it opened: its caches, and the pipe and the thread that wait for its SIGTERM."""
    _OPEN.clear()
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while _wakeup:
        writing = _wakeup.pop()
        if (current := signal.set_wakeup_fd(-1)) != writing:
            signal.set_wakeup_fd(current)
        os.close(writing)


after_fork(_in_child)

"""Cache of descriptors of sealed files that are read with `preadv`, of bounded size for the whole process.

A store of thousands of segments has thousands of such files, and a process may have 1,024 descriptors by default. So
files are opened when they are read, and the least recently used are closed when too many are open.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST = 256


class OpenFiles:
    """LRU cache of open files by a unique key, at most `most` of them open. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()  # Python's garbage collector may call `close` while this thread has the lock
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by key, the most recently used last
        self._keys = 0

    def add(self, descriptor: int) -> int:
        """Add an open file, whose descriptor this object owns from then on. Returns its key."""
        with self._lock:
            self._keys += 1
            key = self._keys
        self._keep(key, descriptor)
        return key

    @contextmanager
    def using(self, key: int, opened: Callable[[], int]) -> Iterator[int]:
        """Yield the descriptor of a file for reading inside the block. opened: opens the file if it is closed."""
        with self._lock:
            descriptor = self._open.pop(key, -1)  # removed, so that no other thread closes it meanwhile
        if descriptor < 0:
            descriptor = opened()
        try:
            yield descriptor
        finally:
            self._keep(key, descriptor)

    def _keep(self, key: int, descriptor: int) -> None:
        with self._lock:
            # two threads may have opened the same file at once
            surplus = [self._open.pop(key)] if key in self._open else []
            self._open[key] = descriptor
            while len(self._open) > self._most:
                surplus.append(self._open.popitem(last=False)[1])
        for surplus_descriptor in surplus:
            os.close(surplus_descriptor)

    def close(self, key: int) -> None:
        """Close a file that is not read any more."""
        with self._lock:
            descriptor = self._open.pop(key, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._open)


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(8, min(_MOST, soft // 4))


OPEN_FILES = OpenFiles(_descriptor_limit())
"""Cache of this process."""

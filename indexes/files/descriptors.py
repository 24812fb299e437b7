"""Descriptors of sealed files that are read with `preadv`: a bounded number is open at a time, in a whole process.

A store of thousands of segments has thousands of such files, and a process may have 1,024 descriptors by default. So
files are opened when they are read, and those that were not read for longest are closed when there are too many.
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
    """Files by any key that is theirs alone, at most `most` of them open. Threads may share it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()  # a file may be given up, by the garbage collector, inside of it
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors, by key, the one that was used last at the end
        self._keys = 0

    def add(self, descriptor: int) -> int:
        """Take a file over that is open; the key that it has from now on."""
        with self._lock:
            self._keys += 1
            key = self._keys
        self._keep(key, descriptor)
        return key

    @contextmanager
    def using(self, key: int, opened: Callable[[], int]) -> Iterator[int]:
        """The descriptor of a file, for reading inside the block. opened: opens it where it is not open."""
        with self._lock:
            descriptor = self._open.pop(key, -1)  # out of the table: nobody closes it meanwhile
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
        for one in surplus:
            os.close(one)

    def close(self, key: int) -> None:
        """Close a file that nobody reads any more."""
        with self._lock:
            descriptor = self._open.pop(key, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._open)


def _affordable() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(8, min(_MOST, soft // 4))


OPEN_FILES = OpenFiles(_affordable())
"""Those of this process."""

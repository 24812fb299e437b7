"""File locks (flock), which the kernel releases when the process that holds one ends in any way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NO_LOCK = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Error numbers of a file system without locks."""


def take(descriptor: int, *, shared: bool = False, supported: bool = False) -> bool:
    """Take the lock of an open file or folder, without waiting, until its descriptor is closed.

    shared: together with other holders of shared locks; by default no other process can hold the lock.
    Returns False when another process holds it. On a file system without locks it returns True and locks nothing;
    OSError with `supported`.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if supported or error.errno not in _NO_LOCK:
            raise
    return True


def share(descriptor: int) -> bool:
    """Take a shared lock on a file that was just created, until its descriptor is closed.

    Returns False when another process has tested the lock (`unlocked`) or removed the file since it was created. On a
    file system without locks it returns True and locks nothing.
    """
    return take(descriptor, shared=True) and os.fstat(descriptor).st_nlink > 0


@contextmanager
def unlocked(descriptor: int) -> Iterator[bool]:
    """Yield whether a file's lock is free; no other process can take it inside the block. Closes the descriptor."""
    try:
        yield take(descriptor)
    finally:
        os.close(descriptor)


def exclude(descriptor: int, pid: int) -> str:
    """Take an exclusive lock and write its holder into the file. Returns "", or the current holder if it is taken."""
    if not take(descriptor, supported=True):
        return os.pread(descriptor, 256, 0).decode("utf-8", "replace").strip() or "an unknown process"
    with suppress(OSError):  # the holder's name is only for people, and eviction must work on a full disk
        label = f"process {pid} on {socket.gethostname()}\n".encode()
        os.pwrite(descriptor, label, 0)
        os.ftruncate(descriptor, len(label))
    return ""

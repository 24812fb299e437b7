"""Opening of files in a store that may belong to anybody: plain files only, and links are not followed."""

from __future__ import annotations

import errno
import os
import stat

from llmcache.indexes.errors import SnapshotDamaged

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_plain(folder: int, leaf: str, name: str) -> tuple[int, int]:
    """Open a plain file for reading. folder: descriptor of its folder. name: the file's name in error messages.

    Returns its descriptor, which the caller closes, and its size in bytes. SnapshotDamaged when the name belongs to
    anything but a plain file.
    """
    try:
        descriptor = os.open(leaf, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SnapshotDamaged(f"{name} is a symbolic link; a store holds plain files only") from None
        if error.errno == errno.ENXIO:
            raise SnapshotDamaged(f"{name} is a socket or a device; a store holds plain files only") from None
        raise
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise SnapshotDamaged(f"{name} is not a plain file")
    return descriptor, facts.st_size

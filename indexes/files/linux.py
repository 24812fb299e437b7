"""Linux system calls missing from `os`: mmap without a descriptor, early write-back, file-system type.

It also interprets `stat` results: types, times of change, owners and permissions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
import sys
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE: start only, without waiting and without consuming the error of a later fsync


def mapped(descriptor: int, size: int) -> NDArray[np.uint8]:
    """Map a file read-only without keeping a descriptor open, as mmap.mmap does before Python 3.13.

    A store maps several files per segment, and a process may have no more than 1,024 descriptors by default.
    Returns uint8 [size].
    """
    if sys.version_info >= (3, 13):
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ, trackfd=False), np.uint8)
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    pages = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(pages, _LIBC.munmap, address, size).atexit = False  # arrays may be used during interpreter exit
    return np.frombuffer(memoryview(pages).toreadonly(), np.uint8)


def begin_sync(descriptor: int, offset: int, nbytes: int) -> None:
    """Start writing bytes to the disk that a later fsync waits for. A hint: a failure shows in that fsync."""
    _LIBC.sync_file_range(descriptor, offset, nbytes, _BEGIN)


def file_system(descriptor: int) -> str:
    """Return the type of the file system of an open folder ("ext4", "nfs4", ...); "" if unknown.

    The mount id of the descriptor is used because `statvfs` has no type, device numbers do not match on btrfs and
    overlay, and paths do not match when one mount covers another.
    """
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return ""
    mount = re.search(r"^mnt_id:\s*(\d+)$", facts, re.MULTILINE)
    for line in mounts.splitlines() if mount else ():
        before, _, after = line.partition(" - ")
        if mount and before.split(" ", 1)[0] == mount[1]:
            return after.split(" ", 1)[0]
    return ""


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def kind_of(mode: int) -> str:
    """Return the type of a directory entry by its `st_mode`: "file", "folder", "link", "pipe", "socket" or "device"."""
    return _KINDS.get(stat.S_IFMT(mode), "device")


def changed(facts: os.stat_result) -> float:
    """Return when a file was last written or linked, in seconds since the epoch. A hard link changes only the ctime."""
    return max(facts.st_mtime, facts.st_ctime)


def flaw_in(folder: int, sub: str, path: str) -> str | None:
    """Return why a folder (by descriptor) or an entry in it is not exclusively this user's; None if all are.

    sub: name of the sub-folder, "" for the store's folder, which messages call `path`.
    """
    flaw = flaw_of(sub or path, os.fstat(folder))
    for leaf in () if flaw else os.listdir(folder):
        try:
            facts = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:  # removed since the listing
            continue
        if flaw := flaw_of(f"{sub}/{leaf}" if sub else leaf, facts):
            break
    return flaw


def flaw_of(name: str, facts: os.stat_result) -> str | None:
    """Return why a file or folder is not exclusively this user's; None if it is."""
    if facts.st_uid != os.geteuid():
        return f"{name} belongs to user id {facts.st_uid}"
    if facts.st_mode & 0o022 and not stat.S_ISLNK(facts.st_mode):  # a link's own mode means nothing
        return f"{name} may be written by other users"
    return None

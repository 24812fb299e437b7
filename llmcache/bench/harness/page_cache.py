"""The kernel's page cache: drop files from it, load files into it, and count their resident pages."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def drop(paths: Iterable[Path]) -> float:
    """Drop the pages of files from the page cache (fsync, then POSIX_FADV_DONTNEED). Returns the share left, 0 to 1.

    A file system in memory keeps all pages, and pages that a process has mapped and touched stay too.
    """
    known = list(paths)
    for path in known:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident(known)


def warm(paths: Iterable[Path]) -> None:
    """Read files, so that their pages are in the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def resident(paths: Iterable[Path]) -> float:
    """Return the share of the files' pages in the page cache, by mincore(2), which loads none."""
    cached = total = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
            failed = _LIBC.mincore(address, size, pages.ctypes.data)
            code = ctypes.get_errno()
            _LIBC.munmap(address, size)
            if failed:
                raise OSError(code, f"mincore failed for {path}")
        finally:
            os.close(descriptor)
        cached, total = cached + int((pages & 1).sum()), total + len(pages)
    return cached / total if total else 0.0

"""Files that are written once: whole, durable, and never again."""

from __future__ import annotations

from collections.abc import Iterable

from llmcache.indexes.io import Folder


def write_whole(folder: Folder, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
    """Write a new file and make its bytes durable; returns its size. A file that could not be finished is removed.

    durable: with False the caller syncs the file later, many at once (`sync_files`).
    The directory entry is not durable yet: the caller syncs the folder once for all files of a commit.
    """
    descriptor = folder.create(name)
    size = 0
    try:
        try:
            for part in parts:
                folder.write(descriptor, part, size)
                folder.begin_sync(descriptor, size, memoryview(part).nbytes)
                size += memoryview(part).nbytes
            if durable:
                folder.sync(descriptor)
        finally:
            folder.close_file(descriptor)
    except BaseException:
        folder.remove(name)
        raise
    return size


def sync_files(folder: Folder, names: Iterable[str]) -> None:
    """Make the bytes of files durable that were written before; their entries in the folder are not."""
    for name in names:
        descriptor, _ = folder.open(name)
        try:
            folder.sync(descriptor)
        finally:
            folder.close_file(descriptor)

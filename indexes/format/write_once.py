"""Write-once files: written completely and durably, and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import FileFacts


def write_whole(folder: Folder, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
    """Write a new file and sync it. Returns its size in bytes. A file that cannot be completed is removed.

    durable: with False the caller syncs the file later, together with others (`sync_files`).
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
    """Sync files that were written before, without their directory entries."""
    for name in names:
        descriptor, _ = folder.open(name)
        try:
            folder.sync(descriptor)
        finally:
            folder.close_file(descriptor)


def write_file(folder: Folder, name: str, parts: Iterable[bytes | memoryview], *, hashed: bool = True) -> FileFacts:
    """Write a new file durably, see `write_whole`. Returns its facts. hashed: with the sha256."""
    digest = hashlib.sha256()

    def through() -> Iterator[bytes | memoryview]:
        for part in parts:
            if hashed:
                digest.update(part)
            yield part

    size = write_whole(folder, name, through())
    return FileFacts(name, size, digest.hexdigest() if hashed else None)


def verified(folder: Folder, facts: FileFacts) -> NDArray[np.uint8]:
    """Map or read a file and check its size and sha256. Returns uint8 [size]. SnapshotDamaged when they differ."""
    try:
        data = folder.map(facts.name, facts.size)
    except FileNotFoundError:
        raise SnapshotDamaged(f"{facts.name} is missing") from None
    digest = hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]  # hashes the mapped pages without a copy
    if digest != facts.sha256:
        raise SnapshotDamaged(
            f"{facts.name} has sha256 {digest[:12]}..., the manifest says {str(facts.sha256)[:12]}..."
        )
    return data

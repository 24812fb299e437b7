"""Files that are written once: whole, durable, and never again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import FileFacts


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


def write_file(folder: Folder, name: str, parts: Iterable[bytes | memoryview], *, hashed: bool = True) -> FileFacts:
    """Write a new file durably (`write_whole`) and give its facts, with the sha256 unless rows carry checksums."""
    digest = hashlib.sha256()

    def through() -> Iterator[bytes | memoryview]:
        for part in parts:
            if hashed:
                digest.update(part)
            yield part

    size = write_whole(folder, name, through())
    return FileFacts(name, size, digest.hexdigest() if hashed else None)


def verified(folder: Folder, facts: FileFacts) -> NDArray[np.uint8]:
    """A mapped file whose size and sha256 are those of the manifest; SnapshotDamaged otherwise."""
    try:
        data = folder.map(facts.name, facts.size)
    except FileNotFoundError:
        raise SnapshotDamaged(f"{facts.name} is missing") from None
    found = hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]  # hashes the mapped pages without a copy
    if found != facts.sha256:
        raise SnapshotDamaged(f"{facts.name} has sha256 {found[:12]}..., the manifest says {str(facts.sha256)[:12]}...")
    return data

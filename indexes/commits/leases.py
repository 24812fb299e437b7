"""Leases: protect the new files that a running process is writing from garbage collection by other processes.

The age of a file does not tell whether its writer still runs: a process may be suspended for hours, a clock may jump,
and a hard link keeps the time of the first write. So a writer lists its new files in a file of its own,
`stat/<id>.lease`, before it creates them. It holds a lock on that file until a manifest names the new files or they
are abandoned. The kernel releases the lock when the process ends in any way, but not while it is suspended.

A collector lists the files first, then reads the leases, then the manifests. Each new file in its listing was named by
a lease before it was created. If the lease is still locked, the file stays. If not, either the file was published
before, and the manifests that are read next name it, or its writer has ended.

Leases need no sync: after a power loss no writer runs. On a file system without locks leases have no effect, and only
the age of files counts.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from llmcache.indexes.files.folder import Folder

log = logging.getLogger("llmcache")

LEASE = re.compile(r"stat/[0-9a-f]{32}\.lease")
"""Pattern of the names of lease files."""
_LIMIT = 256 << 20  # bytes of a lease file, 33 for each id
_TRIES = 100


class Lease:
    """Lease on the ids of segments and index files that this process writes, locked from the first id to `close`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._name = ""
        self._descriptor = -1
        self._size = 0

    def add(self, id: str) -> None:
        """Protect files of this id, which must be created afterwards. OSError when the lease cannot be written."""
        if self._descriptor < 0:
            self._begin()
        line = f"{id}\n".encode()
        self._folder.write(self._descriptor, line, self._size)
        self._size += len(line)

    def new(self) -> str:
        """Return a new id whose files are protected."""
        id = uuid.uuid4().hex
        self.add(id)
        return id

    def _begin(self) -> None:
        for attempt in range(_TRIES):
            name = f"stat/{uuid.uuid4().hex}.lease"
            try:
                self._descriptor = self._folder.create_locked(name)
            except FileExistsError:  # a collector tested the lock at the same moment
                if attempt == _TRIES - 1:
                    raise
                continue
            self._name = name
            return

    def close(self) -> None:
        """End the protection. If the lease file cannot be removed, garbage collection does it: it is not locked."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            self._folder.remove(self._name)  # before the lock is released, so that no process sees it unlocked
        except OSError as error:
            log.info("%s was not removed: %s", self._name, error)
        try:
            self._folder.close_file(descriptor)
        except OSError as error:
            log.info("%s was not closed: %s", self._name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def leased(folder: Folder, names: Iterable[str]) -> frozenset[str]:
    """Return the ids that running processes protect. names: of files, those that are not leases are ignored.

    OSError or SnapshotDamaged when a locked lease cannot be read, so that the files it protects are unknown.
    """
    ids: set[str] = set()
    for name in names:
        if LEASE.fullmatch(name) and folder.locked(name):
            try:
                ids.update(folder.read(name, _LIMIT).decode("ascii", "replace").split())
            except FileNotFoundError:  # closed meanwhile: its files are published or abandoned
                continue
    return frozenset(ids)

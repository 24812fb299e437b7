"""Leases: which new files a living process is still writing, so that no other process removes them as garbage.

A file's age does not say whether its writer lives: a process may be stopped for hours, a clock may jump, and a hard
link keeps the time at which the file was first written. So a writer names its new files in a file of its own,
`stat/<id>.lease`, before it creates them, and holds a lock on that file until a manifest names them or they are given
up. The kernel releases the lock when the process ends, however it ends, and not while it is stopped.

Whoever collects garbage lists the files first, then reads the leases, then the manifests. A file of that listing was
named by a lease before it was created. When the lease is still locked, the file stays; when it is not, the file was
published before, and the manifests that are read next say so, or its writer is dead.

Leases need no sync: after a power loss no writer lives. On a file system without locks no lease counts, and the age of
files decides alone.
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
"""Names of the files of leases."""
_LIMIT = 256 << 20  # bytes of a lease: 33 for each id
_TRIES = 100


class Lease:
    """The ids of segments and index files that this process writes; locked from the first id until `close`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._name = ""
        self._descriptor = -1
        self._size = 0

    def add(self, id: str) -> None:
        """Protect the files of this id, which are created after this returns. OSError when that cannot be written."""
        if self._descriptor < 0:
            self._begin()
        line = f"{id}\n".encode()
        self._folder.write(self._descriptor, line, self._size)
        self._size += len(line)

    def new(self) -> str:
        """A new id that is protected."""
        id = uuid.uuid4().hex
        self.add(id)
        return id

    def _begin(self) -> None:
        for round in range(_TRIES):
            name = f"stat/{uuid.uuid4().hex}.lease"
            try:
                self._descriptor = self._folder.create_locked(name)
            except FileExistsError:  # a collector looked at the lock at the same moment
                if round == _TRIES - 1:
                    raise
                continue
            self._name = name
            return

    def close(self) -> None:
        """Protect nothing any more. A file that cannot be removed now is left for gc: it is not locked."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            self._folder.remove(self._name)  # before the lock goes, so that nobody finds the file without it
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
    """The ids that living processes protect, of the files with these names that are leases.

    OSError or SnapshotDamaged when a lease that is locked cannot be read: what it protects is then not known.
    """
    ids: set[str] = set()
    for name in names:
        if LEASE.fullmatch(name) and folder.locked(name):
            try:
                ids.update(folder.read(name, _LIMIT).decode("ascii", "replace").split())
            except FileNotFoundError:  # closed since: its files are published or given up
                continue
    return frozenset(ids)

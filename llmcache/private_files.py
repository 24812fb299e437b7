"""Private files beside a user's results: readable by that user only, opened without following links."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from llmcache.errors import CorpusError
from llmcache.indexes.files import locks
from llmcache.indexes.files.atomic_write import set_mode, write_atomically
from llmcache.indexes.files.durable import FOLDER

_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MEANINGS = {
    errno.ELOOP: "is a symbolic link",
    errno.ENXIO: "is a socket or a device",
    errno.EISDIR: "is a folder",
    errno.ENOTDIR: "is no folder, or a symbolic link",
}


def open_plain(path: str | Path, flags: int, mode: int = 0o600, *, folder: int | None = None) -> int:
    """Open a regular file of this user. Returns a descriptor.

    flags: flags of os.open; flags that refuse links and never block are added. folder: descriptor of the folder that
    `path` is relative to.
    CorpusError for a link, a device, a folder or another user's file. A file of the owner of its folder is accepted:
    the owner can replace any file there, and on some network file systems all files have one owner.
    """
    try:
        descriptor = os.open(path, flags | _PLAIN, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in _MEANINGS:
            raise _refusal(path, _MEANINGS[error.errno]) from None
        raise
    facts = os.fstat(descriptor)
    flaw = None
    if not stat.S_ISREG(facts.st_mode):
        flaw = "is not a plain file"
    elif facts.st_uid not in {os.geteuid(), _owner(path, folder)}:
        flaw = f"belongs to the user with the number {facts.st_uid}"
    if flaw:
        os.close(descriptor)
        raise _refusal(path, flaw)
    return descriptor


def _owner(path: str | Path, folder: int | None) -> int:
    """Return the user id of the owner of this path's folder."""
    return (os.stat(os.path.dirname(path) or ".") if folder is None else os.fstat(folder)).st_uid


def _refusal(path: str | Path, flaw: str) -> CorpusError:
    return CorpusError(f"{path} {flaw}; nothing was read or written there. Remove it, or choose another name")


class PrivateFolder:
    """Folder of mode 0700 with files of mode 0600, accessed through an open descriptor of the folder."""

    def __init__(self, path: Path) -> None:
        """Open the folder, or make it. CorpusError for a link, or a folder of another user."""
        self.path = path
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            self._descriptor = os.open(path, FOLDER)
        except OSError as error:
            if error.errno in _MEANINGS:
                raise _refusal(path, _MEANINGS[error.errno]) from None
            raise
        facts = os.fstat(self._descriptor)
        if facts.st_uid not in {os.geteuid(), _owner(path, None)}:
            self.close()
            raise _refusal(path, f"belongs to the user with the number {facts.st_uid}")
        if facts.st_mode & 0o077:  # made by an earlier version, or by hand
            set_mode(self._descriptor, 0o700)

    def close(self) -> None:
        """Close the descriptor of the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def open(self, name: str, flags: int) -> int:
        """Open a file, and set its mode to 0600. Returns a descriptor, see `open_plain`."""
        try:
            descriptor = open_plain(name, flags, folder=self._descriptor)
        except CorpusError as error:
            raise CorpusError(f"{self.path}/{error}") from None
        if os.fstat(descriptor).st_mode & 0o077:
            set_mode(descriptor, 0o600)
        return descriptor

    def has(self, name: str) -> bool:
        """Return whether the folder has an entry of this name; a broken link counts."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, limit: int) -> bytes:
        """Read a whole file. ValueError when it has more than `limit` bytes."""
        with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{name} has more than {limit:,} bytes")
        return data

    def replace(self, name: str, data: bytes) -> None:
        """Write a file atomically and durably, by way of "<name>.partial"."""
        write_atomically(name, data, durable=True, partial=f"{name}.partial", folder=self._descriptor)

    def remove(self, name: str) -> None:
        """Remove a file or link, if there is one. OSError when it is a folder."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def lock(self, name: str) -> IO[bytes] | None:
        """Lock a lock file. Returns the file, which has the lock until it is closed; None if another process has it."""
        file = os.fdopen(self.open(name, os.O_RDWR | os.O_CREAT), "r+b")
        if not locks.take(file.fileno()):
            file.close()
            return None
        return file

"""Every system call on a store's files. No other module opens, writes or removes one.

Kept to a dozen calls on purpose: what a store does to a disk can be read here, and replaced as a whole.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged

SUBFOLDERS = ("seg", "idx", "stat")
QUARANTINE = "quarantine"  # damaged files that a repair put aside; made only then
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A store's folder, held open by descriptor.

    Names are relative: "m-000000000001.json" or "seg/<id>.row". A name is looked up below the descriptor of a
    folder that was itself opened without following links, so a store cannot lead out of its folder.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the folder; with `create`, make it and its sub-folders (mode 0700) when they are missing."""
        self.path = path.resolve()
        self.private = False  # True: what `map` gives is a copy that nobody else can change after it was checked
        if create:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptors: dict[str, int] = {"": os.open(self.path, _FOLDER)}
        try:
            if create:
                self._make_parts()
        except BaseException:
            self.close()
            raise

    def _make_parts(self) -> None:
        for sub in SUBFOLDERS:
            try:
                os.mkdir(sub, 0o700, dir_fd=self._descriptors[""])
            except FileExistsError:
                continue
        self.sync_folder("")

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def _place(self, name: str) -> tuple[int, str]:
        sub, _, leaf = name.rpartition("/")
        if not leaf or leaf in {".", ".."} or "\0" in leaf or sub not in {"", *SUBFOLDERS, QUARANTINE}:
            raise SnapshotDamaged(f"{name!r} is not a name inside a store")
        return self._folder(sub), leaf

    def _folder(self, sub: str) -> int:
        if sub not in self._descriptors:
            self._descriptors[sub] = os.open(sub, _FOLDER, dir_fd=self._descriptors[""])
        return self._descriptors[sub]

    # -- looking ------------------------------------------------------------------------------------------

    def names(self, sub: str = "") -> list[str]:
        """File names in one sub-folder, from one directory listing; an absent sub-folder is empty."""
        try:
            return os.listdir(self._folder(sub))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Bytes of a regular file."""
        folder, leaf = self._place(name)
        return os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_size

    def read(self, name: str, limit: int) -> bytes:
        """The whole file, at most `limit` bytes; more than that is damage, not a long wait."""
        descriptor, size = self._open(name)
        try:
            if size > limit:
                raise SnapshotDamaged(f"{name} has {size:,} bytes, more than the {limit:,} such a file may have")
            parts = []
            while part := os.read(descriptor, 1 << 20):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """The file's bytes, read-only and shared between processes; its size must be exactly `size`."""
        descriptor, found = self._open(name)
        try:
            if found != size:
                raise SnapshotDamaged(f"{name} has {found:,} bytes where the manifest says {size:,}")
            if size == 0:  # an empty file cannot be mapped
                return np.zeros(0, np.uint8)
            if self.private and not name.endswith(".seg"):  # rows of .seg are copied one by one, before their check
                return _copied(descriptor, name, size)
            return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> tuple[int, int]:
        folder, leaf = self._place(name)
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

    def exposed(self) -> str | None:
        """Why the folder is not this user's alone: the first name in it that another user owns or may write."""
        for sub in ("", *SUBFOLDERS, QUARANTINE):
            try:
                folder = self._folder(sub)
            except FileNotFoundError:
                continue
            except OSError:
                return f"{sub} is not a folder"
            flaw = _flaw(sub or str(self.path), os.fstat(folder))
            for leaf in os.listdir(folder):
                try:
                    facts = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:  # removed since the listing
                    continue
                flaw = flaw or _flaw(f"{sub}/{leaf}" if sub else leaf, facts)
            if flaw:
                return flaw
        return None

    # -- changing -----------------------------------------------------------------------------------------

    def restrict(self) -> None:
        """Take the rights of everybody else from a folder that was there before the store; in vain on another's."""
        with suppress(OSError):
            os.fchmod(self._descriptors[""], 0o700)

    def create(self, name: str) -> int:
        """Descriptor of a new file (mode 0600); FileExistsError when the name is taken."""
        folder, leaf = self._place(name)
        return os.open(leaf, _CREATE, 0o600, dir_fd=folder)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """All of `data` at `offset`; a short write is continued, its cause then shows as the next error."""
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(descriptor, view, offset)
            view, offset = view[done:], offset + done

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close_file(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, sub: str) -> None:
        os.fsync(self._folder(sub))

    def link(self, name: str, new: str) -> None:
        """Give a file a second name; FileExistsError when `new` is taken: the put-if-absent of a commit."""
        (folder, leaf), (new_folder, new_leaf) = self._place(name), self._place(new)
        os.link(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder, follow_symlinks=False)

    def replace(self, name: str, new: str) -> None:
        """Rename over `new`; only for advisory files, never for one that a manifest names."""
        (folder, leaf), (new_folder, new_leaf) = self._place(name), self._place(new)
        os.replace(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder)

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is fine."""
        folder, leaf = self._place(name)
        try:
            os.unlink(leaf, dir_fd=folder)
        except FileNotFoundError:
            return

    # -- the rest of the world ----------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def pid(self) -> int:
        return os.getpid()


def _flaw(name: str, facts: os.stat_result) -> str | None:
    if facts.st_uid != os.geteuid():
        return f"{name} belongs to the user with the number {facts.st_uid}"
    if facts.st_mode & 0o022 and not stat.S_ISLNK(facts.st_mode):  # a link's own mode means nothing
        return f"{name} may be written by other users"
    return None


def _copied(descriptor: int, name: str, size: int) -> NDArray[np.uint8]:
    data, done = np.empty(size, np.uint8), 0
    while done < size:
        count = os.preadv(descriptor, [data[done:].data], done)
        if not count:
            raise SnapshotDamaged(f"{name} became shorter while it was read")
        done += count
    return data


def write_whole(folder: Folder, name: str, parts: Iterable[bytes | memoryview]) -> int:
    """Write a new file and make its bytes durable; returns its size. A file that could not be finished is removed.

    The directory entry is not durable yet: the caller syncs the folder once for all files of a commit.
    """
    descriptor = folder.create(name)
    size = 0
    try:
        try:
            for part in parts:
                folder.write(descriptor, part, size)
                size += memoryview(part).nbytes
            folder.sync(descriptor)
        finally:
            folder.close_file(descriptor)
    except BaseException:
        folder.remove(name)
        raise
    return size

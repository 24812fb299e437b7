"""Every system call on a store's files, with `sealed`, `system`, `locks`, `durable` and `partial`, which serve
only it.

No other module opens, writes or removes a file of a store. Kept to two dozen calls on purpose: what a store does to a
disk can be read here, and replaced as a whole (`memory`).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import Busy, SnapshotDamaged
from llmcache.indexes.files import locks
from llmcache.indexes.files.durable import FOLDER, make_durably, sync_name
from llmcache.indexes.files.linux import (
    begin_sync,
    changed,
    file_system,
    flaw_in,
    kind_of,
    mapped,
)
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS, placed
from llmcache.indexes.files.plain_file import open_plain
from llmcache.indexes.files.sealed_file import Sealed, read_into

Reading = Literal["auto", "mmap", "pread"]
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "overlay"})
# what a file system answers when it cannot link, or not from there
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Folder:
    """A store's folder, held open by descriptor.

    Names are relative: "m-000000000001.json" or "seg/<id>.row". A name is looked up below the descriptor of a
    folder that was itself opened without following links, so a store cannot lead out of its folder.

    reading: "mmap" maps sealed files, which is shared between processes but kills them (SIGBUS) when somebody shortens
    a mapped file; "pread" reads them into memory, where that is a short read and a miss; "auto" maps on local disks.
    """

    def __init__(self, path: Path, *, create: bool = False, reading: Reading = "auto") -> None:
        """Open the folder; with `create`, make it and its sub-folders (mode 0700) when they are missing."""
        self.reading: Reading = reading
        self._local: bool | None = None
        self.path = path.resolve()
        self.private = False  # True: nothing is mapped, so that nobody else can change what was read and checked
        if create:
            make_durably(self.path)
        self._descriptors: dict[str, int] = {"": os.open(self.path, FOLDER)}
        try:
            if create:
                self._make_parts()
        except BaseException:
            self.close()
            raise

    def make(self) -> None:
        """Make the sub-folders that are missing."""
        self._make_parts()

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
        sub, leaf = placed(name)
        return self._folder(sub), leaf

    def _folder(self, sub: str) -> int:
        if sub not in self._descriptors:
            self._descriptors[sub] = os.open(sub, FOLDER, dir_fd=self._descriptors[""])
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

    def kind(self, name: str) -> str:
        """Type of the directory entry: "file", "folder", "link", "pipe", "socket", "device", or "" if there is none."""
        folder, leaf = self._place(name)
        try:
            mode = os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return ""
        return kind_of(mode)

    def listing(self, sub: str = "") -> dict[str, tuple[int, float]]:
        """Size in bytes and time of the last change (`changed`) of every plain file in one sub-folder, by name."""
        found: dict[str, tuple[int, float]] = {}
        for name in self.names(sub):
            try:
                facts = os.stat(name, dir_fd=self._folder(sub), follow_symlinks=False)
            except FileNotFoundError:  # removed since it was listed
                continue
            if stat.S_ISREG(facts.st_mode):
                found[name] = (facts.st_size, changed(facts))
        return found

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

    @property
    def maps(self) -> bool:
        """Whether files are mapped here rather than read."""
        if self.private:
            return False
        if self.reading != "auto":
            return self.reading == "mmap"
        if self._local is None:
            self._local = file_system(self._descriptors[""]) in _LOCAL
        return self._local

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """The file's bytes, read-only; its size must be exactly `size`. Shared between processes where it is mapped."""
        descriptor, found = self._open(name)
        try:
            if found != size:
                raise SnapshotDamaged(f"{name} has {found:,} bytes where the manifest says {size:,}")
            if size and self.maps:  # an empty file cannot be mapped
                return mapped(descriptor, size)
            data = np.empty(size, np.uint8)
            if read_into(descriptor, data, 0) != size:
                raise SnapshotDamaged(f"{name} became shorter than {size:,} bytes while it was read")
            data.flags.writeable = False
            return data
        finally:
            os.close(descriptor)

    def sealed(self, name: str, size: int) -> Sealed:
        """A file to read rows from; its size must be exactly `size`. Where it is not mapped, it may be opened again."""
        if self.maps:
            return Sealed(size, mapped=self.map(name, size))
        descriptor, found = self._open(name)
        if found != size:
            os.close(descriptor)
            raise SnapshotDamaged(f"{name} has {found:,} bytes where the manifest says {size:,}")
        same = os.fstat(descriptor)
        return Sealed(size, descriptor=descriptor, again=lambda: self._again(name, same))

    def _again(self, name: str, same: os.stat_result) -> int:
        """Descriptor of a file that was looked at before; OSError when it is another one, or this folder is closed."""
        if not self._descriptors:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), name)
        try:
            descriptor, _ = self._open(name)
        except SnapshotDamaged as error:
            raise OSError(errno.ESTALE, str(error), name) from error
        if not os.path.samestat(os.fstat(descriptor), same):
            os.close(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return descriptor

    def open(self, name: str) -> tuple[int, int]:
        """Descriptor of a plain file, for reading with `read_at`, and its bytes; close it with `close_file`."""
        return self._open(name)

    def read_at(self, descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill the buffer from `offset`; the bytes that were there."""
        return read_into(descriptor, buffer, offset)

    def age(self, name: str) -> float:
        """Seconds since the file was last written, or given this name (a link keeps the time of the writing)."""
        folder, leaf = self._place(name)
        facts = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        return self.now() - changed(facts)

    def _open(self, name: str) -> tuple[int, int]:
        folder, leaf = self._place(name)
        return open_plain(folder, leaf, name)

    def exposed(self) -> str | None:
        """Why the folder is not this user's alone: the first name in it that another user owns or may write."""
        for sub in ("", *SUBFOLDERS, QUARANTINE):
            try:
                folder = self._folder(sub)
            except FileNotFoundError:
                continue
            except OSError:
                if self.kind(sub) == "link":  # it is not followed, but whoever made it does not mean this folder
                    return f"{sub} is a link (put the folder itself in its place)"
                continue  # not a folder, so it holds nothing; whose it is was seen above
            if flaw := flaw_in(folder, sub, str(self.path)):
                return flaw
        return None

    def writable(self) -> bool:
        """Return whether this process can create files here: False on a read-only mount or without permission."""
        for sub in ("", *SUBFOLDERS):
            with suppress(FileNotFoundError, NotADirectoryError):
                if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._folder(sub), effective_ids=True):
                    return False
        return True

    # -- changing -----------------------------------------------------------------------------------------

    def restrict(self) -> None:
        """Take the rights of everybody else from a folder that was there before the store; in vain on another's."""
        with suppress(OSError):
            os.fchmod(self._descriptors[""], 0o700)

    def create(self, name: str) -> int:
        """Descriptor of a new file (mode 0600); FileExistsError when the name is taken."""
        folder, leaf = self._place(name)
        return os.open(leaf, _CREATE, 0o600, dir_fd=folder)

    def create_locked(self, name: str) -> int:
        """Descriptor of a new file that is locked until this process closes it or ends.

        FileExistsError when the name is taken, or when another process looked at the lock at the same moment: try
        another name. On a file system without locks it is created all the same.
        """
        descriptor = self.create(name)
        try:
            if not locks.share(descriptor):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        except BaseException:
            os.close(descriptor)
            self.remove(name)
            raise
        return descriptor

    def locked(self, name: str) -> bool:
        """Return whether a process holds the lock of a file of `create_locked`; False if there is no such file."""
        with suppress(FileNotFoundError, SnapshotDamaged), locks.unlocked(self._open(name)[0]) as free:
            return not free
        return False

    def remove_unlocked(self, name: str) -> None:
        """Remove a file that `create_locked` made, unless a living process has it open."""
        with suppress(FileNotFoundError, SnapshotDamaged), locks.unlocked(self._open(name)[0]) as free:
            if free:  # whoever locks it from now on sees that it has no name any more
                self.remove(name)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """All of `data` at `offset`; a short write is continued, its cause then shows as the next error."""
        view = memoryview(data).cast("B")
        while view:
            done = self.write_some(descriptor, view, offset)
            view, offset = view[done:], offset + done

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        """One system call: how many bytes of `data` were taken, which may be fewer than all."""
        return os.pwrite(descriptor, data, offset)

    def begin_sync(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Let the disk begin with bytes that a later `sync` waits for. A hint, whose failure that `sync` would show."""
        begin_sync(descriptor, offset, nbytes)

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

    def link_from(self, source: Folder, name: str, new: str) -> bool:
        """Give a file of another folder a second name here; False where that cannot be: copy it then.

        Only a file of this user that nobody else may write: another's hand must not reach into this folder.
        """
        (folder, leaf), (new_folder, new_leaf) = source._place(name), self._place(new)
        facts = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            return False
        try:
            os.link(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        return True

    def set_aside(self, name: str) -> str:
        """Move a file, or whatever has this name, into the quarantine; its name there."""
        if self.kind(QUARANTINE) not in {"", "folder"}:
            os.rename(
                QUARANTINE,
                f"{QUARANTINE}.{self.now():.0f}",
                src_dir_fd=self._descriptors[""],
                dst_dir_fd=self._descriptors[""],
            )
        with suppress(FileExistsError):
            os.mkdir(QUARANTINE, 0o700, dir_fd=self._descriptors[""])
        leaf = name.rpartition("/")[2]
        taken = set(self.names(QUARANTINE))
        free = next(one for n in range(len(taken) + 1) if (one := f"{leaf}.{n}" if n else leaf) not in taken)
        self.replace(name, f"{QUARANTINE}/{free}")
        return f"{QUARANTINE}/{free}"

    def move_to(self, target: Path) -> None:
        """Give the whole folder its final name, durably. OSError when something that is not empty has it already."""
        built = self.path
        self.rename(target)
        try:
            self.sync_above()
        except BaseException:
            self.rename(built)
            raise

    def rename(self, target: Path) -> None:
        """Give the whole folder another name; `sync_above` makes it durable."""
        os.rename(self.path, target)
        self.path = target

    def sync_above(self) -> None:
        """Make the folder's own name durable."""
        sync_name(self.path.parent)

    def discard(self) -> None:
        """Remove the folder with all that is in it, as far as that can be done."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Hold the store's maintainer lock; `Busy` at once when another process, or another opening, has it.

        The file stays: whoever removed it would let two maintainers lock two files of the same name.
        """
        folder, leaf = self._place(name)
        descriptor = os.open(leaf, _LOCK, 0o600, dir_fd=folder)
        try:
            if holder := locks.exclude(descriptor, self.pid()):
                raise Busy(f"{self.path} is being maintained by {holder}; try again when it is done")
            yield
        finally:
            os.close(descriptor)

    # -- the rest of the world ----------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def pid(self) -> int:
        return os.getpid()

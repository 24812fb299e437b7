"""All system calls on a store's files; the other modules of this package serve only this one.

No other module opens, writes or removes a file of a store. The calls are few on purpose: they show all that a store
does to a disk, and tests replace them as a whole by a simulated disk.
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
from llmcache.indexes.files.linux import begin_sync, changed, file_system, flaw_in, kind_of, mapped
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS, placed
from llmcache.indexes.files.plain_file import open_plain
from llmcache.indexes.files.sealed_file import Sealed, read_into

Reading = Literal["auto", "mmap", "pread"]
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "overlay"})
# errors of a file system that cannot create this link
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Folder:
    """Folder of a store, kept open by descriptor.

    Names are relative: "m-000000000001.json" or "seg/<id>.row". Names are resolved below the descriptor of a folder
    that was itself opened without following links, so a store cannot lead out of its folder.

    reading: "mmap" maps sealed files, so that processes share memory, but a process is killed (SIGBUS) when somebody
    truncates a mapped file; "pread" reads them, and a truncated file is a short read and a miss; "auto" maps files on
    local disks.
    """

    def __init__(self, path: Path, *, create: bool = False, reading: Reading = "auto") -> None:
        """Open the folder; with `create`, make it and its sub-folders (mode 0700) when they are missing."""
        self.reading: Reading = reading
        self._local: bool | None = None
        self.path = path.resolve()
        self.private = False  # True: map no files, so that nobody can change bytes after they were checked
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
        """Close all descriptors of the folder."""
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
        """List the names in one sub-folder, by one directory listing; a missing sub-folder is empty."""
        try:
            return os.listdir(self._folder(sub))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        folder, leaf = self._place(name)
        return os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_size

    def kind(self, name: str) -> str:
        """Return the type of a directory entry, see `linux.kind_of`; "" if there is none."""
        folder, leaf = self._place(name)
        try:
            mode = os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return ""
        return kind_of(mode)

    def listing(self, sub: str = "") -> dict[str, tuple[int, float]]:
        """Return size in bytes and time of change (`linux.changed`) of the files in one sub-folder, by name."""
        listed: dict[str, tuple[int, float]] = {}
        for name in self.names(sub):
            try:
                facts = os.stat(name, dir_fd=self._folder(sub), follow_symlinks=False)
            except FileNotFoundError:  # removed after it was listed
                continue
            if stat.S_ISREG(facts.st_mode):
                listed[name] = (facts.st_size, changed(facts))
        return listed

    def read(self, name: str, limit: int) -> bytes:
        """Read a whole file. SnapshotDamaged when it has more than `limit` bytes."""
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
        """Return whether files are mapped rather than read."""
        if self.private:
            return False
        if self.reading != "auto":
            return self.reading == "mmap"
        if self._local is None:
            self._local = file_system(self._descriptors[""]) in _LOCAL
        return self._local

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """Return the bytes of a file, uint8 [size], read-only, mapped or read. SnapshotDamaged for another size."""
        descriptor, actual = self._open(name)
        try:
            if actual != size:
                raise SnapshotDamaged(f"{name} has {actual:,} bytes where the manifest says {size:,}")
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
        """Open a file to read rows from. SnapshotDamaged for another size. An unmapped file may be reopened later."""
        if self.maps:
            return Sealed(size, mapped=self.map(name, size))
        descriptor, actual = self._open(name)
        if actual != size:
            os.close(descriptor)
            raise SnapshotDamaged(f"{name} has {actual:,} bytes where the manifest says {size:,}")
        same = os.fstat(descriptor)
        return Sealed(size, descriptor=descriptor, again=lambda: self._again(name, same))

    def _again(self, name: str, same: os.stat_result) -> int:
        """Open a file again. Returns its descriptor. OSError when it is another file, or this folder is closed."""
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
        """Open a file for `read_at`. Returns its descriptor, to be closed with `close_file`, and its size in bytes."""
        return self._open(name)

    def read_at(self, descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill the buffer from `offset`. Returns the number of bytes read, fewer at the file's end."""
        return read_into(descriptor, buffer, offset)

    def age(self, name: str) -> float:
        """Return the seconds since a file was last written or linked."""
        folder, leaf = self._place(name)
        facts = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        return self.now() - changed(facts)

    def _open(self, name: str) -> tuple[int, int]:
        folder, leaf = self._place(name)
        return open_plain(folder, leaf, name)

    def exposed(self) -> str | None:
        """Return the first entry that another user owns or may write, as a message; None if there is none."""
        for sub in ("", *SUBFOLDERS, QUARANTINE):
            try:
                folder = self._folder(sub)
            except FileNotFoundError:
                continue
            except OSError:
                if self.kind(sub) == "link":  # links are not followed, so the store would lack this folder
                    return f"{sub} is a link (put the folder itself in its place)"
                continue  # not a folder, so it has no entries; its owner was checked with the folder above
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
        """Set mode 0700 on a folder that existed before the store. Ignored when another user owns it."""
        with suppress(OSError):
            os.fchmod(self._descriptors[""], 0o700)

    def create(self, name: str) -> int:
        """Create a file (mode 0600). Returns its descriptor. FileExistsError when the name is taken."""
        folder, leaf = self._place(name)
        return os.open(leaf, _CREATE, 0o600, dir_fd=folder)

    def create_locked(self, name: str) -> int:
        """Create a file that is locked until this process closes it or ends. Returns its descriptor.

        FileExistsError when the name is taken, or when another process tested the lock at the same moment: try another
        name. On a file system without locks the file is created without a lock.
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
        """Remove a file of `create_locked`, unless a running process has it locked."""
        with suppress(FileNotFoundError, SnapshotDamaged), locks.unlocked(self._open(name)[0]) as free:
            if free:  # a process that locks it from now on sees that its link count is zero
                self.remove(name)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`. A short write is continued; its cause then shows as the next error."""
        view = memoryview(data).cast("B")
        while view:
            done = self.write_some(descriptor, view, offset)
            view, offset = view[done:], offset + done

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write by one system call. Returns the number of bytes written, which may be fewer than all."""
        return os.pwrite(descriptor, data, offset)

    def begin_sync(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Start writing bytes to the disk that a later `sync` waits for. A hint: a failure shows in that `sync`."""
        begin_sync(descriptor, offset, nbytes)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close_file(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, sub: str) -> None:
        os.fsync(self._folder(sub))

    def link(self, name: str, new: str) -> None:
        """Hard-link a file to a second name. FileExistsError when `new` is taken: the put-if-absent of a commit."""
        (folder, leaf), (new_folder, new_leaf) = self._place(name), self._place(new)
        os.link(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder, follow_symlinks=False)

    def replace(self, name: str, new: str) -> None:
        """Rename a file over `new`. Only for advisory files, never for files that a manifest names."""
        (folder, leaf), (new_folder, new_leaf) = self._place(name), self._place(new)
        os.replace(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        folder, leaf = self._place(name)
        try:
            os.unlink(leaf, dir_fd=folder)
        except FileNotFoundError:
            return

    def link_from(self, source: Folder, name: str, new: str) -> bool:
        """Hard-link a file of another folder into this one. Returns False if that is impossible: copy it then.

        Links only files that this user owns and nobody else may write, because others could change the linked file.
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
        """Move a file, or any other entry of this name, into the quarantine. Returns its name there."""
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
        free = next(entry for n in range(len(taken) + 1) if (entry := f"{leaf}.{n}" if n else leaf) not in taken)
        self.replace(name, f"{QUARANTINE}/{free}")
        return f"{QUARANTINE}/{free}"

    def move_to(self, target: Path) -> None:
        """Rename the whole folder, durably. OSError when the target exists and is not empty."""
        built = self.path
        self.rename(target)
        try:
            self.sync_above()
        except BaseException:
            self.rename(built)
            raise

    def rename(self, target: Path) -> None:
        """Rename the whole folder; `sync_above` makes the name durable."""
        os.rename(self.path, target)
        self.path = target

    def sync_above(self) -> None:
        """Make the folder's own name durable."""
        sync_name(self.path.parent)

    def discard(self) -> None:
        """Remove the folder and its content, as far as possible."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Hold the store's maintainer lock inside the block. Busy at once when it is taken, also by this process.

        The lock file stays: if it were removed, two processes could lock two files of the same name.
        """
        folder, leaf = self._place(name)
        descriptor = os.open(leaf, _LOCK, 0o600, dir_fd=folder)
        try:
            if holder := locks.exclude(descriptor, self.pid()):
                raise Busy(f"{self.path} is being maintained by {holder}; try again when it is done")
            yield
        finally:
            os.close(descriptor)

    # -- clock and process ---------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time in seconds since the epoch."""
        return time.time()

    def pid(self) -> int:
        return os.getpid()

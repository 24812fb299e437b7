"""A store's folder in memory, with a disk under it that can be full, fail, or lose its power.

`disk` says what is modelled, `crashes` what a power loss may leave. A process that is killed loses nothing: the page
cache stays. Several folders may be on one disk; their names may be lost in a power loss as those in a folder are.

What it cannot show. Calls happen one after the other, so no race between processes; a lying disk, that acknowledges a
sync and forgets it; bit rot; a rename that is half done (both names, or none); a write to a mapped file; anything a
real file system does beside POSIX. Names that point out of a store, links, pipes and rights do not exist here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import Busy, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS, placed
from llmcache.indexes.files.sealed_file import Sealed
from tests.simulated_disk.crashes import after_a_kill, after_power_loss
from tests.simulated_disk.disk import (
    Fault,
    File,
    Machine,
    Part,
)


class MemoryFolder(Folder):
    """`Folder` without a disk. Every call but `now`, `pid`, `close` is numbered, and noted in `calls`.

    A disk may hold several: `beside` gives another one. Calls, faults, crashes and the clock are of all of them.
    """

    def __init__(self, *, create: bool = False, fault: Fault | None = None) -> None:
        """An empty folder; with `create`, with its sub-folders, as `Folder` makes them."""
        self.path = Path("/in-memory")
        self.reading = "mmap"
        self.private = False
        part = Part()
        self._machine = Machine(Part({self.path.name: part}, {self.path.name: part}), fault)
        if create:
            self.make()

    def beside(self, name: str, *, create: bool = False) -> MemoryFolder:
        """Another folder of the same disk; with `create` it is made, as `Folder` does."""
        folder = MemoryFolder.__new__(MemoryFolder)
        folder.path, folder.reading, folder.private = self.path.with_name(name), "mmap", False
        folder._machine = self._machine
        if create:
            if name not in self._machine.root.names:
                self._machine.step("mkdir", name)
                self._machine.root.change({name: Part()})
                folder.sync_above()
            folder.make()
        return folder

    def folders(self) -> list[str]:
        """Names of all folders of the disk. Not a call."""
        return list(self._machine.root.names)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Name of each call, and of the file it was for."""
        return self._machine.calls

    @property
    def fault(self) -> Fault | None:
        return self._machine.fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._machine.fault = fault

    @property
    def time(self) -> float:
        """Seconds since the epoch; a test may set it."""
        return self._machine.time

    @time.setter
    def time(self, seconds: float) -> None:
        self._machine.time = seconds

    @property
    def process(self) -> int:
        return self._machine.process

    @process.setter
    def process(self, number: int) -> None:
        self._machine.process = number

    @property
    def before(self) -> Callable[[int, str], object] | None:
        """Called before each call, with its number and name."""
        return self._machine.before

    @before.setter
    def before(self, act: Callable[[int, str], object] | None) -> None:
        self._machine.before = act

    @property
    def _root(self) -> Part:
        part = self._machine.root.names.get(self.path.name)
        if part is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        assert isinstance(part, Part)
        return part

    def make(self) -> None:
        """Make the sub-folders that are missing, as opening a `Folder` with `create` does."""
        for sub in SUBFOLDERS:
            self._machine.step("mkdir", sub)
            if sub not in self._root.names:
                self._root.change({sub: Part()})
        self.sync_folder("")

    def close(self) -> None:
        """Nothing: files that are open stay so."""

    def _part(self, sub: str) -> Part:
        part = self._root if not sub else self._root.names.get(sub)
        if part is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), sub)
        assert isinstance(part, Part)
        return part

    def _place_of(self, name: str) -> tuple[Part, str]:
        sub, leaf = placed(name)
        return self._part(sub), leaf

    def _file(self, name: str) -> File:
        part, leaf = self._place_of(name)
        found = part.names.get(leaf)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if isinstance(found, Part):
            raise SnapshotDamaged(f"{name} is not a plain file")
        return found

    # -- looking ------------------------------------------------------------------------------------------

    def names(self, sub: str = "") -> list[str]:
        self._machine.step("names", sub)
        try:
            return list(self._part(sub).names)
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        self._machine.step("size", name)
        return len(self._file(name).data)

    def kind(self, name: str) -> str:
        self._machine.step("kind", name)
        part, leaf = self._place_of(name)
        found = part.names.get(leaf)
        return "" if found is None else "folder" if isinstance(found, Part) else "file"

    def read(self, name: str, limit: int) -> bytes:
        self._machine.step("read", name)
        data = bytes(self._file(name).data)
        if len(data) > limit:
            raise SnapshotDamaged(f"{name} has {len(data):,} bytes, more than the {limit:,} such a file may have")
        return data

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """A copy, so a file that is changed in place does not change under its reader, as a mapped one would."""
        self._machine.step("map", name)
        data = bytes(self._file(name).data)
        if len(data) != size:
            raise SnapshotDamaged(f"{name} has {len(data):,} bytes where the manifest says {size:,}")
        return np.frombuffer(data, np.uint8)

    def sealed(self, name: str, size: int) -> Sealed:
        return Sealed(size, mapped=self.map(name, size))

    def open(self, name: str) -> tuple[int, int]:
        self._machine.step("open", name)
        file = self._file(name)
        return self._machine.opened(file), len(file.data)

    def read_at(self, descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
        self._machine.step("read_at", "")
        part = np.frombuffer(bytes(self._machine.files[descriptor].data[offset : offset + len(buffer)]), np.uint8)
        buffer[: len(part)] = part
        return len(part)

    def age(self, name: str) -> float:
        self._machine.step("age", name)
        return self.time - self._file(name).changed

    def listing(self, sub: str = "") -> dict[str, tuple[int, float]]:
        self._machine.step("listing", sub)
        part = self._root.names.get(sub) if sub else self._root
        entries = part.names.items() if isinstance(part, Part) else ()
        return {name: (len(file.data), file.changed) for name, file in entries if isinstance(file, File)}

    def exposed(self) -> str | None:
        """Never: there are no other users here."""
        return None

    def writable(self) -> bool:
        """Always: there are no rights here."""
        return True

    # -- changing -----------------------------------------------------------------------------------------

    def restrict(self) -> None:
        """Nothing: there are no rights here."""

    def create(self, name: str) -> int:
        part, leaf = self._place_of(name)
        self._machine.step("create", name)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        file = File(changed=self.time)
        part.change({leaf: file})
        return self._machine.opened(file)

    def create_locked(self, name: str) -> int:
        descriptor = self.create(name)
        self._machine.leases[descriptor] = str(self.path), name
        return descriptor

    def locked(self, name: str) -> bool:
        self._machine.step("locked", name)
        return (str(self.path), name) in self._machine.leases.values()

    def remove_unlocked(self, name: str) -> None:
        if not self.locked(name):
            self.remove(name)

    def reopen(self, name: str) -> int:
        """Descriptor of a file that is there, for writing. No store does this: it is how tests break one."""
        return self._machine.opened(self._file(name))

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._machine.step("write_some", "")
        taken = bytes(data[: max(1, len(data) // 2)] if self._machine.cut("write_some") else data)
        self._machine.files[descriptor].write(offset, taken, self.time)
        self._machine.wrote()
        return len(taken)

    def begin_sync(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Nothing: it promises nothing, so a power loss may keep what it did or not."""

    def sync(self, descriptor: int) -> None:
        file = self._machine.files[descriptor]
        try:
            self._machine.step("sync", "")
        except OSError:
            file.failed, file.writes = True, []
            raise
        if not file.failed:
            file.durable, file.writes = bytes(file.data), []

    def close_file(self, descriptor: int) -> None:
        file = self._machine.files.pop(descriptor, None)  # gone whatever the call says
        self._machine.leases.pop(descriptor, None)
        if self._machine.dead:  # files that are open end with their process
            return
        self._machine.step("close_file", "")
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def sync_folder(self, sub: str) -> None:
        self._machine.step("sync_folder", sub)
        part = self._part(sub)
        part.durable, part.changes = dict(part.names), []

    def link(self, name: str, new: str) -> None:
        (part, leaf), file = self._place_of(new), self._file(name)
        self._machine.step("link", new)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        part.change({leaf: file})

    def replace(self, name: str, new: str) -> None:
        (part, old), (target, leaf), file = self._place_of(name), self._place_of(new), self._file(name)
        self._machine.step("replace", new)
        if part is target:  # one change, kept or lost as a whole
            part.change({old: None, leaf: file})
        else:
            target.change({leaf: file})
            part.change({old: None})

    def remove(self, name: str) -> None:
        part, leaf = self._place_of(name)
        self._machine.step("remove", name)
        if isinstance(part.names.get(leaf), File):
            part.change({leaf: None})

    def link_from(self, source: Folder, name: str, new: str) -> bool:
        """Only from a folder of the same disk."""
        if not isinstance(source, MemoryFolder) or source._machine is not self._machine:
            return False
        (part, leaf), file = self._place_of(new), source._file(name)
        self._machine.step("link_from", new)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        part.change({leaf: file})
        return True

    def set_aside(self, name: str) -> str:
        if QUARANTINE not in self._root.names:
            self._machine.step("mkdir", QUARANTINE)
            self._root.change({QUARANTINE: Part()})
        leaf = name.rpartition("/")[2]
        taken = self._part(QUARANTINE).names
        free = next(one for n in range(len(taken) + 1) if (one := f"{leaf}.{n}" if n else leaf) not in taken)
        self.replace(name, f"{QUARANTINE}/{free}")
        return f"{QUARANTINE}/{free}"

    def rename(self, target: Path) -> None:
        self._machine.step("rename", target.name)
        there = self._machine.root.names.get(target.name)
        if isinstance(there, Part) and there.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        self._machine.root.change({self.path.name: None, target.name: self._root})
        self.path = target

    def sync_above(self) -> None:
        self._machine.step("sync_above", "")
        root = self._machine.root
        root.durable, root.changes = dict(root.names), []

    def discard(self) -> None:
        """Name by name, as a tree is removed, so that a crash may leave any of it; a failing disk all of it."""
        with suppress(OSError):
            for sub in [*(name for name, one in self._root.names.items() if isinstance(one, Part)), ""]:
                for leaf in [name for name, one in self._part(sub).names.items() if isinstance(one, File)]:
                    self.remove(f"{sub}/{leaf}" if sub else leaf)
            self._machine.step("remove", "")
            self._machine.root.change({self.path.name: None})

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        self._machine.step("lock", name)
        place = str(self.path), name
        if place in self._machine.locked:
            raise Busy(f"{self.path} is being maintained by this process; try again when it is done")
        self._machine.locked.add(place)
        try:
            yield
        finally:
            self._machine.locked.remove(place)

    # -- the rest of the world ----------------------------------------------------------------------------

    def now(self) -> float:
        return self.time

    def pid(self) -> int:
        return self.process

    def contents(self) -> dict[str, bytes]:
        """Every file's bytes in the page cache, by name. Not a call: nothing counts it, and it never fails."""
        if self.path.name not in self._machine.root.names:
            return {}
        found: dict[str, bytes] = {}
        for sub, part in [("", self._root), *self._root.names.items()]:
            for name, entry in part.names.items() if isinstance(part, Part) else ():
                if isinstance(entry, File):
                    found[f"{sub}/{name}" if sub else name] = bytes(entry.data)
        return found

    def total_bytes(self) -> int:
        """Bytes of all files together. Not a call."""
        parts = [self._root, *(part for part in self._root.names.values() if isinstance(part, Part))]
        return sum(len(file.data) for part in parts for file in part.names.values() if isinstance(file, File))

    # -- crashes ------------------------------------------------------------------------------------------

    def killed(self) -> MemoryFolder:
        """The folder as the next process finds it after this one was killed: what is not synced is still not."""
        return self._with(after_a_kill(self._machine.root))

    def crash_states(self, seed: int, count: int) -> Iterator[MemoryFolder]:
        """Folders as a power loss now may leave them: nothing unsynced kept, all of it, and so on, then at random."""
        for i in range(count):
            yield self._with(after_power_loss(self._machine.root, seed, i))

    def _with(self, root: Part) -> MemoryFolder:
        folder = MemoryFolder()
        folder.path = self.path
        folder._machine = Machine(root, time=self.time, process=self.process + 1)
        return folder

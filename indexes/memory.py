"""A store's folder in memory, with a disk under it that can be full, fail, or lose its power.

What is modelled. A file has bytes in the page cache and bytes on the disk; `sync` makes the first the second. A
folder has names in the cache and names on the disk; `sync_folder` makes the first the second. A power loss may keep
of the bytes that were not synced: none, all, those of the first writes (the last of them cut anywhere), or any blocks
of 512 or 4,096 bytes; what was not kept is what the disk had, zeros beyond it, or the file is shorter. It may keep of
the changes to a folder's names: none, all, the first ones, or any subset. Each file and each folder loses on its own.
After a sync that failed, what was
written is never durable, and a second sync says nothing of it, as Linux does. A process that is killed loses nothing:
the page cache stays.

Several folders may be on one disk; their names may be lost in a power loss as those in a folder are.

What it cannot show. Calls happen one after the other, so no race between processes; a lying disk, that acknowledges a
sync and forgets it; bit rot; a rename that is half done (both names, or none); a write to a mapped file; anything a
real file system does beside POSIX. Names that point out of a store, links, pipes and rights do not exist here.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import Busy, SnapshotDamaged
from llmcache.indexes.io import Folder
from llmcache.indexes.places import QUARANTINE, SUBFOLDERS, placed
from llmcache.indexes.sealed import Sealed

CHANGES = frozenset(
    {"mkdir", "create", "write_some", "sync", "close_file", "sync_folder", "sync_above"}
    | {"link", "link_from", "replace", "rename", "remove"}
)
"""Calls that change a disk; the others only look."""
_TAKES_NO_SPACE = frozenset({"remove", "close_file"})
_BLOCKS = (512, 4096)


class PowerLoss(BaseException):
    """Everything stops here. No `except` of the library's may see it, and no call works after it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong from one call on.

    at: number of the call, from 0. code: an errno; 0 is a power loss in the middle of the call. forever: all later
    calls fail too. short: a write takes half of its bytes, and only what follows fails, where `forever` is set.
    """

    at: int
    code: int = 0
    forever: bool = False
    short: bool = False

    def hits(self, number: int, call: str) -> bool:
        if number < self.at or (number > self.at and not self.forever):
            return False
        if self.short and number == self.at:
            return call == "write_some"
        if self.code in {errno.ENOSPC, errno.EDQUOT}:
            return call in CHANGES - _TAKES_NO_SPACE
        return self.code != errno.EROFS or call in CHANGES


@dataclass(eq=False, slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # since the last sync
    failed: bool = False  # a sync has: what was written will never be durable, and later syncs do not say so
    changed: float = 0.0  # seconds since the epoch


_Names: TypeAlias = "dict[str, _File | _Part]"
_Change: TypeAlias = "dict[str, _File | _Part | None]"  # names and what they now lead to, None: nothing


@dataclass(eq=False, slots=True)
class _Part:
    names: _Names = field(default_factory=dict)
    durable: _Names = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)  # since the last sync

    def change(self, new: _Change) -> None:
        _apply(self.names, new)
        self.changes.append(new)


@dataclass(eq=False, slots=True)
class _Machine:
    """What all folders of one disk share. root: these folders, by name."""

    root: _Part
    fault: Fault | None = None
    time: float = 1.8e9
    process: int = 1
    before: Callable[[int, str], object] | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    files: dict[int, _File] = field(default_factory=dict)  # by descriptor
    locked: set[tuple[str, str]] = field(default_factory=set)
    dead: bool = False


class MemoryFolder(Folder):
    """`Folder` without a disk. Every call but `now`, `pid`, `close` is numbered, and noted in `calls`.

    A disk may hold several: `beside` gives another one. Calls, faults, crashes and the clock are of all of them.
    """

    def __init__(self, *, create: bool = False, fault: Fault | None = None) -> None:
        """An empty folder; with `create`, with its sub-folders, as `Folder` makes them."""
        self.path = Path("/in-memory")
        self.reading = "mmap"
        self.private = False
        part = _Part()
        self._machine = _Machine(_Part({self.path.name: part}, {self.path.name: part}), fault)
        if create:
            self.make()

    def beside(self, name: str, *, create: bool = False) -> MemoryFolder:
        """Another folder of the same disk; with `create` it is made, as `Folder` does."""
        folder = MemoryFolder.__new__(MemoryFolder)
        folder.path, folder.reading, folder.private = self.path.with_name(name), "mmap", False
        folder._machine = self._machine
        if create:
            if name not in self._machine.root.names:
                self._step("mkdir", name)
                self._machine.root.change({name: _Part()})
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
    def _root(self) -> _Part:
        part = self._machine.root.names.get(self.path.name)
        if part is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        assert isinstance(part, _Part)
        return part

    def make(self) -> None:
        """Make the sub-folders that are missing, as opening a `Folder` with `create` does."""
        for sub in SUBFOLDERS:
            self._step("mkdir", sub)
            if sub not in self._root.names:
                self._root.change({sub: _Part()})
        self.sync_folder("")

    def close(self) -> None:
        """Nothing: files that are open stay so."""

    def _step(self, call: str, name: str) -> None:
        if self._machine.dead:
            raise PowerLoss
        if self.before:
            self.before(len(self.calls), call)
        self.calls.append((call, name))
        if self.fault and self.fault.hits(len(self.calls) - 1, call) and not self._cut(call):
            if not self.fault.code:
                self._machine.dead = True
                raise PowerLoss
            raise OSError(self.fault.code, os.strerror(self.fault.code), name)

    def _cut(self, call: str) -> bool:
        """Whether this call is a write that takes only half of its bytes."""
        number = len(self.calls) - 1
        wanted = self.fault and number == self.fault.at and (self.fault.short or not self.fault.code)
        return bool(wanted) and call == "write_some"

    def _part(self, sub: str) -> _Part:
        part = self._root if not sub else self._root.names.get(sub)
        if part is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), sub)
        assert isinstance(part, _Part)
        return part

    def _place_of(self, name: str) -> tuple[_Part, str]:
        sub, leaf = placed(name)
        return self._part(sub), leaf

    def _file(self, name: str) -> _File:
        part, leaf = self._place_of(name)
        found = part.names.get(leaf)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if isinstance(found, _Part):
            raise SnapshotDamaged(f"{name} is not a plain file")
        return found

    # -- looking ------------------------------------------------------------------------------------------

    def names(self, sub: str = "") -> list[str]:
        self._step("names", sub)
        try:
            return list(self._part(sub).names)
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        self._step("size", name)
        return len(self._file(name).data)

    def read(self, name: str, limit: int) -> bytes:
        self._step("read", name)
        data = bytes(self._file(name).data)
        if len(data) > limit:
            raise SnapshotDamaged(f"{name} has {len(data):,} bytes, more than the {limit:,} such a file may have")
        return data

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """A copy, so a file that is changed in place does not change under its reader, as a mapped one would."""
        self._step("map", name)
        data = bytes(self._file(name).data)
        if len(data) != size:
            raise SnapshotDamaged(f"{name} has {len(data):,} bytes where the manifest says {size:,}")
        return np.frombuffer(data, np.uint8)

    def sealed(self, name: str, size: int) -> Sealed:
        return Sealed(size, mapped=self.map(name, size))

    def open(self, name: str) -> tuple[int, int]:
        self._step("open", name)
        file = self._file(name)
        return self._opened(file), len(file.data)

    def read_at(self, descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
        self._step("read_at", "")
        part = np.frombuffer(bytes(self._machine.files[descriptor].data[offset : offset + len(buffer)]), np.uint8)
        buffer[: len(part)] = part
        return len(part)

    def age(self, name: str) -> float:
        self._step("age", name)
        return self.time - self._file(name).changed

    def listing(self, sub: str = "") -> dict[str, tuple[int, float]]:
        self._step("listing", sub)
        part = self._root.names.get(sub) if sub else self._root
        entries = part.names.items() if isinstance(part, _Part) else ()
        return {name: (len(file.data), file.changed) for name, file in entries if isinstance(file, _File)}

    def exposed(self) -> str | None:
        """Never: there are no other users here."""
        return None

    # -- changing -----------------------------------------------------------------------------------------

    def restrict(self) -> None:
        """Nothing: there are no rights here."""

    def create(self, name: str) -> int:
        part, leaf = self._place_of(name)
        self._step("create", name)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        file = _File(changed=self.time)
        part.change({leaf: file})
        return self._opened(file)

    def _opened(self, file: _File) -> int:
        descriptor = 1 + max(self._machine.files, default=2)
        self._machine.files[descriptor] = file
        return descriptor

    def reopen(self, name: str) -> int:
        """Descriptor of a file that is there, for writing. No store does this: it is how tests break one."""
        return self._opened(self._file(name))

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._step("write_some", "")
        cut = self.fault is not None and self._cut("write_some")
        taken = bytes(data[: max(1, len(data) // 2)] if cut else data)
        file = self._machine.files[descriptor]
        _write(file.data, offset, taken)
        file.writes.append((offset, taken))
        file.changed = self.time
        if cut and self.fault and not self.fault.code and not self.fault.short:
            self._machine.dead = True
            raise PowerLoss
        return len(taken)

    def begin_sync(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Nothing: it promises nothing, so a power loss may keep what it did or not."""

    def sync(self, descriptor: int) -> None:
        file = self._machine.files[descriptor]
        try:
            self._step("sync", "")
        except OSError:
            file.failed, file.writes = True, []
            raise
        if not file.failed:
            file.durable, file.writes = bytes(file.data), []

    def close_file(self, descriptor: int) -> None:
        file = self._machine.files.pop(descriptor, None)  # gone whatever the call says
        if self._machine.dead:  # files that are open end with their process
            return
        self._step("close_file", "")
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def sync_folder(self, sub: str) -> None:
        self._step("sync_folder", sub)
        part = self._part(sub)
        part.durable, part.changes = dict(part.names), []

    def link(self, name: str, new: str) -> None:
        (part, leaf), file = self._place_of(new), self._file(name)
        self._step("link", new)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        part.change({leaf: file})

    def replace(self, name: str, new: str) -> None:
        (part, old), (target, leaf), file = self._place_of(name), self._place_of(new), self._file(name)
        self._step("replace", new)
        if part is target:  # one change, kept or lost as a whole
            part.change({old: None, leaf: file})
        else:
            target.change({leaf: file})
            part.change({old: None})

    def remove(self, name: str) -> None:
        part, leaf = self._place_of(name)
        self._step("remove", name)
        if isinstance(part.names.get(leaf), _File):
            part.change({leaf: None})

    def link_from(self, source: Folder, name: str, new: str) -> bool:
        """Only from a folder of the same disk."""
        if not isinstance(source, MemoryFolder) or source._machine is not self._machine:
            return False
        (part, leaf), file = self._place_of(new), source._file(name)
        self._step("link_from", new)
        if leaf in part.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        part.change({leaf: file})
        return True

    def set_aside(self, name: str) -> str:
        if QUARANTINE not in self._root.names:
            self._step("mkdir", QUARANTINE)
            self._root.change({QUARANTINE: _Part()})
        leaf = name.rpartition("/")[2]
        taken = self._part(QUARANTINE).names
        free = next(one for n in range(len(taken) + 1) if (one := f"{leaf}.{n}" if n else leaf) not in taken)
        self.replace(name, f"{QUARANTINE}/{free}")
        return f"{QUARANTINE}/{free}"

    def rename(self, target: Path) -> None:
        self._step("rename", target.name)
        there = self._machine.root.names.get(target.name)
        if isinstance(there, _Part) and there.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        self._machine.root.change({self.path.name: None, target.name: self._root})
        self.path = target

    def sync_above(self) -> None:
        self._step("sync_above", "")
        root = self._machine.root
        root.durable, root.changes = dict(root.names), []

    def discard(self) -> None:
        """Name by name, as a tree is removed, so that a crash may leave any of it; a failing disk all of it."""
        with suppress(OSError):
            for sub in [*(name for name, one in self._root.names.items() if isinstance(one, _Part)), ""]:
                for leaf in [name for name, one in self._part(sub).names.items() if isinstance(one, _File)]:
                    self.remove(f"{sub}/{leaf}" if sub else leaf)
            self._step("remove", "")
            self._machine.root.change({self.path.name: None})

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        self._step("lock", name)
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
            for name, entry in part.names.items() if isinstance(part, _Part) else ():
                if isinstance(entry, _File):
                    found[f"{sub}/{name}" if sub else name] = bytes(entry.data)
        return found

    def total_bytes(self) -> int:
        """Bytes of all files together. Not a call."""
        parts = [self._root, *(part for part in self._root.names.values() if isinstance(part, _Part))]
        return sum(len(file.data) for part in parts for file in part.names.values() if isinstance(file, _File))

    # -- crashes ------------------------------------------------------------------------------------------

    def killed(self) -> MemoryFolder:
        """The folder as the next process finds it after this one was killed: what is not synced is still not."""
        root = _copied(self._machine.root, lambda file: replace(file, data=file.data[:], writes=file.writes[:]), {})
        return self._with(root)

    def crash_states(self, seed: int, count: int) -> Iterator[MemoryFolder]:
        """Folders as a power loss now may leave them: nothing unsynced kept, all of it, and so on, then at random."""
        for i in range(count):
            chance = random.Random(f"{seed} {i}")
            names, data = _PLAIN[i] if i < len(_PLAIN) else ("random", "random")
            settled: dict[int, _File] = {}

            def survive(file: _File, chance: random.Random = chance, data: str = data) -> _File:
                kept = _kept_bytes(file, data, chance)
                return _File(bytearray(kept), kept, changed=file.changed)

            yield self._with(_survived(self._machine.root, names, chance, survive, settled))

    def _with(self, root: _Part) -> MemoryFolder:
        folder = MemoryFolder()
        folder.path = self.path
        folder._machine = _Machine(root, time=self.time, process=self.process + 1)
        return folder


_PLAIN = (("none", "none"), ("all", "all"), ("all", "none"), ("all", "zeros"), ("none", "all"))
"""Which changes to names, and which unsynced bytes, the first crash states keep."""


def _apply(names: _Names, change: _Change) -> None:
    for name, entry in change.items():
        names.pop(name, None)
        if entry is not None:
            names[name] = entry


def _write(data: bytearray, offset: int, part: bytes) -> None:
    data.extend(bytes(max(0, offset + len(part) - len(data))))
    data[offset : offset + len(part)] = part


def _copied(part: _Part, copy: Callable[[_File], _File], seen: dict[int, _File | _Part]) -> _Part:
    """The same names, cached and durable, over copies; what had two names has them still."""

    def one(entry: _File | _Part) -> _File | _Part:
        if id(entry) not in seen:
            seen[id(entry)] = _copied(entry, copy, seen) if isinstance(entry, _Part) else copy(entry)
        return seen[id(entry)]

    def again(names: _Names) -> _Names:
        return {name: one(entry) for name, entry in names.items()}

    changes: list[_Change] = [{name: entry and one(entry) for name, entry in change.items()} for change in part.changes]
    return _Part(again(part.names), again(part.durable), changes)


def _survived(
    part: _Part, names: str, chance: random.Random, copy: Callable[[_File], _File], seen: dict[int, _File]
) -> _Part:
    """What a power loss leaves of a folder: on the disk and in the cache alike."""
    kept = dict(part.durable)
    for change in _kept_changes(part.changes, names, chance):
        _apply(kept, change)
    left: _Names = {}
    for name, entry in kept.items():
        if isinstance(entry, _Part):
            left[name] = _survived(entry, names, chance, copy, seen)
        else:
            if id(entry) not in seen:
                seen[id(entry)] = copy(entry)
            left[name] = seen[id(entry)]
    return _Part(left, dict(left))


def _kept_changes(changes: list[_Change], mode: str, chance: random.Random) -> list[_Change]:
    if mode == "random":
        mode = chance.choice(("none", "all", "first", "any"))
    if mode == "first":
        return changes[: chance.randint(0, len(changes))]
    if mode == "any":
        return [change for change in changes if chance.random() < 0.5]
    return changes if mode == "all" else []


def _kept_bytes(file: _File, mode: str, chance: random.Random) -> bytes:
    if not file.writes:
        return file.durable
    if mode == "random":
        mode = chance.choice(("none", "all", "zeros", "first", "blocks"))
    if mode == "first":
        return _first_writes(file, chance)
    if mode == "blocks":
        return _some_blocks(file, chance.choice(_BLOCKS), chance)
    if mode == "zeros":
        return file.durable.ljust(len(file.data), b"\0")
    return bytes(file.data) if mode == "all" else file.durable


def _first_writes(file: _File, chance: random.Random) -> bytes:
    data = bytearray(file.durable)
    last = chance.randrange(len(file.writes))
    for offset, part in file.writes[:last]:
        _write(data, offset, part)
    offset, part = file.writes[last]
    _write(data, offset, part[: chance.randint(0, len(part))])
    return bytes(data)


def _some_blocks(file: _File, size: int, chance: random.Random) -> bytes:
    old = file.durable.ljust(len(file.data), b"\0")
    blocks = [(file.data if chance.random() < 0.5 else old)[at : at + size] for at in range(0, len(file.data), size)]
    return bytes(b"".join(blocks))

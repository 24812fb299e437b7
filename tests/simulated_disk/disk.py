"""A disk in memory: files and folders, what of them is durable, and the faults that it can have.

A file has bytes in the page cache and bytes on the disk; `sync` makes the first the second. A folder has names in the
cache and names on the disk; `sync_folder` makes the first the second.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

CHANGES = frozenset(
    {"mkdir", "create", "write_some", "sync", "close_file", "sync_folder", "sync_above"}
    | {"link", "link_from", "replace", "rename", "remove"}
)
"""Calls that change a disk; the others only look."""
_TAKES_NO_SPACE = frozenset({"remove", "close_file"})


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
class File:
    """Bytes in the page cache and on the disk."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # since the last sync
    failed: bool = False  # a sync has: what was written will never be durable, and later syncs do not say so
    changed: float = 0.0  # seconds since the epoch

    def write(self, offset: int, part: bytes, now: float) -> None:
        put(self.data, offset, part)
        self.writes.append((offset, part))
        self.changed = now


Names: TypeAlias = "dict[str, File | Part]"
Change: TypeAlias = "dict[str, File | Part | None]"  # names and what they now lead to, None: nothing


@dataclass(eq=False, slots=True)
class Part:
    """A folder: names in the cache and on the disk, of files and of folders below."""

    names: Names = field(default_factory=dict)
    durable: Names = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)  # since the last sync

    def change(self, new: Change) -> None:
        apply(self.names, new)
        self.changes.append(new)


@dataclass(eq=False, slots=True)
class Machine:
    """What all folders of one disk share. root: these folders, by name. dead: it has lost its power."""

    root: Part
    fault: Fault | None = None
    time: float = 1.8e9
    process: int = 1
    before: Callable[[int, str], object] | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    files: dict[int, File] = field(default_factory=dict)  # by descriptor
    locked: set[tuple[str, str]] = field(default_factory=set)
    leases: dict[int, tuple[str, str]] = field(default_factory=dict)  # folder and name of locked files, by descriptor
    dead: bool = False

    def step(self, call: str, name: str) -> None:
        """Number and note a call; raises what goes wrong with it."""
        if self.dead:
            raise PowerLoss
        if self.before:
            self.before(len(self.calls), call)
        self.calls.append((call, name))
        if self.fault and self.fault.hits(len(self.calls) - 1, call) and not self.cut(call):
            if not self.fault.code:
                self.dead = True
                raise PowerLoss
            raise OSError(self.fault.code, os.strerror(self.fault.code), name)

    def cut(self, call: str) -> bool:
        """Whether the call that was numbered last is a write that takes only half of its bytes."""
        number = len(self.calls) - 1
        wanted = self.fault and number == self.fault.at and (self.fault.short or not self.fault.code)
        return bool(wanted) and call == "write_some"

    def wrote(self) -> None:
        """After a write: the end, where the power was lost in the middle of it."""
        if self.fault and self.cut("write_some") and not self.fault.code and not self.fault.short:
            self.dead = True
            raise PowerLoss

    def opened(self, file: File) -> int:
        """A new descriptor of this file."""
        descriptor = 1 + max(self.files, default=2)
        self.files[descriptor] = file
        return descriptor


def apply(names: Names, change: Change) -> None:
    for name, entry in change.items():
        names.pop(name, None)
        if entry is not None:
            names[name] = entry


def put(data: bytearray, offset: int, part: bytes) -> None:
    """Write into bytes that are made longer where they end before."""
    data.extend(bytes(max(0, offset + len(part) - len(data))))
    data[offset : offset + len(part)] = part

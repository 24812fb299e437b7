"""What a power loss leaves of a disk in memory.

It may keep of the bytes that were not synced: none, all, those of the first writes (the last of them cut anywhere), or
any blocks of 512 or 4,096 bytes; what was not kept is what the disk had, zeros beyond it, or the file is shorter. It
may keep of the changes to a folder's names: none, all, the first ones, or any subset. Each file and each folder loses
on its own. After a sync that failed, what was written is never durable, and a second sync says nothing of it, as Linux
does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from tests.simulated_disk.disk import (
    Change,
    File,
    Names,
    Part,
    apply,
    put,
)

_BLOCKS = (512, 4096)
_PLAIN = (("none", "none"), ("all", "all"), ("all", "none"), ("all", "zeros"), ("none", "all"))
"""Which changes to names, and which unsynced bytes, the first crash states keep."""


def after_a_kill(root: Part) -> Part:
    """A copy in which nothing is lost, and what was not synced still is not."""
    return _copied(root, lambda file: replace(file, data=file.data[:], writes=file.writes[:]), {})


def after_power_loss(root: Part, seed: int, number: int) -> Part:
    """What a power loss now may leave: for the first numbers plain cases, then what chance gives."""
    chance = random.Random(f"{seed} {number}")
    names, data = _PLAIN[number] if number < len(_PLAIN) else ("random", "random")

    def survive(file: File) -> File:
        kept = _kept_bytes(file, data, chance)
        return File(bytearray(kept), kept, changed=file.changed)

    return _survived(root, names, chance, survive, {})


def _copied(part: Part, copy: Callable[[File], File], seen: dict[int, File | Part]) -> Part:
    """The same names, cached and durable, over copies; what had two names has them still."""

    def one(entry: File | Part) -> File | Part:
        if id(entry) not in seen:
            seen[id(entry)] = _copied(entry, copy, seen) if isinstance(entry, Part) else copy(entry)
        return seen[id(entry)]

    def again(names: Names) -> Names:
        return {name: one(entry) for name, entry in names.items()}

    changes: list[Change] = [{name: entry and one(entry) for name, entry in change.items()} for change in part.changes]
    return Part(again(part.names), again(part.durable), changes)


def _survived(
    part: Part, names: str, chance: random.Random, copy: Callable[[File], File], seen: dict[int, File]
) -> Part:
    """What a power loss leaves of a folder: on the disk and in the cache alike."""
    kept = dict(part.durable)
    for change in _kept_changes(part.changes, names, chance):
        apply(kept, change)
    left: Names = {}
    for name, entry in kept.items():
        if isinstance(entry, Part):
            left[name] = _survived(entry, names, chance, copy, seen)
        else:
            if id(entry) not in seen:
                seen[id(entry)] = copy(entry)
            left[name] = seen[id(entry)]
    return Part(left, dict(left))


def _kept_changes(changes: list[Change], mode: str, chance: random.Random) -> list[Change]:
    if mode == "random":
        mode = chance.choice(("none", "all", "first", "any"))
    if mode == "first":
        return changes[: chance.randint(0, len(changes))]
    if mode == "any":
        return [change for change in changes if chance.random() < 0.5]
    return changes if mode == "all" else []


def _kept_bytes(file: File, mode: str, chance: random.Random) -> bytes:
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


def _first_writes(file: File, chance: random.Random) -> bytes:
    data = bytearray(file.durable)
    last = chance.randrange(len(file.writes))
    for offset, part in file.writes[:last]:
        put(data, offset, part)
    offset, part = file.writes[last]
    put(data, offset, part[: chance.randint(0, len(part))])
    return bytes(data)


def _some_blocks(file: File, size: int, chance: random.Random) -> bytes:
    old = file.durable.ljust(len(file.data), b"\0")
    blocks = [(file.data if chance.random() < 0.5 else old)[at : at + size] for at in range(0, len(file.data), size)]
    return bytes(b"".join(blocks))

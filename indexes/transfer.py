"""Whole files from one folder into another: linked, or copied and checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files import write_whole
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import FileFacts, SegmentFacts
from llmcache.indexes.records import agree
from llmcache.indexes.segment import Segment

_CHUNK = 2 << 20  # stays in a processor's cache while it is read, compared and written


def files_of(facts: object) -> Iterator[FileFacts]:
    """Every file that a manifest, or a part of one, names."""
    if isinstance(facts, FileFacts):
        yield facts
    elif isinstance(facts, Mapping):
        for one in facts.values():
            yield from files_of(one)
    elif isinstance(facts, tuple):
        for one in facts:
            yield from files_of(one)
    elif is_dataclass(facts):
        for one in fields(facts):
            yield from files_of(getattr(facts, one.name))


def chunks(folder: Folder, name: str, size: int) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a file, 2 MiB at a time; each is good until the next is asked for. SnapshotDamaged: not `size`."""
    buffer = np.empty(min(size, _CHUNK), np.uint8)
    with _Opened(folder, name, size) as descriptor:
        for start in range(0, size, _CHUNK):
            part = buffer[: min(_CHUNK, size - start)]
            if folder.read_at(descriptor, part, start) != len(part):
                raise SnapshotDamaged(f"{name} became shorter while it was read")
            yield part


def row_chunks(
    folder: Folder, name: str, size: int, records: NDArray[Any]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """The bytes of a .seg file in order, cut between rows, each chunk with the numbers of its rows that are damaged.

    records: of ROW. Rows that lie outside the file, or in each other, come with the last chunk.
    """
    rows, starts, ends = _apart(records, size)
    cuts = np.flatnonzero(np.diff(starts // _CHUNK)) + 1
    begins = [0, *starts[cuts].tolist()]
    stops = [*begins[1:], size]
    buffer = np.empty(max((b - a for a, b in zip(begins, stops, strict=True)), default=0), np.uint8)
    with _Opened(folder, name, size) as descriptor:
        groups = np.split(np.arange(len(rows)), cuts)
        for begin, stop, group in zip(begins, stops, groups, strict=True):
            part = buffer[: stop - begin]
            part[folder.read_at(descriptor, part, begin) :] = 0
            chosen = rows[group]
            view, places = part.data, zip((starts[group] - begin).tolist(), (ends[group] - begin).tolist(), strict=True)
            good = agree(records[chosen], [view[start:end] for start, end in places])
            bad = chosen[~np.array(good, np.bool_)]
            if stop == size and len(rows) < len(records):
                bad = np.concatenate([bad, np.setdiff1d(np.arange(len(records)), rows)])
            yield part, bad


def _apart(records: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows that lie inside the file and not in each other, by their place; where each begins and ends."""
    offsets, lengths = records["offset"], records["nbytes"].astype(np.uint64)
    inside = np.flatnonzero((offsets <= size) & (lengths <= np.uint64(size) - np.minimum(offsets, size)))
    rows = inside[np.argsort(offsets[inside], kind="stable")]
    starts = offsets[rows].astype(np.int64)
    ends = starts + lengths[rows].astype(np.int64)
    reach = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(rows) else ends
    free = starts >= reach
    return rows[free], starts[free], ends[free]


class _Opened:
    """A file open for reading, of exactly this size."""

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self._folder = folder
        try:
            self._descriptor, found = folder.open(name)
        except (FileNotFoundError, NotADirectoryError):
            raise SnapshotDamaged(f"{name} is missing") from None
        if found != size:
            folder.close_file(self._descriptor)
            raise SnapshotDamaged(f"{name} has {found:,} bytes where the manifest says {size:,}")

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what was read is checked
            self._folder.close_file(self._descriptor)


# -- checking and carrying ----------------------------------------------------------------------------------


def checked(folder: Folder, facts: FileFacts, records: NDArray[Any] | None = None) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a file; SnapshotDamaged, at the latest after the last, when they are not what they should be.

    records: of ROW, for a .seg file, whose rows carry the checksums.
    """
    if facts.sha256 is None and records is not None:
        for part, bad in row_chunks(folder, facts.name, facts.size, records):
            if len(bad):
                raise SnapshotDamaged(f"{facts.name}: row {bad[0]} does not agree with its checksum")
            yield part
        return
    digest = hashlib.sha256()
    for part in chunks(folder, facts.name, facts.size):
        digest.update(part.data)
        yield part
    if facts.sha256 not in {None, digest.hexdigest()}:
        found, said = digest.hexdigest(), str(facts.sha256)
        raise SnapshotDamaged(f"{facts.name} has sha256 {found[:12]}..., the manifest says {said[:12]}...")


def carry(
    source: Folder,
    target: Folder,
    facts: FileFacts,
    new: str,
    records: Callable[[], NDArray[Any]] | None = None,
    *,
    link: bool = True,
    check: bool = False,
) -> bool:
    """Bring a file into `target` under the name `new`; True when it was linked, False when it was copied.

    Neither a copy's bytes nor the folder's entry is durable yet: the caller syncs them all together.

    A copy is checked on the way, a link only with `check`. records: gives those of a .seg file's rows.
    SnapshotDamaged says what is wrong with the source.
    """
    if link:
        if check:
            for _ in checked(source, facts, records and records()):
                pass
        with _Opened(source, facts.name, facts.size) as descriptor:
            source.sync(descriptor)  # whoever copied the source here may not have waited for the disk
            if target.link_from(source, facts.name, new):
                return True
    write_whole(target, new, (part.data for part in checked(source, facts, records and records())), durable=False)
    return False


def carry_segment(
    source: Folder, target: Folder, facts: SegmentFacts, id: str, *, link: bool = True, check: bool = False
) -> tuple[SegmentFacts, int]:
    """Bring a whole segment into `target` under this id; its facts there, and the bytes that were linked.

    Copies and entries are not durable yet. What fails leaves no file of it behind.
    """
    new = renamed(facts, id)
    made: list[str] = []
    linked = 0
    try:
        for old, one in zip(files_of(facts), files_of(new), strict=True):
            records = (lambda: Segment.open(source, facts).rows) if one.name.endswith(".seg") else None
            by_link = carry(source, target, old, one.name, records, link=link, check=check)
            made.append(one.name)
            linked += one.size if by_link else 0
    except BaseException:
        for name in made:
            target.remove(name)
        raise
    return new, linked


def renamed(facts: SegmentFacts, id: str) -> SegmentFacts:
    """The same segment under another id, with the files that go with it."""

    def named(file: FileFacts) -> FileFacts:
        return replace(file, name=file.name.replace(facts.id, id, 1))

    alive = getattr(facts, "alive", None)
    more: dict[str, Any] = {"alive": named(alive)} if alive else {}
    return replace(facts, id=id, files=tuple(map(named, facts.files)), **more)


def living(folder: Folder, facts: SegmentFacts) -> NDArray[np.bool_]:
    """Which rows of a segment are not evicted; bool [rows]. SnapshotDamaged when the bitmap is not whole."""
    alive = getattr(facts, "alive", None)
    if alive is None:
        return np.ones(facts.rows, np.bool_)
    bits = np.concatenate([np.zeros(0, np.uint8), *(part.copy() for part in checked(folder, alive))])
    if len(bits) != -(-facts.rows // 8):
        raise SnapshotDamaged(f"{alive.name} has not one bit for each of {facts.rows} rows")
    return np.unpackbits(bits, count=facts.rows, bitorder="little").astype(np.bool_)

"""Transfer of whole files between folders: hard-linked, or copied and checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import FileFacts, SegmentFacts
from llmcache.indexes.format.rows import agree, begun_digest
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.write_once import write_whole

_LARGE = 64 << 20  # bytes of rows that are verified in memory at once
_CHUNK = 2 << 20  # fits a core's cache while it is read, verified and written


def files_of(facts: object) -> Iterator[FileFacts]:
    """Yield all files that a manifest, or a part of one, names."""
    if isinstance(facts, FileFacts):
        yield facts
    elif isinstance(facts, Mapping):
        for part in facts.values():
            yield from files_of(part)
    elif isinstance(facts, tuple):
        for part in facts:
            yield from files_of(part)
    elif is_dataclass(facts):
        for member in fields(facts):
            yield from files_of(getattr(facts, member.name))


def chunks(folder: Folder, name: str, size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a file in chunks of 2 MiB, each valid until the next. SnapshotDamaged for another size."""
    buffer = np.empty(min(size, _CHUNK), np.uint8)
    with _OpenFile(folder, name, size) as descriptor:
        for start in range(0, size, _CHUNK):
            part = buffer[: min(_CHUNK, size - start)]
            if folder.read_at(descriptor, part, start) != len(part):
                raise SnapshotDamaged(f"{name} became shorter while it was read")
            yield part


def row_chunks(
    folder: Folder, name: str, size: int, records: NDArray[Any], until: int | None = None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield the bytes of a .seg file in order, cut between rows, each chunk with the numbers of its damaged rows.

    size: of the file in bytes. until: end of the bytes to read; None: the file's end. records: of ROW.
    At most 64 MiB are in memory: longer rows, and long gaps without rows, are split into several chunks. The numbers of
    rows that lie outside the file, or overlap others, come with the last chunk.
    SnapshotDamaged when the file has another size.
    """
    until = size if until is None else until
    rows, starts, ends = _separate_rows(records, until)
    outside = np.setdiff1d(np.arange(len(records)), rows) if len(rows) < len(records) else rows[:0]
    cuts = np.flatnonzero(np.diff(starts // _CHUNK) | (np.diff(ends // _CHUNK) > _LARGE // _CHUNK)) + 1
    stops = [*starts[cuts].tolist(), until]
    at = 0
    with _OpenFile(folder, name, size) as descriptor:
        for stop, group in zip(stops, np.split(np.arange(len(rows)), cuts), strict=True):
            chosen = rows[group]
            base, reach = (int(starts[group[0]]), int(ends[group[-1]])) if len(group) else (at, at)
            yield from _bytes_between_rows(folder, descriptor, at, base)
            if len(group) == 1 and reach - base > _LARGE:
                yield from _long_row(folder, descriptor, records, int(chosen[0]), base)
            elif len(group):
                part = _read(folder, descriptor, base, reach)
                places = zip((starts[group] - base).tolist(), (ends[group] - base).tolist(), strict=True)
                good = agree(records[chosen], [part.data[start:end] for start, end in places])
                yield part, chosen[~np.array(good, np.bool_)]
            yield from _bytes_between_rows(folder, descriptor, reach, stop)
            at = stop
        if len(outside):
            yield np.zeros(0, np.uint8), outside


def _read(folder: Folder, descriptor: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Read the bytes from start to stop; zeros where the file was truncated."""
    part = np.empty(stop - start, np.uint8)
    part[folder.read_at(descriptor, part, start) :] = 0
    return part


def _bytes_between_rows(
    folder: Folder, descriptor: int, start: int, stop: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield bytes that belong to no row, in chunks."""
    for at in range(start, stop, _CHUNK):
        yield _read(folder, descriptor, at, min(at + _CHUNK, stop)), np.zeros(0, np.int64)


def _long_row(
    folder: Folder, descriptor: int, records: NDArray[Any], row: int, start: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield the bytes of one row in several chunks; its number comes with an empty last chunk, if it is damaged."""
    digest = begun_digest(records[row : row + 1])
    for part, none in _bytes_between_rows(folder, descriptor, start, start + int(records["nbytes"][row])):
        digest.update(part.data)
        yield part, none
    whole = digest.digest()[:16] == records["checksum"][row].tobytes()
    yield np.zeros(0, np.uint8), np.zeros(0, np.int64) if whole else np.array([row])


def _separate_rows(records: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that lie inside the file and do not overlap, by position, with their starts and ends in bytes."""
    offsets, lengths = records["offset"], records["nbytes"].astype(np.uint64)
    inside = np.flatnonzero((offsets <= size) & (lengths <= np.uint64(size) - np.minimum(offsets, size)))
    rows = inside[np.argsort(offsets[inside], kind="stable")]
    starts = offsets[rows].astype(np.int64)
    ends = starts + lengths[rows].astype(np.int64)
    reach = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(rows) else ends
    free = starts >= reach
    return rows[free], starts[free], ends[free]


class _OpenFile:
    """File open for reading, of exactly this size. SnapshotDamaged when it is missing or has another size."""

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self._folder = folder
        try:
            self._descriptor, actual = folder.open(name)
        except (FileNotFoundError, NotADirectoryError):
            raise SnapshotDamaged(f"{name} is missing") from None
        if actual != size:
            folder.close_file(self._descriptor)
            raise SnapshotDamaged(f"{name} has {actual:,} bytes where the manifest says {size:,}")

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the bytes that were read are verified
            self._folder.close_file(self._descriptor)


# -- checking and carrying ----------------------------------------------------------------------------------


def checked(folder: Folder, facts: FileFacts, records: NDArray[Any] | None = None) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a file and verify them. SnapshotDamaged, at the latest after the last chunk, when they differ.

    records: of ROW, for a .seg file, whose rows have the checksums.
    """
    if facts.sha256 is None and records is not None:
        for part, bad in row_chunks(folder, facts.name, facts.size, records):
            if len(bad):
                raise SnapshotDamaged(f"{facts.name}: row {bad[0]} does not match its checksum")
            yield part
        return
    digest = hashlib.sha256()
    for part in chunks(folder, facts.name, facts.size):
        digest.update(part.data)
        yield part
    if facts.sha256 not in {None, digest.hexdigest()}:
        actual, expected = digest.hexdigest(), str(facts.sha256)
        raise SnapshotDamaged(f"{facts.name} has sha256 {actual[:12]}..., the manifest says {expected[:12]}...")


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
    """Link or copy a file into `target` under the name `new`. Returns True for a link, False for a copy.

    Neither a copy's bytes nor the directory entry is durable yet: the caller syncs all together. A copy is verified on
    the way, a link only with `check`. records: returns the records of ROW of a .seg file.
    SnapshotDamaged when the source is damaged.
    """
    if link:
        if check:
            for _ in checked(source, facts, records and records()):
                pass
        with _OpenFile(source, facts.name, facts.size) as descriptor:
            source.sync(descriptor)  # a person's cp or rsync may have written the source without a sync
            try:
                if target.link_from(source, facts.name, new):
                    return True
            except FileNotFoundError:  # removed after it was opened
                raise SnapshotDamaged(f"{facts.name} is missing") from None
    write_whole(target, new, (part.data for part in checked(source, facts, records and records())), durable=False)
    return False


def carry_segment(
    source: Folder, target: Folder, facts: SegmentFacts, id: str, *, link: bool = True, check: bool = False
) -> tuple[SegmentFacts, int]:
    """Link or copy a whole segment into `target` under this id. Returns its new facts, and the bytes linked.

    Copies and directory entries are not durable yet. After an error no file of the segment remains in `target`.
    """
    new = renamed(facts, id)
    made: list[str] = []
    linked = 0
    try:
        for old_file, renamed_file in zip(files_of(facts), files_of(new), strict=True):
            records = (lambda: Segment.open(source, facts).rows) if renamed_file.name.endswith(".seg") else None
            by_link = carry(source, target, old_file, renamed_file.name, records, link=link, check=check)
            made.append(renamed_file.name)
            linked += renamed_file.size if by_link else 0
    except BaseException:
        for name in made:
            target.remove(name)
        raise
    return new, linked


def renamed(facts: SegmentFacts, id: str) -> SegmentFacts:
    """Return a segment's facts under another id, with its files renamed."""

    def named(file: FileFacts) -> FileFacts:
        return replace(file, name=file.name.replace(facts.id, id, 1))

    alive = getattr(facts, "alive", None)
    more: dict[str, Any] = {"alive": named(alive)} if alive else {}
    return replace(facts, id=id, files=tuple(map(named, facts.files)), **more)


def living(folder: Folder, facts: SegmentFacts) -> NDArray[np.bool_]:
    """Read which rows of a segment are live, bool [rows]. SnapshotDamaged when the bitmap is damaged."""
    alive = getattr(facts, "alive", None)
    if alive is None:
        return np.ones(facts.rows, np.bool_)
    if alive.size != -(-facts.rows // 8):  # checked before any memory is allocated
        raise SnapshotDamaged(f"{alive.name} has not one bit for each of {facts.rows} rows")
    bits = np.concatenate([np.zeros(0, np.uint8), *(part.copy() for part in checked(folder, alive))])
    if len(bits) != -(-facts.rows // 8):
        raise SnapshotDamaged(f"{alive.name} has not one bit for each of {facts.rows} rows")
    return np.unpackbits(bits, count=facts.rows, bitorder="little").astype(np.bool_)

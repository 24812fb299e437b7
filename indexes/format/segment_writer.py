"""Writing of segments: make pending rows, or prepared streams of rows, durable under a new id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import FileFacts, SegmentFacts
from llmcache.indexes.format.marks import Marks, joined
from llmcache.indexes.format.rows import HEADER, MAGIC, ROW, STRONG, Keys, aligned, digests, portions, seconds32
from llmcache.indexes.format.write_once import write_file


@dataclass(slots=True)
class PendingRows:
    """Rows that are not sealed yet; the arrays share their first axis.

    keys: uint64 [n, 2]. payload: uint8 [n, bytes], or one array [bytes] per row. scale: float32 [n], 1 except for int8.
    cost: seconds of the model, float32 [n]. tokens: one int32 array per row. sources: document ids.
    features: float16 [n, feature width]. created: seconds since the epoch, uint32 [n]; None: the time of sealing.
    flags: of rows that were sealed before, uint16 [n]; None: set by `seal`.
    marks: tell which near matches the rows may answer, [n]; None if unknown.
    """

    keys: Keys
    payload: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
    scale: NDArray[np.float32]
    cost: NDArray[np.float32]
    tokens: Sequence[NDArray[np.int32]]
    sources: Sequence[str]
    features: NDArray[np.float16]
    created: NDArray[np.uint32] | None = None
    flags: NDArray[np.uint16] | None = None
    marks: Marks | None = None

    def __len__(self) -> int:
        return len(self.keys)


def seal(
    folder: Folder,
    id: str,
    batches: Sequence[PendingRows],
    aliases: NDArray[Any],
    feature_width: int,
    *,
    strong: bool = False,
) -> SegmentFacts:
    """Write one segment durably, with its directory entries. Returns its facts for a manifest.

    aliases: records of ALIAS. strong: use checksums that cannot be forged, for a signed store.
    OSError when a file cannot be written; no file of the segment remains then.
    """
    rows, source_bytes = _records(folder, batches, strong)  # the checksums come with the bytes, as they are written
    features = [np.ascontiguousarray(batch.features).data.cast("B") for batch in batches if batch.features.size]
    marks = joined([(len(batch), batch.marks) for batch in batches])
    variable = _variable(batches, source_bytes)
    return write_segment(
        folder, id, rows, aliases, feature_width, _payload(batches, rows), variable, features, marks=marks
    )


def write_segment(
    folder: Folder,
    id: str,
    rows: NDArray[Any],
    aliases: NDArray[Any],
    feature_width: int,
    payload: Iterable[bytes | memoryview],
    variable: Iterable[bytes | memoryview],
    features: Iterable[bytes | memoryview],
    *,
    marks: Marks | None = None,
) -> SegmentFacts:
    """Write the five files of a segment durably. Returns its facts.

    rows: records of ROW, with offsets into the bytes of `payload` and `variable`. The records are read after `payload`
    is exhausted, so that the iterator may fill in their checksums.
    marks: of the rows, [n], written after the records; None: no marks.
    OSError when a file cannot be written; no file of the segment remains then.
    """
    files: list[FileFacts] = []
    try:
        files.append(write_file(folder, f"seg/{id}.seg", payload, hashed=False))
        header = header_of(rows, feature_width, 0 if marks is None else marks.itemsize)
        mark_bytes = [] if marks is None else [marks.tobytes()]
        files.append(write_file(folder, f"seg/{id}.row", [header, rows.tobytes(), *mark_bytes]))
        files.append(write_file(folder, f"seg/{id}.key", [aliases.tobytes()]))
        files.append(write_file(folder, f"seg/{id}.var", variable))
        files.append(write_file(folder, f"seg/{id}.fp", features))
        folder.sync_folder("seg")
    except BaseException:
        for facts in files:
            folder.remove(facts.name)
        raise
    return SegmentFacts(id, len(rows), len(aliases), int(rows["nbytes"].sum()), tuple(files))


def header_of(rows: NDArray[Any], feature_width: int, mark: int = 0) -> bytes:
    """Return the header of a .row file with these records. mark: bytes of the mark of a row, 0 for no marks."""
    header = np.zeros(1, HEADER)
    header["magic"], header["record"], header["rows"] = MAGIC, ROW.itemsize, len(rows)
    header["feature_width"], header["mark"] = feature_width, mark
    sizes = np.unique(rows["nbytes"])
    header["pitch"] = aligned(int(sizes[0])) if len(sizes) == 1 else 0
    return header.tobytes()


def _records(folder: Folder, batches: Sequence[PendingRows], strong: bool) -> tuple[NDArray[Any], list[bytes]]:
    rows = np.zeros(sum(map(len, batches)), ROW)
    tokens = [part for batch in batches for part in batch.tokens]
    # a source id is a label for people, so long ones are cut rather than refused
    sources = [name.encode("utf-8", "surrogatepass")[:1024] for batch in batches for name in batch.sources]
    if len(rows):
        rows["key"] = np.concatenate([batch.keys for batch in batches])
        rows["scale"] = np.concatenate([batch.scale for batch in batches])
        rows["cost"] = np.concatenate([batch.cost for batch in batches])
        rows["nbytes"] = np.concatenate([_sizes(batch) for batch in batches])
    rows["tokens"] = [len(part) for part in tokens]
    rows["source"] = [len(part) for part in sources]
    now = np.uint32(seconds32(folder.now()))
    stamps = [np.full(len(batch), now) if batch.created is None else batch.created for batch in batches]
    rows["created"] = np.concatenate(stamps) if stamps else now
    steps = aligned(rows["nbytes"].astype(np.uint64))
    rows["offset"] = np.cumsum(steps) - steps
    steps = rows["tokens"].astype(np.uint64) * 4 + rows["source"]
    rows["var"] = np.cumsum(steps) - steps
    flags = [
        np.full(len(batch), STRONG * strong, np.uint16) if batch.flags is None else batch.flags for batch in batches
    ]
    rows["flags"] = np.concatenate(flags) if flags else 0
    return rows, sources


def _sizes(batch: PendingRows) -> NDArray[np.int64]:
    if isinstance(batch.payload, np.ndarray):
        return np.full(len(batch), batch.payload.shape[1])
    return np.array([part.nbytes for part in batch.payload], np.int64)


def _payload(batches: Sequence[PendingRows], rows: NDArray[Any]) -> Iterator[memoryview]:
    """Yield the rows' bytes, padded, and fill in the checksums of `rows`. Rows without padding are not copied."""
    first = 0
    for batch in batches:
        mine = rows[first : first + len(batch)]
        for portion in portions(_sizes(batch)):
            parts, records = batch.payload[portion], mine[portion]
            records["checksum"] = np.frombuffer(b"".join(digests(records, parts)), np.uint8).reshape(-1, 16)
            yield padded(parts)
        first += len(batch)


def padded(parts: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> memoryview:
    """Return the bytes of rows as in .seg, each padded to a multiple of 64 bytes."""
    if isinstance(parts, np.ndarray):
        n, nbytes = parts.shape
        if not parts.size:
            return memoryview(b"")
        if nbytes == aligned(nbytes) and parts.flags.c_contiguous:
            return parts.reshape(-1).data
        block = np.zeros((n, aligned(nbytes)), np.uint8)
        block[:, :nbytes] = parts
        return block.reshape(-1).data
    padded_parts: list[bytes | memoryview] = []
    for part in parts:
        padded_parts += [part.data, bytes(aligned(part.nbytes) - part.nbytes)]
    return memoryview(b"".join(padded_parts))


def _variable(batches: Sequence[PendingRows], sources: Sequence[bytes]) -> Iterator[bytes]:
    names = iter(sources)
    for batch in batches:
        yield b"".join(ids.astype("<i4", copy=False).tobytes() + next(names) for ids in batch.tokens)


def write_alive(folder: Folder, facts: SegmentFacts, alive: NDArray[np.bool_], id: str) -> SegmentFacts:
    """Write a bitmap of live rows, bool [rows], durably under a new id. Returns the segment's facts with it.

    The caller syncs the folder. The bitmap has no effect until a manifest names it; older manifests keep their own.
    """
    file = write_file(folder, f"seg/{facts.id}-{id}.alive", [np.packbits(alive, bitorder="little").tobytes()])
    return replace(facts, dead=facts.rows - int(alive.sum()), alive=file)

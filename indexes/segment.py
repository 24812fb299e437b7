"""Segments: sealed, memory-mapped files of activations with all that is needed to find and trust them.

One segment is five files with one id (docs/format.md):

    .seg  activations, row after row, each at a multiple of 64 bytes
    .row  a header and one fixed-width record per row: key, checksum, where the bytes are
    .key  pairs (text key, row key): other names under which a row is found
    .var  token ids and source id of each row
    .fp   the raw features that fingerprints are made of, float16 [rows, width]

Rows that were evicted stay in their segment, marked in a sixth file, until the segment is compacted:

    .alive  a bitmap, little bit order: 1 where the row is alive
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files import write_whole
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import FileFacts, SegmentFacts
from llmcache.indexes.sealed import Sealed

Keys: TypeAlias = NDArray[np.uint64]  # 128-bit keys, [n, 2]

ALIGN = 64
ROW = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("checksum", "u1", (16,)),
        ("offset", "<u8"),
        ("var", "<u8"),
        ("nbytes", "<u4"),
        ("tokens", "<u4"),
        ("created", "<u4"),  # seconds since the epoch
        ("scale", "<f4"),  # int8 rows: what one step is worth
        ("cost", "<f4"),  # seconds the model took for this row
        ("source", "<u2"),  # bytes of the source id
        ("flags", "<u2"),
    ]
)
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("record", "<u4"),
        ("feature_width", "<u4"),
        ("rows", "<u8"),
        ("pitch", "<u8"),  # bytes from one row to the next where all rows are equally long, else 0
        ("reserved", "S32"),
    ]
)
ALIAS = np.dtype([("text", "<u8", (2,)), ("row", "<u8", (2,))])
_HEAD = np.dtype([("key", "<u8", (2,)), ("nbytes", "<u8"), ("scale", "<f4")])  # what a checksum covers, then the bytes
STRONG = 1  # flag of a row: its checksum is a sha256, cut to 16 bytes, which nobody can forge
_MAGIC = b"LLMCROW1"
_PIECE = 2 << 20  # bytes that are hashed, and then written while they are near the processor
_NEAR = 256 << 10  # bytes that are copied and then compared: no more than a processor's own cache holds


@dataclass(slots=True)
class Entries:
    """Rows that are not sealed yet; the arrays share their first axis.

    keys: uint64 [n, 2]. payload: uint8 [n, bytes], or one array [bytes] per row. scale, cost: float32 [n].
    tokens: one int32 array per row. sources: the ids of the documents that made them.
    features: float16 [n, feature width]. created: seconds since the epoch, uint32 [n]; None is the time of sealing.
    flags: of rows that were sealed before, uint16 [n]; None: as the new segment is sealed.
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

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Gone:
    """The place of a segment that was evicted while its bank was open: nobody else gets its row numbers."""

    rows: int

    def __len__(self) -> int:
        return self.rows


def checksum(key: Keys, payload: NDArray[np.uint8], scale: float = 1.0, *, strong: bool = False) -> bytes:
    """128 bits over key, length, scale and bytes, so that the right bytes in the wrong row do not pass.

    scale: of an int8 row, 1 for others. strong: against people, not only against damage: xxh3 takes a fifteenth of
    sha256's time, and can be forged.
    """
    record = np.zeros(1, ROW)
    record["key"], record["nbytes"], record["scale"] = key, payload.nbytes, scale
    return _digest(heads(record), payload, strong)


def heads(records: NDArray[Any]) -> bytes:
    """What a row's checksum covers beside its bytes: key, length and scale, 28 bytes for each record of ROW."""
    found = np.zeros(len(records), _HEAD)
    found["key"], found["nbytes"], found["scale"] = records["key"], records["nbytes"], records["scale"]
    return found.tobytes()


def _digest(head: bytes, payload: NDArray[np.uint8] | memoryview, strong: bool) -> bytes:
    if strong:
        whole = hashlib.sha256(head)
        whole.update(payload)  # type: ignore[arg-type]
        return whole.digest()[:16]
    digest = xxhash.xxh3_128(head)
    digest.update(payload)  # type: ignore[arg-type]  # any contiguous buffer is accepted
    return digest.digest()


def digests(records: NDArray[Any], parts: Iterable[NDArray[np.uint8] | memoryview]) -> list[bytes]:
    """The checksum of each row that these bytes should have; records: of ROW, as many as there are parts."""
    head, size = heads(records), _HEAD.itemsize
    strong = (records["flags"] & STRONG > 0).tolist()
    return [
        _digest(head[size * i : size * i + size], part, one)
        for i, (part, one) in enumerate(zip(parts, strong, strict=True))
    ]


def agree(records: NDArray[Any], parts: Sequence[NDArray[np.uint8] | memoryview] | NDArray[np.uint8]) -> list[bool]:
    """Which rows' bytes are as long as their records say, and agree with their checksums."""
    wanted = records["checksum"].tobytes()
    return [
        part.nbytes == size and found == wanted[16 * i : 16 * i + 16]
        for i, (part, size, found) in enumerate(
            zip(parts, records["nbytes"].tolist(), digests(records, parts), strict=True)
        )
    ]


# -- writing ------------------------------------------------------------------------------------------------


def seal(
    folder: Folder,
    id: str,
    batches: Sequence[Entries],
    aliases: NDArray[Any],
    feature_width: int,
    *,
    strong: bool = False,
) -> SegmentFacts:
    """Write one segment durably and return what a manifest says of it. Its folder entries are synced too.

    aliases: records of ALIAS. strong: checksums that hold against forgery, for a store that is signed.
    Any OSError leaves no file of this segment behind.
    """
    rows, source_bytes = _records(folder, batches, strong)  # the checksums come with the bytes, as they are written
    features = [np.ascontiguousarray(batch.features).data.cast("B") for batch in batches if batch.features.size]
    return write_segment(
        folder, id, rows, aliases, feature_width, _payload(batches, rows), _variable(batches, source_bytes), features
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
) -> SegmentFacts:
    """Write the five files of a segment durably. Any OSError leaves none of them behind.

    rows: records of ROW, whose offsets are those of the bytes that `payload` and `variable` give. They are read after
    `payload` has come to its end, which may still fill in their checksums.
    """
    files: list[FileFacts] = []
    try:
        files.append(write_file(folder, f"seg/{id}.seg", payload, hashed=False))
        files.append(write_file(folder, f"seg/{id}.row", [header_of(rows, feature_width), rows.tobytes()]))
        files.append(write_file(folder, f"seg/{id}.key", [aliases.tobytes()]))
        files.append(write_file(folder, f"seg/{id}.var", variable))
        files.append(write_file(folder, f"seg/{id}.fp", features))
        folder.sync_folder("seg")
    except BaseException:
        for facts in files:
            folder.remove(facts.name)
        raise
    return SegmentFacts(id, len(rows), len(aliases), int(rows["nbytes"].sum()), tuple(files))


def header_of(rows: NDArray[Any], feature_width: int) -> bytes:
    """The header of a .row file with these records."""
    header = np.zeros(1, HEADER)
    header["magic"], header["record"], header["rows"] = _MAGIC, ROW.itemsize, len(rows)
    header["feature_width"] = feature_width
    sizes = np.unique(rows["nbytes"])
    header["pitch"] = aligned(int(sizes[0])) if len(sizes) == 1 else 0
    return header.tobytes()


def aligned(size: Any) -> Any:
    """Bytes that a row of this size takes up in .seg; for a number, or an array of them."""
    return -(-size // ALIGN) * ALIGN if isinstance(size, int) else (size + (ALIGN - 1)) // ALIGN * ALIGN


def _records(folder: Folder, batches: Sequence[Entries], strong: bool) -> tuple[NDArray[Any], list[bytes]]:
    rows = np.zeros(sum(map(len, batches)), ROW)
    tokens = [part for batch in batches for part in batch.tokens]
    # a source id is a label for people: a longer one is cut rather than refused
    sources = [name.encode("utf-8", "surrogatepass")[:1024] for batch in batches for name in batch.sources]
    if len(rows):
        rows["key"] = np.concatenate([batch.keys for batch in batches])
        rows["scale"] = np.concatenate([batch.scale for batch in batches])
        rows["cost"] = np.concatenate([batch.cost for batch in batches])
        rows["nbytes"] = np.concatenate([_sizes(batch) for batch in batches])
    rows["tokens"] = [len(part) for part in tokens]
    rows["source"] = [len(part) for part in sources]
    now = np.uint32(folder.now())
    stamps = [np.full(len(one), now) if one.created is None else one.created for one in batches]
    rows["created"] = np.concatenate(stamps) if stamps else now
    steps = aligned(rows["nbytes"].astype(np.uint64))
    rows["offset"] = np.cumsum(steps) - steps
    steps = rows["tokens"].astype(np.uint64) * 4 + rows["source"]
    rows["var"] = np.cumsum(steps) - steps
    flags = [np.full(len(one), STRONG * strong, np.uint16) if one.flags is None else one.flags for one in batches]
    rows["flags"] = np.concatenate(flags) if flags else 0
    return rows, sources


def portions(nbytes: NDArray[Any]) -> list[slice]:
    """Rows of these sizes in portions of about 2 MiB, which stay near the processor from one use to the next."""
    cuts = np.flatnonzero(np.diff(np.cumsum(aligned(nbytes.astype(np.int64))) // _PIECE)) + 1
    return [slice(a, b) for a, b in pairwise([0, *cuts.tolist(), len(nbytes)]) if a < b]


def _sizes(batch: Entries) -> NDArray[np.int64]:
    if isinstance(batch.payload, np.ndarray):
        return np.full(len(batch), batch.payload.shape[1])
    return np.array([part.nbytes for part in batch.payload], np.int64)


def _payload(batches: Sequence[Entries], rows: NDArray[Any]) -> Iterator[memoryview]:
    """The rows' bytes, padded; the checksums of `rows` are filled in. Rows without padding are not copied."""
    first = 0
    for batch in batches:
        mine = rows[first : first + len(batch)]
        for portion in portions(_sizes(batch)):
            parts, records = batch.payload[portion], mine[portion]
            records["checksum"] = np.frombuffer(b"".join(digests(records, parts)), np.uint8).reshape(-1, 16)
            yield padded(parts)
        first += len(batch)


def padded(parts: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> memoryview:
    """The bytes of some rows as they stand in .seg, each at a multiple of 64 bytes."""
    if isinstance(parts, np.ndarray):
        n, nbytes = parts.shape
        if not parts.size:
            return memoryview(b"")
        if nbytes == aligned(nbytes) and parts.flags.c_contiguous:
            return parts.reshape(-1).data
        block = np.zeros((n, aligned(nbytes)), np.uint8)
        block[:, :nbytes] = parts
        return block.reshape(-1).data
    held: list[bytes | memoryview] = []
    for part in parts:
        held += [part.data, bytes(aligned(part.nbytes) - part.nbytes)]
    return memoryview(b"".join(held))


def _variable(batches: Sequence[Entries], sources: Sequence[bytes]) -> Iterator[bytes]:
    names = iter(sources)
    for batch in batches:
        yield b"".join(ids.astype("<i4", copy=False).tobytes() + next(names) for ids in batch.tokens)


def write_file(folder: Folder, name: str, parts: Iterable[bytes | memoryview], *, hashed: bool = True) -> FileFacts:
    """Write a new file durably (`write_whole`) and give its facts, with the sha256 unless rows carry checksums."""
    digest = hashlib.sha256()

    def through() -> Iterator[bytes | memoryview]:
        for part in parts:
            if hashed:
                digest.update(part)
            yield part

    size = write_whole(folder, name, through())
    return FileFacts(name, size, digest.hexdigest() if hashed else None)


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Segment:
    """A sealed segment, opened. `rows` and `aliases` are verified; the larger files when they are first needed."""

    facts: SegmentFacts
    folder: Folder
    rows: NDArray[Any]  # records of ROW
    aliases: NDArray[Any]  # records of ALIAS
    pitch: int
    feature_width: int
    data: Sealed  # the activations
    _mapped: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    alive: NDArray[np.bool_] | None = None  # bool [rows]; None while all are

    @classmethod
    def open(cls, folder: Folder, facts: SegmentFacts) -> Segment:
        """SnapshotDamaged when a file is missing, has another size, or differs from its sha256."""
        raw_rows, pitch, feature_width = records_of(folder, facts)
        aliases = verified(folder, facts.file("key"))
        if aliases.nbytes != facts.aliases * ALIAS.itemsize:
            raise SnapshotDamaged(f"{facts.file('key').name} does not hold the {facts.aliases} aliases of its manifest")
        payload = facts.file("seg")
        try:
            data = folder.sealed(payload.name, payload.size)
        except FileNotFoundError:
            raise SnapshotDamaged(f"{payload.name} is missing") from None
        if pitch and (pitch * len(raw_rows) != payload.size or (raw_rows["nbytes"] != raw_rows["nbytes"][:1]).any()):
            raise SnapshotDamaged(f"{facts.file('row').name} says that all rows are equally long, and they are not")
        sizes = raw_rows["nbytes"].astype(np.uint64)
        if int(sizes.sum()) != facts.payload or facts.payload > payload.size:  # rows on top of each other
            raise SnapshotDamaged(f"{facts.file('row').name} has rows that do not fill {payload.name}")
        alive = _alive(folder, facts)
        return cls(facts, folder, raw_rows, aliases.view(ALIAS), pitch, feature_width, data, alive=alive)

    def __len__(self) -> int:
        return len(self.rows)

    def bury(self, facts: SegmentFacts) -> None:
        """Take over the bitmap of newer facts of the same segment; SnapshotDamaged when it cannot be read."""
        self.facts, self.alive = facts, _alive(self.folder, facts)

    def live(self) -> NDArray[np.int64]:
        """Numbers of the rows that were not evicted."""
        return np.arange(len(self.rows)) if self.alive is None else np.flatnonzero(self.alive)

    def living(self) -> NDArray[np.bool_]:
        """Which rows were not evicted; bool [rows]."""
        return np.ones(len(self.rows), np.bool_) if self.alive is None else self.alive

    @property
    def strong(self) -> bool:
        """Whether every row's checksum holds against forgery."""
        return bool((self.rows["flags"] & STRONG).all())

    def _file(self, kind: str) -> NDArray[np.uint8]:
        if kind not in self._mapped:
            self._mapped[kind] = verified(self.folder, self.facts.file(kind))
        return self._mapped[kind]

    def payload(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
        """Stored bytes of some rows: a copy, uint8 [n, bytes], where all rows are equally long, else one array each."""
        if self.pitch and len(rows):
            return self.data.table(rows, self.pitch, int(self.rows["nbytes"][rows[0]]))
        return self.views(rows)

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Stored bytes of some rows, one array each: a view of a mapped file, or a copy."""
        return [self.data.part(int(one["offset"]), int(one["nbytes"])) for one in self.rows[rows]]

    def intact(
        self, rows: NDArray[np.int64], payload: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Which of these rows' bytes, as `payload` gave them, agree with their checksums; bool [n]."""
        return np.array(agree(self.rows[rows], payload), np.bool_)

    def whole(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows agree with their checksums, reading a few at a time; bool [n]."""
        good, order = np.zeros(len(rows), np.bool_), np.argsort(rows, kind="stable")
        for part in portions(self.rows["nbytes"][rows[order]]):
            some = order[part]
            good[some] = self.intact(rows[some], self.payload(rows[some]))
        return good

    def fetch(self, rows: NDArray[np.int64], into: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[bool]:
        """Copy rows that are all equally long to where `into` has a place for each; which agree with their checksums.

        `into`: uint8 [n, bytes], or one array [bytes] per row. A few rows at a time are copied and at once compared,
        while they are near the processor. What does not agree is left there and is not to be used.
        """
        good: list[bool] = []
        step = max(1, _NEAR // self.pitch)
        records = self.rows[rows]
        for start in range(0, len(rows), step):
            parts = into[start : start + step]
            self.data.fill(rows[start : start + step], self.pitch, parts)
            good += agree(records[start : start + step], parts)
        return good

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of one row. SnapshotDamaged when they are not where the row says."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} has token ids beyond the end of {self.facts.file('var').name}")
        return data[start:end].view("<i4")

    def variable(self, row: int) -> bytes:
        """Token ids and source id of one row, as they are stored. SnapshotDamaged when they are not there."""
        record, data = self.rows[row], self._file("var")
        start = int(record["var"])
        end = start + 4 * int(record["tokens"]) + int(record["source"])
        if end > data.nbytes:
            raise SnapshotDamaged(f"row {row} ends beyond the end of {self.facts.file('var').name}")
        return data[start:end].tobytes()

    def source(self, row: int) -> str:
        """Id of the document that made the row. SnapshotDamaged when it is not where the row says."""
        return self.variable(row)[4 * int(self.rows[row]["tokens"]) :].decode("utf-8", "replace")

    def features(self) -> NDArray[np.float16]:
        """float16 [rows, feature width], a view of the file."""
        stored = self._file("fp")
        if stored.nbytes != 2 * len(self.rows) * self.feature_width:
            raise SnapshotDamaged(
                f"{self.facts.file('fp').name} has {stored.nbytes:,} bytes, which is not float16 "
                f"[{len(self.rows)}, {self.feature_width}]"
            )
        return stored.view("<f2").reshape(len(self.rows), self.feature_width)


def records_of(folder: Folder, facts: SegmentFacts) -> tuple[NDArray[Any], int, int]:
    """Records of ROW, pitch and feature width of a segment; SnapshotDamaged when its .row is not what it should be."""
    raw = verified(folder, facts.file("row"))
    if raw.nbytes < HEADER.itemsize:
        raise SnapshotDamaged(f"{facts.file('row').name} is shorter than its header")
    header = raw[: HEADER.itemsize].view(HEADER)[0]
    rows = raw[HEADER.itemsize :]
    if (
        header["magic"] != _MAGIC
        or header["record"] != ROW.itemsize
        or int(header["rows"]) != facts.rows
        or rows.nbytes != facts.rows * ROW.itemsize
    ):
        raise SnapshotDamaged(f"{facts.file('row').name} has a header that does not fit its manifest")
    return rows.view(ROW), int(header["pitch"]), int(header["feature_width"])


def _alive(folder: Folder, facts: SegmentFacts) -> NDArray[np.bool_] | None:
    """The segment's bitmap. A damaged one is damage of the segment: it could give an evicted row back."""
    if facts.alive is None:
        return None
    raw = verified(folder, facts.alive)
    bits = np.unpackbits(raw, bitorder="little")
    if len(raw) != -(-facts.rows // 8) or bits[facts.rows :].any() or int(bits.sum()) != facts.live:
        raise SnapshotDamaged(f"{facts.alive.name} does not have {facts.live} of {facts.rows} rows alive")
    return bits[: facts.rows].astype(np.bool_)


def write_alive(folder: Folder, facts: SegmentFacts, alive: NDArray[np.bool_], id: str) -> SegmentFacts:
    """Write a bitmap, bool [rows], durably under a new id; the segment's facts with it. The caller syncs the folder.

    Nothing is changed for anybody until a manifest names it: an older manifest goes on with its own bitmap.
    """
    file = write_file(folder, f"seg/{facts.id}-{id}.alive", [np.packbits(alive, bitorder="little").tobytes()])
    return replace(facts, dead=facts.rows - int(alive.sum()), alive=file)


def verified(folder: Folder, facts: FileFacts) -> NDArray[np.uint8]:
    """A mapped file whose size and sha256 are those of the manifest; SnapshotDamaged otherwise."""
    try:
        data = folder.map(facts.name, facts.size)
    except FileNotFoundError:
        raise SnapshotDamaged(f"{facts.name} is missing") from None
    found = hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]  # hashes the mapped pages without a copy
    if found != facts.sha256:
        raise SnapshotDamaged(f"{facts.name} has sha256 {found[:12]}..., the manifest says {str(facts.sha256)[:12]}...")
    return data

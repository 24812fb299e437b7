"""On-disk format of rows: records, checksums over keys and bytes, and alignment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

Keys: TypeAlias = NDArray[np.uint64]  # 128-bit keys, [n, 2]
Rows: TypeAlias = NDArray[np.int64]  # row numbers in a bank, [n]
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
        ("scale", "<f4"),  # int8 rows: value of one step
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
        ("pitch", "<u8"),  # bytes from one row to the next if all rows have the same size, else 0
        ("mark", "<u4"),  # bytes of a row's mark, 0 if rows have no marks
        ("reserved", "S28"),
    ]
)
ALIAS = np.dtype([("text", "<u8", (2,)), ("row", "<u8", (2,))])
_HEAD = np.dtype([("key", "<u8", (2,)), ("nbytes", "<u8"), ("scale", "<f4")])  # hashed before a row's bytes
STRONG = 1  # flag of a row: its checksum is a sha256, cut to 16 bytes, which cannot be forged
MAGIC = b"LLMCROW1"
_SHORT = 4 << 10  # bytes of a row up to which a copy costs less than the set-up of a hash
_NEAR = 256 << 10  # bytes that are copied and then hashed, chosen to fit a core's cache
_PIECE = 2 << 20  # bytes that are hashed and then written while they are in the cache


def seconds32(now: float) -> int:
    """Clip a time in seconds since the epoch to the unsigned 32 bits of a record (1970 to 2106)."""
    return min(max(int(now), 0), (1 << 32) - 1)


def checksum(key: Keys, payload: NDArray[np.uint8], scale: float = 1.0, *, strong: bool = False) -> bytes:
    """Compute a 128-bit checksum over key, length, scale and bytes, so that the bytes of another row do not pass.

    scale: of an int8 row, 1 for others. strong: use sha256, which protects against forgery as well as damage; xxh3
    takes a fifteenth of the time, but can be forged.
    """
    record = np.zeros(1, ROW)
    record["key"], record["nbytes"], record["scale"] = key, payload.nbytes, scale
    return _digest(heads(record), payload, strong)


def heads(records: NDArray[Any]) -> bytes:
    """Return key, length and scale of each record of ROW, 28 bytes each, which a checksum covers before the bytes."""
    covered = np.zeros(len(records), _HEAD)
    covered["key"], covered["nbytes"], covered["scale"] = records["key"], records["nbytes"], records["scale"]
    return covered.tobytes()


def _digest(head: bytes, payload: NDArray[np.uint8] | memoryview, strong: bool) -> bytes:
    if strong:
        whole = hashlib.sha256(head)
        whole.update(payload)  # type: ignore[arg-type]
        return whole.digest()[:16]
    digest = xxhash.xxh3_128(head)
    digest.update(payload)  # type: ignore[arg-type]  # any contiguous buffer is accepted
    return digest.digest()


def begun_digest(record: NDArray[Any]) -> Any:
    """Start the hash of one record of ROW, [1]. Update it with the row's bytes; 16 bytes of it are the checksum."""
    strong = bool(record["flags"][0] & STRONG)
    return hashlib.sha256(heads(record)) if strong else xxhash.xxh3_128(heads(record))


def digests(records: NDArray[Any], parts: Iterable[NDArray[np.uint8] | memoryview]) -> list[bytes]:
    """Compute the checksums of rows. records: of ROW. parts: bytes of each row, as many as there are records."""
    head, size = heads(records), _HEAD.itemsize
    strong = (records["flags"] & STRONG > 0).tolist()
    if isinstance(parts, np.ndarray) and parts.shape[1] <= _SHORT and not any(strong) and len(parts) == len(records):
        return _digests_of_short_rows(head, parts)
    return [
        _digest(head[size * i : size * i + size], part, one)
        for i, (part, one) in enumerate(zip(parts, strong, strict=True))
    ]


def _digests_of_short_rows(head: bytes, parts: NDArray[np.uint8]) -> list[bytes]:
    """Compute the checksums of short rows, copying each next to its head: one hash call per row instead of three."""
    size, step = _HEAD.itemsize, max(1, _NEAR // (_HEAD.itemsize + parts.shape[1]))
    digests_found: list[bytes] = []
    head_bytes = np.frombuffer(head, np.uint8).reshape(-1, size)
    joined = np.empty((min(step, len(parts)), size + parts.shape[1]), np.uint8)
    for start in range(0, len(parts), step):
        block = joined[: len(parts) - start]
        block[:, :size], block[:, size:] = head_bytes[start : start + step], parts[start : start + step]
        digests_found += map(xxhash.xxh3_128_digest, block)
    return digests_found


def agree(records: NDArray[Any], parts: Sequence[NDArray[np.uint8] | memoryview] | NDArray[np.uint8]) -> list[bool]:
    """Return which rows have the length of their record and match its checksum."""
    expected, computed = records["checksum"].tobytes(), digests(records, parts)
    if isinstance(parts, np.ndarray) and b"".join(computed) == expected and (records["nbytes"] == parts.shape[1]).all():
        return [True] * len(records)
    return [
        part.nbytes == size and one == expected[16 * i : 16 * i + 16]
        for i, (part, size, one) in enumerate(zip(parts, records["nbytes"].tolist(), computed, strict=True))
    ]


def aligned(size: Any) -> Any:
    """Round a size in bytes, a number or an array, up to the alignment of rows in .seg (64)."""
    return -(-size // ALIGN) * ALIGN if isinstance(size, int) else (size + (ALIGN - 1)) // ALIGN * ALIGN


def portions(nbytes: NDArray[Any]) -> list[slice]:
    """Split rows of these sizes into slices of about 2 MiB, which fit the cache from one use to the next."""
    cuts = np.flatnonzero(np.diff(np.cumsum(aligned(nbytes.astype(np.int64))) // _PIECE)) + 1
    return [slice(a, b) for a, b in pairwise([0, *cuts.tolist(), len(nbytes)]) if a < b]

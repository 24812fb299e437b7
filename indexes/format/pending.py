"""Pending rows of a bank: their encoding, their sizes, and the batches that become segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format import codec
from llmcache.indexes.format.reading import Payload
from llmcache.indexes.format.rows import ALIAS, ROW, Keys
from llmcache.indexes.format.segment_writer import PendingRows
from llmcache.indexes.format.shelf import Shelf


@dataclass(frozen=True, slots=True)
class FlushBatch:
    """Pending rows with consecutive numbers, and aliases, which become one segment. They do not change any more.

    aliases: pairs of text keys and row keys, each uint64 [n, 2].
    """

    batches: list[PendingRows]
    aliases: list[tuple[Keys, Keys]]
    shelf: Shelf | None = None
    """Memory that only these rows use; None: memory that other rows use too."""


def encode_rows(
    values: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    dtype: str,
    place: Callable[[int, int], NDArray[np.uint8]],
) -> tuple[NDArray[np.bool_], Payload, NDArray[np.float32]]:
    """Encode the rows that `dtype` can represent.

    values: float32 [n, width], or n arrays [tokens, width], also as an array of objects. place: allocates uint8
        [rows, bytes].
    Returns which rows are encoded, bool [n], their bytes, and their scales, float32 [rows encoded].
    """
    if isinstance(values, np.ndarray) and values.dtype != object:
        return codec.kept(values, dtype, place)
    flat = [states.reshape(1, -1) for states in values]
    fits = np.array([bool(codec.representable(states, dtype)[0]) for states in flat], np.bool_)
    pairs = [codec.encode(flat[i], dtype) for i in np.flatnonzero(fits)]
    scale = np.array([one[0] for _, one in pairs], np.float32)
    return fits, [one[0] for one, _ in pairs], scale


def payload_bytes(payload: Payload) -> int:
    """Sum the bytes of stored activations."""
    return payload.nbytes if isinstance(payload, np.ndarray) else sum(part.nbytes for part in payload)


def sealed_bytes(batches: Sequence[PendingRows], aliases: Sequence[tuple[Keys, Keys]]) -> int:
    """Estimate from above the bytes of a segment of these batches and aliases (text keys and row keys)."""
    size = 4096 + 32 * sum(len(text) for text, _ in aliases)
    for batch in batches:
        size += payload_bytes(batch.payload) + 64 * len(batch) + batch.features.nbytes + ROW.itemsize * len(batch)
        size += sum(
            4 * len(ids) + min(1024, 4 * len(name)) for ids, name in zip(batch.tokens, batch.sources, strict=True)
        )
        size += 0 if batch.marks is None else batch.marks.nbytes
    return size


def alias_records(aliases: Sequence[tuple[Keys, Keys]]) -> NDArray[Any]:
    """Return pairs of text keys and row keys, each uint64 [n, 2], as records of ALIAS."""
    records = np.zeros(sum(len(text) for text, _ in aliases), ALIAS)
    if len(records):
        records["text"] = np.concatenate([text for text, _ in aliases])
        records["row"] = np.concatenate([row for _, row in aliases])
    return records

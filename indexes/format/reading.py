"""Reading of rows: check stored bytes against their checksums and decode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format import codec
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.format.segment import Segment, Tombstone
from llmcache.indexes.format.segment_writer import PendingRows
from llmcache.indexes.format.segments import Piece, SegmentList

Payload: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


@dataclass(slots=True)
class Reading:
    """Result of `Bank.read`. values: float32 [n, width] (rank 1), or one [tokens, width] per row (rank 2).

    intact: bool [n], False where the row failed its checksum; its values are then zeros (rank 1) or empty (rank 2).
    """

    values: NDArray[np.float32] | list[NDArray[np.float32]]
    intact: NDArray[np.bool_]


def vectors(pieces: SegmentList, facts: BankFacts, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read rows of rank 1. Returns float32 [n, width], zeros where a row is not intact, and bool [n], intact."""
    table, intact = np.empty((len(rows), facts.width), np.float32), np.zeros(len(rows), np.bool_)
    plain = facts.dtype == "float32"
    for piece, chosen, local in pieces.groups(rows):
        if not isinstance(piece, Segment) or not piece.pitch:  # only segments by other programs lack a pitch here
            good, payload, scale = _stored(piece, local)
            if good.any():
                block = np.stack([payload[i] for i in np.flatnonzero(good).tolist()])
                table[chosen[good]] = codec.decode(block, scale[good], facts.dtype)
        elif plain:  # without a copy: directly into the result
            raw = table.view(np.uint8)
            every = len(chosen) == len(rows)
            good = np.array(piece.fetch(local, raw if every else [raw[i] for i in chosen.tolist()]), np.bool_)
        else:
            block = np.empty((len(local), facts.width * codec.DTYPES[facts.dtype]), np.uint8)
            good = np.array(piece.fetch(local, block), np.bool_)
            table[chosen[good]] = codec.decode(block[good], piece.rows["scale"][local[good]], facts.dtype)
        intact[chosen] = good
    if not intact.all():
        table[~intact] = 0
    return table, intact


def states(pieces: SegmentList, facts: BankFacts, rows: Rows) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_]]:
    """Read rows of rank 2. Returns float32 [tokens, width] per row, empty if not intact, and bool [n], intact."""
    arrays, intact = [np.zeros((0, facts.width), np.float32)] * len(rows), np.zeros(len(rows), np.bool_)
    for piece, chosen, local in pieces.groups(rows):
        good, payload, scale = _stored(piece, local)
        intact[chosen] = good
        for i in np.flatnonzero(good).tolist():
            stored = np.ascontiguousarray(payload[i])[None]
            numbers = codec.decode(stored, scale[i : i + 1], facts.dtype)
            arrays[chosen[i]] = numbers.reshape(-1, facts.width)
    return arrays, intact


def _stored(piece: Piece, rows: Rows) -> tuple[NDArray[np.bool_], Payload, NDArray[np.float32]]:
    """Read stored bytes. Returns which rows are intact, bool [n], their bytes, and their scales, float32 [n]."""
    if isinstance(piece, Tombstone):
        return np.zeros(len(rows), np.bool_), [np.zeros(0, np.uint8)] * len(rows), np.zeros(len(rows), np.float32)
    if isinstance(piece, PendingRows):
        return np.ones(len(rows), np.bool_), [piece.payload[i] for i in rows], piece.scale[rows]
    payload = piece.payload(rows)
    return piece.intact(rows, payload), payload, piece.rows["scale"][rows]

"""Coverage of a bank's index file: the segments whose rows, or whose live rows, it contains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.segments import SegmentList

DEAD_SHARE = 0.3
"""Share of an index's rows that may be evicted before it is rebuilt. Most kinds of index cannot remove vectors."""


def segment_spans(segments: SegmentList) -> dict[str, NDArray[np.int64]]:
    """Return the row numbers of each sealed segment that has rows, by its id."""
    spans = {}
    for piece, first in segments.placed():
        if isinstance(piece, Segment) and len(piece):
            spans[piece.facts.id] = np.arange(first, first + len(piece))
    return spans


def live_spans(segments: SegmentList) -> dict[str, NDArray[np.int64]]:
    """Return the live rows of each segment with dead rows, by the name of its bitmap, which changes with the bitmap."""
    spans = {}
    for piece, first in segments.placed():
        if isinstance(piece, Segment) and piece.facts.alive:
            spans[piece.facts.alive.name[len("seg/") : -len(".alive")]] = piece.live() + first
    return spans


def covered_segments(segments: SegmentList, indexed: NDArray[np.int64]) -> tuple[str, ...] | None:
    """Describe the rows of an index as names for a manifest: a segment's id for all its rows, its bitmap's name for
    its live rows.

    indexed: rows of the index, in order. Returns None when they are not such a sequence.
    """
    begin: dict[int, list[tuple[str, NDArray[np.int64]]]] = {}
    for name, rows in [*segment_spans(segments).items(), *live_spans(segments).items()]:
        if len(rows):
            begin.setdefault(int(rows[0]), []).append((name, rows))
    names: list[str] = []
    at = 0
    while at < len(indexed):
        for name, rows in begin.pop(int(indexed[at]), []):
            if np.array_equal(indexed[at : at + len(rows)], rows):
                names.append(name)
                at += len(rows)
                break
        else:
            return None
    return tuple(names)


def index_stands(facts: BankFacts) -> bool:
    """Return whether the bank's index file still fits its segments, with not more than `DEAD_SHARE` dead rows."""
    if facts.index is None:
        return False
    segments = {segment.id: segment for segment in facts.segments}
    dead = 0
    for name in facts.index.segments:
        id, dash, _ = name.partition("-")
        segment = segments.get(id)
        if segment is None or (dash and (segment.alive is None or segment.alive.name != f"seg/{name}.alive")):
            return False
        dead += 0 if dash else segment.dead
    return dead <= DEAD_SHARE * facts.index.count

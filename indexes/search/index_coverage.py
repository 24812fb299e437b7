"""Coverage of a bank's index file: the segments, and the live rows of them, whose vectors it holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.segments import SegmentList

DEAD_SHARE = 0.3
"""Share of an index's rows that may be evicted before it is built again. Few kinds can give a vector up."""


def segment_spans(segments: SegmentList) -> dict[str, NDArray[np.int64]]:
    """Row numbers of each sealed segment that has rows, by its id."""
    spans = {}
    for piece, first in segments.placed():
        if isinstance(piece, Segment) and len(piece):
            spans[piece.facts.id] = np.arange(first, first + len(piece))
    return spans


def live_spans(segments: SegmentList) -> dict[str, NDArray[np.int64]]:
    """Live rows of each segment that has dead ones, by the name of its bitmap: another bitmap, another name."""
    spans = {}
    for piece, first in segments.placed():
        if isinstance(piece, Segment) and piece.facts.alive:
            spans[piece.facts.alive.name[len("seg/") : -len(".alive")]] = piece.live() + first
    return spans


def covered_segments(segments: SegmentList, indexed: NDArray[np.int64]) -> tuple[str, ...] | None:
    """What the index covers, in order, as a manifest says it; None when that cannot be said of these rows.

    A segment's id is all its rows; the name of its bitmap is those that live.
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
    """Whether the bank's index file still leads to its segments' rows, and not to too many dead ones."""
    if facts.index is None:
        return False
    segments = {one.id: one for one in facts.segments}
    dead = 0
    for name in facts.index.segments:
        id, dash, _ = name.partition("-")
        one = segments.get(id)
        if one is None or (dash and (one.alive is None or one.alive.name != f"seg/{name}.alive")):
            return False
        dead += 0 if dash else one.dead
    return dead <= DEAD_SHARE * facts.index.count

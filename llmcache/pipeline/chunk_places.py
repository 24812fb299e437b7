"""Locate chunks in a document that were given by their text alone, by beam search over their positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from llmcache.pipeline.chunking import Chunk

_HYPOTHESES = 16  # beam width
_OCCURRENCES = 4  # occurrences of a chunk that are tried per hypothesis
_SKIPPED = 1000.0  # cost of a character left out between two chunks; one that two chunks share costs 1


@dataclass(frozen=True, slots=True)
class _Placed:
    """Position of a chunk in a hypothesis. cost: total up to this chunk. before: the previous chunk's position."""

    cost: float
    start: int
    end: int
    before: _Placed | None


@dataclass(frozen=True, slots=True)
class NoChunk:
    """Value that was given as a chunk but is no part of the text."""

    part: Any


def chunk_places(text: str, parts: Sequence[Any]) -> list[tuple[int, int]] | NoChunk:
    """Locate every chunk in a text. Returns start and end of each, or a NoChunk for the first that is no part of it.

    parts: in the order of the text, each a Chunk, a pair of start and end, or a substring. A substring that occurs
        several times is placed so that the chunks together skip as few characters as possible, and overlap as little
        as possible. Sliding windows and plain splits get their true positions wherever the text is unambiguous.
    """
    beam = [_Placed(0.0, 0, 0, None)]
    for part in parts:
        span = _span_of(text, part)
        if span is None:
            return NoChunk(part)
        following: dict[int, _Placed] = {}
        for last in beam:
            for start in _starts(text, part, last) if isinstance(part, str) else span[:1]:
                placed = _Placed(last.cost + _cost(text, last, start), start, start + span[1] - span[0], last)
                if start not in following or placed.cost < following[start].cost:
                    following[start] = placed
        if not following:  # the chunk is out of order: take its first occurrence
            last = min(beam, key=lambda placed: placed.cost)
            following[span[0]] = _Placed(last.cost, *span, last)
        beam = sorted(following.values(), key=lambda placed: placed.cost)[:_HYPOTHESES]
    best: _Placed | None = min(beam, key=lambda placed: placed.cost + _SKIPPED * len(text[placed.end :].strip()))
    places: list[tuple[int, int]] = []
    while best is not None and best.before is not None:
        places.append((best.start, best.end))
        best = best.before
    return places[::-1]


def _span_of(text: str, part: Any) -> tuple[int, int] | None:
    """Return start and end of a chunk, of a substring its first occurrence; None if it is no part of the text."""
    if isinstance(part, str):
        start = text.find(part)
        return None if start < 0 else (start, start + len(part))
    if isinstance(part, Chunk):
        start, end = part.start, part.end
    elif isinstance(part, list | tuple) and len(part) == 2 and all(isinstance(at, Integral) for at in part):
        start, end = int(part[0]), int(part[1])
    else:
        return None
    return (start, end) if 0 <= start <= end <= len(text) else None


def _starts(text: str, part: str, last: _Placed) -> Iterator[int]:
    """Yield the positions where a substring may begin, given the position of the previous chunk."""
    yield from {at for at in (last.end, _after_space(text, last.end)) if text.startswith(part, at)}
    first = last.start if last.before is None or len(part) > last.end - last.start else last.start + 1
    for begin in (first, last.end):
        at = text.find(part, begin)
        for _ in range(_OCCURRENCES):
            if at < 0:
                break
            yield at
            at = text.find(part, at + 1)


def _cost(text: str, last: _Placed, start: int) -> float:
    """Return the cost of this start: characters skipped after the previous chunk, or shared with it."""
    if start >= last.end:
        return _SKIPPED * max(0, start - _after_space(text, last.end))
    return float(last.end - start)


def _after_space(text: str, at: int) -> int:
    """Return the first position from `at` on that is not white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at

"""Find where chunks that a caller gave by their text alone lie in a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from llmcache.pipeline.chunking import Chunk

_HYPOTHESES = 16  # assignments that are followed at a time
_OCCURRENCES = 4  # of one chunk that are looked at from one hypothesis
_SKIPPED = 1000.0  # what a character left out between two chunks costs, beside one that two chunks share


@dataclass(frozen=True, slots=True)
class _Placed:
    """One chunk's place in one hypothesis. cost: of this and all chunks before it. before: the chunk before it."""

    cost: float
    start: int
    end: int
    before: _Placed | None


@dataclass(frozen=True, slots=True)
class NoChunk:
    """A part that was given as a chunk and is none of the text."""

    part: Any


def chunk_places(text: str, parts: Sequence[Any]) -> list[tuple[int, int]] | NoChunk:
    """Start and end of every chunk of a text, or the first part that is no chunk of it.

    parts: in the order of the text, each a Chunk, a pair of start and end, or a part of the text. A part that occurs
        several times is placed so that the chunks together leave out as little of the text as possible, and overlap no
        more than they must: sliding windows and plain splits get their true places wherever the text allows no doubt.
    """
    beam = [_Placed(0.0, 0, 0, None)]
    for part in parts:
        spans = _given(text, part)
        if spans is None:
            return NoChunk(part)
        following: dict[int, _Placed] = {}
        for last in beam:
            for start in _starts(text, part, last) if isinstance(part, str) else spans[:1]:
                placed = _Placed(last.cost + _cost(text, last, start), start, start + spans[1] - spans[0], last)
                if start not in following or placed.cost < following[start].cost:
                    following[start] = placed
        if not following:  # out of order: somewhere
            last = min(beam, key=lambda one: one.cost)
            following[spans[0]] = _Placed(last.cost, *spans, last)
        beam = sorted(following.values(), key=lambda one: one.cost)[:_HYPOTHESES]
    best: _Placed | None = min(beam, key=lambda one: one.cost + _SKIPPED * len(text[one.end :].strip()))
    places: list[tuple[int, int]] = []
    while best is not None and best.before is not None:
        places.append((best.start, best.end))
        best = best.before
    return places[::-1]


def _given(text: str, part: Any) -> tuple[int, int] | None:
    """Start and end of a part as it was given, of a text its first occurrence; None where it is no part of the text."""
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
    """Places where a part may begin, given the place of the chunk before it."""
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
    """Cost of placing a chunk here: characters skipped since the chunk before it, or shared with it."""
    if start >= last.end:
        return _SKIPPED * max(0, start - _after_space(text, last.end))
    return float(last.end - start)


def _after_space(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at

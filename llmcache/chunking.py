"""Documents cut into chunks at headings, paragraphs and sentences, so that an edit changes only the chunks it touches.

A cut depends on the text around it, never on a count from the beginning of the document: fixed windows shift behind
every insertion, and then nothing behind it is a repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmcache.errors import ConfigError

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_HEADING = re.compile(r"#{1,6}\s|[^\n]{1,100}\n[=-]{3,}\s*\Z")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|(?<=[\u3002\uff01\uff1f])|\n")  # the last three of CJK
_SPACE = re.compile(r"\s+")

LIMIT, LEAST = 800, 200


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text: text[start:end]."""

    start: int
    end: int
    text: str


def chunks(text: str, *, limit: int = LIMIT, least: int = LEAST, length: Callable[[str], int] = len) -> list[Chunk]:
    """The text in parts that are at most `limit` long, in order; only white space lies between them.

    A part begins at a heading or a paragraph, and a paragraph shorter than `least` is joined with the next ones; a
    longer one than `limit` is cut at sentences, and a longer sentence at spaces. A word that is longer stands alone.
    length: of a text; characters, or for example its tokens: `lambda text: len(tokenizer.encode(text))`.
    ConfigError for limits that make no sense.
    """
    if not 0 <= least <= limit or limit < 1:
        raise ConfigError(f"limit is at least 1 and least from 0 to limit, got limit={limit} and least={least}")
    found: list[tuple[int, int]] = []
    begin = end = None  # of the chunk that is being made
    for start, stop, heads in _parts(text, limit, length):
        joined = begin is not None and not heads and length(text[begin:stop]) <= limit
        if begin is not None and end is not None and not joined:
            found.append((begin, end))
            begin = None
        begin, end = start if begin is None else begin, stop
        if length(text[begin:end]) >= least and not _is_heading(text[start:stop]):
            found.append((begin, end))
            begin = end = None
    if begin is not None and end is not None:
        found.append((begin, end))
    return [Chunk(start, stop, text[start:stop]) for start, stop in found]


def _parts(text: str, limit: int, length: Callable[[str], int]) -> Iterator[tuple[int, int, bool]]:
    """Start and end of every paragraph, or of every piece of one that is too long; whether a chunk must begin there."""
    after_heading = False
    for start, stop in _spans(text, 0, len(text), _BLANK):
        heading = _is_heading(text[start:stop])
        begins = heading and not after_heading
        after_heading = heading
        if length(text[start:stop]) <= limit:
            yield start, stop, begins
            continue
        for one, other in _packed(text, start, stop, limit, length):
            yield one, other, begins
            begins = False


def _is_heading(paragraph: str) -> bool:
    return _HEADING.match(paragraph) is not None and paragraph.count("\n") <= 1


def _packed(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """A paragraph in pieces: as many sentences as fit, and words where one sentence does not."""
    begin = end = start
    for one, other in _spans(text, start, stop, _SENTENCE):
        if length(text[begin:other]) <= limit:
            end = other
            continue
        if end > begin:
            yield begin, end
        begin, end = one, other
        if length(text[one:other]) > limit:
            *whole, (begin, end) = _words(text, one, other, limit, length)
            yield from whole
    if end > begin:
        yield begin, end


def _words(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    begin = end = start
    for one, other in _spans(text, start, stop, _SPACE):
        if end > begin and length(text[begin:other]) > limit:
            found.append((begin, end))
            begin = one
        end = other
    return [*found, (begin, end)]


def _spans(text: str, start: int, stop: int, between: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """What lies between the matches, without white space at its ends; nothing empty."""
    at = start
    for cut in [*((one.start(), one.end()) for one in between.finditer(text, start, stop)), (stop, stop)]:
        part = text[at : cut[0]]
        begin = at + len(part) - len(part.lstrip())
        end = at + len(part.rstrip())
        if end > begin:
            yield begin, end
        at = cut[1]

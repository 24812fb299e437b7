"""Cut documents into chunks at headings, paragraphs and sentences, so that an edit changes only the chunks it touches.

A cut depends on the text around it, never on the distance from the start of the document: fixed windows would shift
after every insertion, and no later chunk would repeat. Text without spaces (Chinese, Japanese, Thai, base64) is cut at
punctuation, or, without punctuation, at positions chosen by a checksum of the characters before them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmcache.errors import ConfigError

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_HEADING = re.compile(r"#{1,6}\s|[^\n]{1,100}\n[=-]{3,}\s*\Z")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|(?<=[\u3002\uff01\uff1f])|\n")  # the last three of CJK
_SPACE = re.compile(r"\s+")
# punctuation after which a run of characters without spaces may be cut: CJK, Arabic, Latin, data formats
_CLAUSE = re.compile("[\u3001\uff0c\uff1b\uff1a\u30fb\u2026\u2014\u060c\u061b,;:|/&=)\\]}>\u300d\u300f\u3011\uff09-]+")
_JOINERS = "\u200d\u2060"  # zero-width joiner and word joiner: never cut beside them
_CONTEXT = 8  # number of preceding characters that decide whether a run is cut at a position

LIMIT, LEAST = 800, 200


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a text: text[start:end], in characters."""

    start: int
    end: int
    text: str


def chunks(text: str, *, limit: int = LIMIT, least: int = LEAST, length: Callable[[str], int] = len) -> list[Chunk]:
    """Cut a text into chunks of at most `limit`. Returns them in order; only white space lies between them.

    A chunk begins at a heading or a paragraph; a paragraph shorter than `least` is joined with the next ones. A
    paragraph longer than `limit` is cut at sentences, a longer sentence at spaces, and a longer word after punctuation
    or between characters (never inside a character with its combining marks). Only a single character that is longer
    than `limit` by the given measure makes a chunk that is too long.
    length: measure of a text; characters, or for example tokens: `lambda text: len(tokenizer.encode(text))`.
    ConfigError unless 0 <= least <= limit and limit >= 1.
    """
    if not 0 <= least <= limit or limit < 1:
        raise ConfigError(f"limit is at least 1 and least from 0 to limit, got limit={limit} and least={least}")
    spans: list[tuple[int, int]] = []
    begin = end = None  # of the current chunk
    for start, stop, heads in _parts(text, limit, length):
        joined = begin is not None and not heads and length(text[begin:stop]) <= limit
        if begin is not None and end is not None and not joined:
            spans.append((begin, end))
            begin = None
        begin, end = start if begin is None else begin, stop
        if length(text[begin:end]) >= least and not _is_heading(text[start:stop]):
            spans.append((begin, end))
            begin = end = None
    if begin is not None and end is not None:
        spans.append((begin, end))
    return [Chunk(start, stop, text[start:stop]) for start, stop in spans]


def _parts(text: str, limit: int, length: Callable[[str], int]) -> Iterator[tuple[int, int, bool]]:
    """Yield start and end of every paragraph, cut if it is too long, and whether a chunk must begin there."""
    after_heading = False
    for start, stop in _spans(text, 0, len(text), _BLANK):
        heading = _is_heading(text[start:stop])
        begins = heading and not after_heading
        after_heading = heading
        if length(text[start:stop]) <= limit:
            yield start, stop, begins
            continue
        for first, last in _packed(text, start, stop, limit, length):
            yield first, last, begins
            begins = False


def _is_heading(paragraph: str) -> bool:
    return _HEADING.match(paragraph) is not None and paragraph.count("\n") <= 1


def _packed(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """Cut a paragraph into spans of as many sentences as fit; a sentence that does not fit is cut by `_words`."""
    begin = end = start
    for first, last in _spans(text, start, stop, _SENTENCE):
        if length(text[begin:last]) <= limit:
            end = last
            continue
        if end > begin:
            yield begin, end
        begin, end = first, last
        if length(text[first:last]) > limit:
            *complete, (begin, end) = _words(text, first, last, limit, length)
            yield from complete
    if end > begin:
        yield begin, end


def _words(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> list[tuple[int, int]]:
    """Cut a sentence at spaces into spans of at most `limit`; a longer word is cut by `_run`."""
    spans: list[tuple[int, int]] = []
    begin = end = start
    for first, last in _spans(text, start, stop, _SPACE):
        if end > begin and length(text[begin:last]) > limit:
            spans.append((begin, end))
            begin = first
        end = last
        if length(text[begin:end]) > limit:
            *complete, (begin, end) = _run(text, max(begin, first), last, limit, length)
            spans += complete
    return [*spans, (begin, end)]


def _run(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> list[tuple[int, int]]:
    """Cut a run of characters without spaces into spans of at most `limit`.

    Each cut lies in the second half of the longest prefix that fits: after the last punctuation there, else at the
    position whose preceding characters have the smallest checksum, so that an insertion moves only the cuts near it.
    """
    spans: list[tuple[int, int]] = []
    while length(text[start:stop]) > limit:
        fits = _longest_prefix(text, start, stop, limit, length)
        cut = _best_cut(text, start + (fits - start + 1) // 2, fits)
        if cut is None:
            cut = next((at for at in range(fits, start, -1) if _may_cut(text, at)), None)
        if cut is None:  # one character with its marks is longer than the limit
            cut = next((at for at in range(fits + 1, stop) if _may_cut(text, at)), stop)
        spans.append((start, cut))
        start = cut
        if start == stop:
            return spans
    return [*spans, (start, stop)]


def _longest_prefix(text: str, start: int, stop: int, limit: int, length: Callable[[str], int]) -> int:
    """Return the end of a long prefix of text[start:stop] within `limit`, by bisection; at least one character."""
    low, high = start + 1, stop
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(text[start:middle]) <= limit else (low, middle - 1)
    return low


def _best_cut(text: str, first: int, last: int) -> int | None:
    """Choose a position from `first` to `last` at which to cut a run of characters; None if none is allowed."""
    clauses = [match.end() for match in _CLAUSE.finditer(text, max(0, first - 1), last) if match.end() >= first]
    places = [at for at in clauses if _may_cut(text, at)]
    if places:
        return places[-1]
    places = [at for at in range(first, last + 1) if _may_cut(text, at)]
    return min(places, key=lambda at: (zlib.crc32(text[max(0, at - _CONTEXT) : at].encode()), at), default=None)


def _may_cut(text: str, at: int) -> bool:
    """Return whether a text may be cut at this position: not inside a letter with its marks or a joined emoji."""
    if at >= len(text):
        return True
    after, before = text[at], text[at - 1]
    marks = unicodedata.category(after) in ("Mn", "Mc", "Me") or "\U0001f3fb" <= after <= "\U0001f3ff"
    return not (marks or after in _JOINERS or before in _JOINERS)


def _spans(text: str, start: int, stop: int, between: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield the spans between the matches of a pattern, stripped of white space, unless they are empty."""
    at = start
    for cut in [*(match.span() for match in between.finditer(text, start, stop)), (stop, stop)]:
        part = text[at : cut[0]]
        begin = at + len(part) - len(part.lstrip())
        end = at + len(part.rstrip())
        if end > begin:
            yield begin, end
        at = cut[1]

"""Read the fields of a text that the guard compares: numbers, dates, identifiers, quotations, negations.

The rules cover digits of every script, Unicode's compatibility forms, and word lists for a dozen languages. Case and
the width of white space are ignored. A text is first normalised (`llmcache.near.guard.plain_text`). Its number words
are rewritten in digits (`llmcache.near.guard.number_words`, `llmcache.near.guard.scripts`). The result is read as
dates, identifiers and amounts. Run time grows with the length of a text only, not with its content, since repetitions
inside the patterns are bounded or anchored.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from llmcache.near.guard.capitals import capital_codes, marked_units
from llmcache.near.guard.comparisons import TRIGGERS as COMPARISON_TRIGGERS
from llmcache.near.guard.comparisons import comparisons
from llmcache.near.guard.dates import (
    clock_phrases,
    dates,
    months,
    times,
    weekdays,
)
from llmcache.near.guard.digits import fractions, glued_multipliers, signs
from llmcache.near.guard.identifiers import (
    SIZES,
    linkless,
    may_spell,
    numbered,
    quotations,
    spelled_codes,
)
from llmcache.near.guard.lexicon import (
    CURRENCIES,
    DOUBTFUL_WEEKDAYS,
    GERMAN_WEEKDAYS,
    MONTHS,
    WEEKDAYS,
)
from llmcache.near.guard.negations import TRIGGERS as NEGATION_TRIGGERS
from llmcache.near.guard.negations import negations
from llmcache.near.guard.number_lexicon import joined_number, number_words
from llmcache.near.guard.number_words import in_digits
from llmcache.near.guard.numerals import amounts, currencies, named_units
from llmcache.near.guard.plain_text import plain_text
from llmcache.near.guard.relative_dates import TRIGGERS as DATE_TRIGGERS
from llmcache.near.guard.relative_dates import bounds, decades, eras, relative_dates
from llmcache.near.guard.scripts import hindi_times, rewritten


class Fields(NamedTuple):
    """Fields of a text by kind, each in a canonical form and in the order of the text.

    number: values with their units, and currencies without a value. date: dates, times, months and weekdays.
    identifier: codes, versions, addresses, paths. quoted: texts in quotation marks.
    negation: the number of negations; empty for none. pattern: matches of the user's own pattern.
    """

    number: tuple[str, ...] = ()
    date: tuple[str, ...] = ()
    identifier: tuple[str, ...] = ()
    quoted: tuple[str, ...] = ()
    negation: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()


KINDS = Fields._fields

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_NO_LETTERS = {code: chr(code) if chr(code).isalpha() else " " for code in range(128)}
_MARKED_WORD = re.compile(r"(?:[^\W\d_]|[\u0900-\u0963\u0971-\u097f])+(?:'[^\W\d_]+)*")  # includes Hindi vowel signs
_HAS_DIGIT = re.compile(r"[0-9]")
_JOINED = re.compile(r"tausend|duizend|mil(?:a|le)")  # in one-word numbers of German, Dutch and Italian
_OTHER_SCRIPT = re.compile(r"[\u0900-\u097f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_CLOCK = re.compile(r"noon|midday|midnight")


NO_FIELDS = Fields()
_GERMAN_DAYS = frozenset(GERMAN_WEEKDAYS) | {"und", "bis"}
_MAY_BE_MARKED = re.compile(r"""[0-9"`@_/\\#<>+'.-]""")
_MARKED = re.compile(r"""[0-9"`@_/\\#<>+]|-(?:-[a-z]|(?![a-z]))|n'|\.[a-z]|(?<![a-z'])'[a-z]""")
_LONE = frozenset("bcfghjkpqrvwxzdelmnostuy")  # single letters that may be a code: vitamin c


@cache
def _triggers() -> frozenset[str]:
    """Return the words of which an ASCII text without a match of `_MARKED` must have one to have a field."""
    return _known().union(
        NEGATION_TRIGGERS,
        COMPARISON_TRIGGERS,
        DATE_TRIGGERS,
        CURRENCIES,
        SIZES,
        _LONE,
        ("positive", "noon", "midday", "midnight", "mo", "di", "mi", "sa", "und"),
    )


@cache
def _known() -> frozenset[str]:
    """Return all words for numbers, weekdays and months."""
    return number_words().union(WEEKDAYS, MONTHS, DOUBTFUL_WEEKDAYS)


def fields(text: str, pattern: re.Pattern[str] | None = None) -> Fields:
    """Read the fields of a text.

    pattern: matches the user's own fields. Its groups are the values, or the whole matches if it has no group.
    """
    matched = _matches(pattern, text) if pattern else []
    original, text = text, plain_text(text)
    words = _words(text)
    identifiers = capital_codes(original) if "-" in original else []
    if (
        text.isascii()
        and not identifiers
        and _triggers().isdisjoint(words)
        and "nicht" not in text
        and not (_MAY_BE_MARKED.search(text) and _MARKED.search(text))
        and not may_spell(text)
        and not _JOINED.search(text)
    ):
        return Fields(pattern=tuple(matched)) if matched else NO_FIELDS
    numbers: list[str] = []
    date_values: list[str] = []
    if marked := marked_units(original):
        text = plain_text(marked)
    if (
        _HAS_DIGIT.search(text)
        or not COMPARISON_TRIGGERS.isdisjoint(words)
        or not number_words().isdisjoint(words)
        or not text.isascii()
    ):
        text = comparisons(text, words, numbers)
        if numbers:
            text = " ".join(text.split())
            words = _words(text)
    negated = negations(text, words)
    quoted = quotations(text)
    text = linkless(text, identifiers)
    if not text.isascii() and _OTHER_SCRIPT.search(text):
        text = rewritten(text)
        words = _MARKED_WORD.findall(text)
    text = named_units(eras(text, date_values))
    identifiers += spelled_codes(text, words)
    text = decades(text, words)
    known = _known().intersection(words)
    joined = {word for word in words if len(word) > 7 and joined_number(word)} if _JOINED.search(text) else set()
    if joined or not number_words().isdisjoint(known):
        text = in_digits(text, known | joined)
    if known or not _GERMAN_DAYS.isdisjoint(words):
        date_values += weekdays(text, known | _GERMAN_DAYS.intersection(words))
    if _HAS_DIGIT.search(text):
        text = numbered(text, identifiers)
        text = signs(fractions(glued_multipliers(text)))
        text = hindi_times(clock_phrases(text, words))
    elif _CLOCK.search(text):
        text = clock_phrases(text, words)
    bounds(text, words, date_values)
    if not known.isdisjoint(MONTHS.keys()):
        text = months(text, known.intersection(MONTHS), date_values)
    if _HAS_DIGIT.search(text):
        text = times(dates(text, date_values), date_values)
        amounts(text, numbers, identifiers)
    relative_dates(text, words, date_values)
    currencies(text, words, numbers)
    negation = (str(negated),) if negated else ()
    return Fields(*(tuple(kind) for kind in (numbers, date_values, identifiers, quoted, negation, matched)))


def _words(text: str) -> list[str]:
    """Return the words of a plain text, with their apostrophes."""
    if text.isascii() and "'" not in text:
        return text.translate(_NO_LETTERS).split()  # three times as fast as the pattern
    return _WORD.findall(text)


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return ["\0".join(match.groups("")) if pattern.groups else match[0] for match in pattern.finditer(text)]

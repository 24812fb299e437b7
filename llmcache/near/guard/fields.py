"""What two texts must have in common to be taken for the same: numbers, dates, identifiers, quotations, negations.

The rules hold across languages: digits of every script, Unicode's compatibility forms, word lists for a dozen
languages. They do not look at case or at the width of white space. A text is brought into one spelling
(`llmcache.near.guard.plain_text`), its numbers in words are rewritten in digits (`llmcache.near.guard.number_words`,
`llmcache.near.guard.scripts`), and the result is read as dates, identifiers and amounts. Time grows with the length
of the text, whatever stands in it: repetitions inside the patterns are bounded or anchored.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from llmcache.near.guard.dates import (
    clock_phrases,
    dates,
    months,
    times,
    weekdays,
)
from llmcache.near.guard.digits import fractions, glued_multipliers, signs
from llmcache.near.guard.identifiers import (
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
from llmcache.near.guard.scripts import hindi_times, rewritten


class Fields(NamedTuple):
    """What must be the same in two texts, each kind in a canonical form and in the order of the text.

    number: values with their units, and currencies named without a value. date: dates, times, months and weekdays.
    identifier: codes, versions, addresses, paths. quoted: what stands in quotation marks. negation: the number of
    negations where there are some, else empty. pattern: what the user's own pattern matched.
    """

    number: tuple[str, ...] = ()
    date: tuple[str, ...] = ()
    identifier: tuple[str, ...] = ()
    quoted: tuple[str, ...] = ()
    negation: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()


KINDS = Fields._fields

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_MARKED_WORD = re.compile(r"(?:[^\W\d_]|[\u0900-\u0963\u0971-\u097f])+(?:'[^\W\d_]+)*")  # with the vowel signs of Hindi
_HAS_DIGIT = re.compile(r"[0-9]")
_JOINED = re.compile(r"tausend|duizend|mil(?:a|le)")  # inside German, Dutch and Italian numbers that are one word
_OTHER_SCRIPT = re.compile(r"[\u0900-\u097f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_CLOCK = re.compile(r"noon|midday|midnight")


NO_FIELDS = Fields()
_GERMAN_DAYS = frozenset(GERMAN_WEEKDAYS) | {"und", "bis"}
_MARKED = re.compile(r"""[0-9"`@_/\\#]|--[a-z]|n'|nicht|\.[a-z]|(?<![a-z'])'[a-z]""")
_LONE = frozenset("bcfghjkpqrvwxzdelmnostuy")  # letters that may be a code of their own: vitamin c


@cache
def _triggers() -> frozenset[str]:
    """Words without which a text in ASCII has no field, if it has no mark either."""
    return _known().union(
        NEGATION_TRIGGERS, CURRENCIES, _LONE, ("noon", "midday", "midnight", "mo", "di", "mi", "sa", "und")
    )


@cache
def _known() -> frozenset[str]:
    return number_words().union(WEEKDAYS, MONTHS, DOUBTFUL_WEEKDAYS)


def fields(text: str, pattern: re.Pattern[str] | None = None) -> Fields:
    """The fields of one text. pattern: the user's own; its matches (or groups, when it has some) are a field too."""
    matched = _matches(pattern, text) if pattern else []
    text = plain_text(text)
    words = _WORD.findall(text)
    if (
        text.isascii()
        and _triggers().isdisjoint(words)
        and not _MARKED.search(text)
        and not may_spell(text)
        and not _JOINED.search(text)
    ):
        return Fields(pattern=tuple(matched)) if matched else NO_FIELDS
    negated = negations(text, words)
    quoted = quotations(text)
    identifiers: list[str] = []
    numbers: list[str] = []
    when: list[str] = []
    text = linkless(text, identifiers)
    if not text.isascii() and _OTHER_SCRIPT.search(text):
        text = rewritten(text)
        words = _MARKED_WORD.findall(text)
    text = named_units(text)
    identifiers += spelled_codes(text)
    known = _known().intersection(words)
    joined = {word for word in words if len(word) > 7 and joined_number(word)} if _JOINED.search(text) else set()
    if joined or not number_words().isdisjoint(known):
        text = in_digits(text, known | joined)
    if known or not _GERMAN_DAYS.isdisjoint(words):
        when += weekdays(text, known | _GERMAN_DAYS.intersection(words))
    if _HAS_DIGIT.search(text):
        text = numbered(text, identifiers)
        text = signs(fractions(glued_multipliers(text)))
        text = hindi_times(clock_phrases(text, words))
    elif _CLOCK.search(text):
        text = clock_phrases(text, words)
    if not known.isdisjoint(MONTHS.keys()):
        text = months(text, known.intersection(MONTHS), when)
    if _HAS_DIGIT.search(text):
        text = times(dates(text, when), when)
        amounts(text, numbers, identifiers)
    currencies(text, words, numbers)
    negation = (str(negated),) if negated else ()
    return Fields(*(tuple(kind) for kind in (numbers, when, identifiers, quoted, negation, matched)))


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return ["\0".join(match.groups("")) if pattern.groups else match[0] for match in pattern.finditer(text)]

"""What two texts must have in common to be taken for the same: numbers, dates, identifiers, quotations, negations.

The rules hold across languages: digits of every script, Unicode's compatibility forms, word lists for a dozen
languages (`llmcache.lexicon`). They do not look at case or at the width of white space. Time grows with the length of
the text, whatever stands in it: repetitions inside the patterns are bounded or anchored.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from llmcache.lexicon import (
    ECHOES,
    HARMLESS,
    MONTHS,
    NEGATING_PARTS,
    NEGATIONS,
    NO_CODES,
    NUMBERS,
    PARTICLES,
    WEEKDAYS,
)
from llmcache.numerals import amounts, dates, months, times


class Fields(NamedTuple):
    """What must be the same in two texts, each kind in a canonical form and in the order of the text.

    number: values with their units. date: dates, times, months and weekdays. identifier: codes, versions, addresses,
    paths. quoted: what stands in quotation marks. negation: "odd" when an odd number of negations was read, else
    empty. pattern: what the user's own pattern found.
    """

    number: tuple[str, ...] = ()
    date: tuple[str, ...] = ()
    identifier: tuple[str, ...] = ()
    quoted: tuple[str, ...] = ()
    negation: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()


KINDS = Fields._fields

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_KNOWN = frozenset((*WEEKDAYS, *NUMBERS, *MONTHS))  # the words that need a closer look
_HAS_DIGIT = re.compile(r"[0-9]")
_FILES = "py|js|ts|java|cpp|txt|pdf|csv|jsonl?|xml|ya?ml|html?|docx?|xlsx?|pptx?|png|jpe?g|zip|exe"
# lengths are bounded where a search could otherwise go over a long run of letters again and again
_LINK = re.compile(
    r"""(?:https?|ftp|s3|file)://[^\s<>"'”»)\]]+|www\.[^\s<>"'”»)\]]+"""
    r"""|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+|(?<![\w@])@\w{2,}"""
    r"""|(?<![\w/.])(?:~|\.{1,2})?(?:/[\w.+-]+){2,}/?|\b[a-z]:\\[^\s"']+"""
    r"""|(?<![\w.-])(?:[\w-]{1,63}\.){1,5}(?:com|org|net|edu|gov|io|info|dev|app)\b(?:/[^\s"'<>)]*)?"""
    rf"""|(?<![\w.-])[\w-]{{1,99}}\.(?:{_FILES})\b"""
    r"""|(?<!\w)--[a-z][\w-]+|(?<!\w)_*[^\W_]+(?:_+[^\W_]+)+"""
)
_MAY_LINK = re.compile(rf"[@\\_]|://|--[a-z]|\.(?:com|org|net|edu|gov|io|info|dev|app|{_FILES})\b|/[\w.+-]+/|www\.")
# letters only and no vowel in one of the parts: lcs-csj, php
_NO_VOWEL = "[b-df-hj-np-tv-xz]"
_SPELLED = re.compile(rf"(?<![\w./@-])(?:[^\W\d_]+-)*{_NO_VOWEL}{{3,}}(?:-[^\W\d_]+)*(?![\w@]|[-./]\w)")
_MAY_SPELL = re.compile(rf"\b{_NO_VOWEL}{{3,}}\b")
# a consonant alone: vitamin C, C++. Two of them (TV, CV) refused as many right pairs as wrong ones
_LONE = re.compile(r"(?<![\w'./&-])[bcfghjkpqrvwxz](?:\+\+|#)?(?![\w'./&-])")
_QUOTED = re.compile(
    r"""(?<![\w"])"(?=\S)([^"\n]{1,80}?)(?<=\S)"(?!\w)|[“„]([^“”„]{1,80})[”“]|«([^«»]{1,80})»|»([^«»]{1,80})«"""
    r"""|「([^「」]{1,80})」|『([^『』]{1,80})』|(?<![\w`])`([^`\n]{1,80})`(?![\w`])"""
)
_MAY_QUOTE = re.compile(r'["“„«»「『`]')


def fields(text: str, pattern: re.Pattern[str] | None = None) -> Fields:
    """The fields of one text. pattern: the user's own; its matches (or groups, when it has some) are a field too."""
    found = _matches(pattern, text) if pattern else []
    text = _plain(text)
    words = _WORD.findall(text)
    negation = ("odd",) if _negations(text, words) % 2 else ()
    quoted = _quotations(text) if _MAY_QUOTE.search(text) else []
    known = _KNOWN.intersection(words)
    when = [WEEKDAYS[word] for word in words if word in WEEKDAYS] if known else []
    identifiers: list[str] = []
    numbers: list[str] = []
    if _MAY_LINK.search(text):
        text = _unlinked(text, identifiers)
    if _MAY_SPELL.search(text):
        identifiers += [code.replace("-", "") for code in _SPELLED.findall(text) if code not in NO_CODES]
    identifiers += _LONE.findall(text)
    if not known.isdisjoint(NUMBERS.keys()):
        text = _WORD.sub(lambda match: NUMBERS.get(match[0], match[0]), text)
    if not known.isdisjoint(MONTHS.keys()):
        text = months(text, known.intersection(MONTHS), when)
    if _HAS_DIGIT.search(text):
        text = times(dates(text, when), when)
        amounts(text, numbers, identifiers)
    return Fields(*(tuple(kind) for kind in (numbers, when, identifiers, quoted, negation, found)))


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return ["\0".join(found.groups("")) if pattern.groups else found[0] for found in pattern.finditer(text)]


# before compatibility forms are undone, which would make 102 of 10² and 51/2 of 5½
_RAISED = re.compile(r"[⁰¹²³⁴-⁹]|(?=[¼-¾⅐-⅞↉])")
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]")
_MARKS = {0x2212: "-", 0x2010: "-", 0x2011: "-", 0x2019: "'", 0x2044: "/", 0x066B: ".", 0x066C: ",", 0x066A: "%"}
_MARK = re.compile("[" + "".join(map(chr, _MARKS)) + "]")
_GROUP = re.compile(r"(?<=\d)[\u00a0\u202f\u2009\u2019'](?=\d{3}(?!\d))")  # 1 234, 1'234


def _plain(text: str) -> str:
    """Lower case, single spaces, ASCII digits, compatibility forms undone."""
    if not text.isascii():
        text = _RAISED.sub(lambda mark: f"^{unicodedata.digit(mark[0])}" if mark[0] else " ", _GROUP.sub("", text))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _FOREIGN_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
        text = _MARK.sub(lambda mark: _MARKS[ord(mark[0])], text)
    elif "'" in text:
        text = _GROUP.sub("", text)
    return " ".join(text.lower().split())


def _unlinked(text: str, into: list[str]) -> str:
    """The text without its addresses, paths and names with underscores, which go to `into`."""

    def take(match: re.Match[str]) -> str:
        into.append(match[0].rstrip(".,;:!?/"))
        return " "

    # piece by piece: the long pattern is tried only where its short form finds something
    return " ".join(_LINK.sub(take, part) if _MAY_LINK.search(part) else part for part in text.split(" "))


def _quotations(text: str) -> list[str]:
    found = (next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(text))
    return [name for name in (one.strip(" .,;:!?") for one in found) if name]


# -- negations -------------------------------------------------------------------------------------------------

_NEGATING = NEGATIONS | PARTICLES | ECHOES
_PARTS = re.compile("|".join(NEGATING_PARTS))
_HARMLESS = re.compile("|".join(HARMLESS))
_NUMERO = re.compile(r"\bno\.? ?(?=[0-9#])")  # "no. 5" counts, it does not negate


def _negations(text: str, words: list[str]) -> int:
    """How many negations a text has; one that is said twice, as in "ne ... pas", counts once."""
    count = particles = echoes = 0
    for word in () if _NEGATING.isdisjoint(words) and "n'" not in text else words:
        if word in NEGATIONS or word.endswith("n't"):
            count += 1
        elif word in PARTICLES or word.startswith("n'"):
            particles += 1
        elif word in ECHOES:
            echoes += 1
    if particles and "no" in words:
        particles -= len(_NUMERO.findall(text))
    count += max(particles, echoes)
    if not text.isascii() and _PARTS.search(text):
        count += len(_PARTS.findall(_HARMLESS.sub(" ", text)))
    return count

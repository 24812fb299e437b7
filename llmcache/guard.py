"""The field guard: two texts whose numbers, dates, negations, identifiers or quoted names differ are not the same.

Near neighbours can be one figure apart: another model number, another date, a "not". To a fingerprint that is little,
to the reader it is everything. The guard reads the fields of each text once; a near hit is refused when those of the
two texts differ. Fields are compared as multisets in a canonical form, so texts with the same fields form classes, and
a digest per kind, stored beside an entry, is all a look-up needs.

The rules hold across languages: digits of every script, Unicode's compatibility forms, word lists for a dozen
languages (`llmcache.lexicon`). They do not look at case or at the width of white space.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmcache.lexicon import (
    CURRENCIES,
    ECHOES,
    GLUED,
    HARMLESS,
    MONTHS,
    NEGATING_PARTS,
    NEGATIONS,
    NO_CODES,
    NUMBERS,
    ORDINALS,
    PARTICLES,
    SURE_MONTHS,
    UNITS,
    WEEKDAYS,
)

RULES = 1  # goes into every digest: entries stored under other rules are refused, never trusted


class Fields(NamedTuple):
    """What must be the same in two texts, each kind in a canonical form and sorted.

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


def differs(one: str, other: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The first kind of field (of `KINDS`) in which two texts differ; None when they differ in none."""
    return unlike(fields(one, pattern), fields(other, pattern))


def unlike(one: Fields, other: Fields) -> str | None:
    """The first kind in which these fields differ; None when they are the same."""
    if one == other:
        return None
    return next(kind for kind, a, b in zip(KINDS, one, other, strict=True) if a != b)


def digests(texts: Sequence[str], pattern: re.Pattern[str] | None = None) -> NDArray[np.uint64]:
    """The fields of each text as numbers to store and compare: uint64 [n, kinds], one column per kind of `KINDS`.

    Two texts have the same row exactly when `differs` finds nothing (but for one chance in 2^64 per kind).
    """
    empty = _empty(pattern)
    rows = np.tile(empty, (len(texts), 1))
    for row, text in enumerate(texts):
        for column, values in enumerate(fields(text, pattern)):
            if values:
                rows[row, column] = _digest(int(empty[column]), values)
    return rows


def refused(ones: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int8]:
    """Pairs of rows of `digests`: the place in `KINDS` of the first kind that differs, -1 where none does.

    ones, others: uint64 [n, kinds]. Returns int8 [n].
    """
    unequal = ones != others
    return np.where(unequal.any(axis=1), unequal.argmax(axis=1), -1).astype(np.int8)


def _empty(pattern: re.Pattern[str] | None) -> NDArray[np.uint64]:
    rules = (str(RULES), pattern.pattern if pattern else "", str(pattern.flags) if pattern else "")
    return np.array([_digest(place, rules) for place in range(len(KINDS))], np.uint64)


def _digest(seed: int, values: tuple[str, ...]) -> int:
    state = blake2b(seed.to_bytes(8, "little"), digest_size=8)
    for value in values:
        data = value.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(state.digest(), "little")


# -- reading the fields ---------------------------------------------------------------------------------------

_LETTER = "a-z\u00aa\u00b5\u00ba\u00df-\u024f\u0370-\u052f"  # scripts in which a code may mix letters and digits
_ALNUM = f"[{_LETTER}0-9]"
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_KNOWN = frozenset((*WEEKDAYS, *NUMBERS, *MONTHS))  # the words that need a closer look
_HAS_DIGIT = re.compile(r"[0-9]")
# a run of letters and digits that has a digit, with the joints that codes, dates and numbers have inside
_TOKEN = re.compile(
    rf"(?<!{_ALNUM})(?=[{_LETTER}\-_/.]{{0,40}}[0-9]){_ALNUM}+"
    rf"(?:(?:[-_/]+|(?<=[0-9])[.,:](?={_ALNUM})|\.(?=[0-9])){_ALNUM}+)*"
)
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
    dates = [WEEKDAYS[word] for word in words if word in WEEKDAYS] if known else []
    identifiers: list[str] = []
    numbers: list[str] = []
    if _MAY_LINK.search(text):
        text = _taken(_LINK, text, identifiers)
    if _MAY_SPELL.search(text):
        identifiers += [_JOINTS.sub("", code) for code in _SPELLED.findall(text) if code not in NO_CODES]
    if not known.isdisjoint(NUMBERS.keys()):
        text = _WORD.sub(lambda match: NUMBERS.get(match[0], match[0]), text)
    if not known.isdisjoint(MONTHS.keys()):
        text = _months(text, dates)
    if _HAS_DIGIT.search(text):
        text = _times(_dates(text, dates), dates)
        for match in _TOKEN.finditer(text):
            _read(match[0], text, match.start(), match.end(), numbers, identifiers)
    return Fields(*(tuple(sorted(kind)) for kind in (numbers, dates, identifiers, quoted, negation, found)))


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return ["\0".join(found.groups("")) if pattern.groups else found[0] for found in pattern.finditer(text)]


_DIGITS = {
    code: chr(48 + unicodedata.decimal(chr(code)))
    for code in range(128, 0x20000)
    if unicodedata.category(chr(code)) == "Nd"
}
# before compatibility forms are undone, which would make 102 of 10² and 51/2 of 5½
_EARLY = {ord(mark): f"^{unicodedata.digit(mark)}" for mark in "⁰¹²³⁴⁵⁶⁷⁸⁹"} | {
    code: f" {chr(code)}" for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)
}
_LATE = {0x2212: "-", 0x2010: "-", 0x2011: "-", 0x2019: "'", 0x2044: "/", 0x066B: ".", 0x066C: ",", 0x066A: "%"}
_GROUP = re.compile(r"(?<=\d)[\u00a0\u202f\u2009'’](?=\d{3}(?!\d))")  # 1 234, 1'234


def _plain(text: str) -> str:
    """Lower case, single spaces, ASCII digits, compatibility forms undone."""
    if not text.isascii():
        text = _GROUP.sub("", text.translate(_EARLY))
        text = unicodedata.normalize("NFKC", text).translate(_DIGITS).translate(_LATE)
        text = unicodedata.normalize("NFC", text.lower())
    elif "'" in text:
        text = _GROUP.sub("", text)
    return " ".join(text.lower().split())


def _taken(pattern: re.Pattern[str], text: str, into: list[str]) -> str:
    """The text without what the pattern matches, which goes to `into`."""

    def take(match: re.Match[str]) -> str:
        into.append(match[0].rstrip(".,;:!?/"))
        return " "

    return pattern.sub(take, text)


def _quotations(text: str) -> list[str]:
    found = (next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(text))
    return [name for name in (one.strip(" .,;:!?") for one in found) if name]


# -- negations ------------------------------------------------------------------------------------------------

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
    count += text.count("non-")  # "non-refundable": the word before the hyphen was not read alone
    if not text.isascii() and _PARTS.search(text):
        count += len(_PARTS.findall(_HARMLESS.sub(" ", text)))
    return count


# -- dates and times ------------------------------------------------------------------------------------------

_NAMES = "|".join(sorted(map(re.escape, MONTHS), key=len, reverse=True))
_NTH = r"(?:st|nd|rd|th|er|o|\.)?"
_OF = r"(?:of |de |di |del |den )?"
_DAY_MONTH = re.compile(
    rf"(?<![\w.,/-])(\d{{1,2}}){_NTH} ?{_OF}(?:the )?({_NAMES})\b\.?(?:,? ?(?:de |del )?(\d{{4}})(?![\w]))?"
)
_MONTH_DAY = re.compile(rf"\b({_NAMES})\b\.? (?:the )?(\d{{1,2}})(?:st|nd|rd|th)?(?![\w:])(?:,? (\d{{4}})(?!\w))?")
_MONTH_YEAR = re.compile(rf"\b({_NAMES})\b\.?,? (?:of |de |del )?(\d{{4}})(?!\w)")
_ISO = re.compile(r"(?<![\w.-])(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?!\d|[-/]\d)")
_DMY = re.compile(r"(?<![\w./-])(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|(?<=[/-])\d{2})(?![\w]|[./-]\d)")
_MAY_DATE = re.compile(r"[0-9]([-/.])[0-9]{1,2}\1[0-9]")
_HAN = re.compile(r"(?:(\d{2,4}) ?[年년] ?)?(\d{1,2}) ?[月월] ?(?:(\d{1,2}) ?[日일号號])?")
_MAY_TIME = re.compile(r"[0-9](?:[:h][0-9]| ?(?:am|pm|a\.m|p\.m|uhr)\b)")
_TIME = re.compile(
    r"(?<![\w.,:/-])(\d{1,2})(?:[:h](\d{2})(?::(\d{2}))?)(?![\d:]) ?(am\b|pm\b|a\.m\b\.?|p\.m\b\.?|uhr\b)?"
    r"|(?<![\w.,:/-])(\d{1,2})(?:\.(\d{2}))? ?(am\b|pm\b|a\.m\b\.?|p\.m\b\.?|uhr\b)"
)


def _months(text: str, into: list[str]) -> str:
    """Dates with the name of a month, taken out of the text."""
    text = _DAY_MONTH.sub(lambda found: _noted(into, found[3], MONTHS[found[2]], found[1]), text)
    text = _MONTH_DAY.sub(lambda found: _noted(into, found[3], MONTHS[found[1]], found[2]), text)
    text = _MONTH_YEAR.sub(lambda found: _noted(into, found[2], MONTHS[found[1]], None), text)
    into += [f"-{MONTHS[word]}-" for word in _WORD.findall(text) if word in SURE_MONTHS]
    return text


def _dates(text: str, into: list[str]) -> str:
    """Dates in digits, taken out of the text."""
    if _MAY_DATE.search(text):
        text = _ISO.sub(lambda found: _noted(into, found[1], found[3], found[4]), text)
        text = _DMY.sub(lambda found: _ordered(into, found), text)
    if not text.isascii():
        text = _HAN.sub(lambda found: _noted(into, found[1], found[2], found[3]), text)
    return text


def _ordered(into: list[str], found: re.Match[str]) -> str:
    """Day first with dots; with slashes only where one number cannot be a month, otherwise the date as written."""
    first, joint, second, year = found.groups()
    if joint == "." or int(first) > 12:
        return _noted(into, year, second, first)
    if int(second) > 12:
        return _noted(into, year, first, second)
    return _noted(into, year, f"{int(first)}/{int(second)}", None)


def _noted(into: list[str], year: str | None, month: str, day: str | None) -> str:
    month = str(int(month)) if month.isdecimal() else month
    into.append(f"{year or ''}-{month}-{int(day) if day else ''}")
    return " "


def _times(text: str, into: list[str]) -> str:
    """Times of day, taken out of the text, as minutes of a day of 24 hours."""

    def note(found: re.Match[str]) -> str:
        hour, minute, second = int(found[1] or found[5]), int(found[2] or found[6] or 0), found[3] or ""
        half = (found[4] or found[7] or "").replace(".", "")
        if half in ("am", "pm") and 1 <= hour <= 12:
            hour = hour % 12 + 12 * (half == "pm")
        into.append(f"{hour}:{minute:02}{second and ':' + second}")
        return " "

    return _TIME.sub(note, text) if _MAY_TIME.search(text) else text


# -- numbers and identifiers ----------------------------------------------------------------------------------

_AMOUNT = r"[0-9]+(?:[.,][0-9]+)*"
_PURE = re.compile(_AMOUNT)
_SUFFIXED = re.compile(rf"({_AMOUNT})([{_LETTER}]+)")
_HYPHENED = re.compile(rf"({_AMOUNT})-([{_LETTER}]+)(?:-[{_LETTER}]+)*")
_SPAN = re.compile(rf"({_AMOUNT})-({_AMOUNT})")
_FRACTION = re.compile(rf"{_AMOUNT}/{_AMOUNT}")
_BEFORE = re.compile(r"(?:([$€£¥₹₽₩₺]) ?|\b([a-z]{2,3}\$?) )?(-?)$")
_AFTER = re.compile(r" ?(%|‰|°[cf]?|[$€£¥₹₽₩₺円元원万亿天]|[^\W\d_]+)")
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}")
_JOINTS = re.compile(r"[-_]+")


def _read(token: str, text: str, start: int, end: int, numbers: list[str], identifiers: list[str]) -> None:
    """Puts one token with a digit among the numbers, with its unit, or among the identifiers."""
    if token[0] == "v" and token[1:2].isdecimal():
        token = token[1:]
    unit, body = None, token
    if suffixed := _SUFFIXED.fullmatch(token):
        if suffixed[2] in ORDINALS:
            body = suffixed[1]
        elif unit := GLUED.get(suffixed[2]):
            body = suffixed[1]
    elif (hyphened := _HYPHENED.fullmatch(token)) and (hyphened[2] in UNITS or len(hyphened[1]) < 3):
        body, unit = hyphened[1], UNITS.get(hyphened[2])
    elif (span := _SPAN.fullmatch(token)) and not any(_coded(one) for one in span.groups()):
        numbers.append(_value(span[1]))
        body = span[2]
    if _FRACTION.fullmatch(body):
        numbers.append(body)
    elif _PURE.fullmatch(body) and not _coded(body):
        numbers.append(_measured(body, unit, text, start, end))
    else:
        identifiers.append(_JOINTS.sub("", body))


def _coded(digits: str) -> bool:
    """Whether digits are a code: leading zeros, or a version with several dots."""
    return (digits[0] == "0" and len(digits) > 2 and digits.isdecimal()) or (
        digits.count(".") > 1 and not _THOUSANDS.fullmatch(digits)
    )


def _measured(body: str, unit: str | None, text: str, start: int, end: int) -> str:
    """A number with its sign, and with the unit before or after it."""
    before = _BEFORE.search(text, max(0, start - 5), start)
    currency = CURRENCIES.get(before[1] or before[2] or "", "") if before else ""
    sign = before[3] if before and (before.start() == 0 or currency or text[before.start() - 1] in " (") else ""
    if unit is None and (after := _AFTER.match(text, end)):
        unit = UNITS.get(after[1])
    return f"{sign}{_value(body)}{currency or ''}{unit if unit and unit != currency else ''}"


def _value(digits: str) -> str:
    """One spelling for a number: 1,234.50 and 1.234,50 and 1234.5 are the same, and so are 05 and 5."""
    if _THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", "").replace(".", "")
    elif digits.rfind(",") > digits.rfind("."):
        whole, _, part = digits.rpartition(",")
        digits = f"{whole.replace('.', '').replace(',', '')}.{part}"
    elif "," in digits:
        digits = digits.replace(",", "")
    whole, _, part = digits.partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")

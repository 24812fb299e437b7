"""Numbers, dates and times as they are written, in one spelling: 1,234.50 is 1234.5, and 3 May 2024 is 2024-5-3.

All functions expect plain text: lower case, single spaces, ASCII digits (`llmcache.fields`).
"""

from __future__ import annotations

import re
from functools import lru_cache

from llmcache.lexicon import CURRENCIES, GLUED, MONTHS, ORDINALS, SURE_MONTHS, UNITS

# -- dates and times ------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+")
_NTH = r"(?:st|nd|rd|th|er|o|\.)?"
_OF = r"(?:of |de |di |del |den )?"
_ISO = re.compile(r"(?<![\w.-])(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?!\d|[-/]\d)")
_DMY = re.compile(r"(?<![\w./-])(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|(?<=[/-])\d{2})(?![\w]|[./-]\d)")
_MAY_DATE = re.compile(r"[0-9]([-/.])[0-9]{1,2}\1[0-9]")
_HAN = re.compile(r"(?:(\d{2,4}) ?[年년] ?)?(\d{1,2}) ?[月월] ?(?:(\d{1,2}) ?[日일号號])?")
_MAY_TIME = re.compile(r"[0-9](?:[:h][0-9]| ?(?:am|pm|a\.m|p\.m|uhr)\b)")
_TIME = re.compile(
    r"(?<![\w.,:/-])(\d{1,2})(?:[:h](\d{2})(?::(\d{2}))?)(?![\d:]) ?(am\b|pm\b|a\.m\b\.?|p\.m\b\.?|uhr\b)?"
    r"|(?<![\w.,:/-])(\d{1,2})(?:\.(\d{2}))? ?(am\b|pm\b|a\.m\b\.?|p\.m\b\.?|uhr\b)"
)


@lru_cache(256)
def _named(names: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Day and month, month and day, month and year; with these months only: an alternation of all is slow."""
    month = "(" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
    return (
        re.compile(rf"(?<![\w.,/-])(\d{{1,2}}){_NTH} ?{_OF}(?:the )?{month}\b\.?(?:,? ?(?:de |del )?(\d{{4}})(?!\w))?"),
        re.compile(rf"\b{month}\b\.? (?:the )?(\d{{1,2}})(?:st|nd|rd|th)?(?![\w:])(?:,? (\d{{4}})(?!\w))?"),
        re.compile(rf"\b{month}\b\.?,? (?:of |de |del )?(\d{{4}})(?!\w)"),
    )


def months(text: str, names: frozenset[str], into: list[str]) -> str:
    """The text without its dates that name a month, which go to `into`. names: the months in it, of `MONTHS`."""
    day_month, month_day, month_year = _named(names)
    text = day_month.sub(lambda found: _noted(into, found[3], MONTHS[found[2]], found[1]), text)
    text = month_day.sub(lambda found: _noted(into, found[3], MONTHS[found[1]], found[2]), text)
    text = month_year.sub(lambda found: _noted(into, found[2], MONTHS[found[1]], None), text)
    into += [f"-{MONTHS[word]}-" for word in _WORD.findall(text) if word in SURE_MONTHS]
    return text


def dates(text: str, into: list[str]) -> str:
    """The text without its dates in digits, which go to `into` as year-month-day."""
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


def times(text: str, into: list[str]) -> str:
    """The text without its times of day, which go to `into` in 24 hours."""

    def note(found: re.Match[str]) -> str:
        hour, minute, second = int(found[1] or found[5]), int(found[2] or found[6] or 0), found[3] or ""
        half = (found[4] or found[7] or "").replace(".", "")
        if half in ("am", "pm") and 1 <= hour <= 12:
            hour = hour % 12 + 12 * (half == "pm")
        into.append(f"{hour}:{minute:02}{second and ':' + second}")
        return " "

    return _TIME.sub(note, text) if _MAY_TIME.search(text) else text


# -- numbers and identifiers ----------------------------------------------------------------------------------

_LETTER = "a-z\u00aa\u00b5\u00ba\u00df-\u024f\u0370-\u052f"  # scripts in which a code may mix letters and digits
_ALNUM = f"[{_LETTER}0-9]"
# a run of letters and digits that has a digit, with the joints that codes and numbers have inside
_TOKEN = re.compile(
    rf"(?<!{_ALNUM})(?=[{_LETTER}\-_/.]{{0,40}}[0-9]){_ALNUM}+"
    rf"(?:(?:[-_/]+|(?<=[0-9])[.,:](?={_ALNUM})|\.(?=[0-9])){_ALNUM}+)*"
)
_AMOUNT = r"[0-9]+(?:[.,][0-9]+)*"
_PURE = re.compile(_AMOUNT)
_SUFFIXED = re.compile(rf"({_AMOUNT})([{_LETTER}]+)")
_HYPHENED = re.compile(rf"({_AMOUNT})-([{_LETTER}]+)(?:-[{_LETTER}]+)*")
_PRICED = re.compile(rf"([a-z]{{2,3}})\.?({_AMOUNT})")  # rs500
_SPAN = re.compile(rf"({_AMOUNT})-({_AMOUNT})")
_FRACTION = re.compile(rf"{_AMOUNT}/{_AMOUNT}")
_BEFORE = re.compile(r"(?:([$€£¥₹₽₩₺]) ?|\b([a-z]{2,3}\$?)\.? )?(-?)$")
_AFTER = re.compile(r" ?(%|‰|°[cf]?|[$€£¥₹₽₩₺円元원万亿天]|[^\W\d_]+)")
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}")
_JOINTS = re.compile(r"[-_]+")


def amounts(text: str, numbers: list[str], identifiers: list[str]) -> None:
    """Puts the tokens with a digit among the numbers, with their units, or among the identifiers."""
    for match in _TOKEN.finditer(text):
        _read(match[0], text, match.start(), match.end(), numbers, identifiers)


def _read(token: str, text: str, start: int, end: int, numbers: list[str], identifiers: list[str]) -> None:
    if token[0] == "v" and token[1:2].isdecimal():  # version 2.1 is v2.1
        token = token[1:]
    elif text[max(0, start - 2) : start] in (" .", "."):  # .5 is 0.5
        token = f"0.{token}"
    unit, body = None, token
    if (priced := _PRICED.fullmatch(token)) and priced[1] in CURRENCIES:
        token = body = priced[2]
        unit = CURRENCIES[priced[1]]
    if suffixed := _SUFFIXED.fullmatch(token):
        unit = GLUED.get(suffixed[2])
        if unit or suffixed[2] in ORDINALS:
            body = suffixed[1]
    elif (hyphened := _HYPHENED.fullmatch(token)) and (
        hyphened[2] in UNITS or (len(hyphened[1]) < 3 and len(hyphened[2]) > 2)
    ):
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

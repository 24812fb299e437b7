"""Dates, weekdays and times of day in one form: "3 May 2024" is 2024-5-3, "half past three" is 3:30, "Mondays" is mon.

Text is expected in the plain form of `llmcache.near.guard.plain_text`, with its numbers in digits.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache

from llmcache.near.guard.lexicon import (
    DOUBTFUL_WEEKDAYS,
    GERMAN_WEEKDAYS,
    MONTHS,
    SURE_MONTHS,
    WEEKDAYS,
    word_set,
)

_WORD = re.compile(r"[^\W\d_]+")
_NTH = r"(?:st|nd|rd|th|er|o|ª|º|\.)?"
_OF = r"(?:of |de |di |del |den |do )?"
_ISO = re.compile(r"(?<![\w.-])(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?!\d|[-/]\d)")
_DMY = re.compile(r"(?<![\w./-])(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|(?<=[/-])\d{2})(?![\w]|[./-]\d)")
_DM = re.compile(r"(?<![\w./-])([0-3]?\d)\.([01]?\d)\.(?=\s|$|[,;!?)])")
_MAY_DATE = re.compile(r"[0-9]([-/.])[0-9]{1,2}\1")
_HAN = re.compile(r"(?:(\d{2,4}) ?[年년] ?)?(?<!\d)(\d{1,2}) ?[月월](?!\s?(?:간|前))[ 份]?(?:(\d{1,2}) ?[日일号號])?")
_MAY_TIME = re.compile(r"[0-9](?::[0-9]| ?(?:am|pm|a\.? ?m|p\.? ?m|uhr|h)\b| ?h ?[0-9])")
_ZONE = r"(?: ?(utc|gmt|est|edt|cst|cdt|mst|mdt|pst|pdt|cet|cest|bst|ist|jst)\b)?"
_HALF_DAY = r"(am\b|pm\b|a\.? ?m\b\.?|p\.? ?m\b\.?|uhr\b)"
_TIME = re.compile(
    rf"(?<![\w.,:/-])(\d{{1,2}})(?: ?[:h] ?(\d{{2}})(?::(\d{{2}}))?)(?![\d:])(?: ?{_HALF_DAY})?{_ZONE}"
    rf"|(?<![\w.,:/-])(\d{{1,2}})(?:\.(\d{{2}}))? ?{_HALF_DAY}(?: ?(\d{{2}})\b(?! ?%))?{_ZONE}"
)


@lru_cache(256)
def _named(names: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Day and month, month and day, month and year, preposition and month; with these months only: an alternation of
    all is slow.
    """
    month = "(" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
    return (
        re.compile(
            rf"(?<![\w.,/-])(\d{{1,2}}){_NTH}[ /]?{_OF}(?:the )?{month}\b\.?(?:[,/]? ?(?:de |del "
            rf"|do )?(\d{{4}})(?!\w))?"
        ),
        re.compile(rf"\b{month}\b\.? (?:the )?(\d{{1,2}})(?:st|nd|rd|th)?(?![\w:])(?:,? (\d{{4}})(?!\w))?"),
        re.compile(rf"\b{month}\b\.?,? (?:of |de |del |do )?(\d{{4}})(?!\w)"),
        re.compile(
            rf"\b(?:(?:in|since|until|till|by|early|late|mid|during|im|seit|ab|bis|en|em|vers|depuis|desde|hasta|mes de"
            rf"|mois de)[ -]{month}\b|(?:last|next|this|every) {month}\b(?! (?:i|we|you|it|be|the|not|have|also)\b))"
        ),
    )


def months(text: str, names: frozenset[str], into: list[str]) -> str:
    """The text without its dates that name a month, which go to `into`. names: the months in it, of `MONTHS`."""
    day_month, month_day, month_year, in_month = _named(names)
    text = day_month.sub(lambda found: _noted(into, found[3], MONTHS[found[2]], found[1]), text)
    text = month_day.sub(lambda found: _noted(into, found[3], MONTHS[found[1]], found[2]), text)
    text = month_year.sub(lambda found: _noted(into, found[2], MONTHS[found[1]], None), text)
    if not names <= SURE_MONTHS:
        text = in_month.sub(lambda found: _noted(into, None, MONTHS[found[1] or found[2]], None), text)
    into += [f"-{MONTHS[word]}-" for word in _WORD.findall(text) if word in SURE_MONTHS]
    return text


_DAYS = "|".join(sorted(DOUBTFUL_WEEKDAYS, key=len, reverse=True))
_SHORT_DAY = re.compile(
    rf"\b(?:on|by|next|last|this|every|until|till|am|since|and|or) ({_DAYS})\b(?! [a-z]+(?:ed|ing)\b)"
    rf"|(?<=[a-z]-)({_DAYS})\b|\b({_DAYS})(?=\.? ?-|\.?,? ?(?:[0-9]|(?:and|or|to) (?:{_DAYS})\b)"
    rf"|\.? (?:morning|afternoon|evening|night)\b)"
)
_GERMAN_DAY = re.compile(r"\b(mo|di|mi|do|fr|sa|so)\b\.?(?=\.? (?:- |und |bis )?-?(?:mo|di|mi|do|fr|sa|so)\b)"
                         r"|(?<=und |bis )(mo|di|mi|do|fr|sa|so)\b")  # fmt: skip


def weekdays(text: str, words: frozenset[str]) -> list[str]:
    """The weekdays of a text in its order. words: those of it that are or may be weekdays."""
    days = []
    if not words.isdisjoint(WEEKDAYS):
        days = [(found.start(), WEEKDAYS[found[0]]) for found in _WORD.finditer(text) if found[0] in WEEKDAYS]
    if not words.isdisjoint(DOUBTFUL_WEEKDAYS):
        for found in _SHORT_DAY.finditer(text):
            group = next(place for place in (1, 2, 3) if found[place])
            days.append((found.start(group), DOUBTFUL_WEEKDAYS[found[group]]))
    if not words.isdisjoint(("und", "bis")) and not words.isdisjoint(GERMAN_WEEKDAYS):
        for found in _GERMAN_DAY.finditer(text):
            group = 1 if found[1] else 2
            days.append((found.start(group), GERMAN_WEEKDAYS[found[group]]))
    return [day for _, day in sorted(set(days))]


def dates(text: str, into: list[str]) -> str:
    """The text without its dates in digits, which go to `into` as year-month-day."""
    if _MAY_DATE.search(text):
        text = _ISO.sub(lambda found: _noted(into, found[1], found[3], found[4]), text)
        text = _DMY.sub(lambda found: _ordered(into, found), text)
        text = _DM.sub(lambda found: _day_and_month(into, found), text)
    if not text.isascii():
        text = _HAN.sub(lambda found: _noted(into, found[1], found[2], found[3]), text)
    return text


def _day_and_month(into: list[str], found: re.Match[str]) -> str:
    day, month = int(found[1]), int(found[2])
    return _noted(into, None, found[2], found[1]) if 0 < day < 32 and 0 < month < 13 else found[0]


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


# -- times -----------------------------------------------------------------------------------------------------

_EVENING = r"afternoon|evening|tarde|noche|noite|abends|nachmittags|mittags|soir|après-midi|pomeriggio|sera"
_MORNING = r"morning|mañana|madrugada|manhã|morgens|früh|vormittags|nachts|matin|mattina|mattino"
_PAST = re.compile(
    r"\b(?:a )?(half|quarter|viertel|[0-9]{1,2} minutes) (past|after|to|before|till|nach"
    r"|vor) ([0-9]{1,2})\b(?![:.,]?[0-9])"
)
_HALB = re.compile(r"\bhalb ([0-9]{1,2}|eins)\b")
_AND_HALF = re.compile(
    r"\b([0-9]{1,2})(?: heures?| h| uhr)? (?:y|et|e) (media|cuarto|demie|quart|meia|mezza)\b"
    r"|\b([0-9]{1,2})\.5 heures\b(?= du)"
    r"|\b(?:las?|a las|às|alle) ([0-9]{1,2})\.5\b|\b([0-9]{1,2})(?: heures?)? (?:menos cuarto|moins le quart)\b"
)
_HALF_OF_DAY = re.compile(r"\b([0-9]{1,2})\.5(?= (?:de la|da|du|di|del) )")
_HALVES = word_set("media cuarto demie quart meia mezza heures")
_CLOCK = re.compile(r"(?<![\w.,:/-])([0-9]{1,2}) ?o'? ?clock\b")
_UHR = re.compile(r"(?<![\w.,:/-])([0-9]{1,2}) uhr ([0-9]{1,2})\b")
_PART_OF_DAY = re.compile(
    rf"(?<![\w.,:/-])([0-9]{{1,2}})(?:[:.]([0-9]{{2}}))?(?: ?h| heures?| uhr| horas?)?,? "
    rf"(?:in the |at |de la |da |du |de l'|di |del |della |por la )?(?:({_EVENING}|night)|({_MORNING}))\b"
)
_PART_WORDS = frozenset(f"{_EVENING}|{_MORNING}|night|midi|après|l'après".replace("-midi", "").split("|"))
_NOON = re.compile(r"\b(?:12 )?(noon|midday|midnight)\b")


def clock_phrases(text: str, words: Collection[str]) -> str:
    """The text with spoken times in figures: half past 3, quarter to 6, halb 4, 9 o'clock, 8 in the evening, noon.

    words: those of the text.
    """
    if "half" in text or "quarter" in text or "viertel" in text or "minutes" in text:
        text = _PAST.sub(_past, text)
    if "halb" in text:
        text = _HALB.sub(lambda found: f"{(1 if found[1] == 'eins' else int(found[1])) - 1 or 12}:30", text)
    if not _HALVES.isdisjoint(words):
        text = _AND_HALF.sub(_and_half, text)
    if ".5 d" in text:
        text = _HALF_OF_DAY.sub(r"\1:30", text)
    if "clock" in text:
        text = _CLOCK.sub(r"\1:00", text)
    if " uhr " in text:
        text = _UHR.sub(lambda found: f"{found[1]}:{int(found[2]):02}", text)
    if "noon" in text or "midday" in text or "midnight" in text:
        text = _NOON.sub(lambda found: "0:00" if found[1] == "midnight" else "12:00", text)
    if not _PART_WORDS.isdisjoint(words):
        text = _PART_OF_DAY.sub(_part_of_day, text)
    return text


def _past(found: re.Match[str]) -> str:
    what, where, hour = found[1], found[2], int(found[3])
    minutes = {"half": 30, "quarter": 15, "viertel": 15}.get(what) or int(what.split()[0])
    if hour > 24:
        return found[0]
    if where in ("to", "before", "till", "vor"):
        hour, minutes = (hour - 1 or 12), 60 - minutes
    return f"{hour}:{minutes % 60:02}"


def _and_half(found: re.Match[str]) -> str:
    if found[5]:
        return f"{int(found[5]) - 1 or 12}:45"
    if found[3] or found[4]:
        return f"{found[3] or found[4]}:30"
    return f"{found[1]}:{15 if found[2] in ('cuarto', 'quart') else 30}"


def _part_of_day(found: re.Match[str]) -> str:
    hour = int(found[1])
    if not 1 <= hour <= 24:
        return found[0]
    late = (
        bool(found[3])
        and not (found[3] in ("night", "noche") and hour < 5)
        and not (hour == 12 and "night" in found[3])
    )
    if hour < 12 and late:
        hour += 12
    elif hour == 12 and not late:
        hour = 0
    return f"{hour}:{found[2] or '00'} "


def times(text: str, into: list[str]) -> str:
    """The text without its times of day, which go to `into` in 24 hours, with the time zone where one is named."""

    def note(found: re.Match[str]) -> str:
        hour, minute, second = int(found[1] or found[6]), int(found[2] or found[7] or found[9] or 0), found[3] or ""
        half = (found[4] or found[8] or "").replace(".", "").replace(" ", "")
        if half in ("am", "pm") and 1 <= hour <= 12:
            hour = hour % 12 + 12 * (half == "pm")
        zone = found[5] or found[10] or ""
        into.append(f"{hour % 24}:{minute:02}{second.strip('0') and ':' + second}{zone}")
        return " "

    return _TIME.sub(note, text) if _MAY_TIME.search(text) else text

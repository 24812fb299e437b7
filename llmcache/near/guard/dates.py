"""Normalise dates, weekdays and times: "3 May 2024" is 2024-5-3, "half past three" is 3:30, "Mondays" is mon.

The functions expect text from `llmcache.near.guard.plain_text`, with number words in digits.
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
_ZONE = (
    r"(?: ?(?:in )?\(?(utc|gmt|est|edt|cst|cdt|mst|mdt|pst|pdt|cet|cest|bst|ist|jst|kst|hkt|sgt|pkt|eet|eest"
    r"|wet|msk|aest|aedt|acst"
    r"|awst|nzst|nzdt|akst|hst|brt|art|sast|wat|eat)\b\)?(?: time\b(?! zone))?)?"
)
_HALF_DAY = r"(am\b|pm\b|a\.? ?m\b\.?|p\.? ?m\b\.?|uhr\b)"
_TIME = re.compile(
    rf"(?<![\w.,:/-])(\d{{1,2}})(?: ?[:h] ?(\d{{2}})(?::(\d{{2}}))?)(?![\d:])(?: ?{_HALF_DAY})?{_ZONE}"
    rf"|(?<![\w.,:/-])(\d{{1,2}})(?:\.(\d{{2}}))? ?{_HALF_DAY}(?: ?(\d{{2}})\b(?! ?%))?{_ZONE}"
)


@lru_cache(256)
def _named(names: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Return patterns for day and month, month and day, month and year, preposition and month.

    They match the given months only, since an alternation of all months is slow.
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
    """Move dates that name a month from a text to `into`. names: its month names, of `MONTHS`. Returns the rest."""
    day_month, month_day, month_year, in_month = _named(names)
    text = day_month.sub(lambda match: _append_date(into, match[3], MONTHS[match[2]], match[1]), text)
    text = month_day.sub(lambda match: _append_date(into, match[3], MONTHS[match[1]], match[2]), text)
    text = month_year.sub(lambda match: _append_date(into, match[2], MONTHS[match[1]], None), text)
    if not names <= SURE_MONTHS:
        text = in_month.sub(lambda match: _append_date(into, None, MONTHS[match[1] or match[2]], None), text)
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
    """Return the weekdays of a text, in order. words: its words that are or may be weekdays."""
    days = []
    if not words.isdisjoint(WEEKDAYS):
        days = [(match.start(), WEEKDAYS[match[0]]) for match in _WORD.finditer(text) if match[0] in WEEKDAYS]
    if not words.isdisjoint(DOUBTFUL_WEEKDAYS):
        for match in _SHORT_DAY.finditer(text):
            group = next(place for place in (1, 2, 3) if match[place])
            days.append((match.start(group), DOUBTFUL_WEEKDAYS[match[group]]))
    if not words.isdisjoint(("und", "bis")) and not words.isdisjoint(GERMAN_WEEKDAYS):
        for match in _GERMAN_DAY.finditer(text):
            group = 1 if match[1] else 2
            days.append((match.start(group), GERMAN_WEEKDAYS[match[group]]))
    return [day for _, day in sorted(set(days))]


def dates(text: str, into: list[str]) -> str:
    """Move dates in digits from a text to `into`, as year-month-day. Returns the rest of the text."""
    if _MAY_DATE.search(text):
        text = _ISO.sub(lambda match: _append_date(into, match[1], match[3], match[4]), text)
        text = _DMY.sub(lambda match: _full_date(into, match), text)
        text = _DM.sub(lambda match: _day_and_month(into, match), text)
    if not text.isascii():
        text = _HAN.sub(lambda match: _append_date(into, match[1], match[2], match[3]), text)
    return text


def _day_and_month(into: list[str], match: re.Match[str]) -> str:
    day, month = int(match[1]), int(match[2])
    return _append_date(into, None, match[2], match[1]) if 0 < day < 32 and 0 < month < 13 else match[0]


def _full_date(into: list[str], match: re.Match[str]) -> str:
    """Append a date of three numbers.

    With dots the day is first. With slashes, day and month are told apart only if one of them cannot be a month;
    otherwise the date is compared as written.
    """
    first, separator, second, year = match.groups()
    if separator == "." or int(first) > 12:
        return _append_date(into, year, second, first)
    if int(second) > 12:
        return _append_date(into, year, first, second)
    return _append_date(into, year, f"{int(first)}/{int(second)}", None)


def _append_date(into: list[str], year: str | None, month: str, day: str | None) -> str:
    """Append year-month-day to `into`. Returns the replacement in the text, a space."""
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
    """Rewrite spoken times in digits: half past 3, quarter to 6, halb 4, 9 o'clock, 8 in the evening, noon.

    words: the words of the text.
    """
    if "half" in text or "quarter" in text or "viertel" in text or "minutes" in text:
        text = _PAST.sub(_past, text)
    if "halb" in text:
        text = _HALB.sub(lambda match: f"{(1 if match[1] == 'eins' else int(match[1])) - 1 or 12}:30", text)
    if not _HALVES.isdisjoint(words):
        text = _AND_HALF.sub(_and_half, text)
    if ".5 d" in text:
        text = _HALF_OF_DAY.sub(r"\1:30", text)
    if "clock" in text:
        text = _CLOCK.sub(r"\1:00", text)
    if " uhr " in text:
        text = _UHR.sub(lambda match: f"{match[1]}:{int(match[2]):02}", text)
    if "noon" in text or "midday" in text or "midnight" in text:
        text = _NOON.sub(lambda match: "0:00" if match[1] == "midnight" else "12:00", text)
    if not _PART_WORDS.isdisjoint(words):
        text = _PART_OF_DAY.sub(_part_of_day, text)
    return text


def _past(match: re.Match[str]) -> str:
    amount, preposition, hour = match[1], match[2], int(match[3])
    minutes = {"half": 30, "quarter": 15, "viertel": 15}.get(amount) or int(amount.split()[0])
    if hour > 24:
        return match[0]
    if preposition in ("to", "before", "till", "vor"):
        hour, minutes = (hour - 1 or 12), 60 - minutes
    return f"{hour}:{minutes % 60:02}"


def _and_half(match: re.Match[str]) -> str:
    if match[5]:
        return f"{int(match[5]) - 1 or 12}:45"
    if match[3] or match[4]:
        return f"{match[3] or match[4]}:30"
    return f"{match[1]}:{15 if match[2] in ('cuarto', 'quart') else 30}"


def _part_of_day(match: re.Match[str]) -> str:
    hour = int(match[1])
    if not 1 <= hour <= 24:
        return match[0]
    late = (
        bool(match[3])
        and not (match[3] in ("night", "noche") and hour < 5)
        and not (hour == 12 and "night" in match[3])
    )
    if hour < 12 and late:
        hour += 12
    elif hour == 12 and not late:
        hour = 0
    return f"{hour}:{match[2] or '00'} "


def times(text: str, into: list[str]) -> str:
    """Move times of day from a text to `into`, in 24 hours, with the time zone if it is named. Returns the rest."""

    def note(match: re.Match[str]) -> str:
        hour, minute, second = int(match[1] or match[6]), int(match[2] or match[7] or match[9] or 0), match[3] or ""
        half = (match[4] or match[8] or "").replace(".", "").replace(" ", "")
        if half in ("am", "pm") and 1 <= hour <= 12:
            hour = hour % 12 + 12 * (half == "pm")
        zone = match[5] or match[10] or ""
        into.append(f"{hour % 24}:{minute:02}{second.strip('0') and ':' + second}{zone}")
        return " "

    return _TIME.sub(note, text) if _MAY_TIME.search(text) else text

"""Read fields in which capital letters matter: Mb and MB, mW and MW, ABC-DEF.

Everywhere else the guard ignores case. A text of capital letters only, or of small letters only, has none of
these fields.
"""

from __future__ import annotations

import re
from functools import cache

from llmcache.near.guard.identifiers import may_spell
from llmcache.near.guard.lexicon import CURRENCIES, DOUBTFUL_WEEKDAYS, MONTHS, WEEKDAYS
from llmcache.near.guard.number_lexicon import number_words

_WHOLE = re.compile(r"[A-Z]{2,4}(?:-[A-Z]{2,4})+")
_CODE = re.compile(r"(?<![\w'./@-])[A-Z]{2,8}(?:-[A-Z]{2,8})+(?![\w'/@-])")
_UNIT = re.compile(
    r"[KMGT](?<![A-Za-z].)(?:b(?:ps|/s|it/s)?(?![A-Za-z])|Bps(?![A-Za-z])|(?:(?<=[0-9].)|(?<=[0-9] .))(?:W|V|Pa"
    r"|J)(?![A-Za-z]))"
)
_SMALL = re.compile(r"[a-z]")
_UNIT_NAMES = {"K": "kilo", "M": "mega", "G": "giga", "T": "tera"}


def capital_codes(original: str) -> list[str]:
    """Return codes of capital letters with hyphens, in lower case: ABC-DEF, not MON-FRI or TWENTY-ONE.

    original: the text as it was written. In a text of capital letters only, a code is read if it is the whole text.
    """
    codes = _CODE.findall(original)
    if not codes or not (_SMALL.search(original) or _WHOLE.fullmatch(original.strip())):
        return []
    parts = [code.lower().split("-") for code in codes]
    return ["".join(code) for code in parts if _words().isdisjoint(code) and not any(map(may_spell, code))]


@cache
def _words() -> frozenset[str]:
    """Return the words that are no part of a code."""
    return number_words().union(WEEKDAYS, MONTHS, DOUBTFUL_WEEKDAYS, CURRENCIES)


def marked_units(original: str) -> str:
    """Write megabits (Mb) and megawatts (MW) in words, which would be read as megabytes (MB) and milliwatts (mW).

    original: the text as it was written. Returns "" if the text has no such unit.
    """
    if not _UNIT.search(original) or not _SMALL.search(original):
        return ""
    return _UNIT.sub(_name, original)


def _name(match: re.Match[str]) -> str:
    prefix, unit = match[0][0], match[0][1:]
    return f" {prefix}B/s " if unit == "Bps" else f" {_UNIT_NAMES[prefix]}{_ENDINGS.get(unit, 'bps')} "


_ENDINGS = {"W": "watt", "V": "volt", "Pa": "pascal", "J": "joule", "b": "bit"}

"""Read tokens with digits: amounts (a number with sign and unit) and codes (letters and digits).

The functions expect text from `llmcache.near.guard.plain_text` with number words in digits and without dates.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from llmcache.near.guard.digits import is_grouped, plain_number
from llmcache.near.guard.lexicon import (
    CURRENCIES,
    GLUED,
    LETTER_UNITS,
    ORDINALS,
    PERIODS,
    UNITS,
    word_set,
)

_LETTER = "a-z\u00aa\u00b5\u00ba\u00df-\u024f\u0370-\u052f"  # scripts whose codes may mix letters and digits
_ALNUM = f"[{_LETTER}0-9]"
# letters and digits with at least one digit, and the separators inside codes and numbers
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
_NAMED = re.compile(r"([a-z]*[aeiouy][a-z]*)-?([1-9][0-9]{0,3})")  # covid-19, iphone12: a word and a number
_BEFORE = re.compile(r"(-?)(?:([a-z.]{1,4}\$|[$€£¥₹₽₩₺₪₫₱₦₴]) ?|\b([a-z]{2,3})\.? )?(-?)$")
_AFTER = re.compile(r" ?(?:de |d'|di )?(%|‰|°(?: ?[cf]\b)?|(?:ca|us|au|nz|hk)?[$€£¥₹₽₩₺₪₫₱₦₴円元원]|[^\W\d_]+)")
_LETTER_END = re.compile(
    r"(?=$|[.,;:!?)/]| (?:of|long|wide|high|deep|tall|thick|apart|away|per|lang|breit|hoch|tief|de|d'|von)\b)"
)
_RATE = re.compile(r"(?: ?/ ?| (?:per|pro|por|par|an?|each|every|al|à la) )([^\W\d_]+)")
_SPEEDS = (
    (
        re.compile(r"(?<![a-z])(?:km ?/ ?h(?:r|our|ora)?\b|kmh\b|kph\b|(?:kilomet(?:er|re)s?|km) (?:per|an) hour\b)"),
        "kmh",
    ),
    (re.compile(r"(?<![a-z])(?:m ?/ ?s\b|met(?:er|re)s? per second\b)"), "mps"),
    (re.compile(r"(?<![a-z])(?:mi ?/ ?h\b|miles (?:per|an) hour\b)"), "mph"),
)
_POINTS = re.compile(
    r" ?(?:(?:percentage|percent|per cent|%|prozent) ?-?points?\b|prozentpunkten?\b|puntos? porcentual(?:es)?"
    r"|points? de pourcentage"
    r"|(?:个|個)?百分点|퍼센트 ?포인트|%p\b|प्रतिशत अंक)"
)
_BASIS_POINTS = re.compile(r"\bbasis points?\b")
_PER_CENT = re.compile(r" per cent\b")
_MONEY_GROUP = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")
_JOINTS = re.compile(r"[-_]+")
_SPACED_GROUPS = re.compile(r"(?<![\w.,-])([1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9]|[-/][0-9])(?! [0-9])")
_DOLLARS = re.compile(r"\b(us|u\.s\.|american|canadian|australian|hong kong|singapore|new zealand) dollars?\b")
_DOLLAR_CODES = {"us": "usd", "u.s": "usd", "ame": "usd", "can": "cad", "aus": "aud", "hon": "hkd", "sin": "sgd",
                 "new": "nzd"}  # fmt: skip
_DEGREES = re.compile(r"(?:degrees?|grad|grados|degrés|gradi|°) ?([cf])(?:elsius|ahrenheit)?\b")
_CHAT = word_set(
    "2day 2nite 2night 2moro 2morrow 2mrw 2mro b4 gr8 l8 l8r m8 w8 h8 str8 4eva 4ever 4u 2u 2b 2go 2c 2gether any1 "
    "every1 some1 no1 2getha 4get 4got 4give"
)  # words in text-message spelling, not codes


def amounts(text: str, numbers: list[str], identifiers: list[str]) -> None:
    """Append each token with a digit to `numbers`, with its unit, or to `identifiers`."""
    if " " in text:
        text = _SPACED_GROUPS.sub(lambda match: match[1] + match[2].replace(" ", ""), text)
    for match in _TOKEN.finditer(text):
        _read(match[0], text, match.start(), match.end(), numbers, identifiers)


def _read(token: str, text: str, start: int, end: int, numbers: list[str], identifiers: list[str]) -> None:
    """Append one token, text[start:end], to `numbers` or `identifiers`."""
    if token in _CHAT:
        return
    if token[0] == "v" and token[1:2].isdecimal():  # version 2.1 is v2.1
        token = token[1:]
    elif text[max(0, start - 2) : start] in (" .", "."):  # .5 is 0.5
        token = f"0.{token}"
    unit, body = None, token
    if (priced := _PRICED.fullmatch(token)) and priced[1] in CURRENCIES:
        token = body = priced[2]
        unit = CURRENCIES[priced[1]]
    elif (named := _NAMED.fullmatch(token)) and len(named[1]) > 3:
        numbers.append(named[2])
        return
    if suffixed := _SUFFIXED.fullmatch(token):
        unit = GLUED.get(suffixed[2])
        if unit or suffixed[2] in ORDINALS:
            body = suffixed[1]
    elif (hyphened := _HYPHENED.fullmatch(token)) and (
        hyphened[2] in UNITS or (len(hyphened[1]) < 3 and len(hyphened[2]) > 2)
    ):
        body, unit = hyphened[1], UNITS.get(hyphened[2])
    elif (span := _SPAN.fullmatch(token)) and not any(_coded(number) for number in span.groups()):
        numbers.append(plain_number(span[1]))
        body = span[2]
    if _FRACTION.fullmatch(body):
        numbers.append(body)
    elif _PURE.fullmatch(body) and not _coded(body):
        measured = _measured(body, unit, text, start, end)
        if measured.partition("/")[0] != "1" or not _NOUN.match(text, end):
            numbers.append(measured)
    else:
        identifiers.append(_JOINTS.sub("", body))


def _coded(digits: str) -> bool:
    """Return True if digits are a code: they have leading zeros, or several dots like a version."""
    return (digits[0] == "0" and len(digits) > 2 and digits.isdecimal()) or (
        digits.count(".") > 1 and not is_grouped(digits)
    )


def _measured(body: str, unit: str | None, text: str, start: int, end: int) -> str:
    """Return a number with its sign, and with the unit before or after the number."""
    before = _BEFORE.search(text, max(0, start - 6), start)
    named = (before[2] or before[3] or "") if before else ""
    currency = CURRENCIES.get(named) or CURRENCIES.get(named[-1:] if before and before[2] else "", "")
    sign = ""
    if before and (before[4] or before[1]):
        place = before.start() if before[1] or currency else start - 1
        previous = text[place - 1] if place else " "
        sign = "-" if not previous.isalnum() and previous not in "-/._" else ""
    if unit is None and (after := _AFTER.match(text, end)):
        unit = UNITS.get(after[1].replace(" ", ""))
        if after[1] == "per" and _PER_CENT.match(text, end):
            unit = "%"
        elif after[1] in LETTER_UNITS:
            unit = GLUED[after[1]] if _LETTER_END.match(text, after.end()) else None
        end = after.end()
    if currency == "$" and unit in _OTHER_DOLLARS:
        currency = ""
    rate = (match := _RATE.match(text, end)) and UNITS.get(match[1])
    money = currency or (unit if unit in _CURRENCY_CODES else "")
    if money and _MONEY_GROUP.fullmatch(body):  # prices have no three decimals: 1.234 € is 1234 €
        body = body.replace(".", "")
    unit = unit if unit and unit != currency else ""
    return f"{sign}{plain_number(body)}{currency or ''}{unit}{f'/{rate}' if rate in PERIODS else ''}"


# "one card", "1 card" and "my first card" mean "a card", so a lone 1 before a noun is no field
_NOUN = re.compile(
    r" (?!(?:of|to|and|or|in|on|at|for|from|out|with|is|was|the|a|an|by|as|per|than|minus|plus|x|von|de"
    r"|sur|di)\b)[^\W\d_]{3}"
)


_CURRENCY_CODES = frozenset(CURRENCIES.values())
_OTHER_DOLLARS = frozenset(_DOLLAR_CODES.values()) - {"usd"}
# currencies that are a field without a number
_CURRENCY_NAMES = frozenset(
    word
    for word in CURRENCIES
    if len(word) > 2
    and word
    not in {
        "pound",
        "quid",
        "real",
        "reais",
        "won",
        "buck",
        "bucks",
        "cents",
        "lira",
        "livres",
        "libras",
        "peso",
        "sterling",
        "pence",
        "franc",
        "rub",
        "cad",
        "try",
    }
)
_LONE_CURRENCY = re.compile(
    r"(?<![0-9] )(?<![0-9] de )(?<![0-9] di )(?<![0-9] d')(?<![\w$])([^\W\d_]+)(?!\w)(?! ?[0-9])"
)


def named_units(text: str) -> str:
    """Replace units of several words (US dollars, degrees Celsius) by codes. Returns the text."""
    if "dollar" in text:
        text = _DOLLARS.sub(lambda match: _DOLLAR_CODES[match[1][:3]], text)
    if "/" in text or "hour" in text or "second" in text or "km" in text or "kph" in text:
        for pattern, name in _SPEEDS:
            text = pattern.sub(name, text)
    if "point" in text or "punkt" in text or "punto" in text or not text.isascii():
        text = _BASIS_POINTS.sub("bps", _POINTS.sub(" pp ", text))
    if "°" in text or "deg" in text or "gra" in text:
        text = _DEGREES.sub(r"°\1", text)
    return text


def currencies(text: str, words: Collection[str], numbers: list[str]) -> None:
    """Append currencies without an amount ("pay in euros") to `numbers`. words: the words of the text."""
    if not _CURRENCY_NAMES.isdisjoint(words):
        numbers += [CURRENCIES[word] for word in _LONE_CURRENCY.findall(text) if word in _CURRENCY_NAMES]

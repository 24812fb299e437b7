"""Normalise numbers in digits: separators, fractions, attached multipliers and signs.

The functions expect text from `llmcache.near.guard.plain_text`.
"""

from __future__ import annotations

import re
from decimal import Decimal


def written(value: Decimal) -> str:
    """Format a number in its canonical form: no trailing zeros, at most three decimals."""
    if value.adjusted() > 20:  # exceeds the precision of the arithmetic
        return f"{value.normalize():e}"
    if value % 1 == 0:
        return str(int(value))
    return format(round(value, 3).normalize(), "f")


_GROUPED = re.compile(
    r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|[1-9][0-9]{0,2}\.000"
    r"|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"
)


def is_grouped(digits: str) -> bool:
    """Return True if the points or commas of a number separate its thousands."""
    return _GROUPED.fullmatch(digits) is not None


def plain_number(digits: str) -> str:
    """Normalise the digits of a number: 1,234.50 and 1.234,50 become 1234.5, and 05 becomes 5."""
    if _GROUPED.fullmatch(digits):
        point = "," if digits.find(".") >= 0 and digits.find(".") < digits.find(",") else "."
        if digits.count(".") == 1 and "," not in digits:
            point = ","
        digits = digits.replace("." if point == "," else ",", "").replace(",", ".")
        if digits.count(".") > 1:
            digits = digits.replace(".", "")
    elif digits.rfind(",") > digits.rfind("."):
        whole, _, decimals = digits.rpartition(",")
        digits = f"{whole.replace('.', '').replace(',', '')}.{decimals}"
    elif "," in digits:
        digits = digits.replace(",", "")
    whole, _, decimals = digits.partition(".")
    decimals = decimals.replace(".", "").rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


_GLUED_MULTIPLIER = re.compile(
    r"(?<![\w.,])([$€£¥₹]? ?)([0-9]{1,15}(?:[.,][0-9]{1,9}){0,4})(k|bn|mn|mio|m)(?![\w])( ?(?:dollars?"
    r"|euros?|usd|eur|pounds?|users?"
    r"|people|views|followers)\b)?"
)
_FRACTIONS = re.compile(r"(?<![\w./,])(?:([0-9]{1,4})[ -])?([1-9])/([2-9])(?![\w/]|[.,][0-9])")


def glued_multipliers(text: str) -> str:
    """Write 20k, $3bn and $3m in digits. 5m without a currency stays, since it may be metres."""

    def multiply(match: re.Match[str]) -> str:
        currency, digits, letter, counted = match.groups()
        if letter == "m" and not currency.strip() and not counted:
            return match[0]
        factor = {"k": 10**3, "bn": 10**9}.get(letter, 10**6)
        return f"{currency}{written(Decimal(plain_number(digits)) * factor)}{counted or ''}"

    return _GLUED_MULTIPLIER.sub(multiply, text)


def fractions(text: str) -> str:
    """Write fractions as decimals: 1/2 is 0.5, and 2 1/2 is 2.5."""

    def divide(match: re.Match[str]) -> str:
        whole, numerator, denominator = match.groups()
        if int(numerator) >= int(denominator):
            return match[0]
        return written(Decimal(whole or 0) + Decimal(numerator) / Decimal(denominator))

    return _FRACTIONS.sub(divide, text)


_MINUS = re.compile(r"(?<![0-9] )(?<![\w])(?:minus|negative|moins|menos|meno|माइनस) (?=[0-9])")
_BELOW_ZERO = re.compile(
    r"(?<![\w.,-])([0-9]+(?:[.,][0-9]+)*)( ?(?:°[cf]?|degrees?|grad|grados|degrés|gradi)?(?: celsius| fahrenheit)?)"
    r" (?:below|unter|sous|bajo|sotto) (?:0|null|zero)\b"
)


def signs(text: str) -> str:
    """Write "minus 5" and "5 degrees below zero" with a minus sign."""
    return _BELOW_ZERO.sub(r"-\1\2", _MINUS.sub("-", text))

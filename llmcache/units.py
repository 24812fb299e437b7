"""Format numbers, durations, sizes and amounts of money for people."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """Format a count: 1234567 as "1.23 million"; below a million all digits, "12,345"."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(number) >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def short(number: float) -> str:
    """Format a number for the axis of a chart: 1500000 as "1.5 M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1000 if letter == 'k' else size):g} {letter}"
    return f"{number:,g}"


def share(part: float) -> str:
    """Format a share as per cent: 0.805 as "80.5 %"; shares below 1 % with two significant digits."""
    if part != 0 and abs(part) < 0.01:
        return f"{100 * part:.2g} %"
    return f"{100 * part:.1f} %"


def duration(seconds: float) -> str:
    """Format seconds: 15120 as "4 h 12 min"."""
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 1:
        return f"{sign}{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{sign}{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        rest = round(seconds) - 60 * int(seconds // 60)
        return f"{sign}{int(seconds // 60)} min" + (f" {rest} s" if seconds < 600 and rest else "")
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{sign}{hours} h" + (f" {minutes} min" if minutes else "")
    return f"{sign}{hours / 24:,.0f} days"


def size(count: float) -> str:
    """Format a number of bytes, in powers of 1,000: 1500000 as "1.5 MB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def money(amount: float, currency: str) -> str:
    """Format an amount of money: 12.5 as "$12.50"; amounts below 0.01 with two significant digits."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    if 0 < amount < 0.01:
        return f"{sign}{currency}{amount:.{1 - math.floor(math.log10(amount))}f}"
    return f"{sign}{currency}{amount:,.2f}" if amount < 10_000 else f"{sign}{currency}{amount:,.0f}"

"""Numbers as a person reads them on a page."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """1234567 is 1.23 million; what is below ten thousand is said whole."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(number) >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def short(number: float) -> str:
    """1500000 is 1.5 M: on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1000 if letter == 'k' else size):g} {letter}"
    return f"{number:,g}"


def share(part: float) -> str:
    """0.805 is 80.5 %; small shares keep two digits."""
    if part != 0 and abs(part) < 0.01:
        return f"{100 * part:.2g} %"
    return f"{100 * part:.1f} %"


def duration(seconds: float) -> str:
    """15120 is 4 h 12 min."""
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
    """Bytes, in powers of 1,000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def money(amount: float, currency: str) -> str:
    """12.5 is $12.50; what is less than a hundredth keeps two digits."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    if 0 < amount < 0.01:
        return f"{sign}{currency}{amount:.{1 - math.floor(math.log10(amount))}f}"
    return f"{sign}{currency}{amount:,.2f}" if amount < 10_000 else f"{sign}{currency}{amount:,.0f}"

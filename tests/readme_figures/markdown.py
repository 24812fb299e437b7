"""Formatting of numbers, paragraphs and tables as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ReadRow = Mapping[str, Any]
"""One row of a record, only read."""

WIDTH = 125


def prose(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    head, rule, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head.replace("|  |", "| |"), rule.replace(" ", ""), *body])


def by(rows: Iterable[ReadRow], **wanted: Any) -> ReadRow:
    """Find the first row with these field values. StopIteration when there is none."""
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def times(value: float) -> str:
    """Format a ratio with three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float) -> str:
    """Format a rate per second as a whole number, in thousands from 100,000 on."""
    return f"{value:,.0f}" if value < 100_000 else f"{round(value, -3):,.0f}"


def percent(value: float, places: int = 1) -> str:
    return f"{100 * value:.{places}f} %"

"""Output of the commands on standard output: tables, facts and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from llmcache.indexes.urls import redacted


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a plain table; columns of numbers are aligned right."""
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    cells = [[formatted(cell) for cell in row] for row in rows]
    for place, column in enumerate(columns):
        numbers = all(row[place][:1].isdigit() or row[place][:1] in {"-", ""} for row in cells)
        shown.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        shown.add_row(*row)
    Console(markup=False, highlight=False, soft_wrap=False).print(shown)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair a line."""
    listed = [(name, formatted(value)) for name, value in pairs]
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        typer.echo(f"{name:<{width}}  {value}")


def as_json(value: Any) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(value, default=str))


def formatted(value: object) -> str:
    """Format a value for reading: grouped digits, three figures, yes, no or -."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return printable(str(value))


def printable(text: str) -> str:
    """Escape the control characters of a text, which may come from a store's author, and hide credentials of URLs."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in redacted(text))


def quiet() -> None:
    """Disable the progress bars of the libraries that load models."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no annotation here


def size(count: float) -> str:
    """Format bytes with a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"

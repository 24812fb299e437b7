"""Documents: one record of a file, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from llmcache.errors import CorpusError


@dataclass(frozen=True, slots=True)
class Document:
    """One input of the pipeline. An empty text is a document too."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class File:
    """One file to read. name begins the ids of documents that bring none; title is for messages."""

    path: Path | None  # None: standard input
    name: str
    title: str
    format: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Where text and id of a document are; unit: what a document is in plain text."""

    text: str
    id: str
    unit: str


Found: TypeAlias = Document | CorpusError
"""A bad record is given as its error, not raised: a generator that has raised cannot go on."""


def document(file: File, fields: Fields, number: int, id: object, text: object) -> Found:
    """The document, or what is wrong with it; an id that is None is made from the place."""
    if not isinstance(text, str):
        return bad(file, number, f"has {kind(text)} under {fields.text!r}, not a text")
    if not isinstance(id, str | int | None) or isinstance(id, bool):
        return bad(file, number, f"has {kind(id)} under {fields.id!r}, not a text or whole number (--id-field)")
    made = Document(f"{file.name}:{number}" if id is None else str(id), text)
    try:
        _ = text.isascii() or text.encode(), made.id.encode()
    except UnicodeEncodeError:
        return bad(file, number, "is not Unicode text: bytes that are not UTF-8, or half of a surrogate pair")
    return made


def missing(file: File, fields: Fields, number: int, found: Iterable[str]) -> CorpusError:
    """found: the fields that are there."""
    names = [repr(name[:40]) for name in found]
    seen = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return bad(
        file,
        number,
        f"has no field {fields.text!r}, only {seen or 'none'}; name the right one (--text-field)",
    )


def undecodable(file: File, number: int, error: UnicodeDecodeError) -> CorpusError:
    byte = error.object[error.start]
    return bad(file, number, f"is not UTF-8 (byte 0x{byte:02x} at place {error.start}); convert it with iconv")


def bad(file: File, number: int, what: str) -> CorpusError:
    """number: of the line or row, 0 for the file as a whole."""
    place = f" {'row' if file.format == 'parquet' else 'line'} {number}" if number else ""
    return CorpusError(f"{file.title}{place} {what}; or leave out what is bad with --skip-bad")


def kind(value: object) -> str:
    """What a value is, in words."""
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

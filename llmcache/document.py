"""Documents, and the errors of records that are no documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llmcache.errors import CorpusError

Text: TypeAlias = str | tuple[str, ...]
"""Text of a document; for a CrossEncoder an ordered pair of texts, for a prompt template the texts of its fields."""
TextFields: TypeAlias = str | tuple[str, ...]
"""Name of the field of a text, or names of the fields of several texts."""
PAIR_FIELDS = ("query", "document")
"""Fields of a pair, where the caller names no others."""


@dataclass(frozen=True, slots=True)
class Document:
    """Input of a pipeline: an id and a text, which may be empty. For a CrossEncoder text is a pair of texts, for a
    prompt template with several fields a tuple of their texts."""

    id: str
    text: Text


def characters(text: Text) -> int:
    """Return the number of characters of a text, or of all texts of a tuple."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def as_text(text: Text) -> str:
    """Return a text, or both texts of a pair as one, for the guard, which compares the fields of texts."""
    return text if isinstance(text, str) else "\n".join(text)


def only_text(document: Document) -> str:
    """Return the text of a document. CorpusError for a pair of texts."""
    if not isinstance(document.text, str):
        raise CorpusError(f"the document {document.id!r:.60} is a pair of texts; give documents of one text each")
    return document.text


def whole(texts: Sequence[Any]) -> Any:
    """Return the only one of some texts, or all of them as a tuple."""
    return texts[0] if len(texts) == 1 else tuple(texts)


def names_of(fields: TextFields) -> tuple[str, ...]:
    """Return the names of the fields of a text."""
    return (fields,) if isinstance(fields, str) else fields


@dataclass(frozen=True, slots=True)
class File:
    """File to read. path: None for standard input. name: prefix of generated ids. title: name in messages."""

    path: Path | None
    name: str
    title: str
    format: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the text field and the id field. unit: unit of a document in plain text, "line" or "paragraph".

    text: several names where documents are tuples of texts. as_json: True to take other values than texts, as JSON.
    """

    text: TextFields
    id: str
    unit: str
    as_json: bool = False


Found: TypeAlias = Document | CorpusError
"""Document, or the error of a bad record. Errors are yielded, not raised, since a generator ends when it raises."""


def document(file: File, fields: Fields, number: int, id: object, text: object) -> Found:
    """Make a document from a record's id and text. number: line or row of the record; id: None to generate one.

    text: for a pair of texts a list or tuple of both.
    Returns the error, instead of raising it, for a text or id of another type or that is not valid Unicode.
    """
    names = names_of(fields.text)
    texts = (text,) if len(names) == 1 else text
    if not isinstance(texts, list | tuple):
        what = "one text" if isinstance(texts, str) else kind(texts)
        if len(names) != 2 or fields.as_json:
            return bad(file, number, f"is {what}, and the fields {', '.join(map(repr, names))} are needed")
        return bad(file, number, f"is {what}, not a pair of texts with {names[0]!r} and {names[1]!r} (--pair-fields)")
    if len(texts) != len(names):
        wanted = "the two of a pair" if len(names) == 2 else str(len(names))
        return bad(file, number, f"has {len(texts)} text{'s' * (len(texts) != 1)}, not {wanted}")
    if fields.as_json:
        texts = [json_text(one) for one in texts]
    for name, one in zip(names, texts, strict=True):
        if not isinstance(one, str):
            return bad(file, number, f"has {kind(one)} under {name!r}, not a text")
    if not isinstance(id, str | int | None) or isinstance(id, bool):
        return bad(file, number, f"has {kind(id)} under {fields.id!r}, not a text or whole number (--id-field)")
    result = Document(f"{file.name}:{number}" if id is None else str(id), whole(texts))
    try:
        for one in (*texts, result.id):
            _ = one.isascii() or one.encode()
    except UnicodeEncodeError:
        return bad(file, number, "is not Unicode text: bytes that are not UTF-8, or half of a surrogate pair")
    return result


def json_text(value: object) -> object:
    """Return a value of a record as text: a text as it is, any other value as JSON. None, and what is no JSON, stay."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return value


def missing(file: File, fields: Fields, number: int, names: Iterable[str]) -> CorpusError:
    """Return the error of a record without a text field. names: fields that the record has."""
    given, wanted = list(names), names_of(fields.text)
    quoted = [repr(name[:40]) for name in given]
    absent = next((name for name in wanted if name not in given), wanted[0])
    advice = "name the right one (--text-field)"
    if fields.as_json:
        advice = "the template, or --choices-field, names it"
    elif len(wanted) == 2:
        advice = f"a pair of texts needs both {wanted[0]!r} and {wanted[1]!r}: name the right two (--pair-fields)"
    seen = ", ".join(quoted[:10]) + (f" and {len(quoted) - 10} more" if len(quoted) > 10 else "")
    return bad(
        file,
        number,
        f"has no field {absent!r}, only {seen or 'none'}; {advice}",
    )


def undecodable(file: File, number: int, error: UnicodeDecodeError) -> CorpusError:
    """Return the error of a record that is not UTF-8."""
    byte = error.object[error.start]
    return bad(file, number, f"is not UTF-8 (byte 0x{byte:02x} at place {error.start}); convert it with iconv")


def bad(file: File, number: int, what: str) -> CorpusError:
    """Return the error of a bad record. number: its line or row, 0 for the whole file. what: end of the sentence."""
    place = f" {'row' if file.format == 'parquet' else 'line'} {number}" if number else ""
    return CorpusError(f"{file.title}{place} {what}; correct it, or skip bad records with --skip-bad")


def kind(value: object) -> str:
    """Describe the type of a value in words."""
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

"""Read documents from texts, mappings, objects, frames, tables and data sets, as one stream."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias
from uuid import UUID

from llmcache.document import Document, kind
from llmcache.errors import ConfigError, CorpusError

MOST_CHARACTERS = 10_000_000
_ROWS = 1024  # of a frame or a data set, taken at a time
_NOTHING = object()


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """A record that is no document. place: in the stream, from 0. id: its own, or the place where it has none."""

    place: int
    id: str
    reason: str


Taken: TypeAlias = Document | RejectedRecord


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """Where text and id of a record are, and how many characters a document may have."""

    text: str = "text"
    id: str = "id"
    most: int = MOST_CHARACTERS


def intake(documents: Any, wanted: FieldSpec | None = None) -> Iterator[Taken]:
    """One Document, or what is wrong with it, per record, in order; nothing is read before it is asked for.

    documents: any iterable of texts, `Document`s, mappings, or objects with the fields as attributes (dataclasses,
        named tuples); a frame of pandas or polars, an Arrow table or a stream of record batches, a
        `datasets.Dataset`; or an iterable of frames. Frames and data sets are taken 1024 rows at a time, and only
        the two columns. A record without an id gets its place in the stream.
    ConfigError for a single text, bytes, path or mapping, and for a lazy frame. CorpusError for a frame without the
    column. What the iterable raises is raised.
    """
    wanted = wanted or FieldSpec()
    check_many(documents, "documents", frames=True)
    return _stream(documents, wanted)


def check_many(given: Any, what: str, *, frames: bool = False) -> None:
    """ConfigError for one text, document, mapping or path where many are meant.

    what: their name in the message. frames: whether a frame or table is allowed.
    """
    if isinstance(given, os.PathLike):
        raise ConfigError(
            f"{what} are many, got the path {os.fspath(given)!r}; read it with llmcache.pipeline.files.documents"
        )
    if isinstance(given, Mapping) and not isinstance(given.get("text", ""), str):
        raise ConfigError(f"{what} are many, got a mapping of columns; give a frame, such as pandas.DataFrame(...)")
    if isinstance(given, str | bytes | bytearray | Mapping | Document):
        raise ConfigError(f"{what} are many, got one {type(given).__name__}; give a list of them: [...]")
    if not frames and not isinstance(given, list | tuple) and is_table(given):
        raise ConfigError(f"{what} are texts, got a {type(given).__name__}; give one of its columns, as a list")


def check_texts(given: Any, what: str) -> None:
    """ConfigError unless this is a sequence of texts, none of them missing.

    what: their name in the message.
    """
    check_many(given, what)
    if not isinstance(given, Sequence):
        raise ConfigError(f"{what} are a list of texts, got a {type(given).__name__}; give a list: [...]")
    for place, text in enumerate(given):
        if not isinstance(text, str):
            raise ConfigError(f"{what} are texts, and number {place} is a {type(text).__name__}: {text!r:.60}")


def is_table(given: Any) -> bool:
    """Return whether something has several named columns: a frame of pandas or polars, an Arrow table, a data set."""
    return hasattr(given, "column_names") or (hasattr(given, "columns") and hasattr(given, "shape"))


def _stream(documents: Any, wanted: FieldSpec) -> Iterator[Taken]:
    place = 0
    columns = _columns(documents, wanted)
    if columns is not None:
        for place, (id, text) in enumerate(columns):
            yield _made(place, id, text, wanted)
        return
    if not isinstance(documents, Iterable):
        raise ConfigError(f"documents are an iterable or a frame, got a {type(documents).__name__}")
    for record in documents:
        if isinstance(record, str):  # most are
            yield _made(place, None, record, wanted)
            place += 1
            continue
        nested = None if isinstance(record, Mapping | Document | bytes) else _columns(record, wanted)
        for taken in [_record(place, record, wanted)] if nested is None else _rows(place, nested, wanted):
            yield taken
            place += 1


def _rows(start: int, columns: Iterator[tuple[Any, Any]], wanted: FieldSpec) -> Iterator[Taken]:
    for place, (id, text) in enumerate(columns, start):
        yield _made(place, id, text, wanted)


def _record(place: int, record: Any, wanted: FieldSpec) -> Taken:
    if isinstance(record, Document):
        return _made(place, record.id, record.text, wanted)
    if isinstance(record, Mapping):
        if wanted.text not in record:
            seen = ", ".join(repr(str(name)[:40]) for name in list(record)[:10])
            reason = f"has no field {wanted.text!r}, only {seen or 'none'}"
            return RejectedRecord(place, _named(place, record.get(wanted.id)), reason)
        return _made(place, record.get(wanted.id), record[wanted.text], wanted)
    text = getattr(record, wanted.text, _NOTHING)
    if text is _NOTHING or record is None:
        return RejectedRecord(place, str(place), f"is {kind(record)}, neither a text nor a record with {wanted.text!r}")
    return _made(place, getattr(record, wanted.id, None), text, wanted)


def _made(place: int, id: Any, text: Any, wanted: FieldSpec) -> Taken:
    id, text = _plain(id), _plain(text)
    if isinstance(id, float) and id.is_integer():  # how a frame writes whole numbers of which one is missing
        id = int(id)
    if not isinstance(id, str | Integral | None) or isinstance(id, bool):
        return RejectedRecord(place, str(place), f"has {kind(id)} under {wanted.id!r}, not a text or whole number")
    named = _named(place, id)
    if not isinstance(text, str):
        return RejectedRecord(place, named, f"has {kind(text)} under {wanted.text!r}, not a text")
    if len(text) > wanted.most:
        return RejectedRecord(place, named, f"has {len(text):,} characters, more than max_characters={wanted.most:,}")
    try:
        _ = text.isascii() or text.encode(), named.isascii() or named.encode()
    except UnicodeEncodeError:
        return RejectedRecord(place, ascii(named), "is not Unicode text: it has half of a surrogate pair")
    return Document(named, text)


def _plain(value: Any) -> Any:
    """A scalar of numpy, Arrow, pandas or torch as a Python value; what stands for a missing value as None."""
    if value is None or type(value) in (str, int):  # most are
        return value
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "as_py"):  # Arrow
        value = value.as_py()
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy, torch
        value = value.item()
    if isinstance(value, UUID):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _named(place: int, id: Any) -> str:
    id = _plain(id)
    return str(place) if id is None else str(id)


# -- columns ----------------------------------------------------------------------------------------------


def _columns(given: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]] | None:
    """Pairs of id and text out of a frame, a table or a data set; None when it is none of them."""
    if type(given).__module__.partition(".")[0] == "datasets" and hasattr(given, "column_names"):
        return _of_data_set(given, wanted)
    if type(given).__name__ == "RecordBatch":
        import pyarrow as pa

        return _of_frame(pa.Table.from_batches([given]), wanted)
    if not hasattr(given, "__arrow_c_stream__") and not hasattr(given, "collect_schema"):
        return None
    return _of_frame(given, wanted)


def _of_frame(given: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]] | None:
    import narwhals as nw

    frame: Any = nw.from_native(given, pass_through=True)
    if isinstance(frame, nw.LazyFrame):
        raise ConfigError(f"a {type(given).__name__} is lazy; give what its collect() gives, or its batches")
    if isinstance(frame, nw.DataFrame):
        _check(frame.columns, wanted)
        return _of_slices(frame, wanted)
    if hasattr(given, "read_next_batch"):  # a stream of batches that never fit in memory
        import pyarrow as pa

        _check(given.schema.names, wanted)
        tables = (pa.Table.from_batches([batch]) for batch in given)
        return (pair for table in tables for pair in _of_slices(nw.from_native(table), wanted))
    return None  # a series, or something that only looks like a frame: iterated


def _of_slices(frame: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]]:
    has_id = wanted.id in frame.columns
    for start in range(0, len(frame), _ROWS):
        part = frame[start : start + _ROWS]
        texts = part[wanted.text].to_list()
        yield from zip(part[wanted.id].to_list() if has_id else [None] * len(texts), texts, strict=True)


def _of_data_set(given: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]]:
    if hasattr(given, "with_format"):  # one that gives tensors or tables would lose texts, or give columns as one value
        given = given.with_format(None)
    if given.column_names is not None:
        _check(given.column_names, wanted)
        given = given.select_columns([name for name in {wanted.id, wanted.text} if name in given.column_names])
    for batch in given.iter(_ROWS):
        _check(list(batch), wanted)
        texts = batch[wanted.text]
        yield from zip(batch.get(wanted.id, [None] * len(texts)), texts, strict=True)


def _check(names: Iterable[str], wanted: FieldSpec) -> None:
    found = list(names)
    if wanted.text not in found:
        seen = ", ".join(repr(str(name)[:40]) for name in found[:10]) or "none"
        raise CorpusError(f"there is no column {wanted.text!r}, only {seen}; name the right one with text_field")

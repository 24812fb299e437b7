"""Read documents from texts, mappings, objects, data frames, Arrow tables and data sets, as one stream."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias
from uuid import UUID

from llmcache.document import Document, Text, TextFields, characters, json_text, kind, names_of, whole
from llmcache.errors import ConfigError, CorpusError

MOST_CHARACTERS = 10_000_000
_ROWS = 1024  # rows taken from a frame or a data set at a time
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """Record that is no document. place: position in the stream, from 0. id: its id, or the position if it has none."""

    place: int
    id: str
    reason: str


Taken: TypeAlias = Document | RejectedRecord


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """Names of the text field and the id field of a record. most: maximum number of characters of a document.

    text: two names where documents are pairs of texts, in the order of the pair; or the names of the fields of a prompt
        template. as_json: True to take other values than texts, as JSON.
    """

    text: TextFields = "text"
    id: str = "id"
    most: int = MOST_CHARACTERS
    as_json: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the text fields."""
        return names_of(self.text)


def intake(documents: Any, wanted: FieldSpec | None = None) -> Iterator[Taken]:
    """Turn records into documents, lazily. Yields a Document or a RejectedRecord for each, in order.

    documents: any iterable of texts, `Document`s, mappings, or objects with the fields as attributes (dataclasses,
        named tuples); a frame of pandas or polars, an Arrow table or a stream of record batches, a
        `datasets.Dataset`; or an iterable of frames. Of frames and data sets only the columns of the text and the id
        are read, 1024 rows at a time. A record without an id gets its position in the stream as id. Where `wanted`
        names two text fields, a record is a tuple, list or array of two texts, or has both fields.
    ConfigError for a single text, pair, bytes, path or mapping, and for a lazy frame. CorpusError for a frame without
    the text column. Exceptions of the iterable are passed on.
    """
    wanted = wanted or FieldSpec()
    check_many(documents, "documents", frames=True)
    one_pair = isinstance(documents, tuple) and len(wanted.names) == len(documents) == 2
    if one_pair and all(isinstance(side, str) for side in documents):
        raise ConfigError("documents must be a collection, got one pair of texts; give a list: [(query, document)]")
    return _stream(documents, wanted)


def check_many(value: Any, what: str, *, frames: bool = False) -> None:
    """Check that an argument is a collection. ConfigError for a single text, document, mapping or path.

    what: name of the argument in the message. frames: True if a frame or table is allowed.
    """
    if isinstance(value, os.PathLike):
        raise ConfigError(
            f"{what} must be a collection, got the path {os.fspath(value)!r}; "
            "read it with llmcache.pipeline.files.documents"
        )
    if isinstance(value, Mapping) and not isinstance(value.get("text", ""), str):
        raise ConfigError(
            f"{what} must be a collection, got a mapping of columns; give a frame, such as pandas.DataFrame(...)"
        )
    if isinstance(value, str | bytes | bytearray | Mapping | Document):
        raise ConfigError(f"{what} must be a collection, got one {type(value).__name__}; give a list: [...]")
    if not frames and not isinstance(value, list | tuple) and is_table(value):
        raise ConfigError(f"{what} must be texts, got a {type(value).__name__}; give one of its columns, as a list")


def check_texts(value: Any, what: str) -> None:
    """Check that an argument is a sequence of strings. ConfigError otherwise, also for None among them.

    what: name of the argument in the message.
    """
    check_many(value, what)
    if not isinstance(value, Sequence):
        raise ConfigError(f"{what} must be a list of texts, got a {type(value).__name__}; give a list: [...]")
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise ConfigError(f"{what} are texts, and number {place} is a {type(text).__name__}: {text!r:.60}")


def is_table(value: Any) -> bool:
    """Return whether a value has named columns: a frame of pandas or polars, an Arrow table, a data set."""
    return hasattr(value, "column_names") or (hasattr(value, "columns") and hasattr(value, "shape"))


def _stream(documents: Any, wanted: FieldSpec) -> Iterator[Taken]:
    place = 0
    columns = _columns(documents, wanted)
    if columns is not None:
        for place, (id, text) in enumerate(columns):
            yield _document(place, id, text, wanted)
        return
    if not isinstance(documents, Iterable):
        raise ConfigError(f"documents must be an iterable or a frame, got a {type(documents).__name__}")
    for record in documents:
        if isinstance(record, str):  # most are
            yield _document(place, None, record, wanted)
            place += 1
            continue
        nested = None if isinstance(record, Mapping | Document | bytes) else _columns(record, wanted)
        for taken in [_record(place, record, wanted)] if nested is None else _rows(place, nested, wanted):
            yield taken
            place += 1


def _rows(start: int, columns: Iterator[tuple[Any, Any]], wanted: FieldSpec) -> Iterator[Taken]:
    for place, (id, text) in enumerate(columns, start):
        yield _document(place, id, text, wanted)


def _record(place: int, record: Any, wanted: FieldSpec) -> Taken:
    if isinstance(record, Document):
        return _document(place, record.id, record.text, wanted)
    if isinstance(record, Mapping):
        absent = [name for name in wanted.names if name not in record]
        if absent:
            seen = ", ".join(repr(str(name)[:40]) for name in list(record)[:10])
            reason = f"has no field {absent[0]!r}, only {seen or 'none'}"
            return RejectedRecord(place, _id_or_place(place, record.get(wanted.id)), reason)
        return _document(place, record.get(wanted.id), whole([record[name] for name in wanted.names]), wanted)
    texts = [getattr(record, name, _ABSENT) for name in wanted.names]
    if record is not None and all(text is not _ABSENT for text in texts):
        return _document(place, getattr(record, wanted.id, None), whole(texts), wanted)
    if len(texts) == 2 and (isinstance(record, list | tuple) or hasattr(record, "tolist")):
        return _document(place, None, record, wanted)
    names = " and ".join(map(repr, wanted.names))
    what = "text" if len(texts) == 1 else "pair of texts" if len(texts) == 2 else "tuple of texts"
    return RejectedRecord(place, str(place), f"is {kind(record)}, neither a {what} nor a record with {names}")


def _document(place: int, id: Any, text: Any, wanted: FieldSpec) -> Taken:
    id = _python_value(id)
    if isinstance(id, float) and id.is_integer():  # a frame stores whole numbers as floats if one is missing
        id = int(id)
    if not isinstance(id, str | Integral | None) or isinstance(id, bool):
        return RejectedRecord(place, str(place), f"has {kind(id)} under {wanted.id!r}, not a text or whole number")
    document_id = _id_or_place(place, id)
    texts = _texts(text, wanted)
    if isinstance(texts, str):
        return RejectedRecord(place, document_id, texts)
    found: Text = whole(texts)
    if (count := characters(found)) > wanted.most:
        return RejectedRecord(place, document_id, f"has {count:,} characters, more than max_characters={wanted.most:,}")
    try:
        for one in (*texts, document_id):
            _ = one.isascii() or one.encode()
    except UnicodeEncodeError:
        return RejectedRecord(place, ascii(document_id), "is not Unicode text: it has half of a surrogate pair")
    return Document(document_id, found)


def _texts(value: Any, wanted: FieldSpec) -> list[str] | str:
    """Return the texts of a record, one for each text field, or the reason why it is no document."""
    names = wanted.names
    what = "a pair of texts" if len(names) == 2 else f"a record with {', '.join(map(repr, names))}"
    if len(names) > 1 and not isinstance(value, tuple):
        value = value.tolist() if getattr(value, "ndim", 0) == 1 else value
        if not isinstance(value, list):
            return f"is {'one text' if isinstance(value, str) else kind(value)}, not {what}"
    parts = (value,) if len(names) == 1 else value
    if len(parts) != len(names):
        known = "the two of a pair" if len(names) == 2 else f"the {len(names)} of {what}"
        return f"has {len(parts)} text{'s' * (len(parts) != 1)}, not {known}"
    texts = [_python_value(part) for part in parts]
    if wanted.as_json:
        texts = [json_text(text) for text in texts]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            return f"has {kind(text)} under {name!r}, not a text"
    return texts


def _python_value(value: Any) -> Any:
    """Convert a scalar of NumPy, Arrow, pandas or torch to a Python value; missing values to None."""
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


def _id_or_place(place: int, id: Any) -> str:
    id = _python_value(id)
    return str(place) if id is None else str(id)


# -- columns ----------------------------------------------------------------------------------------------


def _columns(source: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]] | None:
    """Read pairs (id, text) from a frame, a table or a data set. Returns None for any other value."""
    if type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "column_names"):
        return _data_set_columns(source, wanted)
    if type(source).__name__ == "RecordBatch":
        import pyarrow as pa

        return _frame_columns(pa.Table.from_batches([source]), wanted)
    if not hasattr(source, "__arrow_c_stream__") and not hasattr(source, "collect_schema"):
        return None
    return _frame_columns(source, wanted)


def _frame_columns(source: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]] | None:
    import narwhals as nw

    frame: Any = nw.from_native(source, pass_through=True)
    if isinstance(frame, nw.LazyFrame):
        raise ConfigError(f"a {type(source).__name__} is lazy; give the result of its collect(), or its batches")
    if isinstance(frame, nw.DataFrame):
        _check_columns(frame.columns, wanted)
        return _sliced_columns(frame, wanted)
    if hasattr(source, "read_next_batch"):  # a stream of batches that may not fit in memory together
        import pyarrow as pa

        _check_columns(source.schema.names, wanted)
        tables = (pa.Table.from_batches([batch]) for batch in source)
        return (pair for table in tables for pair in _sliced_columns(nw.from_native(table), wanted))
    return None  # a series, or an object that only resembles a frame: the caller iterates over it


def _sliced_columns(frame: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]]:
    has_id = wanted.id in frame.columns
    for start in range(0, len(frame), _ROWS):
        part = frame[start : start + _ROWS]
        texts = _rows_of([part[name].to_list() for name in wanted.names])
        yield from zip(part[wanted.id].to_list() if has_id else [None] * len(texts), texts, strict=True)


def _data_set_columns(source: Any, wanted: FieldSpec) -> Iterator[tuple[Any, Any]]:
    if hasattr(source, "with_format"):  # a format of tensors or tables would lose texts, or give columns as one value
        source = source.with_format(None)
    if source.column_names is not None:
        _check_columns(source.column_names, wanted)
        source = source.select_columns([name for name in {wanted.id, *wanted.names} if name in source.column_names])
    for batch in source.iter(_ROWS):
        _check_columns(list(batch), wanted)
        texts = _rows_of([batch[name] for name in wanted.names])
        yield from zip(batch.get(wanted.id, [None] * len(texts)), texts, strict=True)


def _rows_of(columns: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return one value per row: that of the only column, or a pair of two columns."""
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def _check_columns(names: Iterable[str], wanted: FieldSpec) -> None:
    """CorpusError unless the text columns are among the names."""
    columns = list(names)
    absent = [name for name in wanted.names if name not in columns]
    if absent:
        seen = ", ".join(repr(str(name)[:40]) for name in columns[:10]) or "none"
        raise CorpusError(f"there is no column {absent[0]!r}, only {seen}; name the right one with text_field")

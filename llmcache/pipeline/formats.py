"""Readers of file formats, one function each: JSON lines, CSV and TSV, plain text, Parquet."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from itertools import count, repeat
from typing import IO, Any

from llmcache.document import Fields, File, Found, bad, document, kind, missing, names_of, undecodable, whole

RECORD_LIMIT = 1 << 28  # bytes of a line; a longer one suggests another file format, and would fill the memory
PARQUET_ROWS = 32  # rows in memory at a time; few, since a text may have 10 MB


def _lines(file: File, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and bytes of every line, split at "\\n" only: JSON strings may contain other line ends."""
    for number in count(1):
        line = stream.readline(RECORD_LIMIT + 1)
        if not line:
            return
        if len(line) > RECORD_LIMIT:
            raise bad(file, number, f"is longer than {RECORD_LIMIT:,} bytes; is this a {file.format} file?")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_lines(file: File, fields: Fields, stream: IO[bytes]) -> Iterator[Found]:
    for number, line in _lines(file, stream):
        line = line.rstrip()
        if not line:
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield undecodable(file, number, error)
        except (ValueError, RecursionError) as error:
            where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            yield bad(file, number, f"is not JSON ({getattr(error, 'msg', error)}{where})")
        else:
            yield _from_json(file, fields, number, record)


def _from_json(file: File, fields: Fields, number: int, record: object) -> Found:
    names = names_of(fields.text)
    if isinstance(record, str) or (isinstance(record, list) and len(names) > 1):
        return document(file, fields, number, None, record)
    if not isinstance(record, dict):
        return bad(file, number, f"is {kind(record)}, neither an object nor a text")
    if not all(name in record for name in names):
        return missing(file, fields, number, record)
    return document(file, fields, number, record.get(fields.id), whole([record[name] for name in names]))


def _table(file: File, fields: Fields, stream: IO[bytes]) -> Iterator[Found]:
    """Read CSV and TSV. The csv module is strict: else an unclosed quote would make the rest of the file one text."""
    csv.field_size_limit(max(csv.field_size_limit(), RECORD_LIMIT))  # a setting of the whole process: never lowered
    # undecodable bytes are passed on until the row is complete, since a line may be the middle of a row
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(file, stream))
    rows = csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except csv.Error as error:
            yield bad(file, number, f"is not a {file.format.upper()} row ({error})")
        except StopIteration:
            return
        else:
            if header and row:
                yield _from_row(file, fields, number, header, row)
            elif row and not all(name in row for name in names_of(fields.text)):
                raise missing(file, fields, number, row)
            header = header or row


def _from_row(file: File, fields: Fields, number: int, header: list[str], row: list[str]) -> Found:
    if len(row) != len(header):
        return bad(file, number, f"has {len(row)} cells where the header has {len(header)}; is a quote missing?")
    texts = [row[header.index(name)] for name in names_of(fields.text)]
    if any("\0" in text for text in texts):
        return bad(file, number, "holds a NUL byte; is this UTF-16 or a binary file?")
    id = row[header.index(fields.id)] if fields.id in header else None
    return document(file, fields, number, id or None, whole(texts))


def _plain_text(file: File, fields: Fields, stream: IO[bytes]) -> Iterator[Found]:
    for number, part in _paragraphs(file, stream) if fields.unit == "paragraph" else _lines(file, stream):
        try:
            text = part.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield undecodable(file, number, error)
            continue
        if "\0" in text:
            yield bad(file, number, "holds a NUL byte; is this UTF-16 or a binary file?")
        elif text.strip():
            yield document(file, fields, number, None, text)


def _paragraphs(file: File, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number of the first line and bytes of every paragraph, with "\\n" as line ends."""
    first, lines, size = 0, list[bytes](), 0
    for number, line in _lines(file, stream):
        if line.strip():
            first = first if lines else number
            lines.append(line.rstrip(b"\r\n") + b"\n")
            size += len(lines[-1])
            if size > RECORD_LIMIT:
                raise bad(file, first, f"begins a paragraph of more than {RECORD_LIMIT:,} bytes")
        elif lines:
            yield first, b"".join(lines)
            lines, size = [], 0
    if lines:
        yield first, b"".join(lines)


def _parquet(file: File, fields: Fields, stream: IO[bytes]) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream, buffer_size=1 << 20) as table:
            names = table.schema_arrow.names
            if not all(name in names for name in names_of(fields.text)):
                raise missing(file, fields, 0, names)
            columns = [name for name in dict.fromkeys((*names_of(fields.text), fields.id)) if name in names]
            numbers = count(1)
            for batch in table.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                texts = zip(
                    *(batch.column(batch.schema.names.index(name)) for name in names_of(fields.text)), strict=True
                )
                ids = batch.column(batch.schema.names.index(fields.id)) if fields.id in names else repeat(None)
                for row, id, number in zip(texts, ids, numbers, strict=False):
                    yield _from_scalars(file, fields, number, id, row)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise bad(file, 0, f"is not a whole Parquet file ({reason}); write it again") from error


def _from_scalars(file: File, fields: Fields, number: int, id: Any, row: tuple[Any, ...]) -> Found:
    try:
        texts = [text.as_py() for text in row]
        return document(file, fields, number, None if id is None else id.as_py(), whole(texts))
    except UnicodeDecodeError as error:
        return undecodable(file, number, error)


READERS: dict[str, Callable[[File, Fields, IO[bytes]], Iterator[Found]]] = {
    "jsonl": _json_lines,
    "csv": _table,
    "tsv": _table,
    "txt": _plain_text,
    "parquet": _parquet,
}

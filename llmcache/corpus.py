"""Documents out of files: JSON lines, CSV, TSV, plain text and Parquet, one document at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

from llmcache.errors import ConfigError, CorpusError

UNITS = ("line", "paragraph")
STREAM_FORMATS = ("jsonl", "csv", "tsv", "txt")  # of standard input: Parquet has its index at the end
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
UNDERSTOOD = ".jsonl, .ndjson, .csv, .tsv, .txt (each also with .gz) and .parquet"
RECORD_LIMIT = 1 << 28  # bytes: a longer line is a file of another kind, and would be held in memory whole
PARQUET_ROWS = 32  # in memory at once: few enough for texts of 10 MB
ERRORS_KEPT = 5
FOREIGN = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"PAR1\x15": "parquet"}


@dataclass(frozen=True, slots=True)
class Document:
    """One input of the pipeline. An empty text is a document too."""

    id: str
    text: str


@dataclass(slots=True)
class Reading:
    """What has been read so far; filled in while `documents` is iterated.

    files: begun. documents: given out. duplicate_ids: of these, the ones whose id came before.
    bytes: taken from the files, as stored; runs up to 128 KiB ahead. errors: messages of the first five bad.
    bad: records that could not be read; a file whose rest could not be read counts as one.
    """

    files: int = 0
    documents: int = 0
    bad: int = 0
    duplicate_ids: int = 0
    bytes: int = 0
    errors: list[str] = field(default_factory=list)
    _ids: set[int] = field(default_factory=set, repr=False, compare=False)

    def take(self, document: Document) -> None:
        self.documents += 1
        seen = len(self._ids)
        self._ids.add(hash(document.id))  # 64 bits in place of the id: a collision only costs a wrong count
        self.duplicate_ids += len(self._ids) == seen

    def refuse(self, error: CorpusError) -> None:
        self.bad += 1
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(str(error))


@dataclass(frozen=True, slots=True)
class _File:
    """One file to read. name begins the ids of documents that bring none; title is for messages."""

    path: Path | None  # None: standard input
    name: str
    title: str
    format: str


@dataclass(frozen=True, slots=True)
class _Fields:
    text: str
    id: str
    unit: str


_Found: TypeAlias = Document | CorpusError
"""A bad record is given as its error, not raised: a generator that has raised cannot go on."""


def documents(
    sources: str | Path | Iterable[str | Path],
    *,
    text_field: str = "text",
    id_field: str = "id",
    unit: str = "line",
    stdin_format: str = "jsonl",
    skip_bad: bool = False,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """The documents of all sources, in the order of the sources.

    sources: files, folders, and "-" for standard input. A folder is read with its sub-folders, by name,
    without hidden files, unknown endings and linked folders. Gzip is recognised by its content.
    text_field, id_field: field of a JSON object or column of a table; a JSON line may be a bare text too.
    A document without an id gets "<file name>:<line>" (Parquet: row), from 1, named relative to the folder.
    unit: what a document is in a .txt file: a line that is not blank, or a paragraph between blank lines.
    stdin_format: format of standard input, which may be gzipped too.
    skip_bad: leave out what cannot be read instead of raising; `reading` counts it.

    Nothing is opened before the first document is asked for; in memory is one record (Parquet: 32 rows).
    ConfigError, at once: an unknown unit or stdin_format. CorpusError, naming file and line: before the first
    document, a path that does not exist or is not understood; later, a bad record.
    """
    for name, value, choices in (("unit", unit, UNITS), ("stdin_format", stdin_format, STREAM_FORMATS)):
        if value not in choices:
            raise ConfigError(f"{name} is one of {', '.join(choices)}, got {value!r}")
    given = [sources] if isinstance(sources, str | Path) else sources
    fields = _Fields(text_field, id_field, unit)
    return _documents(given, fields, stdin_format, skip_bad, Reading() if reading is None else reading)


def _documents(
    sources: Iterable[str | Path], fields: _Fields, stdin_format: str, skip_bad: bool, reading: Reading
) -> Iterator[Document]:
    # all paths are looked up first: a mistyped one should not show after an hour's work on those before it
    for file in [file for source in sources for file in _files(source, stdin_format)]:
        reading.files += 1
        for found in _read(file, fields, reading):
            if isinstance(found, Document):
                reading.take(found)
                yield found
            else:
                reading.refuse(found)
                if not skip_bad:
                    raise found


# -- finding files ----------------------------------------------------------------------------------------


def _files(source: str | Path, stdin_format: str) -> list[_File]:
    if str(source) == "-":
        return [_File(None, "stdin", "standard input", stdin_format)]
    path, title = Path(source), _shown(source)
    if os.path.isdir(path):
        return _folder(path)
    if not os.path.exists(path):
        raise CorpusError(f"{title} does not exist; give files, folders, or - for standard input")
    format = _format(path.name)
    if format is None:
        raise CorpusError(f"{title} has none of the endings {UNDERSTOOD}; rename it, or give it through - (stdin)")
    return [_File(path, _shown(path.name), title, format)]


def _folder(folder: Path) -> list[_File]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise_unlisted):  # does not follow links: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in [Path(root, name) for name in names if not name.startswith(".")]:
            format = _format(path.name)
            # a link to nothing is kept and then reported; a pipe is not, since reading it may never end
            if format is not None and (os.path.isfile(path) or not os.path.exists(path)):
                found.append(_File(path, _shown(path.relative_to(folder)), _shown(path), format))
    if not found:
        raise CorpusError(f"the folder {_shown(folder)} holds no file with an ending of {UNDERSTOOD}")
    return sorted(found, key=lambda file: Path(file.name).parts)


def _raise_unlisted(error: OSError) -> NoReturn:
    raise CorpusError(f"the folder {_shown(error.filename)} cannot be listed ({error.strerror})") from error


def _format(name: str) -> str | None:
    plain = name.lower().removesuffix(".gz")
    ending = next((ending for ending in ENDINGS if plain.endswith(ending)), None)
    if ending is None or (ending == ".parquet" and name.lower().endswith(".gz")):
        return None
    return "jsonl" if ending == ".ndjson" else ending[1:]


def _shown(path: str | Path) -> str:
    """The path as text that can be written as UTF-8, whatever bytes the file name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


# -- reading one file -------------------------------------------------------------------------------------


def _read(file: _File, fields: _Fields, reading: Reading) -> Iterator[_Found]:
    """Documents and errors in the order of the file; one that fails as a whole ends with an error."""
    try:
        with _opened(file, reading) as stream:
            yield from READERS[file.format](file, fields, stream)
    except CorpusError as error:
        yield error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield _bad(file, 0, f"is a gzip file that is cut short or damaged ({error}); fetch it again")
    except OSError as error:
        yield _bad(file, 0, f"cannot be read ({error.strerror or error})")


@contextmanager
def _opened(file: _File, reading: Reading) -> Iterator[IO[bytes]]:
    """The bytes of the file, unpacked."""
    with ExitStack() as stack:
        source: Any = stack.enter_context(open(file.path, "rb")) if file.path else sys.stdin.buffer
        stream: Any = stack.enter_context(io.BufferedReader(_Counted(source, reading), 1 << 17))
        head = stream.peek(8)
        for mark, kind in FOREIGN.items():
            if head.startswith(mark) and kind != file.format:
                raise CorpusError(f"{file.title} is a {kind} file by its content; unpack or rename it first")
        if head.startswith(b"\x1f\x8b"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        yield stream


class _Counted(io.RawIOBase):
    """A stream whose bytes are counted as they are taken. Closing it leaves that stream open."""

    def __init__(self, stream: io.BufferedReader, reading: Reading) -> None:
        self._stream, self._reading = stream, reading

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int:
        taken = self._stream.readinto1(buffer)
        self._reading.bytes += taken
        return taken


def _lines(file: _File, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of every line. Cut at "\\n" only: JSON strings may hold other line ends."""
    for number in count(1):
        line = stream.readline(RECORD_LIMIT + 1)
        if not line:
            return
        if len(line) > RECORD_LIMIT:
            raise _bad(file, number, f"is longer than {RECORD_LIMIT:,} bytes; is this a {file.format} file?")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_lines(file: _File, fields: _Fields, stream: IO[bytes]) -> Iterator[_Found]:
    for number, line in _lines(file, stream):
        line = line.rstrip()
        if not line:
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield _undecodable(file, number, error)
        except (ValueError, RecursionError) as error:
            where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            yield _bad(file, number, f"is not JSON ({getattr(error, 'msg', error)}{where})")
        else:
            yield _from_json(file, fields, number, record)


def _from_json(file: _File, fields: _Fields, number: int, record: object) -> _Found:
    if isinstance(record, str):
        return _document(file, fields, number, None, record)
    if not isinstance(record, dict):
        return _bad(file, number, f"is {_kind(record)}, neither an object nor a text")
    if fields.text not in record:
        return _missing(file, fields, number, record)
    return _document(file, fields, number, record.get(fields.id), record[fields.text])


def _table(file: _File, fields: _Fields, stream: IO[bytes]) -> Iterator[_Found]:
    """CSV and TSV. strict: an open quote would otherwise take the rest of the file for one text."""
    csv.field_size_limit(max(csv.field_size_limit(), RECORD_LIMIT))  # a setting of the whole process: only raised
    # undecodable bytes are kept until their row is cut out, for a line may be the middle of a row
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(file, stream))
    rows = csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except csv.Error as error:
            yield _bad(file, number, f"is not a {file.format.upper()} row ({error})")
        except StopIteration:
            return
        else:
            if header and row:
                yield _from_row(file, fields, number, header, row)
            elif row and fields.text not in row:
                raise _missing(file, fields, number, row)
            header = header or row


def _from_row(file: _File, fields: _Fields, number: int, header: list[str], row: list[str]) -> _Found:
    if len(row) != len(header):
        return _bad(file, number, f"has {len(row)} cells where the header has {len(header)}; is a quote missing?")
    text = row[header.index(fields.text)]
    if "\0" in text:
        return _bad(file, number, "holds a NUL byte; is this UTF-16 or a binary file?")
    id = row[header.index(fields.id)] if fields.id in header else None
    return _document(file, fields, number, id or None, text)


def _plain_text(file: _File, fields: _Fields, stream: IO[bytes]) -> Iterator[_Found]:
    for number, part in _paragraphs(file, stream) if fields.unit == "paragraph" else _lines(file, stream):
        try:
            text = part.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield _undecodable(file, number, error)
            continue
        if "\0" in text:
            yield _bad(file, number, "holds a NUL byte; is this UTF-16 or a binary file?")
        elif text.strip():
            yield _document(file, fields, number, None, text)


def _paragraphs(file: _File, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number of the first line and bytes of every paragraph, its lines ended by "\\n"."""
    first, part, size = 0, list[bytes](), 0
    for number, line in _lines(file, stream):
        if line.strip():
            first = first if part else number
            part.append(line.rstrip(b"\r\n") + b"\n")
            size += len(part[-1])
            if size > RECORD_LIMIT:
                raise _bad(file, first, f"begins a paragraph of more than {RECORD_LIMIT:,} bytes")
        elif part:
            yield first, b"".join(part)
            part, size = [], 0
    if part:
        yield first, b"".join(part)


def _parquet(file: _File, fields: _Fields, stream: IO[bytes]) -> Iterator[_Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream, buffer_size=1 << 20) as table:
            names = table.schema_arrow.names
            if fields.text not in names:
                raise _missing(file, fields, 0, names)
            columns = [name for name in dict.fromkeys((fields.text, fields.id)) if name in names]
            numbers = count(1)
            for batch in table.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                texts = batch.column(batch.schema.names.index(fields.text))
                ids = batch.column(batch.schema.names.index(fields.id)) if fields.id in names else repeat(None)
                for text, id, number in zip(texts, ids, numbers, strict=False):
                    yield _from_scalars(file, fields, number, id, text)
    except (pa.ArrowException, OSError) as error:
        why = str(error).partition("\n")[0]
        raise _bad(file, 0, f"is not a whole Parquet file ({why}); write it again") from error


def _from_scalars(file: _File, fields: _Fields, number: int, id: Any, text: Any) -> _Found:
    try:
        return _document(file, fields, number, None if id is None else id.as_py(), text.as_py())
    except UnicodeDecodeError as error:
        return _undecodable(file, number, error)


READERS: dict[str, Callable[[_File, _Fields, IO[bytes]], Iterator[_Found]]] = {
    "jsonl": _json_lines,
    "csv": _table,
    "tsv": _table,
    "txt": _plain_text,
    "parquet": _parquet,
}


# -- one record -------------------------------------------------------------------------------------------


def _document(file: _File, fields: _Fields, number: int, id: object, text: object) -> _Found:
    """The document, or what is wrong with it; an id that is None is made from the place."""
    if not isinstance(text, str):
        return _bad(file, number, f"has {_kind(text)} under {fields.text!r}, not a text")
    if not isinstance(id, str | int | None) or isinstance(id, bool):
        return _bad(file, number, f"has {_kind(id)} under {fields.id!r}, not a text or whole number (--id-field)")
    document = Document(f"{file.name}:{number}" if id is None else str(id), text)
    try:
        _ = text.isascii() or text.encode(), document.id.encode()
    except UnicodeEncodeError:
        return _bad(file, number, "is not Unicode text: bytes that are not UTF-8, or half of a surrogate pair")
    return document


def _missing(file: _File, fields: _Fields, number: int, found: Iterable[str]) -> CorpusError:
    names = [repr(name[:40]) for name in found]
    seen = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return _bad(
        file,
        number,
        f"has no field {fields.text!r}, only {seen or 'none'}; name the right one (--text-field)",
    )


def _undecodable(file: _File, number: int, error: UnicodeDecodeError) -> CorpusError:
    byte = error.object[error.start]
    return _bad(file, number, f"is not UTF-8 (byte 0x{byte:02x} at place {error.start}); convert it with iconv")


def _bad(file: _File, number: int, what: str) -> CorpusError:
    """number: of the line or row, 0 for the file as a whole."""
    place = f" {'row' if file.format == 'parquet' else 'line'} {number}" if number else ""
    return CorpusError(f"{file.title}{place} {what}; or leave out what is bad with --skip-bad")


def _kind(value: object) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

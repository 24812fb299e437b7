"""Read documents from files, folders and standard input: JSON lines, CSV, TSV, plain text and Parquet, as a stream."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from llmcache.document import Document, Fields, File, Found, TextFields, bad
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.formats import READERS

UNITS = ("line", "paragraph")
STREAM_FORMATS = ("jsonl", "csv", "tsv", "txt")  # formats of standard input; Parquet has its index at the end
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
UNDERSTOOD = ".jsonl, .ndjson, .csv, .tsv, .txt (each also with .gz) and .parquet"
ERRORS_KEPT = 5
FOREIGN = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"PAR1\x15": "parquet"}


@dataclass(slots=True)
class CorpusReading:
    """Counters of `documents`, updated while that is iterated.

    files: files opened so far. documents: documents yielded. duplicate_ids: documents whose id occurred before.
    bytes: bytes read from the files, as stored; up to 128 KiB ahead of the documents.
    bad: records that could not be read; the unreadable rest of a file counts as one. errors: their first five messages.
    skipped: files in the given folders that were not read because of their ending, by that ending.
    """

    files: int = 0
    documents: int = 0
    bad: int = 0
    duplicate_ids: int = 0
    bytes: int = 0
    errors: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set, repr=False, compare=False)

    def take(self, document: Document) -> None:
        """Count a document."""
        self.documents += 1
        distinct = len(self._ids)
        self._ids.add(hash(document.id))  # 64 bits in place of the id: a collision only makes the count wrong by one
        self.duplicate_ids += len(self._ids) == distinct

    @property
    def skipped_said(self) -> str:
        """Message with the number of files not read, by ending; "" if all were read."""
        if not self.skipped:
            return ""
        endings = ", ".join(f"{count:,} {ending}" for ending, count in self.skipped.most_common(5))
        more = ", ..." if len(self.skipped) > 5 else ""
        return f"{self.skipped.total():,} files in the folders were not read ({endings}{more}); read are {UNDERSTOOD}"

    def refuse(self, error: CorpusError) -> None:
        """Count a record that could not be read."""
        self.bad += 1
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(str(error))


def documents(
    sources: str | Path | Iterable[str | Path],
    *,
    text_field: TextFields = "text",
    id_field: str = "id",
    unit: str = "line",
    stdin_format: str = "jsonl",
    skip_bad: bool = False,
    reading: CorpusReading | None = None,
    as_json: bool = False,
) -> Iterator[Document]:
    """Read documents from all sources. Yields them in the order of the sources.

    sources: files, folders, and "-" for standard input. A folder is read with its sub-folders, sorted by name, without
        hidden files and linked folders; files with other endings are counted in `reading`. Gzip is recognised by its
        content.
    text_field, id_field: fields of a JSON object or columns of a table; a JSON line may also be a bare string. Two
        names of text fields give pairs of texts, for which a JSON line may be an array of two strings; more names give
        tuples of texts. A document without an id gets "<file name>:<line>" (Parquet: row), counted from 1, relative to
        the folder.
    unit: unit of a document in a .txt file: a "line" that is not blank, or a "paragraph" between blank lines.
    stdin_format: format of standard input, which may be gzipped.
    skip_bad: skip records that cannot be read instead of raising. reading: counters to update.
    as_json: take values of fields that are no texts, such as numbers, as JSON.

    No file is opened before the first document is requested; one record (Parquet: 32 rows) is in memory at a time.
    ConfigError at once for an unknown unit or stdin_format. CorpusError, naming file and line: before the first
    document for a path that does not exist or has no known ending; later for a bad record.
    """
    for name, value, choices in (("unit", unit, UNITS), ("stdin_format", stdin_format, STREAM_FORMATS)):
        if value not in choices:
            raise ConfigError(f"{name} is one of {', '.join(choices)}, got {value!r}")
    paths = [sources] if isinstance(sources, str | Path) else sources
    fields = Fields(text_field, id_field, unit, as_json)
    return _documents(paths, fields, stdin_format, skip_bad, CorpusReading() if reading is None else reading)


def _documents(
    sources: Iterable[str | Path], fields: Fields, stdin_format: str, skip_bad: bool, reading: CorpusReading
) -> Iterator[Document]:
    # all paths are checked first, so that a mistyped one fails before hours of work on the others
    for file in [file for source in sources for file in _files(source, stdin_format, reading)]:
        reading.files += 1
        for record in _read(file, fields, reading):
            if isinstance(record, Document):
                reading.take(record)
                yield record
            else:
                reading.refuse(record)
                if not skip_bad:
                    raise record


def _files(source: str | Path, stdin_format: str, reading: CorpusReading) -> list[File]:
    if str(source) == "-":
        return [File(None, "stdin", "standard input", stdin_format)]
    path, title = Path(source), _shown(source)
    if os.path.isdir(path):
        return _folder(path, reading)
    if not os.path.exists(path):
        raise CorpusError(f"{title} does not exist; give files, folders, or - for standard input")
    format = _format(path.name)
    if format is None:
        raise CorpusError(f"{title} has none of the endings {UNDERSTOOD}; rename it, or give it through - (stdin)")
    return [File(path, _shown(path.name), title, format)]


def _folder(folder: Path, reading: CorpusReading) -> list[File]:
    files = []
    for root, folders, names in os.walk(folder, onerror=_raise_unlisted):  # does not follow links: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in [Path(root, name) for name in names if not name.startswith(".")]:
            format = _format(path.name)
            # a broken link is included, to be reported as an error; a pipe is not, since reading it may never end
            if format is not None and (os.path.isfile(path) or not os.path.exists(path)):
                files.append(File(path, _shown(path.relative_to(folder)), _shown(path), format))
            else:
                reading.skipped[_shown(path.suffix.lower()) or "without an ending"] += 1
    if not files:
        raise CorpusError(f"the folder {_shown(folder)} holds no file with an ending of {UNDERSTOOD}")
    return sorted(files, key=lambda file: Path(file.name).parts)


def _raise_unlisted(error: OSError) -> NoReturn:
    raise CorpusError(f"the folder {_shown(error.filename)} cannot be listed ({error.strerror})") from error


def _format(name: str) -> str | None:
    plain = name.lower().removesuffix(".gz")
    ending = next((ending for ending in ENDINGS if plain.endswith(ending)), None)
    if ending is None or (ending == ".parquet" and name.lower().endswith(".gz")):
        return None
    return "jsonl" if ending == ".ndjson" else ending[1:]


def _shown(path: str | Path) -> str:
    """Return the path as text that can be encoded as UTF-8, whatever bytes the file name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _read(file: File, fields: Fields, reading: CorpusReading) -> Iterator[Found]:
    """Yield documents and errors in the order of the file; a file that cannot be read further ends with an error."""
    try:
        with _opened(file, reading) as stream:
            yield from READERS[file.format](file, fields, stream)
    except CorpusError as error:
        yield error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield bad(file, 0, f"is a gzip file that is cut short or damaged ({error}); fetch it again")
    except OSError as error:
        yield bad(file, 0, f"cannot be read ({error.strerror or error})")


@contextmanager
def _opened(file: File, reading: CorpusReading) -> Iterator[IO[bytes]]:
    """Open the file as a stream of bytes, decompressed."""
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
    """Stream that counts the bytes read from another stream. Closing it leaves the other stream open."""

    def __init__(self, stream: io.BufferedReader, reading: CorpusReading) -> None:
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

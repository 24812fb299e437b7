"""Result files: Parquet, NumPy or JSON lines, written atomically."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.files import locks
from llmcache.indexes.files.atomic_write import ordinary_mode, set_mode
from llmcache.indexes.files.durable import sync_name
from llmcache.private_files import open_plain

CHUNK_ROWS = 4096  # rows of a Parquet row group; fewer if their outputs would exceed CHUNK_BYTES
CHUNK_BYTES = 1 << 26


class Row(Protocol):
    """Row of a result file, one per document or chunk. output: of the file's `Form`. similarity: cosine in [-1, 1]."""

    @property
    def id(self) -> str: ...
    @property
    def output(self) -> NDArray[np.floating[Any]]: ...
    @property
    def tier(self) -> str: ...
    @property
    def layer(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...
    @property
    def similarity(self) -> float | None: ...
    @property
    def audited(self) -> bool: ...
    @property
    def consensus(self) -> float | None: ...


class _Provenance(NamedTuple):
    """Columns of a row except its output, in the order in which they are written."""

    id: str
    tier: str
    layer: str | None
    source: str | None
    similarity: float | None
    consensus: float | None
    audited: bool


_provenance = attrgetter(*_Provenance._fields)

Form: TypeAlias = Literal["vector", "sparse", "tokens", "rows"]
"""Form of every output of a file: float32 [width]; float32 [entries, 2], dimensions and values; or [tokens, width].
"rows" is the form of language-model jobs, whose rows have no vectors (`job_files`)."""
_Put: TypeAlias = Callable[[Floats32, list[int], list[_Provenance]], None]
"""Function that writes a chunk of rows: their vectors, float32 [n, width] (a buffer that is reused), the number of
vectors of each row (1 where the form is "vector"), and other columns."""
_Format: TypeAlias = Callable[[ExitStack, list[IO[bytes]], int, Form], tuple[_Put, Callable[[], None]]]
"""Function from an exit stack, the open files, width and form to a pair: write a chunk, and finish the files."""


class ResultWriter:
    """Writer of a result file that buffers rows and writes them in chunks; see `result_writer`. rows: rows so far."""

    def __init__(self, path: Path, width: int, form: Form, put: _Put) -> None:
        self.rows = 0
        self._path, self._put = path, put
        self._shape = (width,) if form == "vector" else (None, width)
        self._provenance: list[_Provenance] = []
        self._counts: list[int] = []
        self._filled = 0  # vectors of the buffer that belong to the buffered rows
        room = max(1, CHUNK_BYTES // (4 * width))
        self._vectors = np.empty((min(CHUNK_ROWS, room) if form == "vector" else room, width), np.float32)

    def write(self, results: Iterable[Row]) -> None:
        """Write results; their outputs are copied as float32. ConfigError for an output of another shape."""
        for result in results:
            shape = result.output.shape
            if len(shape) != len(self._shape) or shape[-1] != self._shape[-1]:
                wanted = ["any number" if size is None else size for size in self._shape]
                raise ConfigError(
                    f"the output of {result.id!r} has shape {list(shape)}, but this file was "
                    f"opened for {wanted}; open it with the model's output width"
                )
            count = 1 if len(shape) == 1 else shape[0]
            self._reserve(count)
            self._vectors[self._filled : self._filled + count] = result.output
            self._filled += count
            self._counts.append(count)
            self._provenance.append(_Provenance._make(_provenance(result)))
            self.rows += 1
            if len(self._provenance) == CHUNK_ROWS or self._filled >= len(self._vectors):
                self.flush()

    def _reserve(self, count: int) -> None:
        """Make room in the buffer for `count` more vectors; the buffered rows are written first if they do not fit."""
        if self._filled + count > len(self._vectors):
            self.flush()
        if count > len(self._vectors):
            self._vectors = np.empty((count, self._vectors.shape[1]), np.float32)

    def flush(self) -> None:
        """Write the buffered rows to the file; `result_writer` does so at the end."""
        if self._provenance:
            with as_corpus_error(self._path):
                self._put(self._vectors[: self._filled], self._counts, self._provenance)
            self._provenance, self._counts, self._filled = [], [], 0


@contextmanager
def result_writer(path: str | Path, *, width: int, form: Form = "vector") -> Iterator[ResultWriter]:
    """Open a writer of the result file `path`, as a context. The file appears when the block ends without an error.

    width: numbers per vector; they are always written as float32. The format follows from the file name's ending:
    .parquet  id, output (fixed_size_list<float32>[width]), tier, layer, source, similarity and consensus (float32),
              audited (bool)
    .npy      outputs [rows, width]; "<path>.jsonl" beside it has one object per row with the other columns
    .jsonl    one object per row with all columns; a number that is not finite becomes null
    form: "sparse" for outputs of a SparseEncoder, of width 2: list<struct<dimension: int32, value: float32>> in
    Parquet, {"dimensions": [...], "values": [...]} in JSON lines. "tokens" for vectors of tokens:
    list<fixed_size_list<float32>[width]> in Parquet, a list of lists in JSON lines. Neither can be written as .npy.

    Everything is written to "<path>.partial" first. After an exception that file is removed, and an older result file
    stays unchanged. Rows are in the order written; no rows give a valid, empty file.
    ConfigError for another ending, or a width below 1. CorpusError when the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link is written through, not replaced
    check_ending(path, form)
    if width < 1:
        raise ConfigError(f"width is the number of values per output, at least 1, got {width}")
    paths = [path, path.with_name(path.name + ".jsonl")] if path.suffix.lower() == ".npy" else [path]
    with ExitStack() as stack:
        with as_corpus_error(path):
            files = [stack.enter_context(partial_file(target)) for target in paths]
            put, finish = FORMATS[path.suffix.lower()](stack, files, width, form)
        writer = ResultWriter(path, width, form, put)
        yield writer
        writer.flush()
        with as_corpus_error(path):
            finish()
            keep_partial(paths, files)


def check_ending(path: Path, form: Form) -> None:
    """ConfigError unless outputs of this form can be written to a file with the ending of this path."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"results can be written as .parquet, .npy or .jsonl, not as {path.name!r}")
    if form != "vector" and path.suffix.lower() == ".npy":
        what = "sparse vectors" if form == "sparse" else "vectors of tokens"
        raise ConfigError(
            f"{what} differ in length, and an .npy file has rows of one length; write {path.name!r} as .parquet or "
            ".jsonl"
        )


# -- files ------------------------------------------------------------------------------------------------


@contextmanager
def as_corpus_error(path: Path) -> Iterator[None]:
    """Turn OSErrors inside the block into a CorpusError."""
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be written ({error.strerror or error}); free the space or choose another place. "
            "Nothing was changed there"
        ) from error


@contextmanager
def partial_file(target: Path) -> Iterator[IO[bytes]]:
    """Open an empty "<target>.partial" for writing; after the block it is closed and, unless renamed, removed."""
    if target.is_dir():
        raise CorpusError(f"{target} is a folder; give the results a name of their own")
    if not target.parent.is_dir():
        raise CorpusError(f"there is no folder {target.parent} to write {target.name} into; make it first")
    partial = target.with_name(target.name + ".partial")
    file = _open_locked(partial)
    try:
        yield file
    finally:
        if _is_at(file, partial):
            partial.unlink()
        with suppress(OSError):  # the disk may be full; the rest of the buffer is not needed
            file.close()


def _open_locked(partial: Path) -> IO[bytes]:
    """Open a file for writing with a lock, with mode 0600 until it is complete. No link is followed.

    open(partial, "wb") would truncate the file of another writer. The lock of a killed writer ends with its process.
    """
    while True:
        file = open(open_plain(partial, os.O_RDWR | os.O_CREAT), "wb")  # noqa: SIM115
        if not locks.take(file.fileno()):
            file.close()
            raise CorpusError(f"another run is writing {partial}; wait for it, or choose another name")
        if _is_at(file, partial):
            file.truncate(0)
            return file
        file.close()  # another writer finished between the two calls: this file is now its result


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def keep_partial(paths: list[Path], files: list[IO[bytes]]) -> None:
    """Make the partial files durable, and rename them to their final paths."""
    for file in files:
        file.flush()
        set_mode(file.fileno(), ordinary_mode())
        os.fsync(file.fileno())
    if len(paths) > 1:  # a crash between the renames must not leave new provenance beside older vectors
        paths[0].unlink(missing_ok=True)
    for path in reversed(paths):
        path.with_name(path.name + ".partial").replace(path)
    sync_name(paths[0].parent)


# -- formats ----------------------------------------------------------------------------------------------


def _parquet(stack: ExitStack, files: list[IO[bytes]], width: int, form: Form) -> tuple[_Put, Callable[[], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    kinds = {
        "id": text,
        "output": _arrow_type(width, form),
        "tier": text,
        "layer": text,
        "source": text,
        "similarity": pa.float32(),
        "consensus": pa.float32(),
        "audited": pa.bool_(),
    }
    absent = ("layer", "source", "similarity", "consensus")
    schema = pa.schema([pa.field(name, kind, nullable=name in absent) for name, kind in kinds.items()])
    parquet = pq.ParquetWriter(files[0], schema, use_dictionary=["tier", "layer"])
    stack.callback(_close_quietly, parquet)  # otherwise the destructor would write a footer into a closed file

    def put(vectors: Floats32, counts: list[int], rows: list[_Provenance]) -> None:
        columns: dict[str, Any] = dict(zip(_Provenance._fields, zip(*rows, strict=True), strict=True))
        columns["output"] = _arrow_outputs(vectors, counts, kinds["output"], form)
        arrays = [pa.array(columns[name], kind) for name, kind in kinds.items()]
        parquet.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=len(rows))

    return put, parquet.close


def _arrow_type(width: int, form: Form) -> Any:
    """Return the Arrow type of the outputs."""
    import pyarrow as pa

    if form == "sparse":
        return pa.list_(pa.struct([("dimension", pa.int32()), ("value", pa.float32())]))
    vector = pa.list_(pa.float32(), width)
    return vector if form == "vector" else pa.list_(vector)


def _arrow_outputs(vectors: Floats32, counts: list[int], kind: Any, form: Form) -> Any:
    """Return outputs as an Arrow array of a type of `_arrow_type`. vectors, counts: as of `_Put`."""
    import pyarrow as pa

    if form == "sparse":
        sides = pa.array(vectors[:, 0].astype(np.int32)), pa.array(vectors[:, 1].copy())
        items: Any = pa.StructArray.from_arrays(sides, fields=list(kind.value_type))
    else:
        items = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    if form == "vector":
        return items
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts], dtype=np.int32)), items, type=kind)


def _close_quietly(parquet: Any) -> None:
    with suppress(OSError):
        parquet.close()


def _npy(stack: ExitStack, files: list[IO[bytes]], width: int, form: Form) -> tuple[_Put, Callable[[], None]]:
    """Write the header at the start and again at the end, when the number of rows is known."""
    vectors_file, provenance_file = files
    written = 0

    def header() -> None:
        facts = {"descr": "<f4", "fortran_order": False, "shape": (written, width)}
        np.lib.format.write_array_header_1_0(vectors_file, facts)  # padded to the same length for any number

    def put(vectors: Floats32, counts: list[int], rows: list[_Provenance]) -> None:
        nonlocal written
        vectors_file.write(vectors.astype("<f4", copy=False).data)
        provenance_file.writelines(json_line(row._asdict()) for row in rows)
        written += len(rows)

    def finish() -> None:
        start = vectors_file.tell() - written * width * 4
        vectors_file.seek(0)
        header()
        assert vectors_file.tell() == start

    header()
    return put, finish


def _jsonl(stack: ExitStack, files: list[IO[bytes]], width: int, form: Form) -> tuple[_Put, Callable[[], None]]:
    def put(vectors: Floats32, counts: list[int], rows: list[_Provenance]) -> None:
        starts = np.cumsum([0, *counts])
        for start, count, row in zip(starts.tolist(), counts, rows, strict=False):
            matrix = vectors[start : start + count]
            output: Any = matrix[0].tolist() if form == "vector" else matrix.tolist()
            if form == "sparse":
                output = {"dimensions": matrix[:, 0].astype(int).tolist(), "values": matrix[:, 1].tolist()}
            files[0].write(json_line(row._asdict() | {"output": output}))

    return put, lambda: None


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # json.dumps would make an encoder per row


def json_line(row: dict[str, Any]) -> bytes:
    try:
        line = _encode(row)
    except ValueError:  # JSON cannot represent NaN and infinities
        line = json.dumps({name: _finite(value) for name, value in row.items()}, ensure_ascii=False)
    return line.encode() + b"\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(number) for number in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FORMATS: dict[str, _Format] = {
    ".parquet": _parquet,
    ".npy": _npy,
    ".jsonl": _jsonl,
}

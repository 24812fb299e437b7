"""Result files of language-model jobs: Parquet or JSON lines, written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from llmcache.errors import ConfigError
from llmcache.pipeline.job_rows import Columns
from llmcache.pipeline.writers import CHUNK_ROWS, as_corpus_error, json_line, keep_partial, partial_file

ENDINGS = (".jsonl", ".parquet")


class JobWriter:
    """Writer of a result file that buffers rows and writes them in chunks; see `job_writer`."""

    def __init__(self, path: Path, columns: Columns, file: IO[bytes]) -> None:
        self._path, self._columns, self._file, self._rows = path, columns, file, list[Sequence[Any]]()
        self._parquet: Any = None
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            self._schema = columns.arrow_schema()
            self._parquet = pq.ParquetWriter(file, self._schema)

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write rows, each as the values of its columns, in order."""
        for row in rows:
            self._rows.append(row)
            if len(self._rows) == CHUNK_ROWS:
                self.flush()

    def flush(self) -> None:
        """Write the buffered rows to the file."""
        if not self._rows:
            return
        with as_corpus_error(self._path):
            if self._parquet is None:
                self._file.writelines(json_line(dict(zip(self._columns.names, row, strict=True))) for row in self._rows)
            else:
                import pyarrow as pa

                columns = zip(*self._rows, strict=True)
                arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
                self._parquet.write_batch(pa.record_batch(arrays, schema=self._schema), row_group_size=len(self._rows))
        self._rows = []

    def close(self) -> None:
        """End a Parquet file."""
        if self._parquet is not None:
            self._parquet.close()


@contextmanager
def job_writer(path: Path, columns: Columns) -> Iterator[JobWriter]:
    """Open a writer of the result file `path`, as a context. The file appears when the block ends without an error.

    Everything is written to "<path>.partial" first, which an error removes. CorpusError when it cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link is written through, not replaced
    check_job_ending(path)
    with ExitStack() as stack:
        with as_corpus_error(path):
            file = stack.enter_context(partial_file(path))
            writer = JobWriter(path, columns, file)
        try:
            yield writer
            writer.flush()
        finally:
            with as_corpus_error(path):
                writer.close()
        with as_corpus_error(path):
            keep_partial([path], [file])


def check_job_ending(path: Path) -> None:
    """ConfigError unless the rows of a job can be written to a file with the ending of this path."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"the results of a language-model job are written as .jsonl or .parquet, not as {path.name!r}"
        )

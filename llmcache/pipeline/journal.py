"""Journal of an unfinished run: a folder beside the result file with the results so far and the last checkpoints.

    <name>.unfinished/journal.json   facts of the run, and the last two checkpoints
                      vectors.f32    outputs, float32 little-endian, row after row
                      rows.jsonl     the other columns of each row, one JSON array per line
                      lock           locked by the process that writes

An output is one vector or, for sparse vectors and vectors of tokens, a matrix; its number of vectors is then the last
element of its line. A row of a language-model job has no vector; its line has the number of records before its part,
its place in the part, its tier, and the values of the columns. Rows are only appended. A checkpoint has the number of
valid rows and their checksums (xxh3-128); later rows are truncated when the run is resumed. journal.json has a checksum
of its own. The folder has mode 0700, its files 0600, and no link in it is followed. The folder is removed once the
result file is written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.stats.unfinished import FILES, beside
from llmcache.pipeline.journal_format import FORMAT, Checkpoint, JournalRow
from llmcache.pipeline.writers import Form
from llmcache.private_files import PrivateFolder

__all__ = ["Checkpoint", "Journal", "JournalRow", "beside", "discard"]

log = logging.getLogger("llmcache")

_BUFFER = 1 << 20
_LIMIT = 1 << 20  # bytes of a journal
_VECTORS, _TEXT = "vectors.f32", "rows.jsonl"


class Journal:
    """Journal of an unfinished run, open in one process at a time.

    checkpoints: the last one that is sure, then the last one if that is not sure yet. form: of the outputs.
    """

    def __init__(
        self, folder: PrivateFolder, facts: Mapping[str, Any], width: int, form: Form, checkpoints: list[Checkpoint]
    ) -> None:
        self.folder, self._private, self._facts, self.width = folder.path, folder, dict(facts), width
        self.form, self.checkpoints = form, checkpoints
        self._rows = self._count = 0  # rows, and vectors of all rows
        self._text_bytes = 0
        self._tiers = Checkpoint().tiers
        self._checks = xxhash.xxh3_128(), xxhash.xxh3_128()
        appending = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._vectors: IO[bytes] = os.fdopen(folder.open(_VECTORS, appending), "ab", _BUFFER)
        try:
            self._text: IO[bytes] = os.fdopen(folder.open(_TEXT, appending), "ab", _BUFFER)
        except BaseException:
            self._vectors.close()
            raise

    @classmethod
    def open(
        cls, out: Path, facts: Mapping[str, Any], width: int, *, resume: bool, form: Form = "vector"
    ) -> tuple[Journal, IO[bytes]]:
        """Open the journal of the run that writes `out`. Returns the journal and its lock, which is closed after it.

        facts: model and settings of the run, by name, as JSON values; they determine width and form. resume: continue
        an unfinished run; otherwise it is discarded. form: of the outputs, see `result_writer`.
        CorpusError when another process has locked the journal, it is damaged, or its files are links or belong to
        another user. ConfigError, naming the differences, when it belongs to a run with other facts.
        """
        facts = {"out": out.suffix.lower(), **facts}
        with _as_corpus_error(beside(out)):
            folder = PrivateFolder(beside(out))
            try:
                return cls._opened(folder, out, facts, width, form, resume=resume)
            except BaseException:
                folder.close()
                raise

    @classmethod
    def _opened(
        cls, folder: PrivateFolder, out: Path, facts: Mapping[str, Any], width: int, form: Form, *, resume: bool
    ) -> tuple[Journal, IO[bytes]]:
        lock = _lock(folder, out)
        try:
            if folder.has("journal.json") and not resume:
                log.warning("an unfinished run in %s is discarded; use resume to continue such a run", folder.path)
                _empty(folder)
            content = _read(folder) if folder.has("journal.json") else None
            if content is None:
                _empty(folder)
            else:
                _check_facts(folder, content["facts"], facts)
            checkpoints = [Checkpoint(**fields) for fields in content["checkpoints"]] if content else [Checkpoint()]
            return cls(folder, facts, width, form, checkpoints), lock
        except BaseException:
            lock.close()
            raise

    def add(self, results: Iterable[Result]) -> None:
        """Append results."""
        for result in results:
            numbers = (None if number is None else float(number) for number in (result.similarity, result.consensus))
            columns = [result.id, result.tier, result.layer, result.source, *numbers, result.audited]
            count = 1 if self.form == "vector" else len(result.output)
            line = json.dumps(columns if self.form == "vector" else [*columns, count]).encode() + b"\n"
            vector = np.asarray(result.output, "<f4").tobytes()
            self._text_bytes += self._text.write(line)
            self._vectors.write(vector)
            self._checks[0].update(vector)
            self._checks[1].update(line)
            self._tiers[result.tier] += 1
            self._rows += 1
            self._count += count

    def add_rows(self, part: int, rows: Iterable[tuple[int, str, Sequence[Any]]]) -> None:
        """Append rows of a language-model job: place in the part, tier, and values of the columns.

        part: number of records before the part.
        """
        for place, tier, values in rows:
            line = json.dumps([part, place, tier, *values]).encode() + b"\n"
            self._text_bytes += self._text.write(line)
            self._checks[1].update(line)
            self._tiers[tier] += 1
            self._rows += 1

    def here(self, place: int, digest: str, *, open_rows: int | None = None, open_digest: str = "") -> Checkpoint:
        """Return a checkpoint of the rows so far, without writing it. place, digest: of the records read so far.

        open_rows, open_digest: of a part in progress, see `Checkpoint`.
        """
        tiers = self._tiers
        vectors, text = (check.hexdigest() for check in self._checks)
        return Checkpoint(
            place, digest, self._rows, self._text_bytes, tiers["exact"], tiers["near"], tiers["miss"], sure=False,
            vectors_check=vectors, text_check=text, vectors=None if self.form == "vector" else self._count,
            prefix=tiers["prefix"] if self.form == "rows" else None, open_rows=open_rows, open_digest=open_digest,
        )  # fmt: skip

    def checkpoint(self, new: Checkpoint) -> None:
        """Make all rows durable, then write the checkpoint. `commit_done`, or the state of the store, makes it sure."""
        for file in (self._vectors, self._text):
            file.flush()
            os.fsync(file.fileno())
        self.checkpoints = [*[checkpoint for checkpoint in self.checkpoints if checkpoint.sure][-1:], new]
        self._write()

    def commit_done(self) -> None:
        """Mark the last checkpoint as sure: the store has committed its entries."""
        self.checkpoints = [replace(self.checkpoints[-1], sure=True)]
        self._write()

    def back_to(self, at: Checkpoint) -> None:
        """Truncate the rows to those of a checkpoint. CorpusError when these do not match its checksums."""
        count = at.rows if self.form == "vector" else at.vectors or 0
        sizes = {_VECTORS: 4 * self.width * count, _TEXT: at.text_bytes}
        checks = {}
        for file, (name, size) in zip((self._vectors, self._text), sizes.items(), strict=True):
            if os.fstat(file.fileno()).st_size < size:
                raise CorpusError(f"{self.folder / name} is shorter than its journal says; remove {self.folder}")
            checks[name] = _checksum(file.fileno(), size)
            os.ftruncate(file.fileno(), size)
        self._checks = checks[_VECTORS], checks[_TEXT]
        for name, check, wanted in zip(sizes, self._checks, (at.vectors_check, at.text_check), strict=True):
            if check.hexdigest() != wanted:
                raise self._damage(name)
        self._rows, self._count, self._text_bytes = at.rows, count, at.text_bytes
        self._tiers = at.tiers
        self.checkpoints = [replace(at, sure=True)]

    def _damage(self, name: str) -> CorpusError:
        return CorpusError(
            f"{self.folder / name} does not agree with its checksum: it is damaged, or of another run. Remove "
            f"{self.folder} and run again; the computed results are in the store"
        )

    def results(self) -> Iterator[JournalRow]:
        """Read all rows, one at a time. CorpusError, at the latest after the last, when a checksum does not match."""
        self._vectors.flush()
        check = xxhash.xxh3_128()
        with os.fdopen(self._private.open(_VECTORS, os.O_RDONLY), "rb", _BUFFER) as vectors:
            for columns in self._lines():
                try:
                    id, *provenance = columns
                    count = 1 if self.form == "vector" else provenance.pop()
                    if type(count) is not int or not 0 <= count <= self._count:
                        raise ValueError
                    vector = vectors.read(4 * self.width * count)
                    row = JournalRow(id, np.frombuffer(vector, "<f4"), *provenance)
                except (ValueError, TypeError, IndexError):
                    raise self._damage(_TEXT) from None
                check.update(vector)
                if len(row.output) != self.width * count:
                    raise self._damage(_VECTORS)
                yield row if self.form == "vector" else replace(row, output=row.output.reshape(count, self.width))
        if check.digest() != self._checks[0].digest():
            raise self._damage(_VECTORS)

    def job_rows(self) -> Iterator[list[Any]]:
        """Read the values of all rows of a language-model job, in the order of the corpus. Errors as `results`."""
        for _, rows in groupby(self._lines(), key=itemgetter(0)):
            for _, _, _, *values in sorted(rows, key=itemgetter(1)):
                yield values

    def job_places(self, rows: int) -> list[int]:
        """Read the places of the last rows of a language-model job in their part. Errors as `results`."""
        return [line[1] for line in islice(self._lines(), self._rows - rows, None)]

    def _lines(self) -> Iterator[list[Any]]:
        """Read the lines of rows.jsonl. CorpusError, at the latest after the last, when its checksum does not match."""
        self._text.flush()
        check = xxhash.xxh3_128()
        with os.fdopen(self._private.open(_TEXT, os.O_RDONLY), "rb", _BUFFER) as text:
            for _ in range(self._rows):
                line = text.readline()
                check.update(line)
                try:
                    columns = json.loads(line)
                    if not isinstance(columns, list) or (self.form == "rows" and len(columns) < 4):
                        raise ValueError
                except ValueError:
                    raise self._damage(_TEXT) from None
                yield columns
        if check.digest() != self._checks[1].digest():
            raise self._damage(_TEXT)

    def close(self) -> None:
        for file in (self._vectors, self._text):
            with suppress(OSError):  # a full disk: rows still in the buffer are in no checkpoint
                file.close()
        self._private.close()

    def remove(self) -> None:
        """Remove the folder, and close the journal; called once the result file is written."""
        _remove(self._private)
        self.close()

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "facts": self._facts,
            "checkpoints": [checkpoint.as_dict() for checkpoint in self.checkpoints],
        }
        self._private.replace("journal.json", _encode(content))


def discard(out: Path) -> None:
    """Remove the unfinished run of `out`, if there is one. CorpusError when another process has locked it."""
    path = beside(out)
    if not os.path.lexists(path / "journal.json"):
        return
    with _as_corpus_error(path):
        folder = PrivateFolder(path)
        try:
            with _lock(folder, out):
                log.warning("an unfinished run in %s is discarded; use resume to continue such a run", path)
                _remove(folder)
        finally:
            folder.close()


@contextmanager
def _as_corpus_error(path: Path) -> Iterator[None]:
    """Turn OSErrors inside the block into a CorpusError."""
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"the unfinished run in {path} cannot be read or written ({error.strerror or error}); repair that, or "
            "remove that folder and run again"
        ) from error


def _check_facts(folder: PrivateFolder, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """ConfigError unless the recorded facts of an unfinished run are those of this run."""
    different = [name for name in {**recorded, **facts} if recorded.get(name) != facts.get(name)]
    if different:
        seen = ", ".join(f"{name}={recorded.get(name)!r:.60}, now {facts.get(name)!r:.60}" for name in different)
        raise ConfigError(
            f"the unfinished run in {folder.path} is another one ({seen}); resume it with the same settings, or "
            "remove that folder to begin anew"
        )


def _checksum(descriptor: int, size: int) -> xxhash.xxh3_128:
    """Return the running checksum of the first `size` bytes of a file; it can be updated with further bytes."""
    check, at = xxhash.xxh3_128(), 0
    while at < size and (part := os.pread(descriptor, min(_BUFFER, size - at), at)):
        check.update(part)
        at += len(part)
    return check


def _encode(content: Mapping[str, Any]) -> bytes:
    """Encode a journal as JSON, with the checksum of the other fields (xxh3-128, hexadecimal) in `check`."""
    check = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps({**content, "check": check}).encode()


def _read(folder: PrivateFolder) -> dict[str, Any]:
    """Read and verify a journal. CorpusError when it is damaged."""
    path = folder.path / "journal.json"
    try:
        raw = folder.read("journal.json", _LIMIT)
        content: dict[str, Any] = json.loads(raw)
        del content["check"]
        if _encode(content) != raw:
            raise ValueError
        if content["format"] != FORMAT or not content["checkpoints"]:
            raise ValueError
        _ = [Checkpoint(**fields) for fields in content["checkpoints"]], dict(content["facts"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(
            f"{path} cannot be read as the journal of a run: it is damaged, or of another version of LLMCache. Remove "
            f"{folder.path} and run again; the computed results are in the store"
        ) from error
    return content


def _empty(folder: PrivateFolder) -> None:
    for name in FILES:
        if name != "lock":
            folder.remove(name)


def _remove(folder: PrivateFolder) -> None:
    """Remove the files of a run, journal.json first (without it the others are ignored), then the folder."""
    for name in FILES:
        folder.remove(name)
    with suppress(OSError):  # the folder has other files
        os.rmdir(folder.path)


def _lock(folder: PrivateFolder, out: Path) -> IO[bytes]:
    lock = folder.lock("lock")
    if lock is None:
        raise CorpusError(f"another run is writing {out}; wait for it, or choose another name")
    return lock

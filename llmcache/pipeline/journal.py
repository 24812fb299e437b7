"""The unfinished results of a run, and how far they go: a folder beside the result file, until that is whole.

    <name>.unfinished/journal.json   what is run, and the last two checkpoints
                      vectors.f32    outputs, float32 little-endian, row after row
                      rows.jsonl     the rest of each row, one JSON array per line
                      lock           held while a run is at work

Rows are only added. A checkpoint says how many of them count, and has checksums (xxh3-128) of these; what lies behind
is cut off when the run goes on. The journal has a checksum of its own. The folder has mode 0700 and its files
0600, and no link in it is followed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.stats.unfinished import FILES, beside
from llmcache.private_files import PrivateFolder

__all__ = ["Checkpoint", "Journal", "Row", "beside", "discard"]

log = logging.getLogger("llmcache")

FORMAT = 2
_BUFFER = 1 << 20
_LIMIT = 1 << 20  # bytes of a journal
_VECTORS, _TEXT = "vectors.f32", "rows.jsonl"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a run is. place: records of the corpus that were read; digest: of these. rows: results that count.

    text_bytes: of rows.jsonl. exact, near, misses: of the rows. writer, committed: which writer of the store made the
    entries of this checkpoint durable, and how many segments it had committed before; sure: whether it has done so.
    vectors_check, text_check: checksums of the rows that count in vectors.f32 and rows.jsonl, xxh3-128 in hexadecimal.
    """

    place: int = 0
    digest: str = ""
    rows: int = 0
    text_bytes: int = 0
    exact: int = 0
    near: int = 0
    misses: int = 0
    writer: str = ""
    committed: int = 0
    sure: bool = True
    vectors_check: str = xxhash.xxh3_128(b"").hexdigest()
    text_check: str = xxhash.xxh3_128(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Row:
    """A result read back. The same fields as a Result; output: float32 [width]."""

    id: str
    output: NDArray[np.float32]
    tier: str
    layer: str | None
    source: str | None
    similarity: float | None
    consensus: float | None
    audited: bool


class Journal:
    """Open in one process at a time. checkpoints: the last one, and before it the last one that is sure."""

    def __init__(
        self, folder: PrivateFolder, facts: Mapping[str, Any], width: int, checkpoints: list[Checkpoint]
    ) -> None:
        self.folder, self._private, self._facts, self.width = folder.path, folder, dict(facts), width
        self.checkpoints = checkpoints
        self._rows = 0
        self._text_bytes = 0
        self._tiers = {"exact": 0, "near": 0, "miss": 0}
        self._checks = xxhash.xxh3_128(), xxhash.xxh3_128()
        appending = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._vectors: IO[bytes] = os.fdopen(folder.open(_VECTORS, appending), "ab", _BUFFER)
        try:
            self._text: IO[bytes] = os.fdopen(folder.open(_TEXT, appending), "ab", _BUFFER)
        except BaseException:
            self._vectors.close()
            raise

    @classmethod
    def open(cls, out: Path, facts: Mapping[str, Any], width: int, *, resume: bool) -> tuple[Journal, IO[bytes]]:
        """The journal of the run that writes `out`, and its lock, to be closed after it.

        facts: what is run, by name, as JSON has it. resume: go on with one that is there; without it that is thrown
        away. CorpusError when another process is at work on it, it is damaged, or its files are links or another
        user's. ConfigError, naming what differs, when it is of another run.
        """
        facts = {"out": out.suffix.lower(), **facts}
        with _said_plainly(beside(out)):
            folder = PrivateFolder(beside(out))
            try:
                return cls._opened(folder, out, facts, width, resume=resume)
            except BaseException:
                folder.close()
                raise

    @classmethod
    def _opened(
        cls, folder: PrivateFolder, out: Path, facts: Mapping[str, Any], width: int, *, resume: bool
    ) -> tuple[Journal, IO[bytes]]:
        lock = _locked(folder, out)
        try:
            if folder.has("journal.json") and not resume:
                log.warning("an unfinished run in %s is thrown away; resume it to go on with it", folder.path)
                _emptied(folder)
            known = _read(folder) if folder.has("journal.json") else None
            if known is None:
                _emptied(folder)
            elif other := [name for name in {**known["facts"], **facts} if known["facts"].get(name) != facts.get(name)]:
                seen = ", ".join(
                    f"{name}={known['facts'].get(name)!r:.60}, now {facts.get(name)!r:.60}" for name in other
                )
                raise ConfigError(
                    f"the unfinished run in {folder.path} is another one ({seen}); finish it as it was begun, or "
                    "remove that folder to begin anew"
                )
            checkpoints = [Checkpoint(**one) for one in known["checkpoints"]] if known else [Checkpoint()]
            return cls(folder, facts, width, checkpoints), lock
        except BaseException:
            lock.close()
            raise

    def add(self, results: Iterable[Result]) -> None:
        """Write results behind the others."""
        for one in results:
            numbers = (None if number is None else float(number) for number in (one.similarity, one.consensus))
            line = json.dumps([one.id, one.tier, one.layer, one.source, *numbers, one.audited]).encode() + b"\n"
            vector = np.asarray(one.output, "<f4").tobytes()
            self._text_bytes += self._text.write(line)
            self._vectors.write(vector)
            self._checks[0].update(vector)
            self._checks[1].update(line)
            self._tiers[one.tier] += 1
            self._rows += 1

    def here(self, place: int, digest: str) -> Checkpoint:
        """What would be a checkpoint at this place of the corpus, with the rows that were added so far."""
        tiers = self._tiers
        vectors, text = (one.hexdigest() for one in self._checks)
        return Checkpoint(
            place, digest, self._rows, self._text_bytes, tiers["exact"], tiers["near"], tiers["miss"], sure=False,
            vectors_check=vectors, text_check=text,
        )  # fmt: skip

    def checkpoint(self, new: Checkpoint) -> None:
        """Make all rows durable, and say so; it is sure once `commit_done` was called, or the store shows it."""
        for file in (self._vectors, self._text):
            file.flush()
            os.fsync(file.fileno())
        self.checkpoints = [*[one for one in self.checkpoints if one.sure][-1:], new]
        self._write()

    def commit_done(self) -> None:
        """The store has what the last checkpoint needs."""
        self.checkpoints = [replace(self.checkpoints[-1], sure=True)]
        self._write()

    def back_to(self, at: Checkpoint) -> None:
        """Cut off everything behind a checkpoint. CorpusError when what is before it is not what was written."""
        sizes = {_VECTORS: 4 * self.width * at.rows, _TEXT: at.text_bytes}
        checks = {}
        for file, (name, size) in zip((self._vectors, self._text), sizes.items(), strict=True):
            if os.fstat(file.fileno()).st_size < size:
                raise CorpusError(f"{self.folder / name} is shorter than its journal says; remove {self.folder}")
            checks[name] = _check_of(file.fileno(), size)
            os.ftruncate(file.fileno(), size)
        self._checks = checks[_VECTORS], checks[_TEXT]
        for name, check, wanted in zip(sizes, self._checks, (at.vectors_check, at.text_check), strict=True):
            if check.hexdigest() != wanted:
                raise self._damage(name)
        self._rows, self._text_bytes = at.rows, at.text_bytes
        self._tiers = {"exact": at.exact, "near": at.near, "miss": at.misses}
        self.checkpoints = [replace(at, sure=True)]

    def _damage(self, name: str) -> CorpusError:
        return CorpusError(
            f"{self.folder / name} does not agree with its checksum: it is damaged, or of another run. Remove "
            f"{self.folder} and run again; what was computed is in the store"
        )

    def results(self) -> Iterator[Row]:
        """All rows, read back one after the other. CorpusError at the end when they are not what was written."""
        for file in (self._vectors, self._text):
            file.flush()
        checks = xxhash.xxh3_128(), xxhash.xxh3_128()
        with (
            os.fdopen(self._private.open(_VECTORS, os.O_RDONLY), "rb", _BUFFER) as vectors,
            os.fdopen(self._private.open(_TEXT, os.O_RDONLY), "rb", _BUFFER) as text,
        ):
            for _ in range(self._rows):
                line, vector = text.readline(), vectors.read(4 * self.width)
                checks[0].update(vector)
                checks[1].update(line)
                try:
                    id, *provenance = json.loads(line)
                    row = Row(id, np.frombuffer(vector, "<f4"), *provenance)
                except (ValueError, TypeError):
                    raise self._damage(_TEXT) from None
                if len(row.output) != self.width:
                    raise self._damage(_VECTORS)
                yield row
        for name, check, wanted in zip((_VECTORS, _TEXT), checks, self._checks, strict=True):
            if check.digest() != wanted.digest():
                raise self._damage(name)

    def close(self) -> None:
        for file in (self._vectors, self._text):
            with suppress(OSError):  # a full disk: what is in the buffer does not count
                file.close()
        self._private.close()

    def remove(self) -> None:
        """The results are where they belong; the folder goes."""
        _removed(self._private)
        self.close()

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "facts": self._facts,
            "checkpoints": [asdict(one) for one in self.checkpoints],
        }
        self._private.replace("journal.json", _encoded(content))


def discard(out: Path) -> None:
    """Remove the unfinished run of `out`, if there is one. CorpusError when another process is at work on it."""
    path = beside(out)
    if not os.path.lexists(path / "journal.json"):
        return
    with _said_plainly(path):
        folder = PrivateFolder(path)
        try:
            with _locked(folder, out):
                log.warning("an unfinished run in %s is thrown away; resume it to go on with it", path)
                _removed(folder)
        finally:
            folder.close()


@contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"the unfinished run in {path} cannot be read or written ({error.strerror or error}); mend that, or remove "
            "that folder and run again"
        ) from error


def _check_of(descriptor: int, size: int) -> xxhash.xxh3_128:
    """Running checksum of the first `size` bytes of a file, as if they had just been written."""
    check, at = xxhash.xxh3_128(), 0
    while at < size and (part := os.pread(descriptor, min(_BUFFER, size - at), at)):
        check.update(part)
        at += len(part)
    return check


def _encoded(content: Mapping[str, Any]) -> bytes:
    """A journal as JSON, with a checksum of the rest (xxh3-128, hexadecimal) in the field `check`."""
    check = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps({**content, "check": check}).encode()


def _read(folder: PrivateFolder) -> dict[str, Any]:
    path = folder.path / "journal.json"
    try:
        raw = folder.read("journal.json", _LIMIT)
        found: dict[str, Any] = json.loads(raw)
        del found["check"]
        if _encoded(found) != raw:
            raise ValueError
        if found["format"] != FORMAT or not found["checkpoints"]:
            raise ValueError
        _ = [Checkpoint(**one) for one in found["checkpoints"]], dict(found["facts"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(
            f"{path} cannot be read as the journal of a run: it is damaged, or of another version of LLMCache. Remove "
            f"{folder.path} and run again; what was computed is in the store"
        ) from error
    return found


def _emptied(folder: PrivateFolder) -> None:
    for name in FILES:
        if name != "lock":
            folder.remove(name)


def _removed(folder: PrivateFolder) -> None:
    """Remove the files of a run, the journal first: without it the rest counts as none; then the folder."""
    for name in FILES:
        folder.remove(name)
    with suppress(OSError):  # files of others are in it
        os.rmdir(folder.path)


def _locked(folder: PrivateFolder, out: Path) -> IO[bytes]:
    lock = folder.lock("lock")
    if lock is None:
        raise CorpusError(f"another run is writing {out}; wait for it, or choose another name")
    return lock

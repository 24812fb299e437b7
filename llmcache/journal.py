"""The unfinished results of a run, and how far they go: a folder beside the result file, until that is whole.

    <name>.unfinished/journal.json   what is run, and the last two checkpoints
                      vectors.f32    outputs, float32 little-endian, row after row
                      rows.jsonl     the rest of each row, one JSON array per line
                      lock           held while a run is at work

Rows are only added. A checkpoint says how many of them count; what lies behind is cut off when the run goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.durable import sync_name
from llmcache.provenance import Result

log = logging.getLogger("llmcache")

FORMAT = 1
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a run is. place: records of the corpus that were read; digest: of these. rows: results that count.

    text_bytes: of rows.jsonl. exact, near, misses: of the rows. writer, committed: which writer of the store made the
    entries of this checkpoint durable, and how many segments it had committed before; sure: whether it has done so.
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

    def __init__(self, folder: Path, facts: Mapping[str, Any], width: int, checkpoints: list[Checkpoint]) -> None:
        self.folder, self._facts, self.width = folder, dict(facts), width
        self.checkpoints = checkpoints
        self._rows = 0
        self._text_bytes = 0
        self._tiers = {"exact": 0, "near": 0, "miss": 0}
        self._vectors: IO[bytes] = open(folder / "vectors.f32", "ab", _BUFFER)  # noqa: SIM115  # closed by close()
        self._text: IO[bytes] = open(folder / "rows.jsonl", "ab", _BUFFER)  # noqa: SIM115

    @classmethod
    def open(cls, out: Path, facts: Mapping[str, Any], width: int, *, resume: bool) -> tuple[Journal, IO[bytes]]:
        """The journal of the run that writes `out`, and its lock, to be closed after it.

        facts: what is run, by name, as JSON has it. resume: go on with one that is there; without it that is thrown
        away. CorpusError when another process is at work on it, or it cannot be read. ConfigError, naming what
        differs, when it is of another run.
        """
        folder = beside(out)
        facts = {"out": out.suffix.lower(), **facts}
        folder.mkdir(exist_ok=True)
        lock = _locked(folder, out)
        try:
            made = folder / "journal.json"
            if made.exists() and not resume:
                log.warning("an unfinished run in %s is thrown away; resume it to go on with it", folder)
                _emptied(folder)
            known = _read(made) if made.exists() else None
            if known is None:
                _emptied(folder)
            elif other := [name for name in {**known["facts"], **facts} if known["facts"].get(name) != facts.get(name)]:
                seen = ", ".join(
                    f"{name}={known['facts'].get(name)!r:.60}, now {facts.get(name)!r:.60}" for name in other
                )
                raise ConfigError(
                    f"the unfinished run in {folder} is another one ({seen}); finish it as it was begun, or remove "
                    "that folder to begin anew"
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
            row = [one.id, one.tier, one.layer, one.source, *numbers, one.audited]
            self._text_bytes += self._text.write(json.dumps(row).encode() + b"\n")
            self._vectors.write(np.asarray(one.output, "<f4").tobytes())
            self._tiers[one.tier] += 1
            self._rows += 1

    def here(self, place: int, digest: str) -> Checkpoint:
        """What would be a checkpoint at this place of the corpus, with the rows that were added so far."""
        tiers = self._tiers
        return Checkpoint(
            place, digest, self._rows, self._text_bytes, tiers["exact"], tiers["near"], tiers["miss"], sure=False
        )

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
        """Cut off everything behind a checkpoint. CorpusError when less than that is there."""
        sizes = {"vectors.f32": 4 * self.width * at.rows, "rows.jsonl": at.text_bytes}
        for name, size in sizes.items():
            if (self.folder / name).stat().st_size < size:
                raise CorpusError(f"{self.folder / name} is shorter than its journal says; remove {self.folder}")
            os.truncate(self.folder / name, size)
        self._rows, self._text_bytes = at.rows, at.text_bytes
        self._tiers = {"exact": at.exact, "near": at.near, "miss": at.misses}
        self.checkpoints = [replace(at, sure=True)]

    def results(self) -> Iterator[Row]:
        """All rows, read back one after the other."""
        for file in (self._vectors, self._text):
            file.flush()
        with open(self.folder / "vectors.f32", "rb") as vectors, open(self.folder / "rows.jsonl", "rb") as text:
            for line in text:
                id, *provenance = json.loads(line)
                yield Row(id, np.frombuffer(vectors.read(4 * self.width), "<f4"), *provenance)

    def close(self) -> None:
        for file in (self._vectors, self._text):
            with suppress(OSError):  # a full disk: what is in the buffer does not count
                file.close()

    def remove(self) -> None:
        """The results are where they belong; the folder goes."""
        self.close()
        (self.folder / "journal.json").unlink()  # first: a folder without it counts as none
        shutil.rmtree(self.folder)

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "facts": self._facts,
            "checkpoints": [asdict(one) for one in self.checkpoints],
        }
        partial = self.folder / "journal.json.partial"
        with open(partial, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "journal.json")
        sync_name(self.folder)


def discard(out: Path) -> None:
    """Remove the unfinished run of `out`, if there is one. CorpusError when another process is at work on it."""
    folder = beside(out)
    if (folder / "journal.json").exists():
        with _locked(folder, out):
            log.warning("an unfinished run in %s is thrown away; resume it to go on with it", folder)
            _emptied(folder)
            shutil.rmtree(folder)


def beside(out: Path) -> Path:
    """The folder of the unfinished run that writes `out`."""
    return out.with_name(f"{out.stem}.unfinished")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["format"] != FORMAT or not found["checkpoints"]:
            raise ValueError
        _ = [Checkpoint(**one) for one in found["checkpoints"]], dict(found["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} cannot be read as the journal of a run; remove {path.parent}") from error
    return found


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name}={old.get(name)!r:.60}, now {new.get(name)!r:.60}" for name in names)


def _emptied(folder: Path) -> None:
    for name in ("journal.json", "vectors.f32", "rows.jsonl", "journal.json.partial"):
        (folder / name).unlink(missing_ok=True)


def _locked(folder: Path, out: Path) -> IO[bytes]:
    lock = open(folder / "lock", "wb")  # noqa: SIM115  # held until the run ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise CorpusError(f"another run is writing {out}; wait for it, or choose another name") from None
    except OSError:
        pass  # a file system without locks
    return lock

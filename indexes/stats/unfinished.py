"""Registry of unfinished pipeline runs, so that a purge also reaches their partial results.

`stat/<32 hex digits>.run` is JSON with the folder of the run and its namespace. It is written when a run starts, and
removed when the run's results are complete or discarded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmcache.indexes.errors import Busy, ConfigError, SnapshotDamaged
from llmcache.indexes.files import locks
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest_json import strict_json
from llmcache.indexes.format.write_once import write_whole

log = logging.getLogger("llmcache")

ENDING = ".unfinished"
FILES = ("journal.json", "vectors.f32", "rows.jsonl", "journal.json.partial", "lock")
"""Files that a run makes in its folder; `discard` removes only these."""
RESULTS = (".parquet", ".npy", ".jsonl")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """Unfinished run. folder: of its partial results. namespace: None if unknown."""

    folder: Path
    namespace: str | None = None


def beside(out: Path) -> Path:
    """Return the folder of the unfinished run whose result file is `out`."""
    return out.with_name(f"{out.stem}{ENDING}")


def note(folder: Folder, run: Run) -> None:
    """Register a run with the store. A failure is logged and ignored: an unwritable store has no entries of the run."""
    content = json.dumps({"folder": str(run.folder), "namespace": run.namespace}).encode()
    temporary = f"stat/t-{uuid.uuid4().hex}"
    try:
        write_whole(folder, temporary, [content])
        folder.replace(temporary, _name(run.folder))
    except OSError as error:
        log.info("the unfinished run in %s was not registered with the store: %s", run.folder, error)


def forget(folder: Folder, run: Run) -> None:
    """Remove a run that has ended or was discarded from the registry."""
    with suppress(OSError):
        folder.remove(_name(run.folder))


def _name(folder: Path) -> str:
    return f"stat/{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.run"


def runs(folder: Folder, namespace: str | None, given: Iterable[Path]) -> list[Run]:
    """List the registered unfinished runs of a namespace (None: of all), and those given by path.

    given: folders of runs, or the result files that they write. ConfigError for a path that is neither.
    """
    by_folder = {
        run.folder: run for run in _registered(folder) if namespace is None or run.namespace in {None, namespace}
    }
    for path in given:
        where = path if path.name.endswith(ENDING) else beside(path) if path.suffix.lower() in RESULTS else None
        if where is None:
            raise ConfigError(
                f"{path} is not an unfinished run; give its folder (*{ENDING}) or the result file it writes"
            )
        where = where.absolute()
        by_folder.setdefault(where, Run(where))
    return list(by_folder.values())


def _registered(folder: Folder) -> list[Run]:
    noted = []
    for name in folder.names("stat"):
        if name.endswith(".run"):
            try:
                raw = strict_json(folder.read(f"stat/{name}", _LIMIT))
                where = Path(str(raw["folder"]))
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SnapshotDamaged):
                continue
            if where.is_absolute() and where.name.endswith(ENDING):
                space = raw.get("namespace")
                noted.append(Run(where, space if isinstance(space, str) else None))
    return noted


def discard(folder: Folder, run: Run) -> bool:
    """Remove an unfinished run and its partial result files. Returns whether any of them existed.

    Removes only files that a run makes, and follows no links. Busy while the run is active.
    """
    removed = [_empty_folder(run), *(_remove_partial(path) for path in _partials(run))]
    forget(folder, run)
    return any(removed)


def is_there(run: Run) -> bool:
    """Return whether any file of an unfinished run exists."""
    return any(map(os.path.lexists, (run.folder, *_partials(run))))


def _partials(run: Run) -> list[Path]:
    """List the files that a killed writer of the run's results may have left."""
    stem = run.folder.name.removesuffix(ENDING)
    names = [f"{stem}{ending}{more}.partial" for ending in RESULTS for more in ("", ".jsonl")]
    return [run.folder.with_name(name) for name in names]


def _empty_folder(run: Run) -> bool:
    try:
        descriptor = os.open(run.folder, _FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        with suppress(FileNotFoundError):
            lock = os.open("lock", _LOCK, dir_fd=descriptor)
            try:
                if not locks.take(lock):
                    raise Busy(f"the run in {run.folder} is active; stop it, and purge again")
            finally:
                os.close(lock)
        for name in FILES:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with suppress(OSError):  # the folder has foreign files
        os.rmdir(run.folder)
    return True


def _remove_partial(path: Path) -> bool:
    """Remove a partial file. Returns whether it existed. Busy while its writer is active."""
    try:
        descriptor = os.open(path, _LOCK)
    except OSError:
        return False  # missing, a link, or not this user's
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        if not locks.take(descriptor):
            raise Busy(f"a run is writing {path}; stop it, and purge again")
        os.unlink(path)
        return True
    finally:
        os.close(descriptor)

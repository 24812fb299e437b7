"""Snapshots: a store's newest generation in a new folder, which is a store itself.

A snapshot can be copied with cp or rsync, opened in place, or loaded into a new store with all bytes checked.
"""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.create import found
from llmcache.indexes.errors import Busy, LLMCacheError, SnapshotDamaged, StoreFenced, StoreFull
from llmcache.indexes.eviction.budget import waiting_lock
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.new_folder import new_folder
from llmcache.indexes.format.manifest import BankFacts, Manifest
from llmcache.indexes.format.write_once import sync_files
from llmcache.indexes.maintenance.transfer import carry, carry_segment, files_of
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")

_ROUNDS = 20  # attempts of a transfer when files of the source are removed meanwhile
_FREE = 3  # attempts without the maintainer lock, which keeps other processes from removing files


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Result of a transfer. generation: of the source. bytes: of all files. linked: bytes of hard-linked files."""

    path: str
    generation: int
    entries: int
    files: int
    bytes: int
    linked: int


def save(
    store: str | os.PathLike[str], target: str | os.PathLike[str], *, copy: bool = False, dry_run: bool = False
) -> Snapshot:
    """Make a snapshot of the store's newest generation in the new folder `target`.

    On the same file system the files are hard-linked, which takes no space and no time; with `copy`, or elsewhere, they
    are copied and checked on the way. The snapshot has the files of the newest manifest, without counters. It appears
    complete or not at all, and the store is not changed.
    SnapshotDamaged when damage is found; StoreFull or LLMCacheError when the target cannot be written.
    """
    return _transfer(store, target, copy=copy, check=False, dry_run=dry_run)


def load(
    snapshot: str | os.PathLike[str], target: str | os.PathLike[str], *, copy: bool = False, dry_run: bool = False
) -> Snapshot:
    """Make the new store `target` from a snapshot, reading and checking all bytes. Otherwise like `save`."""
    return _transfer(snapshot, target, copy=copy, check=True, dry_run=dry_run)


def _transfer(
    path: str | os.PathLike[str], target: str | os.PathLike[str], *, copy: bool, check: bool, dry_run: bool
) -> Snapshot:
    check_free(Path(target))
    with closing(Store.open(path, uses=False)) as store:
        where = Path(target)
        return transfer(store, where, lambda: new_folder(where), copy=copy, check=check, dry_run=dry_run)


def transfer(
    store: Store,
    target: Path,
    new: Callable[[], AbstractContextManager[Folder]],
    *,
    copy: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> Snapshot:
    """Transfer an open store, as `save`, or with `check` as `load`, into the folder that `new` makes for `target`."""
    for attempt in range(_ROUNDS):
        try:
            with nullcontext() if attempt < _FREE or dry_run else _maintainer_lock(store):
                if attempt >= _FREE:  # under the lock, files of the newest generation are not removed
                    store.reload()
                linked = 0 if dry_run else _make_copy(store, target, new, link=not copy, check=check)
            break
        except SnapshotDamaged as error:
            before = store.manifest.generation
            if store.reload().generation == before or attempt == _ROUNDS - 1:
                raise advised(error, store.folder) from error
    files = list(files_of(store.manifest))
    rows = sum(segment.rows for bank in banks(store.manifest).values() for segment in bank.segments)
    size = sum(file.size for file in files)
    return Snapshot(os.fspath(target), store.manifest.generation, rows, len(files), size, linked)


@contextmanager
def _maintainer_lock(store: Store) -> Iterator[None]:
    """Hold the maintainer lock inside the block, so that no process evicts, compacts or collects, if possible."""
    with ExitStack() as stack:
        try:
            stack.enter_context(waiting_lock(store.folder))
        except (Busy, OSError) as error:  # another process has the lock, or the folder is read-only: try without it
            log.info("%s is copied without the maintainer lock: %s", store.folder.path, error)
        yield


def _make_copy(
    store: Store, target: Path, new: Callable[[], AbstractContextManager[Folder]], *, link: bool, check: bool
) -> int:
    linked = 0
    with failing(target), new() as folder:
        found(folder)
        for facts in banks(store.manifest).values():
            for segment in facts.segments:
                linked += carry_segment(store.folder, folder, segment, segment.id, link=link, check=check)[1]
            for file in files_of((facts.projection, facts.index)):
                carried = carry(store.folder, folder, file, file.name, link=link, check=check)
                linked += file.size if carried else 0
        sync_files(folder, [file_facts.name for file_facts in files_of(store.manifest)])
        for sub in ("seg", "idx"):
            folder.sync_folder(sub)
        publishing.commit(folder, uuid.uuid4().hex, lambda _: replace(store.manifest, skipped=()))
    return linked


# -- what transfers share -----------------------------------------------------------------------------------


def banks(manifest: Manifest) -> dict[tuple[str, str], BankFacts]:
    """Return all banks, by namespace and name."""
    return {
        (namespace, name): facts
        for namespace, space in sorted(manifest.namespaces.items())
        for name, facts in sorted(space.banks.items())
    }


def check_free(target: Path) -> None:
    """Check that a new folder can be made at this path. LLMCacheError when there is anything but an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise LLMCacheError(f"{target} exists and is not a folder; give the path of a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise LLMCacheError(f"{target} exists and is not empty; give the path of a new folder")


def advised(error: SnapshotDamaged, folder: Folder) -> SnapshotDamaged:
    """Return the error with the store's path and advice added."""
    return SnapshotDamaged(
        f"{folder.path}: {error}; `llmcache snapshot verify {folder.path}` lists all damage, `llmcache repair` sets it "
        "aside"
    )


@contextmanager
def failing(target: Path) -> Iterator[None]:
    """Turn disk errors inside the block into LLMCacheError or StoreFull, which say that the target is unchanged."""
    try:
        yield
    except (OSError, StoreFenced) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):  # the store is read-only
            raise
        code = cause.errno
        reason = f"{target} was not written ({os.strerror(code or 0)}); everything is as it was"
        if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreFull(f"{reason}; free some space and try again") from error
        if code in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise LLMCacheError(
                f"{reason}: another program made it meanwhile; give the path of a new folder"
            ) from error
        raise LLMCacheError(f"{reason}; check the path and its rights") from error

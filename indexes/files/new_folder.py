"""Atomically created folders: snapshots and results of merges get their name when they are complete."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmcache.indexes.files import locks
from llmcache.indexes.files.durable import FOLDER, make_durably
from llmcache.indexes.files.folder import Folder


@contextmanager
def new_folder(target: Path) -> Iterator[Folder]:
    """Yield a folder to fill, which is renamed to `target` when the block ends and removed when the block fails.

    It is created next to the target as `.<name>-<id>.partial` and locked while its process runs. The next call for the
    same target removes folders of killed processes. OSError when the target exists and is not empty by then.
    """
    target = target.parent.resolve() / target.name
    make_durably(target.parent)
    _sweep(target)
    built = target.parent / f".{target.name}-{uuid.uuid4().hex}.partial"
    try:
        folder = Folder(built, create=True)
    except BaseException:
        shutil.rmtree(built, ignore_errors=True)
        raise
    lock = _locked(built)
    try:
        with filled(folder, target):
            yield folder
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def filled(folder: Folder, target: Path) -> Iterator[Folder]:
    """Yield the folder to fill, rename it to `target` when the block ends, and remove it when the block fails."""
    try:
        yield folder
        for sub in ("seg", "idx", ""):
            folder.sync_folder(sub)
        folder.move_to(target)
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.close()


def _sweep(target: Path) -> None:
    """Remove partial folders that killed processes left for this target."""
    partial_name = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{32}}\.partial")
    for name in os.listdir(target.parent):
        path = target.parent / name
        if partial_name.fullmatch(name) and path.is_dir() and not path.is_symlink():
            lock = _locked(path)
            if lock is not None:  # None: its process still runs, or the file system has no locks
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """Lock a folder. Returns the descriptor that holds the lock; None if it is taken or locks are not supported."""
    try:
        descriptor = os.open(path, FOLDER)
    except OSError:
        return None
    with suppress(OSError):
        if locks.take(descriptor, supported=True):
            return descriptor
    os.close(descriptor)
    return None

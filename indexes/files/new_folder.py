"""Folders that get their name when they are whole: snapshots, and the results of merges."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcache.indexes.files.durable import FOLDER, make_durably
from llmcache.indexes.files.folder import Folder


@contextmanager
def new_folder(target: Path) -> Iterator[Folder]:
    """A folder to fill, which becomes `target` when the block ends, or goes without a trace when it fails.

    It is made beside the target as `.<name>-<id>.partial` and locked as long as its maker lives. What a killed maker
    left is removed by the next one. OSError when something that is not empty has the target's name by then.
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
    """A new folder to fill, which becomes `target` when the block ends, or goes without a trace when it fails."""
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
    """Remove what killed makers of this target left."""
    mine = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{32}}\.partial")
    for name in os.listdir(target.parent):
        path = target.parent / name
        if mine.fullmatch(name) and path.is_dir() and not path.is_symlink():
            lock = _locked(path)
            if lock is not None:  # None: its maker is at work, or there are no locks here
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """Descriptor that holds the lock of a folder; None when another has it, or the file system has no locks."""
    try:
        descriptor = os.open(path, FOLDER)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

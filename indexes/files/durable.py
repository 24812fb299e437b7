"""Durable folder names: created and renamed folders keep their names after a power loss."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_durably(path: Path) -> None:
    """Make a folder and its missing parents, and sync the directory entry of each."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(PermissionError):  # a folder may be writable and not readable
            parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)


def sync_name(path: Path) -> None:
    """Sync a folder, which makes the names of its entries durable."""
    descriptor = os.open(path, FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

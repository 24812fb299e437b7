"""Folders that a power loss does not take the name from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_durably(path: Path) -> None:
    """Make a folder and those above it that are missing, each durable by name: a store in no folder is a lost store."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
        with suppress(PermissionError):  # a folder may be open to writing and not to reading
            above = os.open(one.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(above)
            finally:
                os.close(above)


def sync_name(path: Path) -> None:
    descriptor = os.open(path, FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

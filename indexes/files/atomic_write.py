"""Files that are replaced as a whole: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from llmcache.indexes.files.durable import sync_name

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PRIVATE = 0o600


def write_atomically(
    path: str | Path,
    data: bytes | memoryview,
    *,
    mode: int = _PRIVATE,
    durable: bool = False,
    partial: str | None = None,
    folder: int | None = None,
) -> None:
    """Write a temporary file beside `path`, and rename it over `path`. A link at either name is replaced, not followed.

    mode: of the file; until it is complete, only this user can read it.
    durable: sync the file and its folder, so that the new content survives a power loss.
    partial: name of the temporary file, which may be left from a killed process. None for a random name, with which
        several processes may write the same file at once.
    folder: descriptor of the folder that `path` is relative to.
    OSError when writing fails; the temporary file is then removed.
    """
    target = Path(path)
    temporary = target.with_name(partial or f".{target.name}.{uuid.uuid4().hex}.partial")
    if partial is not None:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
    descriptor = os.open(temporary, _NEW, _PRIVATE, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if mode != _PRIVATE:
                set_mode(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, target, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    if durable and folder is not None:
        os.fsync(folder)
    elif durable:
        sync_name(target.parent.resolve())


def set_mode(descriptor: int, mode: int) -> None:
    """Set the mode of an open file, where the file system has modes."""
    with suppress(PermissionError):
        os.fchmod(descriptor, mode)


def ordinary_mode() -> int:
    """Return the mode of new files of this process: 0666 minus the bits of the umask."""
    try:
        with open("/proc/self/status") as file:
            mask = next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o077)  # a file that another thread makes in between is private to this user
        os.umask(mask)
    return 0o666 & ~mask

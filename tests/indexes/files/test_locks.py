"""Locks of files: one holder or several readers, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcache.indexes.files import locks


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Open one file twice: locks of two openings exclude each other like those of two processes."""
    opened = [os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2)]
    yield opened[0], opened[1]
    for descriptor in opened:
        os.close(descriptor)


def test_a_lock_has_one_holder_unless_it_is_shared(pair: tuple[int, int]) -> None:
    one, other = pair
    assert locks.take(one)
    assert not locks.take(other)
    assert not locks.take(other, shared=True)
    assert locks.take(one, shared=True)
    assert locks.take(other, shared=True)
    assert not locks.take(other)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_in_the_file_system_nothing_is_locked_unless_locks_are_needed(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert all(locks.take(descriptor) for descriptor in pair)
    with pytest.raises(OSError, match=os.strerror(number)):
        locks.take(pair[0], supported=True)


def test_another_failure_of_a_lock_is_an_error(pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        locks.take(pair[0])

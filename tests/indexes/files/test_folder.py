"""Tests of a store's system calls: they stay inside its folder, and leave no half-written file."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.write_once import write_whole

CLIMBING = [
    "",
    "..",
    ".",
    "seg/",
    "seg/..",
    "seg/.",
    "../x",
    "/etc/passwd",
    "seg/../../x",
    "seg/../FORMAT",
    "a/b",
    "seg/a/b",
    "./FORMAT",
    "seg//x",
    "x\0y",
    "seg/x\0",
    "\0",
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    opened = Folder(tmp_path / "store", create=True)
    yield opened
    opened.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_new_folder_and_its_parts_are_for_its_owner_only(folder: Folder) -> None:
    assert sorted(one.name for one in folder.path.iterdir()) == sorted(SUBFOLDERS)
    assert {mode(folder.path), *(mode(folder.path / sub) for sub in SUBFOLDERS)} == {0o700}


def test_a_new_file_is_for_its_owner_only_and_holds_what_was_written(folder: Folder) -> None:
    parts: list[bytes | memoryview] = [b"abc", memoryview(b"def"), b"", np.arange(3, dtype="<u4").data]
    assert write_whole(folder, "seg/x", parts) == 18
    assert mode(folder.path / "seg/x") == 0o600
    assert (folder.path / "seg/x").read_bytes() == b"abcdef" + bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])


def test_a_file_of_no_parts_is_an_empty_file(folder: Folder) -> None:
    assert write_whole(folder, "x", []) == 0
    assert folder.size("x") == 0
    assert folder.map("x", 0).shape == (0,)
    assert folder.read("x", 0) == b""


def test_opening_a_folder_that_is_there_keeps_what_is_in_it(folder: Folder) -> None:
    write_whole(folder, "FORMAT", [b"1"])
    again = Folder(folder.path, create=True)
    assert sorted(again.names()) == sorted(["FORMAT", *SUBFOLDERS])
    assert again.read("FORMAT", 10) == b"1"
    again.close()


def test_a_folder_that_is_not_there_is_not_made_without_being_asked(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError):
        Folder(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert descriptors() == before


def test_a_folder_that_could_not_be_made_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            Folder(tmp_path / "store", create=True)
    assert descriptors() == before


def test_a_closed_folder_holds_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    folder = Folder(tmp_path / "store", create=True)
    for sub in ("", *SUBFOLDERS):
        folder.names(sub)
    write_whole(folder, "seg/x", [b"abc"])
    folder.read("seg/x", 3)
    folder.map("seg/x", 3)
    folder.close()
    folder.close()
    assert descriptors() == before


def test_a_child_process_inherits_no_descriptor(folder: Folder) -> None:
    descriptor = folder.create("x")
    folder.names("seg")
    mine = [int(name) for name in os.listdir("/proc/self/fd")]
    inside = [
        one
        for one in mine
        if os.path.exists(f"/proc/self/fd/{one}") and os.readlink(f"/proc/self/fd/{one}").startswith(str(folder.path))
    ]
    assert len(inside) >= 3
    assert not any(os.get_inheritable(one) for one in inside)
    folder.close_file(descriptor)


@pytest.mark.parametrize("name", CLIMBING)
def test_a_name_that_is_not_inside_the_store_is_refused_by_every_call(folder: Folder, name: str) -> None:
    outside = folder.path.parent / "x"
    outside.write_bytes(b"untouched")
    write_whole(folder, "y", [b"abc"])
    calls: list[Callable[[], object]] = [
        lambda: folder.size(name),
        lambda: folder.read(name, 100),
        lambda: folder.map(name, 9),
        lambda: folder.create(name),
        lambda: folder.link("y", name),
        lambda: folder.link(name, "z"),
        lambda: folder.replace("y", name),
        lambda: folder.replace(name, "z"),
        lambda: folder.remove(name),
    ]
    for call in calls:
        with pytest.raises(SnapshotDamaged, match="not a name inside a store"):
            call()
    assert outside.read_bytes() == b"untouched"
    assert sorted(folder.names()) == sorted(["y", *SUBFOLDERS])


def test_a_mapped_file_is_read_only(folder: Folder) -> None:
    write_whole(folder, "x", [b"abcd"])
    mapped = folder.map("x", 4)
    assert mapped.tobytes() == b"abcd"
    assert not mapped.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0


def test_a_mapped_file_outlives_its_name_and_its_folder(folder: Folder) -> None:
    write_whole(folder, "x", [b"abcd"])
    mapped = folder.map("x", 4)
    folder.remove("x")
    folder.close()
    assert mapped.tobytes() == b"abcd"


@pytest.mark.parametrize("size", [0, 3, 5, 1 << 60])
def test_a_file_of_another_size_than_expected_is_damage(folder: Folder, size: int) -> None:
    write_whole(folder, "x", [b"abcd"])
    with pytest.raises(SnapshotDamaged, match="4 bytes"):
        folder.map("x", size)


def test_a_file_is_read_up_to_its_limit_and_not_beyond(folder: Folder) -> None:
    write_whole(folder, "x", [bytes(5000)])
    assert folder.read("x", 5000) == bytes(5000)
    with pytest.raises(SnapshotDamaged, match="5,000 bytes"):
        folder.read("x", 4999)


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "folder", "socket"])
def test_what_is_no_plain_file_is_not_read_and_nobody_waits_for_it(folder: Folder, kind: str) -> None:
    other = folder.path.parent / "other"
    other.write_bytes(b"abcd")
    place = folder.path / "seg" / "x"
    if kind == "symlink":
        place.symlink_to(other)
    elif kind == "dangling":
        place.symlink_to(folder.path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        bound = socket.socket(socket.AF_UNIX)
        here = os.open(folder.path / "seg", os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/x")  # a socket's path is short, a test's folder is not
        os.close(here)
        bound.close()
    folder.names("seg")  # opens the part of the folder, for as long as the folder is open
    before = descriptors()
    for _ in range(2):
        with pytest.raises((SnapshotDamaged, OSError)):
            folder.read("seg/x", 100)
        with pytest.raises((SnapshotDamaged, OSError)):
            folder.map("seg/x", 4)
    assert descriptors() == before


def test_a_part_of_the_store_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"abcd")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "seg").symlink_to(tmp_path / "elsewhere")
    folder = Folder(tmp_path / "store")
    with pytest.raises((SnapshotDamaged, OSError)):
        folder.map("seg/x", 4)
    with pytest.raises((SnapshotDamaged, OSError)):
        folder.remove("seg/x")
    with pytest.raises((SnapshotDamaged, OSError)):
        folder.create("seg/y")
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["x"]
    folder.close()


def test_a_store_that_was_moved_is_still_the_one_that_was_opened(folder: Folder) -> None:
    write_whole(folder, "x", [b"mine"])
    folder.path.rename(folder.path.parent / "moved")
    folder.path.mkdir()
    (folder.path / "x").write_bytes(b"else")
    assert folder.read("x", 10) == b"mine"


def test_a_file_that_is_there_is_never_written_over(folder: Folder) -> None:
    write_whole(folder, "x", [b"first"])
    with pytest.raises(FileExistsError):
        write_whole(folder, "x", [b"second"])
    assert folder.read("x", 100) == b"first"


def test_a_link_in_the_way_of_a_new_file_is_not_written_through(folder: Folder) -> None:
    (folder.path / "x").symlink_to(folder.path.parent / "outside")
    with pytest.raises(FileExistsError):
        write_whole(folder, "x", [b"abc"])
    assert not (folder.path.parent / "outside").exists()


def test_a_second_name_is_given_only_if_it_is_free(folder: Folder) -> None:
    write_whole(folder, "a", [b"first"])
    write_whole(folder, "b", [b"second"])
    folder.link("a", "name")
    with pytest.raises(FileExistsError):
        folder.link("b", "name")
    assert folder.read("name", 100) == b"first"


def test_a_renamed_file_takes_the_place_of_the_old_one(folder: Folder) -> None:
    write_whole(folder, "stat/a", [b"new"])
    write_whole(folder, "stat/b", [b"old"])
    folder.replace("stat/a", "stat/b")
    assert folder.names("stat") == ["b"]
    assert folder.read("stat/b", 100) == b"new"


def test_removing_what_is_gone_is_fine(folder: Folder) -> None:
    write_whole(folder, "x", [b"a"])
    folder.remove("x")
    folder.remove("x")
    assert "x" not in folder.names()


def test_a_part_that_is_not_there_is_empty(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.names("stat") == []
    folder.close()


def test_a_short_write_is_continued(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        return real(descriptor, data[:7], offset)

    content = bytes(range(256)) * 3
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", short)
        assert write_whole(folder, "x", [content, b"end"]) == 771
    assert folder.read("x", 1000) == content + b"end"


def test_what_is_written_is_synced_before_it_counts(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    pwrite, fsync = os.pwrite, os.fsync

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        done.append("write")
        return pwrite(descriptor, data, offset)

    def syncing(descriptor: int) -> None:
        done.append("sync")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", writing)
        patch.setattr(os, "fsync", syncing)
        write_whole(folder, "x", [b"a", b"b"])
    assert done == ["write", "write", "sync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["create", "write", "sync", "close_file"])
def test_a_file_that_could_not_be_finished_is_removed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    real = Folder.close_file

    def failing(self: Folder, *args: object) -> None:
        if call == "close_file" and isinstance(args[0], int):
            real(self, args[0])
        raise OSError(code, os.strerror(code))

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, call, failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_whole(folder, "x", [b"abc"])
    assert sorted(folder.names()) == sorted(SUBFOLDERS)
    assert descriptors() == before


def test_a_part_that_cannot_be_made_leaves_no_file(folder: Folder) -> None:
    def parts() -> Iterator[bytes]:
        yield b"abc"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(folder, "x", parts())
    assert sorted(folder.names()) == sorted(SUBFOLDERS)

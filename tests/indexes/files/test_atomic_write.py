"""A file written atomically is the old one or the new one, with the mode that was asked for, and follows no links."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically
from llmcache.indexes.files.durable import FOLDER


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize("partial", [None, "report.partial"])
def test_a_link_is_replaced_and_what_it_led_to_is_left(tmp_path: Path, partial: str | None) -> None:
    victim, path = tmp_path / "victim", tmp_path / "report.html"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    (tmp_path / "report.partial").symlink_to(victim)
    write_atomically(path, b"new", partial=partial)
    assert (path.read_bytes(), path.is_symlink(), victim.read_bytes()) == (b"new", False, b"precious")
    left = ["report.partial"] if partial is None else []
    assert names(tmp_path) == ["report.html", *left, "victim"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "nowhere" / "x", b"new")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("partial", [None, "x.partial"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, partial: str | None
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new", durable=True, partial=partial)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["x"])


def test_the_mode_is_private_or_that_of_other_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "private", b"")
        write_atomically(tmp_path / "ordinary", b"", mode=ordinary_mode())
    finally:
        os.umask(before)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    assert modes == {"private": 0o600, "ordinary": 0o640}


@pytest.mark.parametrize("inside", [False, True], ids=["by path", "by descriptor of the folder"])
def test_content_is_synced_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    done: list[str] = []

    def noted(real: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            done.append(name(*arguments))
            return real(*arguments, **more)

        return call

    def kind(descriptor: int) -> str:
        return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"

    monkeypatch.setattr(os, "fsync", noted(os.fsync, kind))
    monkeypatch.setattr(os, "replace", noted(os.replace, lambda *paths: "rename"))
    folder = os.open(tmp_path, FOLDER) if inside else None
    write_atomically("x" if inside else tmp_path / "x", b"new", durable=True, folder=folder)
    if folder is not None:
        os.close(folder)
    assert done == ["file", "rename", "folder"]
    assert (tmp_path / "x").read_bytes() == b"new"

"""Tests of stores: acknowledged entries survive other writers, full disks, forks and kills."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits import create as opening
from llmcache.indexes.commits.generations import generation_name
from llmcache.indexes.errors import (
    ForkedStoreError,
    FormatTooNew,
    LLMCacheError,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFenced,
    StoreFull,
)
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

WIDTH = 32
SPAWN = multiprocessing.get_context("spawn")


def keys_of(numbers: Sequence[int]) -> Keys:
    """Return a key for each number, the same in every process."""
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def values_of(numbers: Sequence[int]) -> NDArray[np.float32]:
    """Return the values of these numbers, the same in every process, float32 [n, WIDTH]."""
    rows = [np.random.default_rng(number).standard_normal(WIDTH) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, WIDTH)


def bank_of(store: Store, name: str = "layer") -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {"model": "m"}, {"tau": None})
    return store.bank("default", name, lambda: BankFacts("float32", WIDTH, 1, 4), NearChoice())


def put(store: Store, numbers: Sequence[int], name: str = "layer") -> None:
    bank = bank_of(store, name)
    values = values_of(numbers)
    kept = bank.put(
        keys_of(numbers),
        values,
        tokens=[np.array([number], np.int32) for number in numbers],
        sources=[str(number) for number in numbers],
        features=values[:, :4],
        cost=np.ones(len(numbers), np.float32),
    )
    assert kept.all()


def held(store: Store, numbers: Sequence[int], name: str = "layer") -> set[int]:
    """Return which of these the store has, after checking their bytes."""
    bank = bank_of(store, name)
    rows = bank.find(keys_of(numbers))
    found = rows >= 0
    reading = bank.read(rows[found])
    assert reading.intact.all()
    present = np.asarray(numbers)[found]
    assert np.asarray(reading.values).tobytes() == values_of(present.tolist()).tobytes()
    assert [bank.tokens(int(row)).tolist() for row in rows[found]] == [[number] for number in present]
    return set(present.tolist())


@contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[Store]:
    store = Store.open(path, create=create)
    try:
        yield store
    finally:
        store.close()


def on_disk(path: Path, numbers: Sequence[int], name: str = "layer") -> set[int]:
    """Return the entries that a new reader finds."""
    with opened(path) as store:
        return held(store, numbers, name)


def everything_in(path: Path) -> dict[str, bytes | None]:
    return {str(one.relative_to(path)): one.read_bytes() if one.is_file() else None for one in sorted(path.rglob("*"))}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


# -- opening ------------------------------------------------------------------------------------------------


def test_a_new_store_has_a_format_and_nothing_else(path: Path) -> None:
    with opened(path, create=True) as store:
        assert store.manifest.generation == 0
        assert dict(store.manifest.namespaces) == {}
        assert store.writable
    assert sorted(everything_in(path)) == sorted(["FORMAT", *SUBFOLDERS])
    assert json.loads((path / "FORMAT").read_text()) == {"magic": "llmcache", "format": 1}
    with opened(path) as store:
        assert store.manifest.generation == 0


def test_making_a_store_that_is_there_opens_it(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1, 2])
        store.commit()
    with opened(path, create=True) as store:
        assert held(store, [1, 2, 3]) == {1, 2}


def test_a_store_may_be_made_in_an_empty_folder_and_below_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with opened(where, create=True) as store:
            put(store, [1])
            store.commit()
        assert on_disk(where, [1, 2]) == {1}


def test_a_store_may_be_given_as_text(path: Path) -> None:
    Store.open(str(path), create=True).close()
    Store.open(str(path)).close()


def test_no_store_names_the_command_that_makes_one(tmp_path: Path) -> None:
    for where in (tmp_path / "absent", tmp_path):
        with pytest.raises(SnapshotNotFound, match="llmcache build") as caught:
            Store.open(where)
        assert str(where) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [False, True])
def test_a_path_that_is_a_file_is_refused(path: Path, create: bool) -> None:
    path.write_bytes(b"not a store")
    with pytest.raises(SnapshotNotFound, match="is a file"):
        Store.open(path, create=create)
    assert path.read_bytes() == b"not a store"


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("names", [["notes.txt"], ["seg", "letter.doc"], [".git"], ["t-shirts.txt"]], ids=str)
def test_a_folder_of_somebody_elses_is_refused_and_left_as_it_was(path: Path, names: list[str], create: bool) -> None:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"mine")
    before = everything_in(path)
    with pytest.raises(SnapshotNotFound):
        Store.open(path, create=create)
    assert everything_in(path) == before


def test_a_store_whose_making_was_cut_short_can_be_made_again(path: Path) -> None:
    Store.open(path, create=True).close()
    (path / "FORMAT").rename(path / f"t-{'0' * 32}")
    with opened(path, create=True) as store:
        put(store, [1])
        store.commit()
    assert on_disk(path, [1]) == {1}


def test_manifests_without_a_format_are_not_written_over(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1])
        store.commit()
    (path / "FORMAT").unlink()
    before = everything_in(path)
    with pytest.raises(SnapshotDamaged, match="no FORMAT"):
        Store.open(path, create=True)
    with pytest.raises(LLMCacheError):
        Store.open(path)
    assert everything_in(path) == before


def test_a_newer_format_asks_for_an_upgrade(path: Path) -> None:
    Store.open(path, create=True).close()
    (path / "FORMAT").write_text(json.dumps({"magic": "llmcache", "format": 2}))
    for create in (False, True):
        with pytest.raises(FormatTooNew, match="pip install -U llmcache"):
            Store.open(path, create=create)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"llmcache"',
        b"{}",
        b'{"magic": "llmcache"}',
        b'{"format": 1}',
        b'{"magic": "other", "format": 1}',
        b'{"magic": "llmcache", "format": "1"}',
        b'{"magic": "llmcache", "format": true}',
        b'{"magic": "llmcache", "format": 1.0}',
        b'{"magic": "llmcache", "format": NaN}',
        b'{"magic": "llmcache", "format": 0}',
        b'{"magic": "llmcache", "format": -1}',
        b'{"magic": "llmcache", "format": null}',
        b'{"magic": "llmcache", "magic": "llmcache", "format": 1}',
        b"\xff\xfe\x00",
        b"[" * 4000,
        b" " * 5000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_damaged_format_is_refused(path: Path, content: bytes) -> None:
    Store.open(path, create=True).close()
    (path / "FORMAT").write_bytes(content)
    for create in (False, True):
        with pytest.raises(SnapshotDamaged) as caught:
            Store.open(path, create=create)
        assert not isinstance(caught.value, FormatTooNew)
        assert "FORMAT" in str(caught.value)
    assert (path / "FORMAT").read_bytes() == content


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_a_format_that_is_no_plain_file_is_refused_and_nobody_waits_for_it(path: Path, kind: str) -> None:
    Store.open(path, create=True).close()
    (path / "FORMAT").rename(path.parent / "FORMAT")
    if kind == "symlink":
        (path / "FORMAT").symlink_to(path.parent / "FORMAT")
    elif kind == "fifo":
        os.mkfifo(path / "FORMAT")
    else:
        (path / "FORMAT").mkdir()
    with pytest.raises(SnapshotDamaged):
        Store.open(path)


def test_a_store_that_cannot_be_opened_leaves_no_descriptor_open(path: Path) -> None:
    Store.open(path, create=True).close()
    before = descriptors()
    for content in (b"{", b'{"magic": "llmcache", "format": 2}'):
        (path / "FORMAT").write_bytes(content)
        for _ in range(3):
            with pytest.raises(SnapshotDamaged):
                Store.open(path)
    (path / "FORMAT").write_bytes(b'{"magic": "llmcache", "format": 1}')
    (path / generation_name(1)).write_bytes(b"damaged")
    with pytest.raises(SnapshotDamaged, match="none of its 1"):
        Store.open(path)
    assert descriptors() == before


def test_a_closed_store_leaves_no_descriptor_open(path: Path) -> None:
    before = descriptors()
    for _ in range(3):
        with opened(path, create=True) as store:
            put(store, [1])
            store.commit()
            held(store, [1])
    assert descriptors() == before


def test_a_system_error_while_opening_is_told_as_our_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(path, create=True).close()

    def names(self: Folder, sub: str = "") -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "names", names)
        with pytest.raises(LLMCacheError, match="Permission denied"):
            Store.open(path)


def test_a_store_made_by_another_process_in_between_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = opening.refuse_strangers

    def slow(where: Path) -> None:
        with opened(path.parent / "rival", create=True) as rival:
            put(rival, [1])
            rival.commit()
        for one in (path.parent / "rival").iterdir():
            shutil.move(one, path / one.name)
        real(where)

    path.mkdir()
    monkeypatch.setattr(opening, "refuse_strangers", slow)
    with opened(path, create=True) as store:
        assert held(store, [1, 2]) == {1}


def _make_and_fill(path: Path, start: Any, numbers: list[int]) -> None:
    start.wait(60)
    with opened(path, create=True) as store:
        put(store, numbers)
        store.commit()


def test_processes_that_make_one_store_at_once_all_get_it(path: Path) -> None:
    start = SPAWN.Barrier(3)
    makers = [SPAWN.Process(target=_make_and_fill, args=(path, start, [n, n + 10])) for n in range(3)]
    for one in makers:
        one.start()
    for one in makers:
        one.join(60)
    assert [one.exitcode for one in makers] == [0, 0, 0]
    assert on_disk(path, range(20)) == {0, 1, 2, 10, 11, 12}


def test_a_damaged_newest_manifest_opens_the_one_before_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path, create=True) as store:
        put(store, [1])
        store.commit()
        put(store, [2])
        newest = store.commit().generation
    os.truncate(path / generation_name(newest), 100)
    with opened(path) as store:
        assert store.manifest.generation == newest - 1
        assert held(store, [1, 2]) == {1}
        put(store, [3])
        made = store.commit()
    assert made.generation == newest + 1
    assert made.skipped == (newest,)
    assert "damaged" in caplog.text
    assert f"generation {newest - 1}" in caplog.text
    assert on_disk(path, [1, 2, 3]) == {1, 3}


# -- committing ---------------------------------------------------------------------------------------------


def test_what_is_committed_is_there_after_reopening_and_what_is_not_is_gone(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, range(10))
        store.commit()
        put(store, range(10, 20))
        assert held(store, range(30)) == set(range(20))
    assert on_disk(path, range(30)) == set(range(10))


def test_another_store_sees_a_commit_once_it_is_opened_again(path: Path) -> None:
    with opened(path, create=True) as writer:
        put(writer, [1])
        writer.commit()
        with opened(path) as reader:
            put(writer, [2])
            writer.commit()
            assert held(reader, [1, 2]) == {1}
        assert on_disk(path, [1, 2]) == {1, 2}


def test_a_commit_of_nothing_makes_no_generation(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1])
        first = store.commit()
        before = everything_in(path)
        assert store.commit() == first
        bank_of(store, "other")
        assert store.commit() == first
        assert everything_in(path) == before


def test_banks_are_apart_from_each_other_and_committed_together(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1, 2], "a")
        put(store, [2, 3], "b")
        assert bank_of(store, "a") is bank_of(store, "a")
        store.commit()
    assert on_disk(path, range(5), "a") == {1, 2}
    assert on_disk(path, range(5), "b") == {2, 3}
    assert on_disk(path, range(5), "c") == set()


def test_a_namespace_keeps_what_was_declared(path: Path) -> None:
    with opened(path, create=True) as store:
        assert store.namespace("n") is None
        store.declare("n", {"name": "modèle"}, {"tau": 0.5, "list": [1, 2]})
        store.declare("other", {}, {})
    with opened(path) as store:
        found = store.namespace("n")
        assert found is not None
        assert found.identity == {"name": "modèle"}
        assert found.config == {"tau": 0.5, "list": [1, 2]}
        assert sorted(store.manifest.namespaces) == ["n", "other"]


def test_declaring_a_namespace_again_keeps_its_entries(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1, 2])
        store.commit()
        store.declare("default", {"model": "m"}, {"tau": 0.9})
    with opened(path) as store:
        found = store.namespace("default")
        assert found is not None
        assert found.config == {"tau": 0.9}
        assert held(store, [1, 2]) == {1, 2}


def test_a_name_that_could_not_be_read_back_does_not_cost_the_store(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1])
        store.commit()
        with pytest.raises((LLMCacheError, ValueError)):
            store.declare("x" * 5000, {}, {})
        put(store, [2])
        store.commit()
    assert on_disk(path, [1, 2]) == {1, 2}


def test_two_writers_on_one_store_both_keep_their_rows(path: Path) -> None:
    with opened(path, create=True) as one, opened(path) as other:
        bank_of(one)
        bank_of(other)
        put(one, [0])
        one.commit()
        for n in range(1, 9, 2):
            put(one, [n])
            put(other, [n + 1])
            one.commit()
            other.commit()
        assert held(one, range(9)) == {0, 1, 3, 5, 7}
        assert held(other, range(9)) == {2, 4, 6, 8}
    assert on_disk(path, range(9)) == set(range(9))


def _write(path: Path, numbers: list[int], at_once: int) -> None:
    with opened(path) as store:
        for start in range(0, len(numbers), at_once):
            put(store, numbers[start : start + at_once])
            store.commit()


def test_processes_that_write_at_once_all_keep_their_rows(path: Path) -> None:
    with opened(path, create=True) as store:
        bank_of(store)
    writers = [SPAWN.Process(target=_write, args=(path, list(range(n, 60, 3)), 4)) for n in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    assert [one.exitcode for one in writers] == [0, 0, 0]
    assert on_disk(path, range(100)) == set(range(60))
    with opened(path) as store:
        assert store.manifest.generation == 1 + 3 * 5
        assert len(bank_of(store).facts.segments) == 15


def test_an_index_and_rows_of_two_writers_do_not_undo_each_other(path: Path) -> None:
    with opened(path, create=True) as one, opened(path) as other:
        put(one, range(10))
        one.commit()
        put(other, range(10, 20))
        bank_of(one).nearest(values_of([1])[:, :4], 1)
        bank_of(other).nearest(values_of([1])[:, :4], 1)
        other.commit()
        one.commit()
        other.commit()
    assert on_disk(path, range(30)) == set(range(20))
    with opened(path) as store:
        rows, similarity = bank_of(store).nearest(values_of(range(20))[:, :4], 1)
        assert [int(bank_of(store).source(int(row))) for row in rows[:, 0]] == list(range(20))
        np.testing.assert_allclose(similarity, 1, atol=1e-6)


def test_a_bank_whose_namespace_is_gone_is_not_committed(path: Path) -> None:
    with opened(path, create=True) as store:
        bank = store.bank("never declared", "layer", lambda: BankFacts("float32", WIDTH, 1, 4), NearChoice())
        values = values_of([1])
        bank.put(
            keys_of([1]),
            values,
            tokens=[np.zeros(0, np.int32)],
            sources=[""],
            features=values[:, :4],
            cost=np.ones(1, np.float32),
        )
        with pytest.raises(LLMCacheError, match="never declared"):
            store.commit()


# -- writes that fail ---------------------------------------------------------------------------------------


class Faults:
    """Makes the n-th call that changes a file fail, and with `forever` all later ones; counts all calls with -1."""

    CALLS = ("create", "write", "sync", "link", "sync_folder")

    def __init__(self, patch: pytest.MonkeyPatch, code: int, at: int, *, forever: bool = False) -> None:
        self.code, self.at, self.forever = code, at, forever
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        for name in self.CALLS:
            patch.setattr(Folder, name, self._wrapped(name, getattr(Folder, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append((name, args[1:]))
            now = len(self.calls) - 1
            if now == self.at or (self.forever and now > self.at >= 0):
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


@pytest.fixture
def filled(path: Path) -> Path:
    """A store with rows 0 to 4 in two segments, and an index file."""
    with opened(path, create=True) as store:
        put(store, range(3))
        store.commit()
        put(store, range(3, 5))
        bank_of(store).nearest(values_of([1])[:, :4], 1)
        store.commit()
        assert len(store.folder.names("idx")) == 2
    return path


def commit_of_rows_and_index(store: Store) -> None:
    """Publish twice: rows 5 to 8, and an index that covers them."""
    store.commit()
    bank_of(store).nearest(values_of([1])[:, :4], 1)
    store.commit()


@pytest.mark.parametrize(
    ("code", "kind", "forever"),
    [
        (errno.ENOSPC, StoreFull, True),
        (errno.EDQUOT, StoreFull, False),
        (errno.EIO, StoreFenced, False),
    ],
)
def test_a_write_that_fails_anywhere_in_a_commit_costs_nothing_that_was_there(
    filled: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[StoreFenced], forever: bool
) -> None:
    with monkeypatch.context() as patch, opened(_copy(filled, "trial")) as store:
        put(store, range(5, 9))
        calls = Faults(patch, code, -1).calls
        commit_of_rows_and_index(store)
    steps = [name for name, _ in calls]
    assert steps.count("link") == 2
    published = steps.index("link") + 1
    for at in range(len(steps)):
        path = _copy(filled, f"copy {at}")
        with opened(path) as store:
            put(store, range(5, 9))
            with monkeypatch.context() as patch:
                Faults(patch, code, at, forever=forever)
                with pytest.raises(StoreFenced) as caught:
                    commit_of_rows_and_index(store)
                assert type(caught.value) is kind
                assert not store.writable
                assert held(store, range(20)) == set(range(9))  # what waits is served for as long as the store is open
                put(store, [9])
                before = everything_in(path)
            # even with the disk well again: after a failed fsync, nothing of this writer's is to be trusted
            for _ in range(2):
                with pytest.raises(kind):
                    store.commit()
                with pytest.raises(kind):
                    store.declare("another", {}, {})
            assert everything_in(path) == before
            assert not store.writable
        there = set(range(9)) if at >= published else set(range(5))
        assert on_disk(path, range(20)) == there
        assert not [name for name in os.listdir(path) if name.startswith("t-")]
        with opened(path) as store:
            assert store.writable
            put(store, range(5, 12))
            store.commit()
        assert on_disk(path, range(20)) == set(range(12))
        shutil.rmtree(path)


def _copy(path: Path, name: str) -> Path:
    copied = path.parent / name
    shutil.copytree(path, copied)
    return copied


def test_a_segment_that_could_not_be_written_leaves_no_file(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything_in(filled)
    for at in range(10):
        with opened(filled) as store, monkeypatch.context() as patch:
            put(store, range(5, 9))
            Faults(patch, errno.ENOSPC, at, forever=True)
            with pytest.raises(StoreFull, match="free some space"):
                store.commit()
        assert everything_in(filled) == before


def test_a_manifest_is_published_only_when_all_it_names_is_durable(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, opened(filled) as store:
        put(store, range(5, 9))
        calls = Faults(patch, errno.EIO, -1).calls
        store.commit()
    leases = [args for name, args in calls if name == "create" and args[0].endswith(".lease")]
    steps = [name for name, _ in calls]
    published = steps.index("link")
    folders = [args for name, args in calls[:published] if name == "sync_folder"]
    assert ("seg",) in folders
    # a lease needs no sync: after a power loss no writer lives
    assert steps[:published].count("create") - len(leases) == steps[:published].count("sync") == 6
    assert steps[published + 1 :] == ["sync_folder"]
    assert calls[-1][1] == ("",)


def test_an_index_file_that_cannot_be_removed_is_no_reason_to_fail(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Folder.remove

    def remove(self: Folder, name: str) -> None:
        if name.startswith("idx/"):
            raise OSError(errno.EPERM, "not permitted")
        real(self, name)

    with monkeypatch.context() as patch, opened(filled) as store:
        patch.setattr(Folder, "remove", remove)
        put(store, range(5, 9))
        commit_of_rows_and_index(store)
        assert store.writable
    assert on_disk(filled, range(20)) == set(range(9))


# -- forks --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_store_is_not_used_after_a_fork(path: Path) -> None:
    with opened(path, create=True) as store:
        put(store, [1])
        store.commit()
        put(store, [2])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                uses: list[Callable[[], object]] = [
                    store.commit,
                    lambda: store.declare("x", {}, {}),
                    lambda: bank_of(store),
                    lambda: bank_of(store, "new"),
                ]
                for use in uses:
                    try:
                        use()
                        os._exit(2)
                    except ForkedStoreError as error:
                        if "open the store in the child" not in str(error):
                            os._exit(3)
                with opened(path) as own:
                    code = 0 if held(own, [1, 2]) == {1} else 4
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        store.commit()
    assert on_disk(path, [1, 2, 3]) == {1, 2}


# -- counters -----------------------------------------------------------------------------------------------


def test_counters_of_all_writers_add_up(path: Path) -> None:
    with opened(path, create=True) as one, opened(path) as other:
        assert one.counters() == {}
        one.write_counters({"hits": 3, "seconds": 0.5})
        other.write_counters({"hits": 4, "misses": 1})
        assert one.counters() == other.counters() == {"hits": 7, "seconds": 0.5, "misses": 1}
        assert one.counters(without=one.writer) == {"hits": 4, "misses": 1}
        one.write_counters({"hits": 10})
        assert other.counters() == {"hits": 14, "misses": 1}
    with opened(path) as third:
        assert third.counters() == {"hits": 14, "misses": 1}
        assert len(third.folder.names("stat")) == 2


def test_whatever_else_lies_among_the_counters_is_left_out(path: Path) -> None:
    with opened(path, create=True) as store:
        store.write_counters({"hits": 3, "seconds": 0.5})
        outside = path.parent / "outside.json"
        outside.write_text('{"hits": 1000}')
        stat = path / "stat"
        garbage = {
            "a": b"",
            "b": b"{",
            "c": b"[]",
            "d": b"null",
            "e": b"7",
            "f": b"\xff\xfe",
            "g": b"[" * 100_000,
            "h": b'{"hits": NaN}',
            "i": b'{"hits": 1, "hits": 2}',
            "j": b'{"hits": "many", "seconds": null, "x": [1], "y": {"z": 1}, "w": true}',
            "k": b'{"hits": 1e999}',
            "l": b'{"seconds": ' + b"9" * 400 + b"}",
            "m": b'{"seconds": ' + b"9" * 5000 + b"}",
            "n": b" " * (2 << 20) + b'{"hits": 1}',
        }
        for name, content in garbage.items():
            (stat / f"{name}.json").write_bytes(content)
        (stat / "link.json").symlink_to(outside)
        (stat / "folder.json").mkdir()
        os.mkfifo(stat / "pipe.json")
        (stat / "t-unfinished").write_bytes(b'{"hits": 1000}')
        (stat / "readme.txt").write_bytes(b'{"hits": 1000}')
        assert store.counters() == {"hits": 3, "seconds": 0.5}
        store.write_counters({"hits": 4})
        assert store.counters() == {"hits": 4}


def test_counters_that_cannot_be_kept_are_no_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llmcache")
    with opened(path, create=True) as store:
        put(store, [1])
        store.write_counters({"hits": 1})
        for at in range(3):
            with monkeypatch.context() as patch:
                Faults(patch, errno.ENOSPC, at, forever=True)
                store.write_counters({"hits": 2 + at})
            assert store.counters() == {"hits": 1}
            assert store.writable
        assert "counters were not written" in caplog.text
        store.commit()
        shutil.rmtree(path / "stat")
        store.write_counters({"hits": 9})
        assert store.counters() == {}
    with opened(path) as store:
        store.write_counters({"hits": 9})
        assert store.counters() == {}


# -- kills --------------------------------------------------------------------------------------------------


def _commit_until_killed(path: Path, first: int, say: Connection) -> None:
    with opened(path) as store:
        bank = bank_of(store)
        say.send(None)
        number = first
        while True:
            # 1 to 3 rows at a time, and now and then an index
            numbers = list(range(number, number + 1 + number % 3))
            put(store, numbers)
            if number % 4 == 0:
                bank.nearest(values_of(numbers)[:, :4], 1)
            generation = store.commit().generation
            say.send((numbers, generation))
            number += len(numbers)


def _killed_after(path: Path, first: int, delay: float, *, begun: bool) -> tuple[list[int], int]:
    """Numbers that a child acknowledged before it was killed at this moment, and its last generation.

    begun: the moment counts from the child's first acknowledged commit, however busy the machine is.
    """
    hear, say = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=_commit_until_killed, args=(path, first, say))
    child.start()
    say.close()
    assert hear.poll(60)
    hear.recv()
    if begun:
        assert hear.poll(60)
    time.sleep(delay)
    child.kill()
    child.join(60)
    assert child.exitcode == -9
    acknowledged: list[int] = []
    generation = 0
    try:
        while hear.poll():
            numbers, generation = hear.recv()
            acknowledged += numbers
    except (EOFError, OSError):  # the last message may have been cut short: then it was not heard
        pass
    hear.close()
    return acknowledged, generation


def test_what_was_acknowledged_before_a_kill_is_there_bit_for_bit(path: Path) -> None:
    with opened(path, create=True) as store:
        bank_of(store)
    moments = random.Random(20260727)
    acknowledged: set[int] = set()
    for trial in range(10):
        first = trial * 10_000
        heard, generation = _killed_after(path, first, moments.uniform(0, 0.25), begun=trial % 2 == 1)
        acknowledged |= set(heard)
        asked = [number for t in range(trial + 1) for number in range(t * 10_000, t * 10_000 + 2000)]
        with opened(path) as store:
            assert store.manifest.generation >= generation
            assert store.manifest.skipped == ()
            found = held(store, asked)
            assert acknowledged <= found
            # of what was begun and not acknowledged, at most one commit may have come through
            assert len(found - acknowledged) <= 3 * (trial + 1)
            assert len(bank_of(store)) == len(found)
            rows, _ = bank_of(store).nearest(values_of(sorted(found)[:5])[:, :4], 1)
            assert rows.shape == (min(5, len(found)), 1)
    assert len(acknowledged) > 10

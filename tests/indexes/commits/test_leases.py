"""Tests of garbage collection beside writers: files of running writers stay, whatever their age and the clock."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from llmcache.indexes.commits import leases
from llmcache.indexes.commits.leases import Lease, leased
from llmcache.indexes.errors import Busy
from llmcache.indexes.eviction.garbage import files, garbage
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance import snapshot
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.snapshot import save
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.store import Store
from tests.faults import Tally
from tests.kills import forked
from tests.operations import bank_of, found_in, put
from tests.stops import stops

CALLS = ("create", "create_locked", "sync", "sync_folder", "link", "link_from", "remove", "close_file")


def make(path: Path, numbers: range) -> Path:
    store = Store.open(path, create=True)
    put(store, numbers)
    store.commit()
    store.close()
    return path


def old(path: Path, seconds: float = 7200) -> None:
    """Make the files look this old."""
    for one in path.rglob("*"):
        if one.is_file():
            os.utime(one, (one.stat().st_mtime - seconds,) * 2)


def stop_before(call: str, number: int) -> None:
    """Make this process stop itself before the n-th such call."""
    real, count = getattr(Folder, call), iter(range(number, -1, -1))

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(count, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments, **named)

    setattr(Folder, call, stopping)


def beside_a_stopped(work: Callable[[], object], call: str, number: int, meanwhile: Callable[[], None]) -> int:
    """Run `work` in a process that stops before a call, act meanwhile, continue the process. Returns its exit code."""

    def stopped() -> None:
        stop_before(call, number)
        work()

    child = forked(stopped)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        meanwhile()
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def collect(path: Path, grace: float) -> None:
    store = Store.open(path)
    gc(store, grace)
    store.close()


def present(path: Path, numbers: range) -> set[int]:
    store = Store.open(path)
    try:
        return found_in(store, numbers)
    finally:
        store.close()


def check_whole(path: Path, wanted: set[int]) -> None:
    """Check that all entries are served, no file is damaged, and a snapshot can be made."""
    assert present(path, range(400)) == wanted
    assert not [one for one in verify(path).findings if one.damage]
    save(path, path.with_name(f"{path.name}-snapshot"))
    shutil.rmtree(path.with_name(f"{path.name}-snapshot"))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("grace", [0, 0.05, 3600])
def test_a_merge_that_is_stopped_anywhere_keeps_its_files_beside_gc(tmp_path: Path, copy: bool, grace: float) -> None:
    for case in range(12):
        chance = random.Random(f"{copy} {grace} {case}")
        a, b = make(tmp_path / f"a{case}", range(50)), make(tmp_path / f"b{case}", range(100, 150))
        old(a)
        old(b)
        call, number = chance.choice(CALLS), chance.randrange(7)
        code = beside_a_stopped(lambda: merge([a], b, copy=copy), call, number, lambda: collect(b, grace))  # noqa: B023
        assert code == 0, f"stopped before {call} {number}"
        check_whole(b, {*range(50), *range(100, 150)})


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("grace", [0, 0.05])
def test_a_writer_that_is_stopped_anywhere_keeps_its_files_beside_gc(
    tmp_path: Path, behind: bool, grace: float
) -> None:
    for case in range(12):
        chance = random.Random(f"{behind} {grace} {case}")
        path = make(tmp_path / f"s{case}", range(5))

        def work(path: Path = path) -> None:
            store = Store.open(path)
            put(store, range(100, 120))
            if behind:
                store.commit_behind()
                store.finish_commit()
            store.commit()

        def meanwhile(path: Path = path) -> None:
            old(path)
            collect(path, grace)
            make(path, range(200, 203))
            collect(path, grace)

        assert beside_a_stopped(work, chance.choice(CALLS), chance.randrange(7), meanwhile) == 0
        assert {*range(5), *range(100, 120)} <= present(path, range(400))
        check_whole(path, present(path, range(400)))


@pytest.mark.parametrize("idle", [True, False])
def test_a_collector_that_is_stopped_before_it_removes_takes_nothing_that_is_published_meanwhile(
    tmp_path: Path, idle: bool
) -> None:
    path = make(tmp_path / "store", range(5))
    writer = Store.open(path)
    put(writer, range(100, 120))
    if idle:  # its files were written long before gc looks
        writer.commit_behind()
        writer._background._in_progress[0].written.result()
    for name in ("a" * 32, "b" * 32):
        (path / "seg" / f"{name}.seg").write_bytes(b"what a killed writer left")
    old(path)

    def land() -> None:
        writer.finish_commit()
        writer.commit()

    assert beside_a_stopped(lambda: collect(path, 0), "remove", 0, land) == 0
    writer.close()
    assert not (path / "seg" / f"{'a' * 32}.seg").exists()
    check_whole(path, {*range(5), *range(100, 120)})


def test_what_a_killed_writer_left_is_collected_at_once_without_a_grace(tmp_path: Path) -> None:
    path = make(tmp_path / "store", range(5))

    def work() -> None:
        store = Store.open(path)
        put(store, range(100, 120))
        real = Folder.link

        def killed(self: Folder, name: str, new: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL)
            real(self, name, new)

        Folder.link = killed  # type: ignore[method-assign]
        store.commit()

    _, status = os.waitpid(forked(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [name for name in os.listdir(path / "stat") if name.endswith(".lease")]
    before = len(os.listdir(path / "seg"))
    collect(path, 3600)
    assert len(os.listdir(path / "seg")) == before, "younger than the grace"
    collect(path, 0)
    assert len(os.listdir(path / "seg")) == before - 5
    assert not [name for name in os.listdir(path / "stat") if name.endswith(".lease")]
    check_whole(path, set(range(5)))


def test_linked_files_without_a_lease_are_as_old_as_their_names(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", range(50)), make(tmp_path / "b", range(100, 110))
    old(a)
    for one in (a / "seg").iterdir():
        os.link(one, b / "seg" / one.name)
    store = Store.open(b)
    assert not garbage(store.folder, 3600, 3600).sizes
    assert len(garbage(store.folder, 0, 3600).sizes) >= 5
    store.close()


def test_a_lease_protects_from_its_first_id_until_it_is_closed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store", create=True)
    with Lease(folder) as lease:
        assert not folder.names("stat"), "nothing is written for nothing"
        ids = {lease.new() for _ in range(10)}
        assert leased(folder, files(folder)) == ids
    assert leased(folder, files(folder)) == frozenset()
    assert not folder.names("stat")
    folder.close()


def test_a_lease_that_a_collector_looks_at_while_it_is_made_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = Folder(tmp_path / "store", create=True), Folder(tmp_path / "store")
    real, names = Folder.create, list[str]()

    def looked_at(self: Folder, name: str) -> int:
        descriptor = real(self, name)
        names.append(name)
        if len(names) < 4:
            other.remove_unlocked(name)
        return descriptor

    monkeypatch.setattr(Folder, "create", looked_at)
    with Lease(folder) as lease:
        id = lease.new()
        assert leased(other, files(other)) == {id}
        other.remove_unlocked(names[-1])
        assert leased(other, files(other)) == {id}
    assert len(names) == 4
    folder.close()
    other.close()


def test_where_there_are_no_locks_the_age_of_files_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(leases, "_TRIES", 1)
    monkeypatch.setattr("llmcache.indexes.files.locks.fcntl.flock", none)
    path = make(tmp_path / "store", range(5))
    store = Store.open(path)
    put(store, range(100, 110))
    bank_of(store)
    store.commit()
    assert not garbage(store.folder, 3600, 3600).sizes
    store.close()
    check_whole(path, {*range(5), *range(100, 110)})


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("copy", [False, True])
def test_a_merge_and_a_snapshot_begin_again_when_a_store_is_compacted_and_collected_under_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, copy: bool
) -> None:
    a, b = make(tmp_path / "a", range(50)), make(tmp_path / "b", range(100, 150))
    for path in (a, b):
        for number in range(3):
            make(path, range(number, number + 1) if path is a else range(150 + number, 151 + number))
    real, left = Segment.open.__func__, list(range(2 * times))  # type: ignore[attr-defined]
    real_carry, maintaining = vars(snapshot)["carry_segment"], list[bool]()

    def renewed() -> None:
        """Replace all segments of both stores, and remove the files of the old ones."""
        if not left or maintaining:
            return
        left.pop()
        maintaining.append(True)
        try:
            for path in (a, b):
                make(path, range(300 + len(left), 301 + len(left)))
                store = Store.open(path)
                compact(store, small=True)
                gc(store, 0)
                store.close()
        except Busy:  # the snapshot keeps collectors off by now
            left.clear()
        finally:
            maintaining.clear()

    def open_late(cls: type[Segment], folder: Folder, facts: SegmentFacts) -> Segment:
        renewed()
        return cast(Segment, real(cls, folder, facts))

    def carry_late(*arguments: Any, **named: Any) -> Any:
        renewed()
        return real_carry(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "carry_segment", carry_late)
        save(b, tmp_path / "snapshot", copy=copy)
    assert {*range(100, 153)} <= present(tmp_path / "snapshot", range(400))
    left[:] = range(2 * times)
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "open", classmethod(open_late))
        merge([a], b, copy=copy)
    assert {*range(50), *range(100, 153)} <= present(b, range(400))
    check_whole(b, present(b, range(400)))


def test_stops_and_kills_at_random_lose_nothing_and_leave_stores_that_can_be_snapshotted(tmp_path: Path) -> None:
    tally: Tally = stops(tmp_path, int(os.environ.get("LLMCACHE_STOPS", "4")), seed=0)
    assert not tally.failures
    assert tally.counts["acknowledged entries"] > 0

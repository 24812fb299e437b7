"""Full disks, resource limits and read-only folders: no crash, no acknowledged entry lost, helpful messages."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmcache.indexes.errors import LLMCacheError, StoreFenced, StoreFull
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.store import Store
from tests.kills import RealDisk
from tests.operations import FEATURES, Ledger, bank_of, check, check_near, close, commit, open_in, values_of

ROOT = Path(__file__).parents[2]


def in_child(work: str, path: Path, **settings: object) -> str:
    """Run one of the functions below in a process of its own. Returns its last line; any failure fails the test."""
    arguments = f"pathlib.Path({str(path)!r}), **{settings!r}"
    code = f"import pathlib; from tests.indexes.test_environment import {work}; {work}({arguments})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout.strip()


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(where)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def filled(path: Path, segments: int = 3) -> Ledger:
    """Make a store with several segments of 20 entries."""
    ledger, stores = Ledger(), list[Store]()
    store = open_in(RealDisk(path), stores, create=True)
    for i in range(segments):
        commit(store, ledger, range(20 * i, 20 * i + 20))
    bank_of(store).nearest(values_of([1])[:, :FEATURES], 1)
    store.commit()
    close(stores)
    return ledger


def served(path: Path, ledger: Ledger, universe: range = range(4000)) -> None:
    """Check that a new reader finds exactly the acknowledged entries."""
    stores: list[Store] = []
    check(open_in(RealDisk(path), stores), ledger, universe)
    check_near(stores[0], sorted(ledger.acknowledged)[:5])
    close(stores)


# -- run in a child -----------------------------------------------------------------------------------------


def write_until_full(path: Path, limit: int = 0) -> None:
    """Commit until a write fails; acknowledged entries stay, and the store opens again. limit: RLIMIT_FSIZE."""
    ledger, stores = filled(path), list[Store]()
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself; a write then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    store = open_in(RealDisk(path), stores)

    def commit_for_ever() -> None:
        first, size = 100, 50
        while True:
            commit(store, ledger, range(first, first + size))
            first, size = first + size, min(2 * size, 800)

    with pytest.raises(StoreFull, match="free some space and open the store again"):
        commit_for_ever()
    top = max(ledger.begun) + 1
    check(store, ledger, range(top))  # what waits is served too
    assert not store.writable
    store.write_counters({"hits": 1})  # no error
    close(stores)
    served(path, Ledger(ledger.acknowledged, ledger.acknowledged), range(top))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.write(f"{len(ledger.acknowledged)} {' '.join(sorted(os.listdir(path / 'stat')))}")


def read_and_try_to_write(path: Path) -> None:
    """Check that all entries are served, a commit is refused with an error, and counters are not written."""
    acknowledged = set(range(60))
    ledger, stores = Ledger(acknowledged, set(acknowledged)), list[Store]()
    served(path, ledger)
    store = open_in(RealDisk(path), stores)
    store.write_counters({"hits": 1})
    with pytest.raises(StoreFenced, match=r"Read-only|Permission denied") as caught:
        commit(store, ledger, range(100, 110))
    assert not isinstance(caught.value, StoreFull)
    assert "open the store again" in str(caught.value)
    check(store, ledger, range(200))
    close(stores)


def open_with_few_descriptors(path: Path, segments: int, limit: int = 64) -> None:
    """Open, read, search and commit with at most this many descriptors."""
    numbers = set(range(20 * segments))
    ledger = Ledger(numbers, set(numbers))
    check_near(Store.open(path), [1])  # libraries may keep descriptors of their own
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for first in (3000, 3010):
        stores: list[Store] = []
        store = open_in(RealDisk(path), stores)
        check(store, ledger, range(4000))
        check_near(store, range(0, 20 * segments, 20))
        commit(store, ledger, range(first, first + 10))
        close(stores)
    assert len(os.listdir("/proc/self/fd")) < limit


def use_without_descriptors(path: Path) -> None:
    """Without descriptors, opening is refused; an open store still serves its entries, and a commit fences it."""
    ledger, stores = Ledger(set(range(60)), set(range(60))), list[Store]()
    store = open_in(RealDisk(path), stores)
    check(store, ledger, range(200))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises(LLMCacheError, match="Too many open files"):
        Store.open(path)
    with pytest.raises(StoreFenced, match="Too many open files"):
        commit(store, ledger, range(100, 110))
    check(store, ledger, range(200))
    assert store.counters() == {}
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    served(path, Ledger(ledger.begun, set(range(60))))


# -- tests --------------------------------------------------------------------------------------------------


def test_a_full_disk_of_8_mib_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as small:
        acknowledged, *_ = in_child("write_until_full", small / "store").split()
        assert int(acknowledged) > 1000


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    in_child("write_until_full", tmp_path / "store", limit=200_000)


def test_a_folder_mounted_read_only_is_served_and_not_written(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    with mounted(tmp_path / "view", "--bind", str(tmp_path / "store")) as view:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
        in_child("read_and_try_to_write", view)
    served(tmp_path / "store", Ledger(set(range(60)), set(range(60))))


def test_a_folder_without_write_permission_is_served_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "store"
    filled(path)
    folders = [path, path / "seg", path / "idx", path / "stat"]
    for folder in folders:
        folder.chmod(0o500)
    try:
        if os.access(path, os.W_OK):
            pytest.skip("root may write everywhere; the read-only mount is tested instead")
        in_child("read_and_try_to_write", path)
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_a_hundred_segments_are_served_with_64_descriptors(tmp_path: Path) -> None:
    filled(tmp_path / "store", segments=100)
    in_child("open_with_few_descriptors", tmp_path / "store", segments=100)


def test_without_descriptors_an_open_store_serves_on(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    in_child("use_without_descriptors", tmp_path / "store")


def test_an_open_store_keeps_no_descriptor_for_its_files(tmp_path: Path) -> None:
    filled(tmp_path / "store", segments=10)
    before = len(os.listdir("/proc/self/fd"))
    stores: list[Store] = []
    check_near(open_in(RealDisk(tmp_path / "store"), stores), [1, 50])
    assert len(os.listdir("/proc/self/fd")) - before <= 1 + 3  # the folder and its parts
    close(stores)


def test_a_device_that_is_always_full_is_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, stores = filled(tmp_path / "store"), list[Store]()
    store = open_in(RealDisk(tmp_path / "store"), stores)
    full = os.open("/dev/full", os.O_WRONLY)
    real: Callable[..., int] = Folder.write_some
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_some", lambda self, _, data, offset: real(self, full, data, offset))
        with pytest.raises(StoreFull, match="No space left on device"):
            commit(store, ledger, range(100, 110))
    os.close(full)
    check(store, ledger, range(200))
    close(stores)
    assert not [name for name in os.listdir(tmp_path / "store" / "seg") if name not in _named(tmp_path / "store")]
    served(tmp_path / "store", Ledger(ledger.begun, ledger.acknowledged))


def _named(path: Path) -> set[str]:
    store = Store.open(path)
    bank = store.manifest.namespaces["default"].banks["layer"]
    store.close()
    return {file.name.partition("/")[2] for segment in bank.segments for file in segment.files}


def test_a_new_store_is_durable_by_name_in_all_folders_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Store.open(tmp_path / "a" / "b" / "store", create=True).close()
    assert synced[:4] == [
        str(tmp_path),
        str(tmp_path / "a"),
        str(tmp_path / "a" / "b"),
        str(tmp_path / "a" / "b" / "store"),
    ]


def test_an_older_manifest_copied_over_a_newer_one_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "store"
    filled(path, segments=2)
    names = sorted(name for name in os.listdir(path) if name.startswith("m-"))
    shutil.copy(path / names[1], path / names[-1])
    store = Store.open(path)
    assert "newest 1 manifests are damaged" in caplog.text
    assert store.manifest.generation == len(names) - 1
    store.close()

"""Tests of background commits: only complete segments take effect, and no call blocks for ever."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.indexes.errors import StoreFull
from llmcache.indexes.eviction.budget import Budget
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.store import Store
from tests.operations import Ledger, MemoryDisk, Violation, bank_of, found_in, keys_of, open_in, put, recover, values_of
from tests.simulated_disk.disk import Fault
from tests.simulated_disk.folder import MemoryFolder

ALL = range(60)


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk(MemoryFolder(create=True))


class Gate:
    """Gate that blocks the writer thread before its first call until it is opened."""

    def __init__(self, memory: MemoryFolder) -> None:
        self._open, self._mine = threading.Event(), threading.current_thread()
        memory.before = self._wait

    def _wait(self, number: int, call: str) -> None:
        if threading.current_thread() is not self._mine:
            assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()


def elsewhere(disk: MemoryDisk, stores: list[Store]) -> set[int]:
    """Return the entries that a new reader finds."""
    return found_in(open_in(disk, stores), ALL)


def test_rows_on_their_way_are_served_and_rows_that_come_meanwhile_leave_them_alone(
    disk: MemoryDisk, stores: list[Store]
) -> None:
    store, gate = open_in(disk, stores, create=True), Gate(disk.memory)
    put(store, range(20))
    store.commit_behind()
    assert not store.commit_ready
    put(store, range(20, 40))  # into memory that must be other memory: nothing of it is written yet
    before = bank_of(store).find(keys_of(ALL))
    assert found_in(store, ALL) == set(range(40))
    assert elsewhere(disk, stores) == set()
    gate.open()
    store.finish_commit()
    assert elsewhere(disk, stores) == set(range(20))
    np.testing.assert_array_equal(bank_of(store).find(keys_of(ALL)), before)
    assert found_in(store, ALL) == set(range(40))
    put(store, range(40, 60))
    store.commit_behind()
    store.commit()
    assert elsewhere(disk, stores) == found_in(store, ALL) == set(ALL)


def test_nothing_counts_before_it_is_whole(disk: MemoryDisk, stores: list[Store]) -> None:
    store, gate = open_in(disk, stores, create=True), Gate(disk.memory)
    put(store, range(20))
    began = store.manifest.generation
    assert store.commit_behind().generation == began
    gate.open()
    while not store.commit_ready:
        pass
    assert elsewhere(disk, stores) == set()  # written, and nobody named it
    assert store.finish_commit().generation == began + 1


def test_what_waits_is_bounded_by_two_lots(disk: MemoryDisk, stores: list[Store]) -> None:
    store, gate = open_in(disk, stores, create=True), Gate(disk.memory)
    put(store, range(20))
    waiting = store.pending_bytes
    store.commit_behind()
    assert store.pending_bytes == 0
    put(store, range(20, 40))
    assert store.pending_bytes == waiting
    threading.Timer(0.2, gate.open).start()
    store.commit_behind()  # waits for the first
    assert elsewhere(disk, stores) == set(range(20))
    assert store.pending_bytes == 0


def test_a_disk_that_is_full_while_a_thread_writes_ends_storing_and_loses_nothing(
    disk: MemoryDisk, stores: list[Store]
) -> None:
    store = open_in(disk, stores, create=True)
    put(store, range(10))
    store.commit()
    put(store, range(10, 20))
    disk.memory.fault = Fault(len(disk.memory.calls), errno.ENOSPC, forever=True)
    store.commit_behind()
    put(store, range(20, 30))
    with pytest.raises(StoreFull, match="free some space"):
        store.finish_commit()
    assert not store.writable
    assert found_in(store, ALL) == set(range(30))
    with pytest.raises(StoreFull):
        store.commit_behind()
    disk.memory.fault = None
    assert elsewhere(disk, stores) == set(range(10))


def test_a_store_that_is_closed_without_a_commit_leaves_no_file_of_what_was_on_its_way(disk: MemoryDisk) -> None:
    store = open_in(disk, [], create=True)
    put(store, range(20))
    files = set(disk.contents())
    store.commit_behind()
    store.close()
    assert set(disk.contents()) == files
    recover(disk, Ledger())


def test_others_commits_are_read_while_rows_are_on_their_way(disk: MemoryDisk, stores: list[Store]) -> None:
    store = open_in(disk, stores, create=True)
    put(store, range(20))
    other, gate = open_in(disk, stores), Gate(disk.memory)
    put(other, range(20, 40))
    store.commit_behind()
    other.commit()
    put(store, range(40, 50))
    store.reload()
    assert found_in(store, ALL) == set(range(50))
    gate.open()
    store.commit()
    assert found_in(store, ALL) == elsewhere(disk, stores) == set(range(50))


def test_a_mark_of_what_waits_is_taken_after_what_is_on_its_way(disk: MemoryDisk, stores: list[Store]) -> None:
    store = open_in(disk, stores, create=True)
    put(store, range(10))
    store.commit_behind()
    mark = store.pending()
    put(store, range(10, 20))
    assert store.drop_pending(mark) == 10
    store.commit()
    assert elsewhere(disk, stores) == found_in(store, ALL) == set(range(10))


@pytest.mark.parametrize("behind", [False, True])
def test_rows_that_were_given_up_between_others_move_none_of_them(
    disk: MemoryDisk, stores: list[Store], behind: bool
) -> None:
    """A segment over a gap in the pending rows would renumber the first ones."""
    store = open_in(disk, stores, create=True)
    put(store, range(5))
    mark = store.pending()
    put(store, range(5, 9))
    assert store.drop_pending(mark) == 4
    put(store, range(9, 20))
    if behind:
        store.commit_behind()
        put(store, range(20, 24))
        store.finish_commit()
        assert found_in(store, ALL) == {*range(5), *range(9, 24)}
    store.commit()
    left = {*range(5), *range(9, 24 if behind else 20)}
    assert found_in(store, ALL) == elsewhere(disk, stores) == left


def test_a_store_with_a_budget_makes_room_before_it_writes(disk: MemoryDisk, stores: list[Store]) -> None:
    store = open_in(disk, stores, create=True)
    store.budget = Budget(1 << 20, "lru")
    put(store, range(20))
    store.commit_behind()
    assert elsewhere(disk, stores) == set(range(20))


def test_a_wrong_row_in_flight_would_be_seen(disk: MemoryDisk, stores: list[Store]) -> None:
    store = open_in(disk, stores, create=True)
    put(store, range(2))
    bank = bank_of(store)
    bank.put(keys_of([2]), values_of([3]), tokens=[np.array([2, 3], np.int32)], sources=[""],
             features=values_of([2])[:, :4], cost=np.ones(1, np.float32))  # fmt: skip
    with pytest.raises(Violation, match="wrong values"):
        found_in(store, ALL)


# -- caches -------------------------------------------------------------------------------------------------


def texts(n: int) -> list[str]:
    return [f"the {i}th of many texts" for i in range(n)]


@pytest.mark.parametrize("layers", ["output", "all"])
def test_a_cache_that_commits_all_the_time_in_a_thread_gives_what_the_model_gives(
    model: SentenceTransformer, store: Path, layers: str
) -> None:
    asked = texts(96)
    config = CacheConfig(layers=layers, commit_seconds=1e-9)  # type: ignore[arg-type]
    with LLMCache.open(store, model, config=config) as cache:
        cold = [cache.encode(asked[at : at + 16], batch_size=4) for at in range(0, 96, 16)]
        generations = cache.stats().generation
    assert generations > 6
    np.testing.assert_allclose(np.concatenate(cold), model.encode(asked), atol=1e-5)
    with LLMCache.open(store, model) as cache:
        np.testing.assert_array_equal(cache.encode(asked), np.concatenate(cold))
        assert cache.stats().counters.misses == 0


def test_commits_in_the_background_can_be_switched_off(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = set[int]()
    write = Folder.write

    def noted(*given: object) -> None:
        writers.add(threading.get_ident())
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "write", noted)
    with LLMCache.open(store, model, config=CacheConfig(commit_seconds=1e-9, background=False)) as cache:
        cache.encode(texts(32), batch_size=4)
    assert writers == {threading.get_ident()}
    with LLMCache.open(store, model, config=CacheConfig(commit_seconds=1e-9)) as cache:
        cache.encode([text.upper() + "!" for text in texts(32)], batch_size=4)
    assert len(writers) == 2


def test_a_full_disk_in_the_thread_is_one_warning_and_the_results_are_right(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(texts(8))
    cache = LLMCache.open(store, model, config=CacheConfig(commit_seconds=1e-9))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Folder, "write", full)
    for _ in range(2):  # some are served from memory the second time
        np.testing.assert_allclose(cache.encode(texts(64), batch_size=4), model.encode(texts(64)), atol=1e-5)
    assert cache.stats().counters.exact_text > 8
    assert sum("Going on without storing" in record.message for record in caplog.records) == 1
    with pytest.raises(StoreFull):
        cache.commit()
    cache.close()
    monkeypatch.undo()
    with LLMCache.open(store, model) as cache:
        assert len(cache) == 8


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('no')"])
def test_a_cache_that_nobody_closes_keeps_what_it_computed(model_path: str, store: Path, end: str) -> None:
    program = (
        "import sys\n"
        "from llmcache import CacheConfig, LLMCache\n"
        "cache = LLMCache.open(sys.argv[1], sys.argv[2], config=CacheConfig(commit_seconds=0.05))\n"
        "cache.encode([f'the {i}th of many texts' for i in range(200)], batch_size=4)\n"
    )
    subprocess.run([sys.executable, "-c", program + end, str(store), model_path], check=False, capture_output=True)
    with LLMCache.open(store, model_path) as cache:
        cache.encode(texts(200))
        assert cache.stats().counters.misses == 0


def test_a_child_of_a_fork_closes_nothing_of_its_parent(model_path: str, store: Path) -> None:
    program = (
        "import os, sys\n"
        "from llmcache import LLMCache\n"
        "cache = LLMCache.open(sys.argv[1], sys.argv[2])\n"
        "cache.encode(['one', 'two'])\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(store), model_path], check=True, capture_output=True
    )
    assert b"opened by process" not in done.stderr
    with LLMCache.open(store, model_path) as cache:
        assert len(cache) == 2

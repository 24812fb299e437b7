"""Tests with wrong clocks, and with more segments than a process may have descriptors."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from llmcache.indexes.files.descriptors import OPEN_FILES, OpenFiles
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.rows import seconds32
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.verify import verification
from llmcache.indexes.store import Store
from tests.kills import forked
from tests.operations import UNIVERSE, Ledger, MemoryDisk, bank_of, check, commit, found_in, put
from tests.simulated_disk.folder import MemoryFolder

TIMES = (-1e10, -1.0, 0.0, 1.0, 2.0**31, 2.0**32 - 1, 2.0**32, 2.0**33, 1e11)


@pytest.mark.parametrize("now", TIMES)
@pytest.mark.parametrize("later", TIMES)
def test_whatever_the_clock_says_entries_are_stored_served_and_maintained(now: float, later: float) -> None:
    memory, ledger = MemoryFolder(create=True), Ledger()
    for at, numbers in ((now, range(10)), (later, range(10, 20)), (now, range(20, 25))):
        memory.time = at
        store = Store.at(MemoryDisk(memory).folder())
        commit(store, ledger, numbers)
        check(store, ledger, UNIVERSE)
        bank_of(store).audit(np.array([0]), np.array([0.5], np.float32))
        store.write_uses()
        compact(store, small=True)
        gc(store)
        evict(store, 1 << 30)
        store.close()
        assert verification(memory).whole
    store = Store.at(memory)
    check(store, ledger, UNIVERSE)
    assert (bank_of(store).created(np.arange(25)) >= 0).all()
    store.close()


@pytest.mark.parametrize("now", [*TIMES, 1.5, -0.5, 4294967295.9])
def test_a_time_of_32_bits_is_the_nearest_that_can_be_written(now: float) -> None:
    assert np.uint32(seconds32(now)) == min(max(int(now), 0), 2**32 - 1)


def test_more_segments_than_descriptors_are_served_with_preadv(tmp_path: Path) -> None:
    path, segments = tmp_path / "store", 120
    store = Store.open(path, create=True)
    for number in range(segments):
        put(store, [number])
        store.commit()
    store.close()

    def read() -> None:
        limit = len(os.listdir("/proc/self/fd")) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        OPEN_FILES._most = 20
        opened = Store.open(path, reading="pread")
        for _ in range(2):
            assert found_in(opened, range(segments)) == set(range(segments))
        assert len(OPEN_FILES) <= 20
        opened.close()

    assert os.waitstatus_to_exitcode(os.waitpid(forked(read), 0)[1]) == 0


def test_a_file_that_is_another_one_when_it_is_opened_again_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPEN_FILES, "_most", 0)
    folder = Folder(tmp_path / "store", create=True, reading="pread")
    place = tmp_path / "store" / "seg" / ("a" * 32 + ".seg")
    place.write_bytes(b"x" * 64)
    sealed = folder.sealed(f"seg/{'a' * 32}.seg", 64)
    assert sealed.part(0, 64).tobytes() == b"x" * 64
    other = tmp_path / "other"
    other.write_bytes(b"y" * 64)
    os.replace(other, place)
    assert not len(sealed.part(0, 64))
    place.unlink()
    assert not len(sealed.part(0, 64))
    folder.close()
    assert not len(sealed.part(0, 64))


def test_threads_may_read_more_files_than_are_kept_open(tmp_path: Path) -> None:
    files, pool = [tmp_path / str(i) for i in range(30)], OpenFiles(4)
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 10)
    keys = [pool.add(os.open(file, os.O_RDONLY)) for file in files]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 30, 400).tolist():
            with pool.using(keys[i], lambda i=i: os.open(files[i], os.O_RDONLY)) as descriptor:  # type: ignore[misc]
                if os.pread(descriptor, 10, 0) != bytes([i]) * 10:
                    wrong.append(i)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before
    for key in keys:
        pool.close(key)
    assert len(pool) == 0

"""Tests of mapped reads and preadv: equal results, and different outcomes when a file is truncated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files import folder as io
from llmcache.indexes.files.folder import Folder, Reading
from llmcache.indexes.files.linux import file_system
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

WIDTH = 2048  # rows of two pages
Opener = Callable[[Reading], Bank]


def keys_of(count: int) -> Keys:
    first = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def values_of(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((count, WIDTH)).astype(np.float32)


def states_of(count: int) -> list[NDArray[np.float32]]:
    return [values_of(1 + n % 3) + np.float32(n) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 40 vectors and 40 states of different lengths."""
    store = Store.open(tmp_path / "store", create=True)
    store.declare("default", {}, {})
    for rank, name, values in ((1, "vectors", values_of(40)), (2, "states", states_of(40))):
        bank = store.bank("default", name, lambda rank=rank: BankFacts("float32", WIDTH, rank, 4), NearChoice())  # type: ignore[misc]
        bank.put(
            keys_of(40),
            values,
            tokens=[np.array([n], np.int32) for n in range(40)],
            sources=[f"s{n}" for n in range(40)],
            features=values_of(40)[:, :4],
            cost=np.ones(40, np.float32),
        )
    store.commit()
    store.close()
    return tmp_path / "store"


def bank_of(path: Path, stores: list[Store], reading: Reading, name: str = "vectors") -> Bank:
    store = Store.open(path, reading=reading)
    stores.append(store)
    return store.bank("default", name, lambda: BankFacts("float32", WIDTH, 1, 4), NearChoice())


def payload_file(path: Path, bank: Bank) -> Path:
    return path / bank.facts.segments[0].file("seg").name


@pytest.mark.parametrize("reading", ["mmap", "pread", "auto"])
def test_every_way_of_reading_gives_the_same_bits(path: Path, stores: list[Store], reading: Reading) -> None:
    order = np.random.default_rng(1).permutation(40)
    vectors = bank_of(path, stores, reading).read(order)
    assert vectors.intact.all()
    assert np.asarray(vectors.values).tobytes() == values_of(40)[order].tobytes()
    bank = bank_of(path, stores, reading, "states")
    states = bank.read(order)
    assert states.intact.all()
    for found, row in zip(states.values, order.tolist(), strict=True):
        assert found.tobytes() == states_of(40)[row].tobytes()
    assert [bank.source(row) for row in range(40)] == [f"s{n}" for n in range(40)]
    assert [bank.tokens(row).tolist() for row in range(40)] == [[n] for n in range(40)]
    assert bank.sources(order) == [f"s{n}" for n in order]
    assert [one.tolist() for one in bank.tokens_of(order)] == [[n] for n in order]


@pytest.mark.parametrize("name", ["vectors", "states"])
@pytest.mark.parametrize("left", [0, 1, 4096, 100_000])
def test_a_file_that_is_shortened_while_open_is_misses_and_never_a_crash(
    path: Path, stores: list[Store], name: str, left: int
) -> None:
    bank = bank_of(path, stores, "pread", name)
    file = payload_file(path, bank)
    os.truncate(file, left)
    reading = bank.read(np.arange(40))
    records = np.cumsum([0] + [WIDTH * 4 * (1 if name == "vectors" else 1 + n % 3) for n in range(40)])
    assert reading.intact.tolist() == [bool(end <= left) for end in records[1:]]
    expected = values_of(40) if name == "vectors" else states_of(40)
    for row in np.flatnonzero(reading.intact).tolist():
        assert reading.values[row].tobytes() == expected[row].tobytes()
    assert (bank.find(keys_of(40)) >= 0).tolist() == reading.intact.tolist()


def test_a_disk_that_fails_is_misses(path: Path, stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(path, stores, "pread")

    def preadv(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        assert not bank.read(np.arange(3)).intact.any()
    assert (bank.find(keys_of(40)) < 0).sum() == 3


def test_a_read_that_comes_in_pieces_is_put_together(
    path: Path, stores: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(path, stores, "pread")
    real = os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
        reading = bank.read(np.arange(40))
    assert reading.intact.all()
    assert np.asarray(reading.values).tobytes() == values_of(40).tobytes()


def test_descriptors_are_given_back_with_the_store(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened: list[Store] = []
    bank = bank_of(path, opened, "pread")
    assert len(os.listdir("/proc/self/fd")) > before
    opened[0].close()
    del bank
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_removed_while_open_can_still_be_read(path: Path, stores: list[Store]) -> None:
    bank_of(path, stores, "mmap")
    bank_of(path, stores, "pread")
    banks = [
        store.bank("default", "vectors", lambda: BankFacts("float32", WIDTH, 1, 4), NearChoice()) for store in stores
    ]
    payload_file(path, banks[0]).unlink()
    for bank in banks:
        assert np.asarray(bank.read(np.arange(40)).values).tobytes() == values_of(40).tobytes()


# -- which way ----------------------------------------------------------------------------------------------


def test_auto_maps_on_local_disks_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, mapped in (
        ("ext4", True),
        ("xfs", True),
        ("tmpfs", True),
        ("nfs4", False),
        ("fuse.sshfs", False),
        ("", False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(io, "file_system", lambda _, kind=kind: kind)
            folder = Folder(path)
            assert folder.maps is mapped
            assert Folder(path, reading="mmap").maps
            assert not Folder(path, reading="pread").maps
            folder.close()


def test_the_file_system_is_the_one_that_the_mount_table_names(tmp_path: Path) -> None:
    expected = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        expected[where] = kind
    for where in {"/proc", "/sys"} & set(expected):
        descriptor = os.open(where, os.O_RDONLY)
        assert file_system(descriptor) == expected[where]
        os.close(descriptor)
    assert file_system(10**6) == ""


def test_a_file_that_is_not_mapped_is_still_checked_for_its_size_and_read_only(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store", create=True, reading="pread")
    write_whole(folder, "x", [b"abcd"])
    data = folder.map("x", 4)
    assert data.tobytes() == b"abcd"
    assert not data.flags.writeable
    for size in (3, 5):
        with pytest.raises(SnapshotDamaged, match="has 4 bytes"):
            folder.map("x", size)
        with pytest.raises(SnapshotDamaged, match="has 4 bytes"):
            folder.sealed("x", size)
    folder.close()


def test_the_setting_says_what_it_can_be() -> None:
    assert CacheConfig().reading == "auto"
    with pytest.raises(ConfigError, match="reading is one of auto, mmap, pread"):
        CacheConfig(reading="direct")  # type: ignore[arg-type]

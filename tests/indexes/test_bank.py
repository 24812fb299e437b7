"""Tests of banks: look-ups and reads return the rows that were put, after sealing, damage and commits of others."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import ROW, Keys
from llmcache.indexes.search.bank_index import FIT_ROWS, NearChoice
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.indexes.store import Store

WIDTH, FEATURES = 24, 16
EXACT = NearChoice(index="flat", projection="none")
Opener = Callable[..., tuple[Store, Bank]]


def keys_of(numbers: Sequence[int]) -> Keys:
    """Return a deterministic key for each number, uint64 [n, 2]."""
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def text_keys_of(numbers: Sequence[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: Sequence[int], version: int = 0) -> NDArray[np.float32]:
    """Return deterministic values, float32 [n, WIDTH]."""
    rows = [np.random.default_rng([number, version]).standard_normal(WIDTH) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, WIDTH)


def states_of(numbers: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return one float32 [tokens, WIDTH] per number, of different lengths."""
    return [
        np.random.default_rng(number).standard_normal((1 + number * 7 % 13, WIDTH)).astype(np.float32)
        for number in numbers
    ]


def features_of(numbers: Sequence[int]) -> NDArray[np.float32]:
    rows = [np.random.default_rng([7, number]).standard_normal(FEATURES) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, FEATURES)


def put(bank: Bank, numbers: Sequence[int], values: Any = None, **others: Any) -> list[bool]:
    if values is None:
        values = values_of(numbers) if bank.facts.rank == 1 else states_of(numbers)
    kept = bank.put(
        keys_of(numbers),
        values,
        tokens=others.get("tokens", [np.arange(number % 5, dtype=np.int32) for number in numbers]),
        sources=others.get("sources", [f"document {number}" for number in numbers]),
        features=others.get("features", features_of(numbers)),
        cost=np.asarray(others.get("cost", [0.25] * len(numbers)), np.float32),
    )
    assert kept.dtype == np.bool_
    assert kept.shape == (len(numbers),)
    return [bool(one) for one in kept]


def by_torch(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = torch.from_numpy(values.copy()).to(dtype).to(torch.float32).numpy()
    return rounded


def assert_stored_as(dtype: str, found: NDArray[np.float32], values: NDArray[np.float32]) -> None:
    """Check that `found` is `values`, [rows, numbers], stored in this dtype; int8 rows have one scale each."""
    if dtype == "int8":
        step = np.abs(values).max(axis=1, initial=0, keepdims=True) / 127
        assert (np.abs(found - values) <= step * 0.5001 + 1e-12).all()
        return
    expected = by_torch(values, {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype])
    assert found.tobytes() == expected.tobytes()


def table(reading_values: object) -> NDArray[np.float32]:
    assert isinstance(reading_values, np.ndarray)
    return reading_values


def assert_holds(bank: Bank, numbers: Sequence[int]) -> None:
    """Check that all of these are found and read as they were put."""
    rows = bank.find(keys_of(numbers))
    assert (rows >= 0).all()
    reading = bank.read(rows)
    assert reading.intact.all()
    if bank.facts.rank == 1:
        assert_stored_as(bank.facts.dtype, table(reading.values), values_of(numbers))
    else:
        for found, values in zip(reading.values, states_of(numbers), strict=True):
            assert found.shape == values.shape
            assert_stored_as(bank.facts.dtype, found.reshape(1, -1), values.reshape(1, -1))


@pytest.fixture(params=["mmap", "pread"])
def open_bank(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Function that opens the test's store and a bank in it, mapped or not; all are closed at the end."""
    stores: list[Store] = []

    def opened(
        *, dtype: str = "float32", rank: int = 1, choice: NearChoice = EXACT, name: str = "layer"
    ) -> tuple[Store, Bank]:
        store = Store.open(tmp_path / "store", create=True, reading=request.param)
        stores.append(store)
        if store.namespace("default") is None:
            store.declare("default", {}, {})
        return store, store.bank("default", name, lambda: BankFacts(dtype, WIDTH, rank, FEATURES), choice)

    yield opened
    for store in stores:
        store.close()


def damage(path: Path, number: int, bank: Bank) -> None:
    """Flip a byte of the stored activations of this entry, in all segments that have it."""
    key = keys_of([number]).tobytes()
    hit = 0
    for facts in bank.facts.segments:
        rows = np.frombuffer((path / facts.file("row").name).read_bytes()[64:], ROW)
        for record in rows:
            if record["key"].tobytes() == key:
                flip(path / facts.file("seg").name, int(record["offset"]) + 5)
                hit += 1
    assert hit


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


# -- putting and finding ------------------------------------------------------------------------------------


def test_a_new_bank_is_empty(open_bank: Opener) -> None:
    _, bank = open_bank()
    assert len(bank) == 0
    assert not bank.has_pending
    assert bank.find(keys_of([1, 2])).tolist() == [-1, -1]
    assert bank.find_text(text_keys_of([1])).tolist() == [-1]
    rows, similarity = bank.nearest(features_of([1, 2, 3]), 2)
    assert rows.tolist() == [[-1, -1]] * 3
    assert (similarity == -np.inf).all()
    reading = bank.read(np.zeros(0, np.int64))
    assert table(reading.values).shape == (0, WIDTH)
    assert bank.cost(np.zeros(0, np.int64)) == 0


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_what_was_put_reads_the_same_before_and_after_it_is_sealed_and_after_reopening(
    open_bank: Opener, dtype: str, rank: int
) -> None:
    numbers = list(range(20))
    store, bank = open_bank(dtype=dtype, rank=rank)
    assert put(bank, numbers[:12]) == [True] * 12
    assert put(bank, numbers[12:]) == [True] * 8
    assert_holds(bank, numbers)
    rows = bank.find(keys_of(numbers))
    store.commit()
    assert bank.find(keys_of(numbers)).tolist() == rows.tolist()
    assert_holds(bank, numbers)
    _, again = open_bank(dtype=dtype, rank=rank)
    assert len(again) == 20
    assert_holds(again, numbers)
    assert_holds(again, [7])
    assert_holds(again, numbers[::-1])
    assert again.find(keys_of([99])).tolist() == [-1]


def test_rows_keep_their_numbers_when_they_are_sealed(open_bank: Opener) -> None:
    store, bank = open_bank()
    for start in range(0, 30, 10):
        put(bank, range(start, start + 5))
        put(bank, range(start + 5, start + 10))
        assert bank.find(keys_of(range(start + 10))).tolist() == list(range(start + 10))
        store.commit()
        assert bank.find(keys_of(range(start + 10))).tolist() == list(range(start + 10))
        assert not bank.has_pending
        assert bank.pending_bytes == 0
    assert [bank.key(row) for row in (0, 29)] == [keys_of([0]).tobytes().hex(), keys_of([29]).tobytes().hex()]
    _, again = open_bank()
    assert again.find(keys_of(range(30))).tolist() == list(range(30))


def test_rows_of_every_age_are_read_together_in_the_order_asked_for(open_bank: Opener) -> None:
    store, bank = open_bank()
    for start in (0, 10, 20):
        put(bank, range(start, start + 10))
        if start < 20:
            store.commit()
    put(bank, range(30, 33))
    asked = [32, 5, 15, 25, 5, 0, 31, 19, 10]
    assert_holds(bank, asked)
    reading = bank.read(bank.find(keys_of(asked)))
    assert table(reading.values).dtype == np.float32


def test_everything_else_about_a_row_survives_too(open_bank: Opener) -> None:
    store, bank = open_bank()
    tokens = [np.array([3, 1, 2], np.int32), np.zeros(0, np.int32), np.array([30_000], np.int32)]
    sources = ["grüße.txt", "", "a/b 🙂"]
    put(bank, [1, 2, 3], tokens=tokens, sources=sources, cost=[0.5, 0.25, 2.0])

    def check(bank: Bank) -> None:
        assert [bank.tokens(row).tolist() for row in range(3)] == [[3, 1, 2], [], [30_000]]
        assert [bank.source(row) for row in range(3)] == sources
        assert bank.cost(np.array([0, 2])) == 2.5
        assert bank.cost(np.array([1, 1, 0])) == 1.0
        assert [bank.key(row) for row in range(3)] == [one.tobytes().hex() for one in keys_of([1, 2, 3])]

    check(bank)
    store.commit()
    check(bank)
    check(open_bank()[1])


def test_costs_add_up_over_sealed_and_pending_rows(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, [1, 2], cost=[1, 2])
    store.commit()
    put(bank, [3, 4], cost=[4, 8])
    assert bank.cost(np.array([0, 1, 2, 3])) == 15
    assert bank.cost(np.array([3, 0])) == 9


def test_pending_bytes_count_the_activations_that_wait(open_bank: Opener) -> None:
    store, bank = open_bank(dtype="float16")
    put(bank, [1, 2])
    put(bank, [3])
    assert bank.pending_bytes == 3 * WIDTH * 2
    assert bank.has_pending
    store.commit()
    assert bank.pending_bytes == 0
    assert not bank.has_pending


def test_what_is_changed_after_it_was_put_does_not_change_the_bank(open_bank: Opener) -> None:
    store, bank = open_bank()
    values, features = values_of([1, 2]), features_of([1, 2])
    put(bank, [1, 2], values, features=features)
    values[:] = 0
    features[:] = 1
    assert_holds(bank, [1, 2])
    store.commit()
    assert_holds(bank, [1, 2])
    assert bank.nearest(features_of([2]), 1)[0].tolist() == [[1]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_can_be_changed_without_changing_the_bank(open_bank: Opener, dtype: str) -> None:
    store, bank = open_bank(dtype=dtype)
    put(bank, [1, 2])
    for _ in range(2):
        table(bank.read(np.array([0, 1])).values)[:] = 0
        assert_holds(bank, [1, 2])
        store.commit()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("rank", [1, 2])
def test_rows_that_are_no_numbers_are_not_kept(open_bank: Opener, dtype: str, rank: int) -> None:
    store, bank = open_bank(dtype=dtype, rank=rank)
    numbers = list(range(6))
    values: Any = values_of(numbers) if rank == 1 else states_of(numbers)
    for number, bad in ((1, np.nan), (3, np.inf), (4, -np.inf)):
        values[number].ravel()[3] = bad
    kept = put(bank, numbers, values, cost=[1, 2, 4, 8, 16, 32])
    assert kept == [True, False, True, False, False, True]
    assert len(bank) == 3
    assert [bank.cost(np.array([row])) for row in range(3)] == [1, 4, 32]
    assert [int(bank.nearest(features_of([number]), 1)[0][0, 0]) for number in (0, 2, 5)] == [0, 1, 2]
    assert (bank.find(keys_of([1, 3, 4])) == -1).all()
    assert_holds(bank, [0, 2, 5])
    assert [bank.source(row) for row in range(3)] == ["document 0", "document 2", "document 5"]
    assert [len(bank.tokens(row)) for row in range(3)] == [0, 2, 0]
    store.commit()
    assert_holds(open_bank(dtype=dtype, rank=rank)[1], [0, 2, 5])


def test_rows_beyond_float16_are_not_kept_as_float16(open_bank: Opener) -> None:
    _, bank = open_bank(dtype="float16")
    values = values_of([0, 1, 2])
    values[1, 0] = 70_000
    values[2, 0] = 65_504
    assert put(bank, [0, 1, 2], values) == [True, False, True]
    assert bank.find(keys_of([0, 1, 2])).tolist() == [0, -1, 1]
    assert table(bank.read(np.array([1])).values)[0, 0] == 65_504


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_batch_of_which_nothing_can_be_kept_changes_nothing(open_bank: Opener, dtype: str, rank: int) -> None:
    store, bank = open_bank(dtype=dtype, rank=rank)
    values: Any = [np.full_like(one, np.nan) for one in states_of([1, 2])] if rank == 2 else values_of([1, 2]) * np.nan
    assert put(bank, [1, 2], values) == [False, False]
    assert put(bank, []) == []
    assert len(bank) == 0
    assert not bank.has_pending
    before = store.manifest.generation
    assert store.commit().generation == before


def test_of_two_copies_of_an_entry_the_newer_is_served_also_after_reopening(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, [1, 2, 3])
    put(bank, [2, 2], np.concatenate([values_of([2], 1), values_of([2], 2)]))
    assert bank.find(keys_of([1, 2, 3])).tolist() == [0, 4, 2]
    store.commit()
    put(bank, [3], values_of([3], 1))
    store.commit()
    for one in (bank, open_bank()[1]):
        reading = one.read(one.find(keys_of([1, 2, 3])))
        expected = np.concatenate([values_of([1]), values_of([2], 2), values_of([3], 1)])
        assert table(reading.values).tobytes() == expected.tobytes()


# -- names --------------------------------------------------------------------------------------------------


def test_a_text_leads_to_its_row_before_and_after_it_is_sealed_and_after_reopening(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, range(5))
    bank.alias(text_keys_of([10, 11, 13]), keys_of([0, 1, 3]))
    bank.alias(text_keys_of([20]), keys_of([3]))
    asked = text_keys_of([10, 11, 12, 13, 20])
    assert bank.find_text(asked).tolist() == [0, 1, -1, 3, 3]
    store.commit()
    assert bank.find_text(asked).tolist() == [0, 1, -1, 3, 3]
    _, again = open_bank()
    assert again.find_text(asked).tolist() == [0, 1, -1, 3, 3]
    assert again.find(asked).tolist() == [-1] * 5


def test_a_name_for_what_is_not_there_is_passed_over(open_bank: Opener) -> None:
    store, bank = open_bank()
    bank.alias(text_keys_of([10]), keys_of([0]))
    assert not bank.has_pending
    put(bank, [1])
    bank.alias(text_keys_of([10, 11]), keys_of([0, 1]))
    assert bank.find_text(text_keys_of([10, 11])).tolist() == [-1, 0]
    store.commit()
    assert open_bank()[1].find_text(text_keys_of([10, 11])).tolist() == [-1, 0]


def test_names_alone_are_committed_too_and_leave_the_rows_where_they_are(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, [1, 2])
    store.commit()
    bank.alias(text_keys_of([10]), keys_of([2]))
    assert bank.has_pending
    store.commit()
    assert not bank.has_pending
    put(bank, [3])
    store.commit()
    assert bank.find_text(text_keys_of([10])).tolist() == [1]
    assert_holds(bank, [1, 2, 3])
    _, again = open_bank()
    assert again.find_text(text_keys_of([10])).tolist() == [1]
    assert again.find(keys_of([1, 2, 3])).tolist() == [0, 1, 2]
    assert_holds(again, [1, 2, 3])


def test_of_two_rows_for_a_text_the_newer_is_served_also_after_reopening(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, [1, 2])
    bank.alias(text_keys_of([10]), keys_of([1]))
    store.commit()
    bank.alias(text_keys_of([10]), keys_of([2]))
    assert bank.find_text(text_keys_of([10])).tolist() == [1]
    store.commit()
    assert bank.find_text(text_keys_of([10])).tolist() == [1]
    assert open_bank()[1].find_text(text_keys_of([10])).tolist() == [1]


def test_a_name_finds_the_newest_copy_of_its_row_after_reopening(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, [1])
    bank.alias(text_keys_of([10]), keys_of([1]))
    store.commit()
    put(bank, [1], values_of([1], 1))
    store.commit()
    _, again = open_bank()
    rows = again.find_text(text_keys_of([10]))
    assert table(again.read(rows).values).tobytes() == values_of([1], 1).tobytes()


# -- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_a_flipped_byte_is_a_miss_and_nothing_else(
    open_bank: Opener, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    store, bank = open_bank(rank=rank)
    put(bank, range(6))
    bank.alias(text_keys_of(range(6)), keys_of(range(6)))
    store.commit()
    damage(store.folder.path, 3, bank)
    for one in (bank, open_bank(rank=rank)[1]):
        caplog.clear()
        assert one.damaged == 0
        rows = one.find(keys_of(range(6)))
        reading = one.read(rows)
        assert reading.intact.tolist() == [True, True, True, False, True, True]
        assert not np.any(reading.values[3])
        expected: Any = values_of(range(6)) if rank == 1 else states_of(range(6))
        for i in (0, 1, 2, 4, 5):
            assert reading.values[i].tobytes() == expected[i].tobytes()
        assert one.damaged == 1
        assert "1 stored rows do not match" in caplog.text
        assert one.find(keys_of(range(6))).tolist() == [0, 1, 2, -1, 4, 5]
        assert one.find_text(text_keys_of(range(6))).tolist() == [0, 1, 2, -1, 4, 5]
        assert_holds(one, [0, 1, 2, 4, 5])


def test_every_row_of_a_batch_may_be_damaged(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, range(3))
    store.commit()
    for number in range(3):
        damage(store.folder.path, number, bank)
    reading = bank.read(np.array([2, 0, 1]))
    assert reading.intact.tolist() == [False] * 3
    assert not table(reading.values).any()
    assert bank.damaged == 3


@pytest.mark.parametrize("rank", [1, 2])
def test_a_damaged_row_that_is_put_again_is_served_anew_also_after_reopening(open_bank: Opener, rank: int) -> None:
    store, bank = open_bank(rank=rank)
    put(bank, range(5))
    bank.alias(text_keys_of(range(5)), keys_of(range(5)))
    store.commit()
    damage(store.folder.path, 2, bank)
    bank.read(bank.find(keys_of([2])))
    put(bank, [2])
    bank.alias(text_keys_of([2]), keys_of([2]))
    assert_holds(bank, range(5))
    assert bank.find_text(text_keys_of([2])).tolist() == [5]
    store.commit()
    assert_holds(bank, range(5))
    _, again = open_bank(rank=rank)
    assert_holds(again, range(5))
    assert again.damaged == 0
    texts = again.find_text(text_keys_of(range(5)))
    assert again.read(texts).intact.all()


def test_a_damaged_segment_is_misses_and_the_others_are_whole(
    open_bank: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store, bank = open_bank()
    for start in (0, 5, 10):
        put(bank, range(start, start + 5))
        bank.alias(text_keys_of(range(start, start + 5)), keys_of(range(start, start + 5)))
        store.commit()
    flip(store.folder.path / bank.facts.segments[1].file("row").name, 100)
    _, again = open_bank()
    assert "its 5 entries are misses" in caplog.text
    assert len(again) == 10
    assert (again.find(keys_of(range(5, 10))) == -1).all()
    assert (again.find_text(text_keys_of(range(5, 10))) == -1).all()
    kept = [*range(5), *range(10, 15)]
    assert_holds(again, kept)
    assert (again.find_text(text_keys_of(kept)) == again.find(keys_of(kept))).all()


@pytest.mark.parametrize("kind", ["seg", "row", "key"])
@pytest.mark.parametrize("how", ["missing", "truncated", "symlink", "fifo"])
def test_a_segment_with_a_file_that_is_no_more_what_it_was_is_misses(open_bank: Opener, kind: str, how: str) -> None:
    store, bank = open_bank()
    put(bank, range(5))
    store.commit()
    put(bank, range(5, 8))
    bank.alias(text_keys_of([5]), keys_of([5]))
    store.commit()
    path = store.folder.path / bank.facts.segments[1].file(kind).name
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.rename(path.with_suffix(".was"))
        if how == "symlink":
            path.symlink_to(path.with_suffix(".was"))
        elif how == "fifo":
            os.mkfifo(path)
    again_store, again = open_bank()
    assert len(again) == 5
    assert_holds(again, range(5))
    put(again, range(5, 8))
    again_store.commit()
    assert_holds(open_bank()[1], range(8))


@pytest.mark.parametrize("kind", ["var", "fp"])
def test_damaged_tokens_or_features_leave_the_activations_served(
    open_bank: Opener, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    store, bank = open_bank()
    put(bank, range(1, 5))
    store.commit()
    put(bank, range(5, 8))
    store.commit()
    flip(store.folder.path / bank.facts.segments[0].file(kind).name, 1)
    _, again = open_bank()
    assert_holds(again, range(1, 8))
    rows, _ = again.nearest(features_of([6, 2]), 1)
    assert rows[0, 0] == 5
    if kind == "var":
        assert rows[1, 0] == 1
        assert again.tokens(0).tolist() == []
        assert again.source(0) == ""
        assert again.source(5) == "document 6"
        some = np.array([5, 0, 6])
        assert again.sources(some) == ["document 6", "", "document 7"]
        assert [one.tolist() for one in again.tokens_of(some)] == [again.tokens(row).tolist() for row in (5, 0, 6)]
    else:
        assert again.source(0) == "document 1"
        assert "no near matches" in caplog.text


def test_a_bank_survives_a_segment_that_cannot_be_opened_just_after_its_commit(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bank = open_bank()
    put(bank, range(3))
    store.commit()
    put(bank, range(3, 6))

    def no_descriptors(self: Folder, name: str, size: int) -> NDArray[np.uint8]:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "map", no_descriptors)
        with suppress(OSError, LLMCacheError):  # whether it says so or not, the bank must go on
            store.commit()
    assert_holds(bank, range(3))
    rows = bank.find(keys_of(range(3, 6)))
    assert bank.read(rows[rows >= 0]).intact.all()
    put(bank, range(6, 8))
    store.commit()
    assert_holds(bank, [0, 1, 2, 6, 7])
    assert_holds(open_bank()[1], range(8))


# -- neighbours ---------------------------------------------------------------------------------------------


def cosines(queries: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return cosines of features rounded as they are stored, [queries, features]."""
    left, right = (one.astype(np.float16).astype(np.float64) for one in (queries, features))
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)[None]
    return np.asarray(left @ right.T / norms)


def assert_nearest_as_numpy(bank: Bank, numbers: Sequence[int], queries: NDArray[np.float32], k: int) -> None:
    """Compare with an exact search in NumPy. numbers: of the bank's rows, in order."""
    rows, similarity = bank.nearest(queries, k)
    assert rows.shape == similarity.shape == (len(queries), k)
    assert rows.dtype == np.int64
    assert similarity.dtype == np.float32
    expected = cosines(queries, features_of(numbers))
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows[:, : len(numbers)], order)
    np.testing.assert_allclose(similarity[:, : len(numbers)], np.take_along_axis(expected, order, axis=1), atol=2e-6)
    assert (rows[:, len(numbers) :] == -1).all()
    assert (similarity[:, len(numbers) :] == -np.inf).all()


@pytest.mark.parametrize("choice", [EXACT, NearChoice(), NearChoice(index="flat")], ids=str)
def test_below_the_size_for_a_projection_neighbours_are_exact(open_bank: Opener, choice: NearChoice) -> None:
    store, bank = open_bank(choice=choice)
    queries = features_of(range(1000, 1020))
    put(bank, range(100))
    assert_nearest_as_numpy(bank, range(100), queries, 5)
    store.commit()
    assert_nearest_as_numpy(bank, range(100), queries, 5)
    put(bank, range(100, 150))
    assert_nearest_as_numpy(bank, range(150), queries, 5)
    put(bank, range(150, 160))
    assert_nearest_as_numpy(bank, range(160), queries, 1)
    store.commit()
    assert_nearest_as_numpy(bank, range(160), queries, 5)
    _, again = open_bank(choice=choice)
    assert_nearest_as_numpy(again, range(160), queries, 5)


def test_a_repeat_is_its_own_nearest_at_similarity_one(open_bank: Opener) -> None:
    _, bank = open_bank()
    put(bank, range(50))
    rows, similarity = bank.nearest(features_of(range(50)), 1)
    assert rows[:, 0].tolist() == list(range(50))
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-6)


def test_more_neighbours_than_rows_are_filled_up_with_none(open_bank: Opener) -> None:
    _, bank = open_bank()
    put(bank, range(3))
    assert_nearest_as_numpy(bank, range(3), features_of([50, 51]), 7)


def test_no_queries_have_no_neighbours(open_bank: Opener) -> None:
    _, bank = open_bank()
    put(bank, range(3))
    rows, similarity = bank.nearest(features_of([]), 4)
    assert rows.shape == similarity.shape == (0, 4)


def test_similarity_does_not_depend_on_the_length_of_a_feature(open_bank: Opener) -> None:
    _, bank = open_bank()
    put(bank, range(20))
    queries = features_of([60, 61])
    rows, similarity = bank.nearest(queries, 3)
    scaled, near = bank.nearest(queries * 8, 3)
    assert scaled.tolist() == rows.tolist()
    np.testing.assert_allclose(near, similarity, atol=1e-6)


def test_a_feature_of_zeros_is_near_nothing(open_bank: Opener) -> None:
    _, bank = open_bank()
    features = features_of(range(4))
    features[1] = 0
    put(bank, range(4), features=features)
    rows, similarity = bank.nearest(features, 1)
    assert rows[[0, 2, 3], 0].tolist() == [0, 2, 3]
    assert similarity[1, 0] == 0


def test_features_beyond_float16_are_cut_to_its_range(open_bank: Opener) -> None:
    _, bank = open_bank()
    features = features_of(range(4)) * 1e6
    features[1] = np.inf
    put(bank, range(4), features=features)
    _, similarity = bank.nearest(features, 1)
    assert np.isfinite(similarity).all()
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-6)


def test_features_that_are_no_numbers_spoil_nothing(open_bank: Opener) -> None:
    store, bank = open_bank()
    features = features_of(range(4))
    features[1, 3] = np.nan
    put(bank, range(4), features=features)
    for one in (bank, None):
        if one is None:
            store.commit()
            one = open_bank()[1]
        rows, similarity = one.nearest(features, 1)
        assert rows[[0, 2, 3], 0].tolist() == [0, 2, 3]
        assert np.isfinite(similarity).all()
        assert_holds(one, range(4))


@pytest.mark.parametrize("choice", [NearChoice(), NearChoice(projection="simhash", dim=64)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bank_of_equal_features_is_searched_all_the_same(open_bank: Opener, choice: NearChoice, value: float) -> None:
    store, bank = open_bank(choice=choice)
    n = FIT_ROWS + 10
    put(bank, range(n), features=np.full((n, FEATURES), value, np.float32))
    rows, similarity = bank.nearest(np.full((2, FEATURES), value, np.float32), 1)
    assert rows.shape == (2, 1)
    if value:
        assert (rows >= 0).all()
    assert not np.isnan(similarity).any()
    store.commit()


@pytest.mark.parametrize("index", ["ivf-flat", "ivf-sq8", "hnsw"])
def test_an_index_that_needs_more_rows_than_there_are_is_no_error(open_bank: Opener, index: str) -> None:
    _, bank = open_bank(choice=NearChoice(index=index, projection="none"))
    put(bank, range(10))
    rows, _ = bank.nearest(features_of(range(10)), 1)
    assert rows[:, 0].tolist() == list(range(10))


def clustered(numbers: Sequence[int]) -> NDArray[np.float32]:
    """Return features in eight directions of sixteen, with individual noise."""
    centres = np.random.default_rng(0).standard_normal((8, FEATURES)) * 3
    noise = [np.random.default_rng([9, number]).standard_normal(FEATURES) for number in numbers]
    return np.array([centres[number % 8] + one for number, one in zip(numbers, noise, strict=True)], np.float32)


@pytest.mark.parametrize(
    "choice",
    [
        NearChoice(),
        NearChoice(dim=8),
        NearChoice(projection="none"),
        NearChoice(projection="simhash", dim=256),
        NearChoice(index="hnsw"),
        NearChoice(index="ivf-flat", projection="none"),
    ],
    ids=str,
)
def test_after_growing_past_the_fit_every_row_is_still_found_by_its_features(
    open_bank: Opener, choice: NearChoice
) -> None:
    store, bank = open_bank(choice=choice)
    n = 660
    for start in range(0, n, 110):
        put(bank, range(start, start + 110), features=clustered(range(start, start + 110)))
        if start >= 440:
            bank.nearest(clustered([3]), 1)
        if start % 220 == 0:
            store.commit()

    def check(bank: Bank) -> None:
        rows, similarity = bank.nearest(clustered(range(n)), 1)
        lost = int((rows[:, 0] != np.arange(n)).sum())
        assert lost <= (0 if choice.index == "auto" and choice.projection != "simhash" else n // 50)
        np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-5)
        near, _ = bank.nearest(clustered(range(5000, 5080)), 1)
        assert ((near[:, 0] % 8) == np.arange(5000, 5080) % 8).mean() > 0.9

    check(bank)
    bank.near.rebuild()
    check(bank)
    store.commit()
    check(bank)
    check(open_bank(choice=choice)[1])


def test_a_pca_takes_over_once_there_are_enough_rows(open_bank: Opener) -> None:
    _, bank = open_bank(choice=NearChoice(dim=8))
    put(bank, range(FIT_ROWS - 1))
    queries = features_of(range(9000, 9010))
    assert_nearest_as_numpy(bank, range(FIT_ROWS - 1), queries, 3)
    put(bank, [FIT_ROWS - 1])
    rows, similarity = bank.nearest(queries, 3)
    plain = np.sort(cosines(queries, features_of(range(FIT_ROWS))), axis=1)[:, ::-1][:, :3]
    assert not np.allclose(similarity, plain, atol=1e-3)
    assert (rows >= 0).all()
    own, similarity = bank.nearest(features_of(range(FIT_ROWS)), 1)
    assert own[:, 0].tolist() == list(range(FIT_ROWS))
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-5)


def test_a_damaged_row_is_never_a_neighbour_again(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, range(10))
    store.commit()
    damage(store.folder.path, 4, bank)
    assert bank.nearest(features_of([4]), 1)[0].tolist() == [[4]]
    assert not bank.read(np.array([4])).intact[0]
    rows, similarity = bank.nearest(features_of(range(10)), 10)
    assert not (rows == 4).any()
    assert (similarity[rows < 0] == -np.inf).all()
    assert ((rows >= 0).sum(axis=1) == 9).all()


def test_the_neighbour_behind_a_damaged_row_is_found_instead(open_bank: Opener) -> None:
    store, bank = open_bank()
    put(bank, range(10))
    store.commit()
    damage(store.folder.path, 4, bank)
    bank.read(np.array([4]))
    order = np.argsort(-cosines(features_of([4]), features_of(range(10)))[0])
    assert order[0] == 4
    assert bank.nearest(features_of([4]), 1)[0].tolist() == [[order[1]]]
    put(bank, [4])
    rows, similarity = bank.nearest(features_of([4]), 1)
    assert rows.tolist() == [[10]]
    np.testing.assert_allclose(similarity, 1, atol=1e-6)


# -- the index file -----------------------------------------------------------------------------------------


class Builds:
    """Counts the builds of an index."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = VectorIndex.build

        def build(*args: Any, **settings: Any) -> Any:
            self.count += 1
            return real(*args, **settings)

        patch.setattr(VectorIndex, "build", build)


CHOICES = [EXACT, NearChoice(), NearChoice(projection="simhash", dim=64), NearChoice(index="hnsw", dim=8)]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_index_file_is_used_on_reopening_with_the_same_answers(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: NearChoice
) -> None:
    store, bank = open_bank(choice=choice)
    put(bank, range(600))
    queries = features_of([*range(5), *range(2000, 2020)])
    store.commit()
    rows, similarity = bank.nearest(queries, 4)
    store.commit()
    assert bank.facts.index is not None
    assert bank.facts.index.count == 600
    builds = Builds(monkeypatch)
    _, again = open_bank(choice=choice)
    found, near = again.nearest(queries, 4)
    assert builds.count == 0
    assert found.tolist() == rows.tolist()
    np.testing.assert_allclose(near, similarity, atol=1e-6)
    assert again.near.kind == bank.near.kind
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["faiss", "proj"])
@pytest.mark.parametrize("how", ["flipped", "missing", "truncated", "empty", "swapped", "symlink", "fifo", "folder"])
def test_an_index_file_that_is_not_what_it_was_is_made_again_with_the_same_answers(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    choice = NearChoice(dim=8)
    queries = features_of([*range(5), *range(2000, 2010)])
    store, bank = open_bank(choice=choice)
    _, other = store, store.bank("default", "other", lambda: BankFacts("int8", WIDTH, 1, FEATURES), choice)
    put(bank, range(600))
    put(other, range(600, 1200))
    store.commit()
    rows, similarity = bank.nearest(queries, 3)
    other.nearest(queries, 3)
    store.commit()
    names = []
    for one in (bank, other):
        assert one.facts.index is not None
        assert one.facts.projection is not None
        names.append(one.facts.index.file.name if kind == "faiss" else one.facts.projection.name)
    path, theirs = (store.folder.path / name for name in names)
    content = path.read_bytes()
    if how == "flipped":
        flip(path, len(content) // 2)
    elif how == "truncated":
        os.truncate(path, len(content) // 2)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "swapped":
        assert len(content) == theirs.stat().st_size
        path.write_bytes(theirs.read_bytes())
        theirs.write_bytes(content)
    else:
        path.rename(path.with_suffix(".was"))
        if how == "symlink":
            path.symlink_to(path.with_suffix(".was"))
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
    builds = Builds(monkeypatch)
    again_store, again = open_bank(choice=choice)
    found, near = again.nearest(queries, 3)
    assert builds.count == 1
    assert found.tolist() == rows.tolist()
    np.testing.assert_allclose(near, similarity, atol=1e-6)
    put(again, range(3000, 3001))
    again_store.commit()
    again.nearest(queries, 3)
    again_store.commit()
    builds.count = 0
    _, third = open_bank(choice=choice)
    assert third.nearest(queries, 3)[0].tolist() == again.nearest(queries, 3)[0].tolist()
    assert builds.count == 0


def test_rows_of_another_writer_that_came_after_the_index_file_are_found(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bank = open_bank()
    rival_store, rival = open_bank()
    put(bank, range(50))
    store.commit()
    bank.nearest(features_of([1]), 1)
    put(rival, range(50, 60))
    rival_store.commit()
    store.commit()
    put(rival, range(60, 80))
    rival_store.commit()
    put(bank, range(80, 90))
    store.commit()
    builds = Builds(monkeypatch)
    _, again = open_bank()
    held = [int(again.source(row).removeprefix("document ")) for row in range(len(again))]
    assert sorted(held) == list(range(90))
    assert_nearest_as_numpy(again, held, features_of(range(4000, 4020)), 6)
    assert builds.count == 0
    assert_holds(again, range(90))


def test_an_index_whose_writer_did_not_see_all_segments_leads_to_the_right_rows(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bank = open_bank()
    rival_store, rival = open_bank()
    put(bank, range(20))
    store.commit()
    put(rival, range(20, 27))  # lies between the two segments of the index
    rival_store.commit()
    put(bank, range(27, 40))
    store.commit()
    bank.nearest(features_of([1]), 1)
    store.commit()
    assert bank.facts.index is not None
    ids = [facts.id for facts in bank.facts.segments]
    assert bank.facts.index.segments == (ids[0], ids[2])
    builds = Builds(monkeypatch)
    _, again = open_bank()
    assert_holds(again, range(40))
    assert again.find(keys_of(range(40))).tolist() == list(range(40))
    assert_nearest_as_numpy(again, range(40), features_of(range(4000, 4020)), 6)
    assert builds.count == 0


def test_an_index_saved_while_only_some_waiting_rows_were_in_it_is_still_good_on_reopening(
    open_bank: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, bank = open_bank()
    put(bank, range(20))
    bank.nearest(features_of([1]), 1)
    put(bank, range(20, 30))  # sealed into one segment with the twenty that are indexed
    store.commit()
    put(bank, range(30, 35))
    store.commit()
    builds = Builds(monkeypatch)
    _, again = open_bank()
    assert_nearest_as_numpy(again, range(35), features_of(range(4000, 4020)), 6)
    assert "built again" not in caplog.text
    assert builds.count == 0


def test_an_index_file_over_a_segment_that_is_gone_is_not_believed(open_bank: Opener) -> None:
    store, bank = open_bank()
    for start in (0, 10, 20):
        put(bank, range(start, start + 10))
        store.commit()
    bank.nearest(features_of([1]), 1)
    store.commit()
    assert bank.facts.index is not None
    assert len(bank.facts.index.segments) == 3
    (store.folder.path / bank.facts.segments[1].file("row").name).unlink()
    _, again = open_bank()
    kept = [*range(10), *range(20, 30)]
    assert_nearest_as_numpy(again, kept, features_of(range(4000, 4020)), 4)
    assert_holds(again, kept)


def test_the_index_file_is_written_again_only_after_some_growth_and_the_old_one_goes(open_bank: Opener) -> None:
    store, bank = open_bank()

    def files() -> list[str]:
        return sorted(store.folder.names("idx"))

    assert files() == []
    put(bank, range(100))
    store.commit()
    assert files() == []  # nobody has asked for neighbours yet
    bank.nearest(features_of([1]), 1)
    store.commit()
    first = files()
    assert len(first) == 2
    put(bank, range(100, 110))
    bank.nearest(features_of([1]), 1)
    store.commit()
    assert files() == first
    put(bank, range(110, 150))
    store.commit()
    bank.nearest(features_of([1]), 1)
    store.commit()
    second = files()
    assert len(second) == 2
    assert not set(first) & set(second)
    assert_nearest_as_numpy(open_bank()[1], range(150), features_of(range(4000, 4020)), 4)


def test_another_choice_of_index_than_the_one_on_file_is_built_as_asked_for(open_bank: Opener) -> None:
    store, bank = open_bank(choice=NearChoice(index="flat", projection="none"))
    put(bank, range(700))
    store.commit()
    queries = features_of(range(4000, 4010))
    rows, _ = bank.nearest(queries, 3)
    store.commit()
    for choice in (
        NearChoice(index="hnsw", projection="none"),
        NearChoice(index="ivf-flat", projection="none"),
        NearChoice(index="auto", projection="simhash", dim=64),
        NearChoice(index="auto", projection="pca"),
    ):
        other_store, again = open_bank(choice=choice)
        found, _ = again.nearest(features_of(range(700)), 1)
        assert (found[:, 0] == np.arange(700)).mean() > 0.95
        wanted = {"hnsw": "hnsw", "ivf-flat": "ivf-flat"}.get(choice.index)
        assert again.near.kind == (wanted or ("binary-flat" if choice.projection == "simhash" else "flat"))
        other_store.commit()
    _, again = open_bank(choice=NearChoice(index="flat", projection="none"))
    assert again.nearest(queries, 3)[0].tolist() == rows.tolist()


def test_warnings_go_to_the_librarys_own_logger(open_bank: Opener, caplog: pytest.LogCaptureFixture) -> None:
    store, bank = open_bank()
    put(bank, range(3))
    store.commit()
    damage(store.folder.path, 1, bank)
    bank.read(np.array([1]))
    assert {(one.name, one.levelno) for one in caplog.records} == {("llmcache", logging.WARNING)}

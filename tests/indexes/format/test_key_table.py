"""Tests of the key table against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.rows import Keys


def as_keys(pairs: list[tuple[int, int]]) -> Keys:
    return np.array(pairs, np.uint64).reshape(-1, 2)


def as_rows(rows: list[int]) -> NDArray[np.int64]:
    return np.array(rows, np.int64)


def random_keys(n: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 1 << 64, (n, 2), np.uint64)


def expected(known: dict[tuple[int, int], int], keys: Keys) -> list[int]:
    return [known.get((int(first), int(second)), -1) for first, second in keys]


def test_an_empty_table_knows_no_key() -> None:
    table = KeyTable()
    assert len(table) == 0
    assert table.find(random_keys(3, 0)).tolist() == [-1, -1, -1]
    assert table.find(random_keys(0, 0)).tolist() == []
    table.settle()
    table.extend(random_keys(0, 0), as_rows([]))
    table.add(random_keys(0, 0), as_rows([]))
    assert table.find(random_keys(3, 0)).tolist() == [-1, -1, -1]


def test_looking_up_no_keys_gives_no_rows() -> None:
    table = KeyTable()
    table.extend(random_keys(5, 1), np.arange(5))
    table.add(random_keys(5, 2), np.arange(5))
    found = table.find(random_keys(0, 0))
    assert found.dtype == np.int64
    assert found.shape == (0,)


@pytest.mark.parametrize("how", ["add", "extend", "both", "settled"])
def test_many_keys_lead_to_the_rows_a_dict_gives(how: str) -> None:
    keys, strangers = random_keys(20_000, 3), random_keys(5_000, 4)
    rows = np.random.default_rng(5).permutation(20_000)
    known = {(int(a), int(b)): int(row) for (a, b), row in zip(keys, rows, strict=True)}
    table = KeyTable()
    if how == "extend":
        table.extend(keys, rows)
    else:
        half = 0 if how == "add" else 10_000
        table.extend(keys[:half], rows[:half])
        table.add(keys[half:], rows[half:])
        if how == "settled":
            table.settle()
            assert not table._recent
    assert len(table) == 20_000
    asked = np.concatenate([strangers, keys])[np.random.default_rng(6).permutation(25_000)]
    found = table.find(asked)
    assert found.dtype == np.int64
    assert found.tolist() == expected(known, asked)


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    pairs = [(7, i) for i in range(50)] + [(8, i) for i in range(50)] + [(i, 7) for i in range(20, 70)]
    for add_first in (True, False):
        table = KeyTable()
        (table.add if add_first else table.extend)(as_keys(pairs[:75]), np.arange(75))
        (table.extend if add_first else table.add)(as_keys(pairs[75:]), np.arange(75, 150))
        assert table.find(as_keys(pairs)).tolist() == list(range(150))
        assert table.find(as_keys([(7, 50), (8, 1 << 63), (9, 0), (0, 7)])).tolist() == [-1, -1, -1, -1]


def test_the_smallest_and_the_largest_key_are_found() -> None:
    top = (1 << 64) - 1
    pairs = [(0, 0), (0, top), (top, 0), (top, top)]
    table = KeyTable()
    table.extend(as_keys(pairs), np.arange(4))
    assert table.find(as_keys([*pairs, (top, 1), (0, 1)])).tolist() == [0, 1, 2, 3, -1, -1]


def test_of_two_rows_for_a_key_in_one_batch_the_later_wins() -> None:
    pairs = [(1, 1), (2, 2), (1, 1), (1, 2), (2, 2), (1, 1)]
    for how in ("add", "extend"):
        table = KeyTable()
        getattr(table, how)(as_keys(pairs), np.arange(6))
        assert table.find(as_keys(pairs)).tolist() == [5, 4, 5, 3, 4, 5], how


def test_of_two_batches_the_later_wins() -> None:
    for first in ("add", "extend"):
        for second in ("add", "extend"):
            table = KeyTable()
            getattr(table, first)(as_keys([(1, 1), (2, 2)]), as_rows([10, 20]))
            getattr(table, second)(as_keys([(1, 1), (3, 3)]), as_rows([11, 30]))
            asked = as_keys([(1, 1), (2, 2), (3, 3)])
            assert table.find(asked).tolist() == [11, 20, 30], (first, second)


def test_settling_waits_until_there_is_enough_to_sort() -> None:
    table = KeyTable()
    table.add(random_keys(100, 0), np.arange(100))
    table.settle()
    assert len(table._recent) == 100
    table.add(random_keys(5000, 1), np.arange(100, 5100))
    table.settle()
    assert len(table._recent) == 0
    assert table.find(random_keys(100, 0)).tolist() == list(range(100))
    assert table.find(random_keys(5000, 1)).tolist() == list(range(100, 5100))


def test_keys_may_be_a_view_with_gaps() -> None:
    wide = random_keys(40, 8)
    table = KeyTable()
    table.extend(wide[::4], np.arange(10))
    table.add(wide[1::4], np.arange(10, 20))
    assert table.find(wide[::4]).tolist() == list(range(10))
    assert table.find(wide[1::4]).tolist() == list(range(10, 20))
    assert table.find(wide[2::4]).tolist() == [-1] * 10


def test_looking_up_does_not_give_away_the_table_itself() -> None:
    table = KeyTable()
    table.extend(as_keys([(1, 1)]), as_rows([5]))
    table.find(as_keys([(1, 1)]))[:] = -1
    assert table.find(as_keys([(1, 1)])).tolist() == [5]


few = st.tuples(st.integers(0, 3), st.integers(0, 3))
batches = st.lists(few, max_size=6)
steps = st.lists(st.tuples(st.sampled_from(["add", "extend", "settle"]), batches), max_size=8)


@given(steps, st.booleans())
def test_any_order_of_adding_and_settling_agrees_with_a_dict(
    done: list[tuple[str, list[tuple[int, int]]]], eager: bool
) -> None:
    table = KeyTable()
    known: dict[tuple[int, int], int] = {}
    row = 0
    for how, pairs in done:
        if how == "settle":
            if eager:  # as if there were enough of them
                fillers = [(100 + row, i) for i in range(5000)]
                table.add(as_keys(fillers), np.full(5000, 99))
            table.settle()
            continue
        rows = list(range(row, row + len(pairs)))
        row += len(pairs)
        getattr(table, how)(as_keys(pairs), as_rows(rows))
        known.update(zip(pairs, rows, strict=True))
    every = as_keys([(a, b) for a in range(4) for b in range(4)])
    assert table.find(every).tolist() == expected(known, every)

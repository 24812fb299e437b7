"""Tests of the arena for pending rows: allocations do not overlap, and pending rows are not overwritten."""

from __future__ import annotations

import numpy as np

from llmcache.indexes.format import codec
from llmcache.indexes.format.shelf import Shelf


def test_places_do_not_overlap_until_the_shelf_is_cleared() -> None:
    shelf, random = Shelf(), np.random.default_rng(0)
    for _ in range(3):
        shapes = [(int(n), int(width)) for n, width in random.integers(0, 1500, (40, 2))]
        places = [shelf.place(*shape) for shape in shapes]
        for number, place in enumerate(places):
            place[:] = number
        assert [place.shape for place in places] == shapes
        assert all((place == number).all() for number, place in enumerate(places))
        shelf.clear()


def test_the_same_memory_is_given_out_again_and_a_lot_of_it_is_given_back() -> None:
    shelf = Shelf()
    first = shelf.place(10, 1000)
    shelf.clear()
    assert np.shares_memory(shelf.place(10, 1000), first)
    shelf.place(1, 100 << 20)
    shelf.clear()
    assert sum(len(block) for block in shelf._blocks) < 64 << 20


def test_kept_rows_are_their_own_and_those_that_are_no_numbers_are_left_out() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values[2, 1] = np.nan
    for dtype in ("float32", "float16"):
        good, stored, scale = codec.kept(values, dtype, Shelf().place)
        assert good.tolist() == [True, True, False, True]
        assert not np.shares_memory(stored, values)
        assert codec.decode(stored, scale, dtype).tolist() == values[[0, 1, 3]].tolist()


def test_rows_without_numbers_are_kept_as_nothing() -> None:
    good, stored, scale = codec.kept(np.zeros((2, 0), np.float32), "float32", Shelf().place)
    assert good.tolist() == [True, True]
    assert stored.shape == (2, 0)
    assert scale.tolist() == [1, 1]

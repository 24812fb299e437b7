"""Repeats in a batch, and answers that reuse the array read from a bank."""

from __future__ import annotations

import numpy as np
import pytest

from llmcache.banks.lookup import first_occurrences
from llmcache.encoding.answers import EXACT, Answers
from llmcache.indexes.format.manifest import BankFacts


@pytest.mark.parametrize("halves", ["both halves random", "one half alike"])
def test_the_first_occurrence_of_a_key_stands_for_all(halves: str) -> None:
    random = np.random.default_rng(0)
    keys = random.integers(0, 1 << 63, (40, 2)).astype(np.uint64)
    if halves == "one half alike":
        keys[:, 0] = keys[0, 0]
    keys = keys[random.integers(0, 40, 200)]
    seen: dict[tuple[int, int], int] = {}
    expected = [seen.setdefault((int(a), int(b)), i) for i, (a, b) in enumerate(keys)]
    distinct, first = first_occurrences(keys)
    assert first.tolist() == expected
    assert distinct.tolist() == sorted(set(expected))


def test_no_keys_have_no_occurrences() -> None:
    distinct, first = first_occurrences(np.zeros((0, 2), np.uint64))
    assert not len(distinct)
    assert not len(first)


@pytest.mark.parametrize(
    ("places", "broken"), [([0, 1, 2], []), ([2, 0, 1], []), ([0, 2], []), ([0, 1, 2], [1]), ([2, 0, 1], [0])]
)
def test_rows_that_were_read_are_the_answers_and_damaged_ones_are_left_open(
    places: list[int], broken: list[int]
) -> None:
    stored = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    answers = Answers.empty(3, BankFacts("float32", 3, 1, 0))
    rows = np.array([3, 1, 2][: len(places)])
    values, intact = stored[rows], np.ones(len(rows), np.bool_)
    values[broken], intact[broken] = 0, False
    answers.serve(np.array(places), rows, values, intact, EXACT)
    expected = np.zeros((3, 3), np.float32)
    for i, place in enumerate(places):
        if i not in broken:
            expected[place] = stored[rows[i]]
    np.testing.assert_array_equal(answers.outputs, expected)
    assert [int(place) for place in np.flatnonzero(answers.tier == EXACT)] == sorted(
        place for i, place in enumerate(places) if i not in broken
    )
    assert [int(place) for place in np.flatnonzero(answers.row >= 0)] == np.flatnonzero(answers.tier == EXACT).tolist()

"""Order by shared beginnings: complete, deterministic, with siblings together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llmcache.decoders.prefix_order import prefix_order


def transitions(rows: list[list[int]], order: list[int]) -> int:
    """Return the tokens that neighbours share, over all neighbours: what a schedule with a memory of one row saves."""
    total = 0
    for i, j in pairwise(order):
        differ = [a != b for a, b in zip(rows[i], rows[j], strict=False)]
        total += differ.index(True) if True in differ else len(differ)
    return total


def drawn(seed: int, documents: int, questions: int) -> list[list[int]]:
    """Return shuffled prompts: an instruction, documents of several lengths, and questions about each."""
    random = np.random.default_rng(seed)
    head = random.integers(5, 99, 20).tolist()
    bodies = [random.integers(5, 99, random.integers(10, 60)).tolist() for _ in range(documents)]
    rows = [
        head + body + random.integers(5, 99, random.integers(1, 9)).tolist()
        for body in bodies
        for _ in range(questions)
    ]
    return [rows[i] for i in random.permutation(len(rows)).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffled_corpus_shares_as_much_as_a_sorted_one(seed: int) -> None:
    rows = drawn(seed, 40, 5)
    order = prefix_order(rows)
    assert sorted(order) == list(range(len(rows)))
    best = transitions(rows, sorted(range(len(rows)), key=rows.__getitem__))
    assert transitions(rows, order) >= 0.97 * best


@pytest.mark.parametrize("seed", range(5))
def test_the_order_depends_on_the_rows_alone(seed: int) -> None:
    rows = drawn(seed, 20, 3)
    order = [tuple(rows[i]) for i in prefix_order(rows)]
    again = [rows[i] for i in np.random.default_rng(9).permutation(len(rows)).tolist()]
    assert [tuple(again[i]) for i in prefix_order(again)] == order


def test_rows_that_share_nothing_are_ordered_by_length() -> None:
    random = np.random.default_rng(1)
    rows = [[i, *random.integers(500, 999, n).tolist()] for i, n in enumerate(random.permutation(50).tolist())]
    lengths = [len(rows[i]) for i in prefix_order(rows)]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    "rows",
    [[], [[]], [[], []], [[1]], [[1], [1], [1]], [list(range(n)) for n in range(3000)], [[7] * n for n in (9, 0, 2)]],
    ids=["none", "empty", "two empty", "one", "equal", "each continues the last", "repeats"],
)
def test_unusual_rows(rows: list[list[int]]) -> None:
    assert sorted(prefix_order(rows)) == list(range(len(rows)))

"""Batches of rows by length and by tokens."""

from __future__ import annotations

import numpy as np
import pytest

from llmcache.model.batching import batches

LENGTHS = np.random.default_rng(0).integers(1, 700, 500)


@pytest.mark.parametrize("tokens", [None, 2048, 100])
def test_every_row_is_computed_once_and_the_longest_first(tokens: int | None) -> None:
    found = [i for batch in batches(LENGTHS, 32, tokens) for i in batch]
    assert sorted(found) == list(range(500))
    assert (np.diff(LENGTHS[found]) <= 0).all()


def test_a_batch_holds_no_more_tokens_with_their_padding_than_said() -> None:
    sizes = [(len(batch), len(batch) * int(LENGTHS[batch].max())) for batch in batches(LENGTHS, 32, 2048)]
    assert all(padded <= 2048 and rows <= 32 for rows, padded in sizes)
    assert {rows for rows, _ in sizes} >= {2, 32}, "few long rows, many short ones"
    assert [len(batch) for batch in batches(np.array([5000, 300, 0, 0]), 32, 2048)] == [1, 3]


def test_without_a_limit_only_the_number_counts() -> None:
    assert [len(batch) for batch in batches(LENGTHS, 64, None)] == [64] * 7 + [52]

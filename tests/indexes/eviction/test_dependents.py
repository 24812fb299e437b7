"""Evictions keep the beginnings of prompts: a KV block is evicted after the blocks that continue it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.indexes.eviction.dependents import (
    FIRST,
    dependents_first,
    holds_chains,
    needed_elsewhere,
    previous_rows,
)
from llmcache.indexes.eviction.policies import POLICIES, Usage, choose

FORESTS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.permutations(range(n)),
        st.permutations(range(n)),
        st.lists(st.integers(-1, n - 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)


def forest(names: list[int], parents: list[int]) -> list[int]:
    """Return the row before each row, -1 for none: rows continue only rows that come before them in `names`."""
    place = {name: i for i, name in enumerate(names)}
    return [parents[row] if parents[row] >= 0 and place[parents[row]] < place[row] else -1 for row in range(len(names))]


def ancestors(row: int, previous: list[int]) -> list[int]:
    found = []
    while previous[row] >= 0:
        row = previous[row]
        found.append(row)
    return found


@given(FORESTS)
def test_no_row_comes_before_one_that_depends_on_it(drawn: tuple[list[int], list[int], list[int], list[int]]) -> None:
    names, order, parents, _ = drawn
    previous = forest(names, parents)
    found = dependents_first(np.array(order), np.array(previous)).tolist()
    rank = {row: order.index(row) for row in order}
    latest = {row: max([rank[row]] + [rank[one] for one in order if row in ancestors(one, previous)]) for row in order}
    assert found == sorted(order, key=lambda row: (latest[row], -len(ancestors(row, previous))))
    assert all(found.index(row) < found.index(above) for row in order for above in ancestors(row, previous))


@given(FORESTS)
def test_rows_needed_in_another_segment(drawn: tuple[list[int], list[int], list[int], list[int]]) -> None:
    names, order, parents, segments = drawn
    previous, kept = forest(names, parents), [place % 3 > 0 for place in order]
    expected = []
    for row in range(len(names)):
        outside = [above for above in ancestors(row, previous) if segments[above] != segments[row]]
        if kept[row] and outside:
            expected.append((row, outside[0]))
    below, above = needed_elsewhere(np.array(previous), np.array(segments), np.array(kept))
    assert list(zip(below.tolist(), above.tolist(), strict=True)) == expected


def test_a_forged_cycle_ends() -> None:
    assert sorted(dependents_first(np.arange(3), np.array([2, 0, 1])).tolist()) == [0, 1, 2]
    needed_elsewhere(np.array([2, 0, 1]), np.zeros(3, np.int64), np.ones(3, np.bool_))


def test_blocks_are_found_by_their_sources() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 63, (5, 2)).astype(np.uint64)
    named = [key.tobytes().hex() for key in keys]
    absent = np.full(2, 7, np.uint64).tobytes().hex()
    sources = [FIRST, named[0], absent, "", named[3].upper()]
    assert previous_rows(keys, sources).tolist() == [-1, 0, -1, -1, -1]
    assert previous_rows(keys[:0], []).tolist() == []
    assert previous_rows(keys, [named[4], named[4], FIRST, named[1], "document 7"]).tolist() == [4, 4, -1, 1, -1]


@pytest.mark.parametrize(
    ("bank", "holds"),
    [("prefix", True), ("prefix-int8", True), ("prefix-float16", True), ("prefixes", False), ("layer-3", False)],
)
def test_names_of_banks_with_chains(bank: str, holds: bool) -> None:
    assert holds_chains(bank) is holds


def usage_of(segment: list[int], previous: list[int], last: list[int]) -> Usage:
    n = len(segment)
    return Usage(
        last_use=np.array(last, np.int64), uses=np.array(last, np.int64) % 7, created=np.full(n, 1, np.int64),
        nbytes=np.full(n, 100, np.int64), cost=np.array(last, np.float64)[::-1].copy(), drift=np.full(n, np.nan),
        segment=np.array(segment, np.int64), previous=np.array(previous, np.int64),
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_segment_with_a_beginning_is_dropped_last(policy: str) -> None:
    """Segment 0 has a beginning, not used lately, and two of its ends; each other segment has two further ends."""
    segment = [0, 0, 0, 1, 1, 2, 2, 3, 3]
    usage = usage_of(segment, [-1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 10, 11, 20, 21, 30, 31, 40, 41])
    for need in (100, 200, 400, 600):
        assert 0 not in choose(usage, need, policy, only_whole=True)
        assert 0 not in choose(usage, need, policy)
    assert len(choose(usage, 900, policy, only_whole=True)) == 9


def test_a_segment_of_rows_that_are_not_used_goes_in_spite_of_a_beginning() -> None:
    """Otherwise the rows beside a beginning would stay for as long as anything continues it."""
    segment = [0] * 20 + [1] * 4
    usage = usage_of(segment, [-1] * 20 + [0] * 4, [30, *range(1, 20), 40, 41, 42, 43])
    assert set(choose(usage, 1900, "lru", only_whole=True).tolist()) == set(range(20))

"""Tests of eviction policies: their order against slow references, and the number of rows chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.indexes.eviction.policies import (
    POLICIES,
    Terms,
    Usage,
    choose,
)

TERMS = Terms(half_life=1000.0, drift_limit=0.1)
Row = tuple[int, int, int, int, float, float, int]


def usage_of(rows: list[Row]) -> Usage:
    last, uses, created, nbytes, cost, drift, segment = zip(*rows, strict=True) if rows else ([],) * 7
    return Usage(
        last_use=np.array(last, np.int64),
        uses=np.array(uses, np.int64),
        created=np.array(created, np.int64),
        nbytes=np.array(nbytes, np.int64),
        cost=np.array(cost, np.float64),
        drift=np.array(drift, np.float64),
        segment=np.array(segment, np.int64),
    )


SECONDS = st.one_of(st.just(0), st.integers(1_700_000_000, 1_700_010_000))
ROWS = st.lists(
    st.tuples(
        SECONDS,
        st.integers(0, 4),
        st.integers(1_700_000_000, 1_700_010_000),
        st.integers(1, 5000),
        st.sampled_from([0.0, 0.1, 2.0]),
        st.sampled_from([math.nan, 0.0, 0.05, 0.2, 0.9]),
        st.integers(0, 4),
    ),
    max_size=40,
)


def seen(row: Row) -> int:
    return max(row[0], row[2])


def reference(rows: list[Row], policy: str) -> list[int]:
    """Rank rows by sorting tuples of Python numbers."""
    now = max(map(seen, rows), default=0)
    keys: dict[str, Callable[[Row], Any]] = {
        "lru": lambda row: (seen(row),),
        "lfu": lambda row: (row[1], seen(row)),
        "decay": lambda row: (np.log2(1.0 + row[1]) - (now - seen(row)) / 1000.0, seen(row)),
        "cost": lambda row: (row[4] * (1.0 + row[1]) / row[3], seen(row)),
        "divergence": lambda row: (-row[5] if row[5] > 0.1 else 0.0, seen(row)),
    }
    return sorted(range(len(rows)), key=lambda place: (*keys[policy](rows[place]), place))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(rows=ROWS)
def test_a_policy_orders_rows_as_a_sort_of_tuples_does(policy: str, rows: list[Row]) -> None:
    assert POLICIES[policy](usage_of(rows), TERMS).tolist() == reference(rows, policy)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(rows=ROWS, need=st.integers(0, 60_000))
def test_as_many_rows_go_as_are_needed_and_none_that_the_policy_would_keep(
    policy: str, rows: list[Row], need: int
) -> None:
    usage = usage_of(rows)
    chosen = choose(usage, need, policy, TERMS).tolist()
    assert len(set(chosen)) == len(chosen)
    nbytes = [row[3] for row in rows]
    assert sum(nbytes[place] for place in chosen) >= min(need, sum(nbytes))

    ranked = reference(rows, policy)
    drift = {place: row[5] if row[5] > TERMS.drift_limit else 0.0 for place, row in enumerate(rows)}
    order = sorted(ranked, key=lambda place: -drift[place])  # divergent entries go first under every policy
    prefix: list[int] = []
    while order and sum(nbytes[place] for place in prefix) < need:
        prefix.append(order.pop(0))
    mostly = {
        segment
        for segment in range(5)
        if 2 * sum(nbytes[p] for p in prefix if rows[p][6] == segment)
        > sum(row[3] for row in rows if row[6] == segment)
    }
    beyond = set(chosen) - set(prefix)
    assert {rows[place][6] for place in beyond} <= mostly
    for segment in {rows[place][6] for place in beyond}:  # whole, or not beyond the prefix at all
        assert {place for place, row in enumerate(rows) if row[6] == segment} <= set(chosen)
    alone = [place for place in prefix if place in chosen and rows[place][6] not in mostly]
    assert alone == [place for place in prefix if rows[place][6] not in mostly][: len(alone)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(rows=ROWS, need=st.integers(0, 60_000))
def test_no_row_is_taken_that_was_not_needed(policy: str, rows: list[Row], need: int) -> None:
    usage = usage_of(rows)
    chosen = choose(usage, need, policy, TERMS).tolist()
    if not chosen:
        assert need <= 0 or not rows
        return
    last = rows[chosen[-1]]
    whole = {place for place, row in enumerate(rows) if row[6] == last[6]} <= set(chosen)
    without = [place for place in chosen if (rows[place][6] != last[6] if whole else place != chosen[-1])]
    assert sum(rows[place][3] for place in without) < need


@given(rows=ROWS, need=st.integers(1, 60_000))
def test_only_whole_segments_go_when_that_is_asked_for(rows: list[Row], need: int) -> None:
    chosen = set(choose(usage_of(rows), need, "lru", TERMS, only_whole=True).tolist())
    segments = {rows[place][6] for place in chosen}
    assert chosen == {place for place, row in enumerate(rows) if row[6] in segments}
    assert sum(rows[place][3] for place in chosen) >= min(need, sum(row[3] for row in rows))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(rows=ROWS, shift=st.integers(-1_000_000, 1_000_000))
def test_the_order_does_not_depend_on_what_the_clock_says_now(policy: str, rows: list[Row], shift: int) -> None:
    moved = [(row[0] + shift if row[0] else 0, row[1], row[2] + shift, *row[3:]) for row in rows]
    assert POLICIES[policy](usage_of(moved), TERMS).tolist() == POLICIES[policy](usage_of(rows), TERMS).tolist()


def row(last: int = 0, uses: int = 0, created: int = 1000, nbytes: int = 100, cost: float = 1.0, **more: Any) -> Row:
    return last, uses, created, nbytes, cost, more.get("drift", math.nan), more.get("segment", 0)


def test_a_use_stamped_before_its_row_by_a_clock_set_back_makes_the_row_no_older() -> None:
    rows = [row(created=5000), row(created=6000, last=10, uses=3), row(created=5500)]
    assert POLICIES["lru"](usage_of(rows), TERMS).tolist() == [0, 2, 1]
    assert (usage_of(rows).age >= 0).all()


def test_with_decay_a_use_counts_half_after_the_half_life() -> None:
    # 3 uses and the first, two half-lives ago, are worth as much as none now; a little later they are worth less
    now = 1_000_000
    assert POLICIES["decay"](usage_of([row(last=now - 1999, uses=3), row(created=now)]), TERMS).tolist() == [1, 0]
    assert POLICIES["decay"](usage_of([row(last=now - 2001, uses=3), row(created=now)]), TERMS).tolist() == [0, 1]


def test_decay_tells_apart_what_is_thousands_of_half_lives_old() -> None:
    rows = [row(created=10**9), row(created=1001), row(created=1000)]
    assert POLICIES["decay"](usage_of(rows), Terms(half_life=1.0)).tolist() == [2, 1, 0]


def test_the_row_that_saves_least_per_byte_goes_first() -> None:
    rows = [row(cost=1.0, nbytes=100), row(cost=1.0, nbytes=1000), row(cost=9.0, nbytes=1000), row(uses=9, nbytes=1000)]
    assert POLICIES["cost"](usage_of(rows), TERMS).tolist() == [1, 2, 0, 3]


def test_what_drifts_beyond_the_limit_goes_first_however_much_it_is_used() -> None:
    rows = [row(created=1), row(created=9, uses=99, drift=0.11), row(created=2, drift=0.09), row(created=9, drift=0.5)]
    assert POLICIES["divergence"](usage_of(rows), TERMS).tolist() == [3, 1, 0, 2]


def test_a_mostly_chosen_segment_goes_whole_and_before_single_rows() -> None:
    rows = [row(created=1, segment=0), row(created=2, segment=1), row(created=3, segment=1), row(created=9, segment=1),
            row(created=8, segment=0), row(created=7, segment=0)]  # fmt: skip
    assert choose(usage_of(rows), 300, "lru", TERMS).tolist() == [1, 2, 3]
    assert choose(usage_of(rows), 200, "lru", TERMS).tolist() == [0, 1]
    assert choose(usage_of(rows), 100, "lru", TERMS).tolist() == [0]


def test_nothing_goes_when_nothing_has_to() -> None:
    assert choose(usage_of([row(), row()]), 0).tolist() == []
    assert choose(usage_of([row(), row()]), -5).tolist() == []
    assert choose(usage_of([]), 100).tolist() == []

"""Schedules of rows with common prefixes: waves, donors and groups."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llmcache.decoders.schedule import (
    PrefixSchedule,
    TokenSequence,
    common,
    next_key,
    together,
)
from llmcache.model.keys import key_seed


def rows_of(seed: int, count: int) -> list[TokenSequence]:
    """Return different rows with many common prefixes."""
    random = np.random.default_rng(seed)
    seen: dict[tuple[int, bytes], TokenSequence] = {}
    while len(seen) < count:
        ids = np.repeat(random.integers(0, 2, 6), random.integers(1, 12)).astype(np.int32)
        row = TokenSequence(ids[: random.integers(1, len(ids) + 1)], int(random.integers(0, 2)), len(seen))
        row.known = int(random.integers(0, len(row) + 1)) if random.random() < 0.3 else 0
        seen.setdefault((row.start, row.ids.tobytes()), row)
    return list(seen.values())


def shared_by_hand(one: TokenSequence, other: TokenSequence) -> int:
    same = 0
    while one.start == other.start and same < min(len(one), len(other)) and one.ids[same] == other.ids[same]:
        same += 1
    return same


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_computed_once_and_takes_over_only_what_is_there_and_the_same(seed: int) -> None:
    rows = rows_of(seed, 12)
    stored = {row: row.known for row in rows}
    open_ = {row for row in rows if row.known < len(row)}
    waves, done = PrefixSchedule(rows, 1), set[TokenSequence]()
    for wave in waves:
        for row in wave:
            assert row in open_
            donor = waves.donor(row)
            assert row.known == max(stored[row], donor[1] if donor else 0)
            if donor:
                assert donor[0] in done
                assert donor[1] == shared_by_hand(row, donor[0])
        done.update(wave)
        open_ -= set(wave)
    assert not open_
    for one, other in pairwise(rows):
        assert common(one, other) == shared_by_hand(one, other)


def test_questions_about_one_text_wait_for_the_first_of_them() -> None:
    stem = np.arange(100, dtype=np.int32)
    rows = [TokenSequence(np.append(stem, np.full(5, 200 + i)).astype(np.int32), 0, i) for i in range(9)]
    waves = PrefixSchedule(rows, 32)
    first, second = list(waves)
    assert (len(first), len(second)) == (1, 8)
    assert all(waves.donor(row) == (first[0], 100) for row in second)


def test_nobody_waits_for_less_than_a_forward_is_worth() -> None:
    rows = [TokenSequence(np.array([1, 2, 3, 4, 5, 6, 7, 8 + i], np.int32), 0, i) for i in range(3)]
    assert [len(wave) for wave in PrefixSchedule(rows, 100)] == [3]
    assert [len(wave) for wave in PrefixSchedule(rows, 1)] == [1, 2]


def cost(groups: list[list[TokenSequence]], forward: int) -> int:
    needs = [max(len(row) - row.known for row in group) for group in groups]
    return sum(need * len(group) + forward * (need > 0) for need, group in zip(needs, groups, strict=True))


@pytest.mark.parametrize("forward", [0, 8, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_groups_cost_no_more_than_one_forward_for_all_or_one_for_each(seed: int, forward: int) -> None:
    rows = rows_of(seed, 10)
    groups = together(rows, forward)
    assert sorted(row.place for group in groups for row in group) == sorted(row.place for row in rows)
    assert cost(groups, forward) <= min(cost([rows], forward), cost([[row] for row in rows], forward))


def test_a_long_row_is_computed_apart_from_many_short_ones() -> None:
    long, short = TokenSequence(np.arange(150, dtype=np.int32), 0, 0), []
    for i in range(15):
        short.append(TokenSequence(np.arange(150, 300 + i, dtype=np.int32), 0, i + 1, known=140 + i))
    assert sorted(map(len, together([long, *short], 32))) == [1, 15]


def test_keys_depend_on_what_came_before_and_on_the_position() -> None:
    seed, ids = key_seed(b"model", "prefix", None, None), np.arange(4, dtype=np.int32)
    keys = {
        next_key(seed, b"", 0, ids),
        next_key(seed, b"", 4, ids),
        next_key(seed, b"before", 0, ids),
        next_key(seed, b"", 0, ids[:3]),
        next_key(key_seed(b"other", "prefix", None, None), b"", 0, ids),
    }
    assert len(keys) == 5
    assert {len(key) for key in keys} == {16}

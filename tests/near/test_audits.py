"""Audits of near hits and the break-even of near reuse, on streams with a known distribution."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.banks.break_even import (
    LEAST,
    MEMORY,
    PROBED,
    BreakEven,
)
from llmcache.errors import ConfigError
from llmcache.near.monitoring.audits import WATCHFUL, Audits

BUDGET = 0.005
Batch: TypeAlias = tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def audits(share: float = 0.2) -> Audits:
    return Audits([0.0, 1.0, 2.0], [0.5, 0.25, 0.125], budget=BUDGET, alpha=0.05, share=share)


def stream(seed: int, documents: int, odds: tuple[float, float, float], share: float = 0.2) -> Iterator[Batch]:
    """Yield batches of 100 documents, half of them hits with scores in [0, 3). odds: of drift, per third of scores."""
    random = np.random.default_rng(seed)
    for _ in range(documents // 100):
        scores = random.random(50) * 3
        drift = (random.random(50) < np.array(odds)[scores.astype(int)]).astype(np.float64)
        drawn = random.random(50) < share
        yield 100, scores, scores[drawn], drift[drawn]


def level_after(
    found: Audits, batches: Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]
) -> int:
    for batch in batches:
        found.observe(*batch)
    return found.level


def test_hits_that_keep_to_the_budget_are_hardly_ever_tightened() -> None:
    exact = BUDGET / 0.5  # half of all results are hits, so this share of the hits is the whole budget
    tightened = sum(level_after(audits(), stream(seed, 6000, (exact,) * 3)) > 0 for seed in range(200))
    assert tightened <= 10, "one in twenty"


def test_drift_below_a_stricter_threshold_tightens_and_drift_everywhere_ends_near_reuse() -> None:
    found = audits()
    assert level_after(found, stream(0, 10_000, (0.3, 0.0, 0.0))) == 1
    assert found.threshold == 1.0
    assert level_after(found, stream(1, 10_000, (0.0, 0.0, 0.0))) == 1, "only a calibration loosens again"
    ended = audits()
    assert level_after(ended, stream(2, 10_000, (0.3, 0.3, 0.3))) == 3
    assert ended.threshold == np.inf


def test_what_begins_late_is_noticed_though_the_mean_of_all_audits_is_still_within() -> None:
    found = audits()
    assert level_after(found, stream(3, 60_000, (0.0, 0.0, 0.0))) == 0
    reasons = [found.observe(*batch) for batch in stream(4, 3_000, (0.2, 0.2, 0.2))]
    assert found.level > 0
    assert found.bounds[0].mean < found.allowed(0)
    assert any("the latest of" in reason for reason in reasons)


def test_a_saved_state_goes_on_as_if_nothing_had_happened() -> None:
    once, twice = audits(), audits()
    batches = list(stream(5, 4_000, (0.05, 0.02, 0.0)))
    for batch in batches:
        once.observe(*batch)
    for batch in batches[:20]:
        twice.observe(*batch)
    resumed = audits()
    resumed.restore(json.loads(json.dumps(twice.state())))
    for batch in batches[20:]:
        resumed.observe(*batch)
    assert resumed.state() == once.state()


@pytest.mark.parametrize(
    "state", [{}, {"level": 0}, {**audits().state(), "bounds": []}, {**audits().state(), "asked": "x"}]
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="calibrate again"):
        audits().restore(state)


def test_more_is_audited_while_something_speaks_against_the_hits_and_nothing_where_nothing_was_asked_for() -> None:
    found, none = audits(0.02), audits(0.0)
    assert found.share_now == 0.02
    found.shifted = none.shifted = True
    assert (found.share_now, none.share_now) == (WATCHFUL, 0.0)
    wary = audits(0.02)
    wary.observe(100, np.ones(50), np.ones(3), np.array([1.0, 0.0, 0.0]))
    assert wary.level == 0
    assert wary.share_now == WATCHFUL


def test_near_reuse_stands_aside_while_it_costs_more_than_it_saves_and_goes_on_when_it_pays() -> None:
    balance = BreakEven()
    assert not balance.observe(LEAST - 1, 0.0, 1.0), "too few to tell"
    assert balance.observe(10, 0.0, 0.1)
    assert not balance.pays
    probed = len(balance.select_for_lookup(100_000)) / 100_000
    assert probed == pytest.approx(PROBED, rel=0.2)
    changed = [balance.observe(64, 1.0, 0.1) for _ in range(MEMORY // 64)]
    assert balance.pays
    assert changed.count(True) == 1
    assert np.array_equal(balance.select_for_lookup(5), np.arange(5))

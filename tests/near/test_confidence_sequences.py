"""Bounds from audits hold at all times, are not much wider than fixed-time bounds, and detect a change."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.monitoring.confidence_sequences import ChangeDetector, Sequence


def flips(seed: int, count: int, share: float) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random(count) < share).astype(np.float64)


@pytest.mark.parametrize("share", [0.005, 0.05, 0.4])
def test_a_bound_is_wrong_at_any_time_in_at_most_the_promised_share_of_streams(share: float) -> None:
    wrong = 0
    for seed in range(300):
        sequence = Sequence(alpha=0.1)
        missed = False
        for block in flips(seed, 1000, share).reshape(-1, 10):
            sequence.observe(block)
            missed = missed or sequence.exceeds(share) or sequence.within(share - 1e-12)
        wrong += missed
    assert wrong <= 30  # at most 0.1 of them on average; in fact far fewer


def test_bounds_hold_for_the_running_mean_when_the_drift_changes() -> None:
    wrong = 0
    shares = np.repeat([0.01, 0.2, 0.0, 0.5, 0.05], 200)
    running = np.cumsum(shares) / np.arange(1, len(shares) + 1)
    for seed in range(200):
        sequence = Sequence(alpha=0.1)
        drawn = (np.random.default_rng(seed).random(len(shares)) < shares).astype(float)
        missed = False
        for end in range(10, len(shares) + 1, 10):
            sequence.observe(drawn[end - 10 : end])
            missed = missed or sequence.exceeds(running[end - 1]) or sequence.within(running[end - 1] - 1e-12)
        wrong += missed
    assert wrong <= 20


def test_bounds_hold_for_drifts_between_none_and_a_flip() -> None:
    wrong = 0
    for seed in range(200):
        sequence = Sequence(alpha=0.1)
        missed = False
        for block in np.random.default_rng(seed).beta(0.3, 2.7, (100, 10)):  # mean 0.1
            sequence.observe(block)
            missed = missed or sequence.exceeds(0.1) or sequence.within(0.1 - 1e-12)
        wrong += missed
    assert wrong <= 20


# count, total, and the interval of Clopper and Pearson at 95 %, from scipy.stats.beta.ppf
FIXED = [
    (20, 0, 0.0, 0.168433),
    (200, 0, 0.0, 0.018275),
    (100, 1, 0.000253, 0.054459),
    (500, 5, 0.003255, 0.023181),
    (500, 25, 0.032615, 0.072928),
    (2000, 600, 0.279972, 0.320616),
    (50, 50, 0.928878, 1.0),
]


@pytest.mark.parametrize(("count", "total", "low", "high"), FIXED)
def test_holding_always_costs_at_most_twice_the_width_of_clopper_and_pearson(
    count: int, total: int, low: float, high: float
) -> None:
    sequence = Sequence.restored({"alpha": 0.05, "count": count, "total": total})
    assert sequence.lower <= low
    assert sequence.upper >= high
    assert sequence.upper - sequence.lower <= 2 * (high - low)


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.001, 0.5))
def test_the_bounds_enclose_the_mean_and_agree_with_the_decisions(drifts: list[float], alpha: float) -> None:
    sequence = Sequence(alpha)
    sequence.observe(drifts)
    assert 0 <= sequence.lower <= sequence.mean + 1e-12
    assert sequence.mean - 1e-12 <= sequence.upper <= 1
    for budget in (0.001, 0.01, 0.1, 0.5, 0.9):
        assert not (sequence.exceeds(budget) and sequence.within(budget))
        if abs(budget - sequence.lower) > 1e-9:
            assert sequence.exceeds(budget) == (sequence.lower > budget)
        if abs(budget - sequence.upper) > 1e-9:
            assert sequence.within(budget) == (sequence.upper < budget)


def test_audits_in_one_call_or_one_by_one_are_the_same() -> None:
    drifts = flips(1, 500, 0.1)
    at_once, single = Sequence(), Sequence()
    alarm, other = ChangeDetector(0.02), ChangeDetector(0.02)
    at_once.observe(drifts)
    alarm.observe(drifts)
    for drift in drifts:
        single.observe([drift])
        other.observe([drift])
    assert (single.lower, single.upper) == (at_once.lower, at_once.upper)
    assert other.highest == pytest.approx(alarm.highest, rel=1e-9)


def test_what_was_saved_as_json_goes_on_where_it_was() -> None:
    sequence, alarm = Sequence(0.01), ChangeDetector([0.01, 0.2], 0.01)
    sequence.observe(flips(1, 77, 0.05))
    alarm.observe(np.stack([flips(1, 77, 0.05), flips(2, 77, 0.05)], axis=1))
    sequence_too = Sequence.restored(json.loads(json.dumps(sequence.state())))
    alarm_too = ChangeDetector.restored(json.loads(json.dumps(alarm.state())))
    for one in (sequence, sequence_too):
        one.observe(flips(3, 50, 0.2))
    for each in (alarm, alarm_too):
        each.observe(np.stack([flips(3, 50, 0.2), flips(4, 50, 0.2)], axis=1))
    assert sequence_too.state() == sequence.state()
    assert alarm_too.state() == alarm.state()


def test_nothing_is_certain_before_the_first_audit() -> None:
    sequence = Sequence()
    sequence.observe([])
    assert (sequence.lower, sequence.upper, sequence.mean) == (0.0, 1.0, 0.0)
    assert not sequence.exceeds(0.0)
    assert not sequence.within(0.99)
    assert sequence.within(1.0)


@pytest.mark.parametrize("values", [[np.nan], [-0.1], [1.1], [0.5, np.inf]])
def test_a_drift_outside_of_its_range_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a drift is in \[0, 1\]"):
        Sequence().observe(values)
    with pytest.raises(ValueError, match=r"a drift is in \[0, 1\]"):
        ChangeDetector(0.1).observe(values)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_certainty_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="no bound holds with certainty"):
        Sequence(alpha)
    with pytest.raises(ConfigError, match="no bound holds with certainty"):
        ChangeDetector(0.1, alpha)


@pytest.mark.parametrize("limits", [0.0, 1.0, [0.1, -0.1]])
def test_a_limit_that_cannot_be_exceeded_is_refused(limits: float | list[float]) -> None:
    with pytest.raises(ConfigError, match="a limit of drift"):
        ChangeDetector(limits)


def first_alarm(alarm: ChangeDetector, drifts: NDArray[np.float64]) -> int:
    for end in range(10, len(drifts) + 1, 10):
        alarm.observe(drifts[end - 10 : end])
        if alarm.raised:
            return end
    return len(drifts) + 1


def test_six_times_the_budget_is_noticed_within_some_hundred_audits() -> None:
    drawn = [flips(seed, 2000, 0.06) for seed in range(60)]  # 3 % of all results, half of which are hits
    alarms = [first_alarm(ChangeDetector(0.01), drifts) for drifts in drawn]
    assert np.median(alarms) <= 100
    assert np.quantile(alarms, 0.9) <= 300
    sequences = [Sequence() for _ in drawn]
    for sequence, drifts in zip(sequences, drawn, strict=True):
        sequence.observe(drifts[:300])
    assert np.mean([sequence.exceeds(0.01) for sequence in sequences]) >= 0.9


def test_a_change_after_a_long_quiet_is_noticed_by_the_alarm_long_before_the_mean_shows_it() -> None:
    quiet, change = flips(0, 5000, 0.003), flips(1, 3000, 0.06)
    alarm, sequence = ChangeDetector(0.01), Sequence()
    alarm.observe(quiet)
    sequence.observe(quiet)
    assert not alarm.raised
    noticed = first_alarm(alarm, change)
    assert noticed <= 600
    sequence.observe(change[:noticed])
    assert not sequence.exceeds(0.01)


@pytest.mark.parametrize("limits", [[0.01], [0.05] * 5 + [0.2] * 3])
def test_drift_at_its_limit_raises_an_alarm_in_at_most_the_promised_share_of_streams(limits: list[float]) -> None:
    false = 0
    for seed in range(300):
        alarm = ChangeDetector(limits, alpha=0.1)
        alarm.observe(np.random.default_rng(seed).random((2000, len(limits))) < np.array(limits))
        false += alarm.raised
    assert false <= 30


def test_the_loudest_stream_is_the_one_that_changed() -> None:
    alarm = ChangeDetector([0.05, 0.05, 0.05])
    alarm.observe(np.random.default_rng(0).random((500, 3)) < [0.05, 0.3, 0.02])
    assert alarm.raised
    assert alarm.loudest() == 1


def test_wealth_stays_finite_in_a_stream_of_flips() -> None:
    alarm = ChangeDetector(1e-4)
    alarm.observe(np.ones(10_000))
    alarm.observe(np.zeros(10_000))
    assert np.isfinite(alarm.highest)
    assert alarm.raised

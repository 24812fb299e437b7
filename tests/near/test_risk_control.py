"""Choice of a threshold: bounds against their definitions, and a thousand calibrations on a known distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom

from llmcache.errors import ConfigError
from llmcache.near.calibration.drift import (
    beyond,
    cosine_drift,
    kl_drift,
    label_drift,
)
from llmcache.near.calibration.risk_control import (
    choose,
    flip_bound,
    least_samples,
    mean_bound,
)


def test_the_bound_of_flips_inverts_the_binomial_law() -> None:
    for flips, n, confidence in ((0, 100, 0.95), (3, 50, 0.9), (40, 10_000, 0.99)):
        wanted = brentq(lambda p, k=flips, n=n, c=confidence: binom.cdf(k, n, p) - (1 - c), 1e-9, 1 - 1e-9)
        assert flip_bound(np.array(flips), np.array(n), confidence) == pytest.approx(wanted, rel=1e-4)
    assert flip_bound(np.array(5), np.array(5), 0.95) == 1


def test_the_bound_of_a_mean_is_where_hoeffding_bentkus_rejects() -> None:
    for mean, n in ((0.0, 200), (0.02, 500), (0.4, 50)):
        bound = float(mean_bound(np.array(mean), np.array(n), 0.95))

        def p_value(tested: float, mean: float = mean, n: int = n) -> float:
            divergence = (1 - mean) * math.log((1 - mean) / (1 - tested))
            divergence += mean * math.log(mean / tested) if mean else 0
            return min(math.exp(-n * divergence), math.e * float(binom.cdf(math.ceil(round(n * mean, 6)), n, tested)))

        assert p_value(bound + 1e-6) <= 0.05 < p_value(bound - 1e-6)


def test_both_bounds_hold_in_repeated_samples() -> None:
    random = np.random.default_rng(0)
    values = random.beta(0.3, 4, (2000, 300))
    true = 0.3 / 4.3
    low = mean_bound(values.mean(axis=1), np.full(2000, 300), 0.9) < true
    assert low.mean() <= 0.1
    flips = random.binomial(300, true, 2000)
    assert (flip_bound(flips, np.full(2000, 300), 0.9) < true).mean() <= 0.11


def sample(random: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Draw scores uniform in [0, 1], and flips with probability (1 - score) / 5."""
    score = random.uniform(size=n)
    return score, random.uniform(size=n) < (1 - score) / 5


@pytest.mark.parametrize("of", ["all", "hits"])
def test_the_budget_is_exceeded_in_at_most_one_calibration_in_twenty(of: str) -> None:
    random = np.random.default_rng(11)
    budget, exceeded, hits = (0.02 if of == "all" else 0.05), 0, []
    for _ in range(1000):
        score, flips = sample(random, 2000 if of == "all" else 20_000)
        tried = None if of == "all" else np.linspace(0, 1, 101)
        threshold = choose(flips, score, budget, 0.95, of=of, candidates=tried).threshold
        reach = 0.0 if threshold is None else 1 - threshold
        true = reach**2 / 10 if of == "all" else reach / 10  # for all results, the integral of (1 - score) / 5
        exceeded += true > budget
        hits.append(reach)
    assert exceeded <= 50
    best = math.sqrt(0.2) if of == "all" else 0.5
    assert np.mean(hits) > 0.7 * best


def test_bounded_drift_keeps_its_budget_too() -> None:
    random = np.random.default_rng(5)
    exceeded = 0
    for _ in range(60):
        score = random.uniform(size=1000)
        drift = (1 - score) / 5 * random.uniform(0, 2, 1000)
        found = choose(drift, score, 0.02)
        assert found.method == "hoeffding-bentkus"
        assert found.threshold is not None
        exceeded += (1 - found.threshold) ** 2 / 10 > 0.02
    assert exceeded <= 3


def test_the_choice_says_what_the_curve_says_and_is_the_loosest_that_passes() -> None:
    score, flips = sample(np.random.default_rng(0), 5000)
    found = choose(flips, score, 0.02)
    assert found.threshold is not None
    hit = score >= found.threshold
    assert (found.hits, found.drift) == (hit.mean(), (flips & hit).mean())
    assert found.drift_of_hits == pytest.approx(flips[hit].mean())
    assert found.bound == pytest.approx(float(flip_bound(np.array((flips & hit).sum()), np.array(5000), 0.95)))
    place = int(np.flatnonzero(found.curve.threshold == found.threshold)[0])
    assert found.bound <= 0.02 < found.curve.bound[place + 1]
    assert (np.diff(found.curve.threshold) < 0).all()
    assert found.samples == 5000
    assert found.method == "clopper-pearson"


def test_the_sequence_stops_at_the_first_failure() -> None:
    score = np.repeat([0.9, 0.6, 0.3], [400, 100, 1000])
    # the last thousand would bring the drift of the hits down again
    drift = np.repeat([0.0, 1.0, 0.0], [400, 100, 1000])
    found = choose(drift, score, 0.1, of="hits", candidates=np.array([0.9, 0.6, 0.3]))
    assert found.curve.bound_of_hits[2] <= 0.1
    assert found.threshold == 0.9


def test_without_confidence_the_drift_counts_as_measured_and_a_gain_counts_against_it() -> None:
    score = np.array([4.0, 3, 2, 1])
    found = choose(np.array([0.0, 1, -1, 1]), score, 0.0001, None)
    assert (found.threshold, found.hits, found.drift) == (2.0, 0.75, 0.0)


def test_no_safe_threshold_leaves_near_reuse_off() -> None:
    found = choose(np.ones(5000), np.arange(5000.0), 0.01)
    assert found.threshold is None
    assert found.needed == 0
    assert "near reuse stays off" in found.reason
    assert len(found.curve)


def test_too_small_a_sample_says_how_many_more_are_needed() -> None:
    found = choose(np.zeros(100), np.arange(100.0), 0.005)
    assert found.threshold is None
    assert found.needed == 498
    assert "498 more" in found.reason
    assert choose(np.zeros(598), np.arange(598.0), 0.005).hits == 1
    assert least_samples(0.005, 0.95) == 598


def test_a_budget_of_nothing_means_exact_reuse_only() -> None:
    found = choose(np.zeros(10_000), np.arange(10_000.0), 0)
    assert found.threshold is None
    assert "exact reuse only" in found.reason


def test_a_budget_of_everything_serves_everything() -> None:
    assert choose(np.ones(10), np.arange(10.0), 1).hits == 1


def test_identical_documents_and_a_single_class_are_served_whole() -> None:
    found = choose(np.zeros(1000), np.full(1000, 0.999), 0.01)
    assert (found.threshold, found.hits) == (0.999, 1.0)


def test_documents_without_a_neighbour_are_never_hits() -> None:
    score = np.concatenate([np.ones(500), np.full(500, -np.inf)])
    assert choose(np.zeros(1000), score, 0.01).hits == 0.5
    assert choose(np.zeros(1000), np.full(1000, -np.inf), 0.01).threshold is None


def test_hits_that_are_mostly_wrong_are_none_however_few_they_are() -> None:
    assert 0 < choose(np.ones(5000), np.arange(5000.0), 0.01, worst=1).hits < 0.01
    found = choose(np.ones(5000), np.arange(5000.0), 0.01)
    assert found.threshold is None
    assert "of the hits within 0.1" in found.reason


@pytest.mark.parametrize("budget", [-0.1, 1.1, np.nan])
def test_budgets_that_are_no_share_are_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match="budget"):
        choose(np.zeros(10), np.zeros(10), budget)


@pytest.mark.parametrize("confidence", [0, 1, 1.0, -1, np.nan])
def test_certainty_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence"):
        choose(np.zeros(10), np.zeros(10), 0.1, confidence)


def test_drift_that_cannot_be_bounded_is_refused() -> None:
    with pytest.raises(ConfigError, match="document 1 is nan; does the head"):
        choose(np.array([0, np.nan]), np.zeros(2), 0.1)
    with pytest.raises(ConfigError, match=r"0 to 3"):
        choose(np.array([0.0, 3.0]), np.zeros(2), 0.1)
    with pytest.raises(ConfigError, match="one drift and one score"):
        choose(np.zeros(2), np.zeros(3), 0.1)
    with pytest.raises(ConfigError, match="one drift and one score"):
        choose(np.zeros(0), np.zeros(0), 0.1)
    with pytest.raises(ConfigError, match="score of document 0"):
        choose(np.zeros(1), np.full(1, np.nan), 0.1)
    with pytest.raises(ConfigError, match='"all" results'):
        choose(np.zeros(1), np.zeros(1), 0.1, of="some")


# -- drift --------------------------------------------------------------------------------------------------


def test_drift_is_measured_as_named() -> None:
    one, other = np.array([[1.0, 0], [1, 0], [1, 0]]), np.array([[2.0, 0], [0, 1], [-1, 0]])
    np.testing.assert_allclose(cosine_drift(one, other), [0, 1, 1])
    np.testing.assert_array_equal(beyond(0.5)(one, other), [0, 1, 1])
    np.testing.assert_array_equal(label_drift(lambda given: given)(one, other), [0, 1, 1])
    probability = np.array([0.9, 0.1])
    wanted = (probability * np.log(probability / 0.5)).sum()
    np.testing.assert_allclose(kl_drift(2.0)(np.log(probability)[None], np.zeros((1, 2))), wanted / 2)


def test_a_head_that_fails_is_one_clear_error() -> None:
    outputs = np.ones((3, 2))

    def raises(given: NDArray[np.floating]) -> NDArray[np.floating]:
        raise RuntimeError("no such class")

    for head, message in (
        (raises, "RuntimeError: no such class"),
        (lambda given: given * np.nan, "NaN for document 0"),
        (lambda given: given[:2], r"\(2, 2\) for 3"),
        (lambda given: given[None, :, :], r"for 3 outputs"),
    ):
        with pytest.raises(ConfigError, match=message):
            label_drift(head)(outputs, outputs)
    with pytest.raises(ConfigError, match="limit"):
        beyond(0)
    with pytest.raises(ConfigError, match="ceiling"):
        kl_drift(0)

"""Choose a threshold from measured drift: the loosest one whose upper bound is within the budget, or none.

Candidates are tested in a fixed order, from strict to loose, up to the first that fails (fixed-sequence testing,
Angelopoulos et al., "Learn then Test", 2021). Testing many candidates then needs no correction: the probability that
the chosen threshold exceeds the budget is at most 1 - confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from llmcache.arrays import Floats
from llmcache.errors import ConfigError

WORST = 0.1
"""Highest mean drift of the hits alone; a budget over all results would otherwise allow a few hits, all wrong."""
CANDIDATES = 400
"""Number of candidate thresholds: quantiles of the scores, which do not depend on the drift."""

Floats64: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = Floats | NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Measurements per candidate threshold, from strict to loose; all float64 [candidates].

    hits: share of all results that are reused.
    drift: mean over all results; computed results count as 0.
    bound: upper bound of the drift at the confidence, for each candidate alone.
    drift_of_hits, bound_of_hits: the same over the reused results only.
    """

    threshold: Floats64
    hits: Floats64
    drift: Floats64
    bound: Floats64
    drift_of_hits: Floats64
    bound_of_hits: Floats64

    def __len__(self) -> int:
        return len(self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A threshold with its measurements.

    threshold: lowest score that is reused; None when near reuse has to stay off, for the given reason.
    hits, drift, bound, drift_of_hits, bound_of_hits: of the curve at the threshold; 0 without a threshold.
    samples: number of documents. needed: further documents needed for any threshold to pass; 0 when there are enough.
    budget, confidence, of: settings of `choose`. method: name of the bound. reason: explanation of the choice.
    """

    threshold: float | None
    hits: float = 0.0
    drift: float = 0.0
    bound: float = 0.0
    drift_of_hits: float = 0.0
    bound_of_hits: float = 0.0
    samples: int
    needed: int = 0
    budget: float
    confidence: float | None
    of: str = "all"
    method: str
    reason: str
    curve: Curve = field(repr=False)


def choose(
    drift: Floats | NDArray[np.bool_],
    score: Floats,
    budget: float,
    confidence: float | None = 0.95,
    *,
    of: str = "all",
    worst: float = WORST,
    errors: float = 0.0,
    candidates: Floats | None = None,
) -> Choice:
    """Choose the lowest score at which results may be reused, so that the mean drift stays within the budget.

    drift: of each document if it were reused, [n] in [0, 1]. Drift of only 0 and 1 (flips) is bounded exactly by
        Clopper-Pearson, other drift by Hoeffding-Bentkus.
    score: [n], higher is safer; -inf for documents that cannot be reused.
    budget: highest mean drift; 0 allows exact reuse only.
    confidence: of the bound, below 1; None uses the drift as measured, which may then be negative (a gain).
    of: "all" or "hits", the results over which the mean is taken.
    worst: highest measured drift of the hits; the budget if that is higher.
    errors: standard errors added to the measured drift when confidence is None.
    candidates: thresholds to test, chosen independently of the drift; None for quantiles of the scores.
    ConfigError when a setting cannot work, drift is not finite or outside [0, 1], or there are no documents.
    """
    check(budget, confidence, of)
    drifts, scores = _checked(drift, score, confidence)
    n, method = len(drifts), _method(drifts, confidence)
    curve = _curve(drifts, scores, _candidates(scores, candidates), confidence, errors)
    off = Choice(
        threshold=None, samples=n, budget=budget, confidence=confidence, of=of, method=method, reason="", curve=curve
    )  # fmt: skip
    if budget == 0:
        return replace(off, reason="a budget of 0 allows exact reuse only: near reuse stays off")
    needed = least_samples(budget, confidence) - n
    if needed > 0:
        failure = f"{n} documents cannot show a drift of at most {budget:g} at confidence {confidence:g}"
        return replace(off, needed=needed, reason=f"{failure}: {needed} more are needed")
    place = _last_passing(curve, n, budget, confidence, of, max(worst, budget))
    if place is None:
        limits = f"{budget:g}, and that of the hits within {max(worst, budget):g}"
        return replace(off, reason=f"no threshold keeps the drift within {limits}: near reuse stays off")
    basis = f"as measured, {errors:g} standard errors added" if errors else "as measured"
    if confidence is not None:
        basis = f"at confidence {confidence:g}"
    return replace(
        off,
        reason=f"the loosest of {len(curve)} thresholds within {budget:g} {basis}",
        threshold=float(curve.threshold[place]),
        hits=float(curve.hits[place]),
        drift=float(curve.drift[place]),
        bound=float(curve.bound[place]),
        drift_of_hits=float(curve.drift_of_hits[place]),
        bound_of_hits=float(curve.bound_of_hits[place]),
    )


def least_samples(budget: float, confidence: float | None) -> int:
    """Return the least number of documents that can show that the budget is kept, if none of them drifts."""
    if confidence is None or budget >= 1:
        return 1
    return math.ceil(math.log1p(-confidence) / math.log1p(-budget)) if budget > 0 else 1


# -- bounds -------------------------------------------------------------------------------------------------


def flip_bound(flips: Counts, of: Counts, confidence: float) -> Floats64:
    """Return the one-sided Clopper-Pearson upper bound of a share, float64.

    flips, of: counts of flips and of documents, broadcast against each other.
    """
    count, total = np.broadcast_arrays(np.asarray(flips, np.float64), np.asarray(of, np.float64))
    below_one = count < total
    bound = np.ones(count.shape)
    bound[below_one] = beta.ppf(confidence, count[below_one] + 1, total[below_one] - count[below_one])
    return bound


def mean_bound(mean: Counts, of: Counts, confidence: float) -> Floats64:
    """Return the one-sided Hoeffding-Bentkus upper bound of the mean of values in [0, 1], float64.

    mean, of: measured means and numbers of values, broadcast against each other.
    """
    measured, total = (np.array(array) for array in np.broadcast_arrays(np.float64(mean), np.float64(of)))
    low, high = measured.copy(), np.ones(measured.shape)
    for _ in range(40):  # bisection: the p-value falls as the tested mean rises
        middle = (low + high) / 2
        rejected = _p_value(measured, total, middle) <= 1 - confidence
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return np.where(total > 0, high, 1.0)


def _p_value(mean: Floats64, of: Floats64, tested: Floats64) -> Floats64:
    """Return the p-value of the hypothesis that the true mean is above `tested` (Bates et al., 2021, proposition 6)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(mean > 0, mean * np.log(mean / tested), 0.0)
        above = np.where(mean < 1, (1 - mean) * np.log((1 - mean) / (1 - tested)), 0.0)
    hoeffding = np.where(mean < tested, np.exp(-of * (below + above)), 1.0)
    # of * mean of a whole sum may be slightly above an integer by rounding; ceil must not count one more
    bentkus = math.e * binom.cdf(np.ceil(of * mean - 1e-9), of, tested)
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0))


# -- parts --------------------------------------------------------------------------------------------------


def check(budget: float, confidence: float | None, of: str = "all") -> None:
    """Check the settings of `choose`. ConfigError when no documents could make them work."""
    if not 0 <= budget <= 1:
        raise ConfigError(
            f"the budget has to be a share in [0, 1], got {budget}; 0.005 allows one result in 200 to differ"
        )
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(
            f"confidence has to be above 0 and below 1, got {confidence}; use 0.95, or None to use the drift as "
            "measured"
        )
    if of not in {"all", "hits"}:
        raise ConfigError(f'a budget has to be a share of "all" results or of "hits", got {of!r}')


def _checked(drift: Floats | NDArray[np.bool_], score: Floats, confidence: float | None) -> tuple[Floats64, Floats64]:
    drifts, scores = np.asarray(drift, np.float64), np.asarray(score, np.float64)
    if drifts.ndim != 1 or drifts.shape != scores.shape or not len(drifts):
        raise ConfigError(
            f"calibration needs one drift and one score per document, got {drifts.shape} and {scores.shape}"
        )
    if not np.isfinite(drifts).all():
        first = int(np.flatnonzero(~np.isfinite(drifts))[0])
        raise ConfigError(f"the drift of document {first} is {drifts[first]}; does the head give NaN for its output?")
    if np.isnan(scores).any():
        raise ConfigError(f"the score of document {int(np.flatnonzero(np.isnan(scores))[0])} is NaN")
    if confidence is not None and (drifts.min() < 0 or drifts.max() > 1):
        raise ConfigError(
            f"drift has to lie in [0, 1] to be bounded, got {drifts.min():g} to {drifts.max():g}; divide it by its "
            "largest value, or use 1 above a limit and 0 below"
        )
    return drifts, scores


def _method(drift: Floats64, confidence: float | None) -> str:
    if confidence is None:
        return "as measured"
    return "clopper-pearson" if np.isin(drift, (0.0, 1.0)).all() else "hoeffding-bentkus"


def _candidates(score: Floats64, thresholds: Floats | None) -> Floats64:
    """Return the candidate thresholds, strict ones first: the given ones, or quantiles of the finite scores."""
    if thresholds is not None:
        return np.unique(np.asarray(thresholds, np.float64))[::-1]
    finite = np.sort(score[np.isfinite(score)])[::-1]
    if not len(finite):
        return np.zeros(0)
    places = np.unique(np.ceil(np.linspace(0, 1, CANDIDATES + 1)[1:] * len(finite)).astype(np.int64)) - 1
    return np.unique(finite[places])[::-1]


def _curve(drift: Floats64, score: Floats64, thresholds: Floats64, confidence: float | None, errors: float) -> Curve:
    order = np.argsort(-score, kind="stable")
    count = np.searchsorted(-score[order], -thresholds, "right")
    total = np.concatenate([[0.0], np.cumsum(drift[order])])[count]
    n = np.full(len(count), len(drift))
    mean, mean_of_hits = total / n, total / np.maximum(count, 1)
    if confidence is None:
        squares = np.concatenate([[0.0], np.cumsum(np.square(drift[order]))])[count]
        bound, bound_of_hits = (
            measured
            + errors * np.sqrt(np.maximum(squares / np.maximum(of, 1) - np.square(measured), 0) / np.maximum(of, 1))
            for measured, of in ((mean, n), (mean_of_hits, count))
        )
    elif _method(drift, confidence) == "clopper-pearson":
        bound, bound_of_hits = flip_bound(total, n, confidence), flip_bound(total, count, confidence)
    else:
        bound, bound_of_hits = mean_bound(mean, n, confidence), mean_bound(mean_of_hits, count, confidence)
    return Curve(thresholds, count / n, mean, bound, mean_of_hits, bound_of_hits)


def _last_passing(curve: Curve, n: int, budget: float, confidence: float | None, of: str, worst: float) -> int | None:
    """Return the index of the loosest candidate that passes, or None."""
    bound = curve.bound if of == "all" else curve.bound_of_hits
    passed = bound <= budget
    if confidence is not None:
        first = 0
        if of == "hits":
            # with fewer hits even a sample without drift would fail, and the sequence would end at once
            enough = curve.hits * n >= 2 * least_samples(budget, confidence)
            first = int(np.argmax(enough)) if enough.any() else len(curve)
        passed[:first] = False
        failed = np.flatnonzero(~passed[first:])
        passed[first + failed[0] if len(failed) else len(curve) :] = False
    # all passed candidates hold simultaneously, so any of them may be left out for another reason
    allowed = np.flatnonzero(passed & (curve.drift_of_hits <= worst))
    return int(allowed[-1]) if len(allowed) else None

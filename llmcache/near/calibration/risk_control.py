"""From measured drift to a threshold: the loosest one whose upper bound is within the budget, or none.

The candidates are tried in a fixed order, from strict to loose, and the first that fails ends it (fixed-sequence
testing, Angelopoulos et al., "Learn then Test", 2021): trying many does then not cheat, and the chance that the chosen
threshold exceeds the budget is at most 1 - confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from llmcache.errors import ConfigError

WORST = 0.1
"""Highest mean drift of the hits themselves: a budget of all results would otherwise allow a few hits, all wrong."""
CANDIDATES = 400
"""Thresholds that are tried: quantiles of the scores, which depend on no drift."""

Floats = NDArray[np.float64]
Counts = NDArray[np.floating] | NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One place per candidate, from strict to loose; all float64 [candidates].

    hits: share of all results that are reused. drift: mean over all results, those computed counting 0; bound: its
    upper bound at the confidence, each taken by itself. drift_of_hits, bound_of_hits: the same over reused results.
    """

    threshold: Floats
    hits: Floats
    drift: Floats
    bound: Floats
    drift_of_hits: Floats
    bound_of_hits: Floats

    def __len__(self) -> int:
        return len(self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A threshold and what speaks for it. threshold: None where near reuse has to stay off, for the reason given.

    hits, drift, bound, drift_of_hits, bound_of_hits: of the curve, at the threshold; 0 where there is none.
    samples: documents behind it. needed: further documents without which no threshold could pass, 0 where it is
    not for their number. of: what the budget is a share of, "all" results or "hits".
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
    drift: NDArray[np.floating] | NDArray[np.bool_],
    score: NDArray[np.floating],
    budget: float,
    confidence: float | None = 0.95,
    *,
    of: str = "all",
    worst: float = WORST,
    errors: float = 0.0,
    candidates: NDArray[np.floating] | None = None,
) -> Choice:
    """The lowest score at which a result may be reused, so that the mean drift stays within the budget.

    drift: [n] in [0, 1], of each document were it reused; only 0 and 1 (flips) are bounded exactly, by
    Clopper-Pearson, anything between by Hoeffding-Bentkus. score: [n], higher is safer; documents that cannot be reused
    have -inf. budget: highest mean drift, 0 allows exact reuse only. confidence: below 1; None takes the drift as
    measured, without a bound, which may then also be negative (a gain). of: see `Choice`. worst: highest drift of
    the hits, as measured, or the budget where that is higher. errors: standard errors that are added to what was
    measured, where confidence is None. candidates: thresholds to try, chosen without a look at the drift.

    ConfigError: a setting that cannot work, drift that is not a number or outside [0, 1], no documents.
    """
    check(budget, confidence, of)
    moved, safe = _checked(drift, score, confidence)
    n, method = len(moved), _method(moved, confidence)
    curve = _curve(moved, safe, _candidates(safe, candidates), confidence, errors)
    off = Choice(
        threshold=None, samples=n, budget=budget, confidence=confidence, of=of, method=method, reason="", curve=curve
    )  # fmt: skip
    if budget == 0:
        return replace(off, reason="a budget of 0 allows exact reuse only: near reuse stays off")
    needed = least_samples(budget, confidence) - n
    if needed > 0:
        seen = f"{n} documents cannot show a drift of at most {budget:g} at confidence {confidence:g}"
        return replace(off, needed=needed, reason=f"{seen}: {needed} more are needed")
    place = _last_passing(curve, n, budget, confidence, of, max(worst, budget))
    if place is None:
        limits = f"{budget:g}, and that of the hits within {max(worst, budget):g}"
        return replace(off, reason=f"no threshold keeps the drift within {limits}: near reuse stays off")
    how = f"as measured, {errors:g} standard errors added" if errors else "as measured"
    if confidence is not None:
        how = f"at confidence {confidence:g}"
    return replace(
        off,
        reason=f"the loosest of {len(curve)} thresholds within {budget:g} {how}",
        threshold=float(curve.threshold[place]),
        hits=float(curve.hits[place]),
        drift=float(curve.drift[place]),
        bound=float(curve.bound[place]),
        drift_of_hits=float(curve.drift_of_hits[place]),
        bound_of_hits=float(curve.bound_of_hits[place]),
    )


def least_samples(budget: float, confidence: float | None) -> int:
    """Documents below which not even a sample without any drift can show that the budget is kept."""
    if confidence is None or budget >= 1:
        return 1
    return math.ceil(math.log1p(-confidence) / math.log1p(-budget)) if budget > 0 else 1


# -- bounds -------------------------------------------------------------------------------------------------


def flip_bound(flips: Counts, of: Counts, confidence: float) -> Floats:
    """Clopper-Pearson: one-sided upper bound of a share, given that many of so many; float64 like the arguments."""
    seen, every = np.broadcast_arrays(np.asarray(flips, np.float64), np.asarray(of, np.float64))
    open_ = seen < every
    bound = np.ones(seen.shape)
    bound[open_] = beta.ppf(confidence, seen[open_] + 1, every[open_] - seen[open_])
    return bound


def mean_bound(mean: Counts, of: Counts, confidence: float) -> Floats:
    """Hoeffding-Bentkus: one-sided upper bound of the mean of values in [0, 1], given the mean of so many."""
    seen, every = (np.array(one) for one in np.broadcast_arrays(np.float64(mean), np.float64(of)))
    low, high = seen.copy(), np.ones(seen.shape)
    for _ in range(40):  # the p-value falls as the mean that is tested rises
        middle = (low + high) / 2
        rejected = _p_value(seen, every, middle) <= 1 - confidence
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return np.where(every > 0, high, 1.0)


def _p_value(mean: Floats, of: Floats, tested: Floats) -> Floats:
    """Of the hypothesis that the true mean is above `tested` (Bates et al., 2021, proposition 6)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(mean > 0, mean * np.log(mean / tested), 0.0)
        above = np.where(mean < 1, (1 - mean) * np.log((1 - mean) / (1 - tested)), 0.0)
    hoeffding = np.where(mean < tested, np.exp(-of * (below + above)), 1.0)
    # the mean of a sum that is whole but for rounding must not count one more
    bentkus = math.e * binom.cdf(np.ceil(of * mean - 1e-9), of, tested)
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0))


# -- parts --------------------------------------------------------------------------------------------------


def check(budget: float, confidence: float | None, of: str = "all") -> None:
    """ConfigError: settings that no documents could make work."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"the budget is a share in [0, 1], got {budget}; 0.005 allows one result in 200 to differ")
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(
            f"confidence has to be above 0 and below 1, got {confidence}: no finite sample makes certain; use 0.95, or "
            "None to take the drift as measured"
        )
    if of not in {"all", "hits"}:
        raise ConfigError(f'a budget is a share of "all" results or of "hits", got {of!r}')


def _checked(
    drift: NDArray[np.floating] | NDArray[np.bool_], score: NDArray[np.floating], confidence: float | None
) -> tuple[Floats, Floats]:
    moved, safe = np.asarray(drift, np.float64), np.asarray(score, np.float64)
    if moved.ndim != 1 or moved.shape != safe.shape or not len(moved):
        raise ConfigError(f"calibration needs one drift and one score per document, got {moved.shape} and {safe.shape}")
    if not np.isfinite(moved).all():
        first = int(np.flatnonzero(~np.isfinite(moved))[0])
        raise ConfigError(f"the drift of document {first} is {moved[first]}; does the head give NaN for its output?")
    if np.isnan(safe).any():
        raise ConfigError(f"the score of document {int(np.flatnonzero(np.isnan(safe))[0])} is NaN")
    if confidence is not None and (moved.min() < 0 or moved.max() > 1):
        raise ConfigError(
            f"drift has to lie in [0, 1] to be bounded, got {moved.min():g} to {moved.max():g}; divide it by its "
            "largest value, or count what is above a limit"
        )
    return moved, safe


def _method(drift: Floats, confidence: float | None) -> str:
    if confidence is None:
        return "as measured"
    return "clopper-pearson" if np.isin(drift, (0.0, 1.0)).all() else "hoeffding-bentkus"


def _candidates(score: Floats, given: NDArray[np.floating] | None) -> Floats:
    if given is not None:
        return np.unique(np.asarray(given, np.float64))[::-1]
    finite = np.sort(score[np.isfinite(score)])[::-1]
    if not len(finite):
        return np.zeros(0)
    places = np.unique(np.ceil(np.linspace(0, 1, CANDIDATES + 1)[1:] * len(finite)).astype(np.int64)) - 1
    return np.unique(finite[places])[::-1]


def _curve(drift: Floats, score: Floats, thresholds: Floats, confidence: float | None, errors: float) -> Curve:
    order = np.argsort(-score, kind="stable")
    count = np.searchsorted(-score[order], -thresholds, "right")
    total = np.concatenate([[0.0], np.cumsum(drift[order])])[count]
    n = np.full(len(count), len(drift))
    mean, mean_of_hits = total / n, total / np.maximum(count, 1)
    if confidence is None:
        squares = np.concatenate([[0.0], np.cumsum(np.square(drift[order]))])[count]
        bound, bound_of_hits = (
            middle
            + errors * np.sqrt(np.maximum(squares / np.maximum(of, 1) - np.square(middle), 0) / np.maximum(of, 1))
            for middle, of in ((mean, n), (mean_of_hits, count))
        )
    elif _method(drift, confidence) == "clopper-pearson":
        bound, bound_of_hits = flip_bound(total, n, confidence), flip_bound(total, count, confidence)
    else:
        bound, bound_of_hits = mean_bound(mean, n, confidence), mean_bound(mean_of_hits, count, confidence)
    return Curve(thresholds, count / n, mean, bound, mean_of_hits, bound_of_hits)


def _last_passing(curve: Curve, n: int, budget: float, confidence: float | None, of: str, worst: float) -> int | None:
    bound = curve.bound if of == "all" else curve.bound_of_hits
    passed = bound <= budget
    if confidence is not None:
        first = 0
        if of == "hits":
            # with fewer hits than this not even flawless ones would pass, and the sequence would end at once
            enough = curve.hits * n >= 2 * least_samples(budget, confidence)
            first = int(np.argmax(enough)) if enough.any() else len(curve)
        passed[:first] = False
        failed = np.flatnonzero(~passed[first:])
        passed[first + failed[0] if len(failed) else len(curve) :] = False
    # all that passed hold at once, so that any of them may be left out for another reason
    good = np.flatnonzero(passed & (curve.drift_of_hits <= worst))
    return int(good[-1]) if len(good) else None

"""Anytime-valid bounds on the drift of reused results, from the few that were recomputed.

Audits check the bounds after every batch and may stop at any time, so a bound for a fixed number of audits would not
hold. Both classes are built on nonnegative supermartingales: by Ville's inequality these ever exceed 1 / alpha in at
most a share alpha of all streams.

`Sequence` bounds the mean drift of all audits so far. A drift x in [0, 1] of conditional mean m is sub-Bernoulli:
exp(t x - log(1 + m (e^t - 1))) has mean at most 1, since e^(t x) is convex in x. The product over the audits, mixed
over a fixed set of tilts t, is the supermartingale. Since log(1 + m (e^t - 1)) is concave in m, it bounds the *running*
mean also when the drift changes over time. (Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", sub-Bernoulli case with a discrete mixture.) The state is two numbers.

`ChangeDetector` detects that drift has started to exceed a limit, at any later time. It tracks the wealth of bets
against "the mean is at most the limit", as in Waudby-Smith and Ramdas 2024, "Estimating means of bounded random
variables by betting". The bets are mixed over stakes and over starting times, so that a long time without drift does
not use up the wealth (as in the e-detectors of Shin, Ramdas and Rinaldo 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcache.errors import ConfigError

# tilts for the lower bound: small ones suit a mean near 0, large ones a mean near 1; the negatives give the upper bound
_TILTS = np.geomspace(0.02, 8.0, 32)
_LOG_SHARE = -log(len(_TILTS))
_STEPS = 50  # bisections of [0, 1]: to 1e-15


class Sequence:
    """Confidence sequence for the mean of drifts in [0, 1]: all its bounds hold simultaneously, at any time.

    The near hits to audit are drawn at random before their drift is known. Their mean drift therefore estimates that
    of all near hits, also when the sampling rate changes over time. To bound the drift of *all* results, documents
    without a near hit are drawn in the same way and count as 0; they need no audit.

    alpha: probability that a bound is ever wrong, half for each side. ConfigError when it is not in (0, 1).
    """

    def __init__(self, alpha: float = 0.05) -> None:
        self.alpha = _checked_alpha(alpha)
        self.count = 0
        self.total = 0.0

    def observe(self, values: ArrayLike) -> None:
        """Add drifts, each in [0, 1], in the order of the audits. ValueError when one is outside."""
        drifts = _checked(values)
        self.count += len(drifts)
        self.total += float(drifts.sum())

    @property
    def mean(self) -> float:
        """Mean drift of the audits; 0 before the first one."""
        return self.total / self.count if self.count else 0.0

    @property
    def lower(self) -> float:
        """Lower bound of the mean drift, at confidence 1 - alpha / 2 over all times."""
        return self._bound(_TILTS, 0.0, self.mean) if self.total else 0.0

    @property
    def upper(self) -> float:
        """Upper bound of the mean drift, at confidence 1 - alpha / 2 over all times."""
        return self._bound(-_TILTS, 1.0, self.mean) if self.total < self.count else 1.0

    def exceeds(self, budget: float) -> bool:
        """Return True if the mean drift is certainly above the budget."""
        return budget < self.mean and self._refutes(_TILTS, budget)

    def within(self, budget: float) -> bool:
        """Return True if the mean drift is certainly at most the budget."""
        return self.mean <= budget and (budget >= 1 or self._refutes(-_TILTS, budget))

    def _refutes(self, tilts: NDArray[np.float64], mean: float) -> bool:
        """Return True if the audits reject this mean drift."""
        evidence = tilts * self.total - self.count * np.log1p(mean * np.expm1(tilts))
        return bool(np.logaddexp.reduce(evidence) + _LOG_SHARE >= log(2 / self.alpha))

    def _bound(self, tilts: NDArray[np.float64], refuted: float, accepted: float) -> float:
        """Bisect between a rejected and an accepted mean. Returns the end of the interval on the rejected side."""
        if not self._refutes(tilts, refuted):
            return refuted
        for _ in range(_STEPS):
            middle = (refuted + accepted) / 2
            if self._refutes(tilts, middle):
                refuted = middle
            else:
                accepted = middle
        return refuted

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for `restored`."""
        return {"alpha": self.alpha, "count": self.count, "total": self.total}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Sequence:
        """Rebuild a sequence from its `state`."""
        sequence = cls(float(state["alpha"]))
        sequence.count, sequence.total = int(state["count"]), float(state["total"])
        return sequence


# shares of the wealth that are staked: against a mean p and a limit m the best stake is (p - m) / (1 - m)
_STAKES = np.array([0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64])
_SOON = 100  # observations after which new bets start less often
_CHUNK = 64  # observations per block: products over a block stay finite
_RICH = 1e100  # cap on the wealth, far above any alarm; a cap keeps the evidence valid


class ChangeDetector:
    """Detector of drifts in [0, 1] that start to exceed their limits; one stream per limit.

    limits: highest allowed mean of each stream, in (0, 1).
    alpha: probability that any false alarm is ever raised, over all streams.
    ConfigError when a limit or alpha is out of range.
    """

    def __init__(self, limits: float | Several[float], alpha: float = 0.05) -> None:
        self.alpha = _checked_alpha(alpha)
        self.limits = np.atleast_1d(np.asarray(limits, np.float64))
        if not ((self.limits > 0) & (self.limits < 1)).all():
            raise ConfigError(f"a limit of drift has to be above 0 and below 1, got {limits}")
        self.count = 0
        self._wealth = np.zeros((len(self.limits), len(_STAKES)))  # of the started bets
        self.highest = 0.0
        """Largest evidence so far, as a factor."""

    def observe(self, values: ArrayLike) -> None:
        """Add drifts in order: [n] for one stream, [n, streams] for several. ValueError when one is outside [0, 1]."""
        drifts = _checked(values, len(self.limits))
        for start in range(0, len(drifts), _CHUNK):
            self._bet(drifts[start : start + _CHUNK])

    def _bet(self, drifts: NDArray[np.float64]) -> None:
        """Update the wealth with a block of drifts [n, streams]."""
        limits = self.limits[:, None]
        grown = np.cumprod(1 + _STAKES / limits * (drifts[:, :, None] - limits), axis=0)  # [n, streams, stakes]
        waiting = _waiting(np.arange(self.count, self.count + len(drifts) + 1))
        started = (waiting[:-1] - waiting[1:])[:, None, None]  # wealth of the bets that start with each drift
        before = np.concatenate([np.ones_like(grown[:1]), grown[:-1]])
        with np.errstate(over="ignore"):
            wealth = np.minimum(grown * (self._wealth + np.cumsum(started / before, axis=0)), _RICH)
        self._wealth = wealth[-1]
        self.highest = max(self.highest, float((wealth.mean(axis=(1, 2)) + waiting[1:]).max()))
        self.count += len(drifts)

    @property
    def raised(self) -> bool:
        """True once a mean was certainly above its limit."""
        return self.highest >= 1 / self.alpha

    def loudest(self) -> int:
        """Return the index of the stream with the most evidence now."""
        return int(self._wealth.sum(axis=1).argmax())

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for `restored`."""
        return {
            "alpha": self.alpha,
            "limits": self.limits.tolist(),
            "count": self.count,
            "wealth": self._wealth.tolist(),
            "highest": self.highest,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> ChangeDetector:
        """Rebuild a detector from its `state`."""
        detector = cls(state["limits"], float(state["alpha"]))
        detector.count, detector.highest = int(state["count"]), float(state["highest"])
        detector._wealth = np.asarray(state["wealth"], np.float64).reshape(detector._wealth.shape)
        return detector


def _waiting(count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of the wealth whose bets have not started before an observation; half starts with the first."""
    return np.where(count == 0, 1.0, 0.5 / (1 + np.log1p(count / _SOON)))


def _checked(values: ArrayLike, streams: int | None = None) -> NDArray[np.float64]:
    """Return drifts as float64 [n], or [n, streams]. ValueError when one is NaN or outside [0, 1]."""
    drifts = np.asarray(values, np.float64)
    drifts = drifts.reshape(-1) if streams is None else drifts.reshape(-1, streams)
    if not ((drifts >= 0) & (drifts <= 1)).all():
        raise ValueError(f"a drift is in [0, 1], got {drifts.min()} to {drifts.max()}; clip or rescale it")
    return drifts


def _checked_alpha(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ConfigError(f"no bound holds with certainty: 1 - confidence has to be above 0 and below 1, got {alpha}")
    return alpha

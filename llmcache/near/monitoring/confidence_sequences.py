"""How much reused results drift, from the few that were recomputed: bounds that hold at any time.

Audits look at the bounds again and again and stop when they like, so a bound for a fixed number of audits would fail in
time. Both parts here are built on nonnegative supermartingales, which by Ville's inequality exceed 1 / alpha in at most
a share alpha of all streams, whenever one looks.

`Sequence` bounds the mean drift of all audits so far. A drift x in [0, 1] of conditional mean m is sub-Bernoulli:
exp(t x - log(1 + m (e^t - 1))) has mean at most 1, since e^(t x) is convex in x. The product over the audits, mixed
over a fixed set of tilts t, is the supermartingale; as log(1 + m (e^t - 1)) is concave in m, it bounds the *running*
mean also when the drift changes over time. (Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", sub-Bernoulli case with a discrete mixture.) The state is two numbers.

`ChangeDetector` notices that drift has begun to exceed a limit, however long it had not: wealth of bets against "the
mean is at most the limit", as in Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by
betting", mixed over stakes and over the time at which a bet starts, so that long quiet does not use it up (as in the
e-detectors of Shin, Ramdas and Rinaldo 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcache.errors import ConfigError

# tilts for the lower bound, from barely to only-ones; their negatives serve the upper bound
_TILTS = np.geomspace(0.02, 8.0, 32)
_LOG_SHARE = -log(len(_TILTS))
_STEPS = 50  # halvings of an interval: to 1e-15


class Sequence:
    """Bounds on the mean of drifts in [0, 1], all valid at once and at any time.

    Which near hits are audited is left to chance, decided before their drift is known; then the mean of the audited
    ones is that of all near hits, and the share of chance may change over time. For the share of *all* results,
    documents that were no near hits are drawn in the same way and count as 0: they need no audit.

    alpha: chance that a bound is ever wrong, half of it on each side.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        self.alpha = _checked_alpha(alpha)
        self.count = 0
        self.total = 0.0

    def observe(self, values: ArrayLike) -> None:
        """Takes in some drifts, each in [0, 1], in the order of the audits."""
        drifts = _checked(values)
        self.count += len(drifts)
        self.total += float(drifts.sum())

    @property
    def mean(self) -> float:
        """Mean drift of the audits; 0 before the first."""
        return self.total / self.count if self.count else 0.0

    @property
    def lower(self) -> float:
        """The mean drift is at least this: with confidence 1 - alpha / 2, always."""
        return self._bound(_TILTS, 0.0, self.mean) if self.total else 0.0

    @property
    def upper(self) -> float:
        """The mean drift is at most this: with confidence 1 - alpha / 2, always."""
        return self._bound(-_TILTS, 1.0, self.mean) if self.total < self.count else 1.0

    def exceeds(self, budget: float) -> bool:
        """Whether it is certain that the mean drift is above the budget."""
        return budget < self.mean and self._refutes(_TILTS, budget)

    def within(self, budget: float) -> bool:
        """Whether it is certain that the mean drift is at most the budget."""
        return self.mean <= budget and (budget >= 1 or self._refutes(-_TILTS, budget))

    def _refutes(self, tilts: NDArray[np.float64], mean: float) -> bool:
        """Whether the audits would be too unlikely if their mean drift were this."""
        evidence = tilts * self.total - self.count * np.log1p(mean * np.expm1(tilts))
        return bool(np.logaddexp.reduce(evidence) + _LOG_SHARE >= log(2 / self.alpha))

    def _bound(self, tilts: NDArray[np.float64], refuted: float, kept: float) -> float:
        """The border between means that are refuted and those that are not, on the refuted side."""
        if not self._refutes(tilts, refuted):
            return refuted
        for _ in range(_STEPS):
            middle = (refuted + kept) / 2
            if self._refutes(tilts, middle):
                refuted = middle
            else:
                kept = middle
        return refuted

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `restored` takes them."""
        return {"alpha": self.alpha, "count": self.count, "total": self.total}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Sequence:
        """The sequence whose `state` this is."""
        sequence = cls(float(state["alpha"]))
        sequence.count, sequence.total = int(state["count"]), float(state["total"])
        return sequence


# how much of what may be lost is staked: the best stake against a mean p at a limit m is (p - m) / (1 - m)
_STAKES = np.array([0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64])
_SOON = 100  # observations after which starting anew becomes rarer
_CHUNK = 64  # observations at a time: their products stay finite
_RICH = 1e100  # wealth is cut here, long after the alarm; less evidence is still evidence


class ChangeDetector:
    """Evidence that drifts in [0, 1] have begun to exceed their limits; one stream per limit.

    limits: the mean of each stream that is still right. alpha: chance that any alarm is ever false, over all streams.
    """

    def __init__(self, limits: float | Several[float], alpha: float = 0.05) -> None:
        self.alpha = _checked_alpha(alpha)
        self.limits = np.atleast_1d(np.asarray(limits, np.float64))
        if not ((self.limits > 0) & (self.limits < 1)).all():
            raise ConfigError(f"a limit of drift is above 0 and below 1, got {limits}")
        self.count = 0
        self._wealth = np.zeros((len(self.limits), len(_STAKES)))  # of the bets that have started
        self.highest = 0.0  # largest evidence so far, as a factor

    def observe(self, values: ArrayLike) -> None:
        """Takes in some drifts: [n] for one stream, [n, streams] for several, each in [0, 1], in order."""
        drifts = _checked(values, len(self.limits))
        for start in range(0, len(drifts), _CHUNK):
            self._bet(drifts[start : start + _CHUNK])

    def _bet(self, drifts: NDArray[np.float64]) -> None:
        limits = self.limits[:, None]
        grown = np.cumprod(1 + _STAKES / limits * (drifts[:, :, None] - limits), axis=0)  # [n, streams, stakes]
        waiting = _waiting(np.arange(self.count, self.count + len(drifts) + 1))
        started = (waiting[:-1] - waiting[1:])[:, None, None]  # put on every stake just before each drift
        before = np.concatenate([np.ones_like(grown[:1]), grown[:-1]])
        with np.errstate(over="ignore"):
            wealth = np.minimum(grown * (self._wealth + np.cumsum(started / before, axis=0)), _RICH)
        self._wealth = wealth[-1]
        self.highest = max(self.highest, float((wealth.mean(axis=(1, 2)) + waiting[1:]).max()))
        self.count += len(drifts)

    @property
    def raised(self) -> bool:
        """Whether it was certain, at some time, that a mean was above its limit."""
        return self.highest >= 1 / self.alpha

    def loudest(self) -> int:
        """The stream with the most evidence now."""
        return int(self._wealth.sum(axis=1).argmax())

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `restored` takes them."""
        return {
            "alpha": self.alpha,
            "limits": self.limits.tolist(),
            "count": self.count,
            "wealth": self._wealth.tolist(),
            "highest": self.highest,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> ChangeDetector:
        """The alarm whose `state` this is."""
        alarm = cls(state["limits"], float(state["alpha"]))
        alarm.count, alarm.highest = int(state["count"]), float(state["highest"])
        alarm._wealth = np.asarray(state["wealth"], np.float64).reshape(alarm._wealth.shape)
        return alarm


def _waiting(count: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of the money whose bet has not started before this observation: half starts with the first."""
    return np.where(count == 0, 1.0, 0.5 / (1 + np.log1p(count / _SOON)))


def _checked(values: ArrayLike, streams: int | None = None) -> NDArray[np.float64]:
    """As float64 [n], or [n, streams]. ValueError: a drift is NaN or outside [0, 1]."""
    drifts = np.asarray(values, np.float64)
    drifts = drifts.reshape(-1) if streams is None else drifts.reshape(-1, streams)
    if not ((drifts >= 0) & (drifts <= 1)).all():
        raise ValueError(f"a drift is in [0, 1], got {drifts.min()} to {drifts.max()}; clip or rescale it")
    return drifts


def _checked_alpha(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ConfigError(f"no bound holds with certainty: 1 - confidence is above 0 and below 1, got {alpha}")
    return alpha

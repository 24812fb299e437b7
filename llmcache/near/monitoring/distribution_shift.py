"""Detect that live documents differ from the calibration sample.

A calibration is valid for documents like its sample. The sample gives the distribution of similarities to the nearest
entry. An alarm is raised when live documents are far from every entry more often than in the sample (with a margin for
the sample size). The evidence comes from bets as in `llmcache.near.monitoring.confidence_sequences`, so it may be
checked after every document, and a false alarm stays improbable over any run time.

Only larger distances count: a growing cache finds nearer entries for the same traffic, which is no shift. The best
similarity is free, since the look-up computes it. It separated BANKING77 from SNIPS better than the distance to
landmarks, the positions along principal directions, or the part of a fingerprint outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcache.errors import ConfigError
from llmcache.near.monitoring.confidence_sequences import ChangeDetector

LEAST = 100
"""Least number of similarities in a sample; with fewer the margins would hide every shift."""
_FAR = (0.02, 0.05, 0.2, 0.5)  # shares of the sample that are farthest from the entries


class DistributionShift:
    """Monitor of live documents, created by `fitted` from the calibration sample.

    borders: similarities below which 2, 5, 20 and 50 % of the sample lie. alarm: detector with one limit per border.
    """

    def __init__(self, borders: NDArray[np.float64], alarm: ChangeDetector) -> None:
        self.borders = borders
        self._alarm = alarm
        self._below = np.zeros(len(borders), np.int64)

    @classmethod
    def fitted(cls, similarities: ArrayLike, *, alpha: float = 0.01, tolerance: float = 0.5) -> DistributionShift:
        """Create a monitor from the similarities of a calibration sample.

        similarities: of each sample document to its nearest entry, [n], n >= 100, in any order. The sample and its
            copies must not be among those entries (cross-fitted or held out).
        alpha: probability of ever raising a false alarm.
        tolerance: relative excess over the share in the sample that is no shift yet.
        ConfigError when the sample is too small.
        """
        sample = np.sort(_numbers(similarities))
        if len(sample) < LEAST:
            raise ConfigError(f"detecting a shift needs a sample of at least {LEAST} documents, got {len(sample)}")
        counts = [max(1, int(share * len(sample))) for share in _FAR]
        chance = alpha / 2 / len(_FAR)  # half of alpha for shares that the sample underestimates, half for the bets
        limits = [min(0.99, (1 + tolerance) * _at_most(count, len(sample), chance)) for count in counts]
        return cls(sample[counts], ChangeDetector(limits, alpha / 2))

    def observe(self, similarities: ArrayLike) -> None:
        """Add similarities of live documents to their nearest entries, [n], in order.

        Leave out exact hits both here and in the sample, or in neither.
        """
        events = _numbers(similarities)[:, None] < self.borders
        self._below += events.sum(axis=0)
        self._alarm.observe(events)

    @property
    def raised(self) -> bool:
        """True once live documents were certainly unlike the sample."""
        return self._alarm.raised

    @property
    def documents(self) -> int:
        """Number of live documents so far."""
        return self._alarm.count

    def reason(self) -> str:
        """Describe the strongest deviation from the sample in one sentence."""
        event = self._alarm.loudest()
        share = self._below[event] / max(1, self.documents)
        return (
            f"{share:.1%} of {self.documents} documents are less similar to their nearest entry than "
            f"{self.borders[event]:.3f}; in the calibration sample {_FAR[event]:.0%} were, and up to "
            f"{self._alarm.limits[event]:.1%} is no shift"
        )

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for `restored`."""
        return {"borders": self.borders.tolist(), "below": self._below.tolist(), "alarm": self._alarm.state()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DistributionShift:
        """Rebuild a monitor from its `state`. ConfigError when its parts do not fit each other."""
        shift = cls(np.asarray(state["borders"], np.float64), ChangeDetector.restored(state["alarm"]))
        shift._below = np.asarray(state["below"], np.int64)
        expected = (len(_FAR),)
        if (shift.borders.shape, shift._below.shape, np.shape(shift._alarm.limits)) != (expected,) * 3:
            raise ConfigError("the saved monitor of distribution shift does not fit itself; calibrate again")
        return shift


def _numbers(similarities: ArrayLike) -> NDArray[np.float64]:
    """Return similarities as float64 [n]. NaN becomes -1, near to no entry."""
    return np.nan_to_num(np.asarray(similarities, np.float64).reshape(-1), nan=-1.0)


def _at_most(count: int, total: int, chance: float) -> float:
    """Return an upper bound of a share with `count` of `total` seen, wrong with probability `chance` (Chernoff)."""
    low, high = count / total, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if total * _divergence(count / total, middle) >= log(1 / chance):
            high = middle
        else:
            low = middle
    return high


def _divergence(one: float, other: float) -> float:
    """Return the KL divergence between two Bernoulli distributions, in nats."""
    if other >= 1:
        return float("inf") if one < 1 else 0.0
    heads = one * log(one / other) if one else 0.0
    return heads + (1 - one) * log((1 - one) / (1 - other))

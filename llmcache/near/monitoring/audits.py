"""Audits of near hits: check against the drift budget in operation, and tighten the threshold.

A random share of the hits is recomputed. For the calibrated threshold and a few stricter ones, the drift of these hits
feeds a confidence sequence over all audits and a change detector for recent drift
(`llmcache.near.monitoring.confidence_sequences`). When the hits above a threshold certainly drift by more than the
budget allows, the next stricter threshold is used; after the last one near reuse is off. Only a calibration loosens the
threshold again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmcache.arrays import Floats
from llmcache.errors import ConfigError
from llmcache.near.monitoring.confidence_sequences import ChangeDetector
from llmcache.near.monitoring.confidence_sequences import Sequence as Bounds

WATCHFUL = 0.2
"""Least share of hits that is audited while there is evidence of drift or the traffic has changed."""
SUSPICIOUS = 3.0
"""Evidence of a change detector, as a factor, from which more hits are audited. An alarm needs 1 / alpha."""
_HIGHEST = 0.99  # highest limit of a change detector


class Audits:
    """The audits of one calibration.

    thresholds: lowest scores that are reused, from the calibrated one to stricter ones.
    hits: share of results above each threshold at the calibration.
    budget: highest mean drift over all results.
    alpha: probability that the threshold is ever tightened although the hits keep to the budget.
    share: share of the hits that is audited.
    """

    def __init__(
        self, thresholds: Sequence[float], hits: Sequence[float], *, budget: float, alpha: float, share: float
    ) -> None:
        self.thresholds = np.asarray(thresholds, np.float64)
        self.budget, self.share = budget, share
        part = alpha / max(1, len(thresholds))  # half for the lower bound of the sequence, half for the detector
        self.bounds = [Bounds(part) for _ in thresholds]
        self._detectors = [ChangeDetector(min(_HIGHEST, max(1e-6, budget / max(h, 1e-9))), part / 2) for h in hits]
        self.level = 0
        """Index of the threshold in use; the number of thresholds when near reuse is off."""
        self.asked = 0
        self.taken = np.zeros(len(thresholds), np.int64)
        self.shifted = False

    @property
    def threshold(self) -> float:
        """Lowest score that is reused; infinite when near reuse is off."""
        return float(self.thresholds[self.level]) if self.level < len(self.thresholds) else np.inf

    @property
    def share_now(self) -> float:
        """Share of hits to audit now: raised while there is evidence of drift or the traffic has changed."""
        on_alert = self.shifted or (
            self.level < len(self._detectors) and self._detectors[self.level].highest >= SUSPICIOUS
        )
        return max(self.share, WATCHFUL) if on_alert and self.share else self.share

    def allowed(self, level: int) -> float:
        """Return the highest mean drift of the hits above a threshold at which all results keep to the budget."""
        return float(min(1.0, self.budget * self.asked / max(1, int(self.taken[level]))))

    def observe(self, asked: int, scores: Floats, audited: Floats, drift: Floats) -> str:
        """Record documents and audits, and tighten the threshold when the budget is certainly exceeded.

        asked: number of documents looked up. scores: of the hits among them, [hits].
        audited, drift: scores and drift of the audited hits, [audits]; drift in [0, 1].
        Returns the reason for a stricter threshold, "" when it stays.
        """
        self.asked += asked
        self.taken += (np.asarray(scores, np.float64)[None] >= self.thresholds[:, None]).sum(axis=1)
        for level in range(self.level, len(self.thresholds)):
            drift_above = np.asarray(drift, np.float64)[np.asarray(audited) >= self.thresholds[level]]
            if len(drift_above):
                self.bounds[level].observe(drift_above)
                self._detectors[level].observe(drift_above)
        last_reason = ""
        while self.level < len(self.thresholds) and (reason := self._violation(self.level)):
            last_reason, self.level = reason, self.level + 1
        return last_reason

    def _violation(self, level: int) -> str:
        """Return how the hits above a threshold certainly exceed the budget, "" when they do not."""
        bounds, allowed = self.bounds[level], self.allowed(level)
        if bounds.exceeds(allowed):
            return (
                f"{bounds.count} audits show that near hits drift by at least {bounds.lower:.2%}, while the budget of "
                f"{self.budget:.2%} of all results allows {allowed:.2%}"
            )
        if self._detectors[level].raised:
            return (
                f"the latest of {bounds.count} audits show that near hits drift by more than the calibrated "
                f"{float(self._detectors[level].limits[0]):.2%}"
            )
        return ""

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for `restore`."""
        return {
            "level": self.level,
            "asked": self.asked,
            "taken": self.taken.tolist(),
            "bounds": [bounds.state() for bounds in self.bounds],
            "alarms": [detector.state() for detector in self._detectors],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`. ConfigError when it is unreadable or for another number of thresholds."""
        try:
            bounds = [Bounds.restored(saved) for saved in state["bounds"]]
            detectors = [ChangeDetector.restored(saved) for saved in state["alarms"]]
            taken = np.asarray(state["taken"], np.int64)
            if not len(bounds) == len(detectors) == len(taken) == len(self.thresholds):
                raise ConfigError(f"{len(bounds)} audits saved for {len(self.thresholds)} thresholds; calibrate again")
            level, asked = int(state["level"]), int(state["asked"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the audits saved with the store cannot be read: {error}; calibrate again") from None
        self.bounds, self._detectors, self.taken, self.level, self.asked = bounds, detectors, taken, level, asked

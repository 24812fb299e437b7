"""Whether near hits keep to their budget while they are given: audits, and what follows from them.

A random share of the hits is recomputed. Their drift feeds, for each of a few thresholds from the calibrated one to
stricter ones, a confidence sequence over everything so far and an alarm for what has begun lately
(`llmcache.near.monitoring.confidence_sequences`). Where it is certain that the hits above a threshold drift by more
than the budget allows, the next stricter threshold is used; after the last one near reuse is off. Only a calibration
loosens again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.monitoring.confidence_sequences import ChangeDetector
from llmcache.near.monitoring.confidence_sequences import Sequence as Bounds

WATCHFUL = 0.2
"""Share of the hits that is audited while something speaks against them, or the traffic has changed."""
SUSPICIOUS = 3.0
"""Evidence of an alarm, as a factor, from which on more is audited; certain is 1 / alpha."""
_HIGHEST = 0.99  # a limit of an alarm

Floats = NDArray[np.floating]


class Audits:
    """The audits of one calibration. thresholds: lowest score that is reused, from the calibrated one to stricter ones.

    budget: highest mean drift over all results. hits: share of results above each threshold, when it was calibrated.
    alpha: chance that hits which keep to the budget are ever tightened. share: of the hits, that is audited.
    """

    def __init__(
        self, thresholds: Sequence[float], hits: Sequence[float], *, budget: float, alpha: float, share: float
    ) -> None:
        self.thresholds = np.asarray(thresholds, np.float64)
        self.budget, self.share = budget, share
        part = alpha / max(1, len(thresholds))  # half of it for the sequence (its lower bound), half for the alarm
        self.bounds = [Bounds(part) for _ in thresholds]
        self._alarms = [ChangeDetector(min(_HIGHEST, max(1e-6, budget / max(one, 1e-9))), part / 2) for one in hits]
        self.level = 0
        """Which of the thresholds is in use; their number when near reuse is off."""
        self.asked = 0
        self.taken = np.zeros(len(thresholds), np.int64)
        self.shifted = False

    @property
    def threshold(self) -> float:
        """The lowest score that is reused, infinite for nothing."""
        return float(self.thresholds[self.level]) if self.level < len(self.thresholds) else np.inf

    @property
    def share_now(self) -> float:
        """The share of hits that is to be audited."""
        wary = self.shifted or (self.level < len(self._alarms) and self._alarms[self.level].highest >= SUSPICIOUS)
        return max(self.share, WATCHFUL) if wary and self.share else self.share

    def allowed(self, level: int) -> float:
        """Highest mean drift of the hits above this threshold, so that all results keep to the budget."""
        return float(min(1.0, self.budget * self.asked / max(1, int(self.taken[level]))))

    def observe(self, asked: int, scores: Floats, audited: Floats, drift: Floats) -> str:
        """Take note of documents asked, the scores of the hits among them, and of scores and drift of those audited.

        scores: [hits]; audited, drift: [audits], drift in [0, 1]. Returns what was found that tightens the threshold,
        "" for nothing.
        """
        self.asked += asked
        self.taken += (np.asarray(scores, np.float64)[None] >= self.thresholds[:, None]).sum(axis=1)
        for level in range(self.level, len(self.thresholds)):
            mine = np.asarray(drift, np.float64)[np.asarray(audited) >= self.thresholds[level]]
            if len(mine):
                self.bounds[level].observe(mine)
                self._alarms[level].observe(mine)
        found = ""
        while self.level < len(self.thresholds) and (reason := self._against(self.level)):
            found, self.level = reason, self.level + 1
        return found

    def _against(self, level: int) -> str:
        bounds, allowed = self.bounds[level], self.allowed(level)
        if bounds.exceeds(allowed):
            return (
                f"{bounds.count} audits show a drift of at least {bounds.lower:.2%} of the near hits, where the budget "
                f"of {self.budget:.2%} of all results allows {allowed:.2%}"
            )
        if self._alarms[level].raised:
            return (
                f"the latest of {bounds.count} audits show that the near hits have begun to drift by more than the "
                f"{float(self._alarms[level].limits[0]):.2%} that they were calibrated to"
            )
        return ""

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `restore` takes them."""
        return {
            "level": self.level,
            "asked": self.asked,
            "taken": self.taken.tolist(),
            "bounds": [one.state() for one in self.bounds],
            "alarms": [one.state() for one in self._alarms],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. ConfigError when it is of other thresholds."""
        try:
            bounds = [Bounds.restored(one) for one in state["bounds"]]
            alarms = [ChangeDetector.restored(one) for one in state["alarms"]]
            taken = np.asarray(state["taken"], np.int64)
            if not len(bounds) == len(alarms) == len(taken) == len(self.thresholds):
                raise ConfigError(f"{len(bounds)} audits saved for {len(self.thresholds)} thresholds; calibrate again")
            level, asked = int(state["level"]), int(state["asked"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the audits saved with the store cannot be read: {error}; calibrate again") from None
        self.bounds, self._alarms, self.taken, self.level, self.asked = bounds, alarms, taken, level, asked

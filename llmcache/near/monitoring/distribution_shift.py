"""Whether the documents that arrive are still like the sample that tau was calibrated on.

A calibration speaks for documents like its own. Its sample says how similar a document of that kind is to the nearest
entry; live documents that are far from every entry more often than the sample allows (its shares have a margin for the
size of the sample) raise an alarm. The evidence is that of bets, as in
`llmcache.near.monitoring.confidence_sequences`, so that one may look after every document, and a false alarm stays
improbable however long it runs.

Only more distance counts. A cache that grows finds nearer entries for the same traffic, and that is no shift. The best
similarity costs nothing, since the look-up has it, and separated BANKING77 from SNIPS better than the distance to
landmarks, the places along principal directions, or the part of a fingerprint outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcache.errors import ConfigError
from llmcache.near.monitoring.confidence_sequences import ChangeDetector

LEAST = 100  # similarities in a sample: below, the margins swallow every shift
_FAR = (0.02, 0.05, 0.2, 0.5)  # shares of the sample that are farthest from the entries


class DistributionShift:
    """A watch over live documents, made by `fitted` from the calibration sample. A few plain numbers.

    borders: below these similarities lie the shares 2, 5, 20 and 50 % of the sample. alarm: a limit per border.
    """

    def __init__(self, borders: NDArray[np.float64], alarm: ChangeDetector) -> None:
        self.borders = borders
        self._alarm = alarm
        self._below = np.zeros(len(borders), np.int64)

    @classmethod
    def fitted(cls, similarities: ArrayLike, *, alpha: float = 0.01, tolerance: float = 0.5) -> DistributionShift:
        """A watch for documents farther from the entries than these.

        similarities: of each document of the calibration sample to its nearest entry, [n], n >= 100, in any order; the
            sample and its copies are not among those entries (cross-fitted or held out).
        alpha: chance of ever raising a false alarm.
        tolerance: what still counts as alike: a share may be larger than in the sample by this part of itself.
        """
        sample = np.sort(_numbers(similarities))
        if len(sample) < LEAST:
            raise ConfigError(f"to notice a shift takes a sample of at least {LEAST} documents, got {len(sample)}")
        counts = [max(1, int(share * len(sample))) for share in _FAR]
        chance = alpha / 2 / len(_FAR)  # half of alpha for shares that the sample underrates, half for the bets
        limits = [min(0.99, (1 + tolerance) * _at_most(count, len(sample), chance)) for count in counts]
        return cls(sample[counts], ChangeDetector(limits, alpha / 2))

    def observe(self, similarities: ArrayLike) -> None:
        """Takes in the similarities of some live documents to their nearest entries, [n], in order.

        Documents that were exact hits are left out, here and in the sample, or in neither.
        """
        events = _numbers(similarities)[:, None] < self.borders
        self._below += events.sum(axis=0)
        self._alarm.observe(events)

    @property
    def raised(self) -> bool:
        """Whether live documents were, at some time, certainly unlike the sample."""
        return self._alarm.raised

    @property
    def documents(self) -> int:
        """Live documents so far."""
        return self._alarm.count

    def reason(self) -> str:
        """What stands out most, in words: for a log line or a report."""
        event = self._alarm.loudest()
        share = self._below[event] / max(1, self.documents)
        return (
            f"{share:.1%} of {self.documents} documents are less similar to their nearest entry than "
            f"{self.borders[event]:.3f}; in the calibration sample {_FAR[event]:.0%} were, and up to "
            f"{self._alarm.limits[event]:.1%} is taken for alike"
        )

    def state(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `restored` takes them."""
        return {"borders": self.borders.tolist(), "below": self._below.tolist(), "alarm": self._alarm.state()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DistributionShift:
        """The watch whose `state` this is."""
        shift = cls(np.asarray(state["borders"], np.float64), ChangeDetector.restored(state["alarm"]))
        shift._below = np.asarray(state["below"], np.int64)
        return shift


def _numbers(similarities: ArrayLike) -> NDArray[np.float64]:
    """As float64 [n]; what is not a number is near to nothing."""
    return np.nan_to_num(np.asarray(similarities, np.float64).reshape(-1), nan=-1.0)


def _at_most(count: int, total: int, chance: float) -> float:
    """A share is at most this, but for the chance, when `count` of `total` were seen (Chernoff's bound)."""
    low, high = count / total, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if total * _divergence(count / total, middle) >= log(1 / chance):
            high = middle
        else:
            low = middle
    return high


def _divergence(one: float, other: float) -> float:
    """Of two coins, in nats."""
    if other >= 1:
        return float("inf") if one < 1 else 0.0
    heads = one * log(one / other) if one else 0.0
    return heads + (1 - one) * log((1 - one) / (1 - other))

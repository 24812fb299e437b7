"""Near reuse of one bank, as it was calibrated: neighbours' outputs, corrected, where a gate lets them through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache import guard
from llmcache.calibrating import Calibration, Fitted, judge_of
from llmcache.crossfit import Entries, Memory
from llmcache.indexes.bank import Bank
from llmcache.sequences import Sequence as Audits
from llmcache.shift import Shift

log = logging.getLogger("llmcache")

MOST = 200_000
"""Entries that are held in memory for near reuse; of more, so many are drawn evenly."""
_WATCHFUL = 0.2  # share of hits that is audited when the traffic is not the one that was calibrated on
TAKEN, LOW, GUARDED, ALONE = 0, 1, 2, 3
GATES = ("taken", "the score is below the threshold", "the guard", "there is no neighbour")
"""What decided on a near match, by number."""

Decode = Callable[[Sequence[NDArray[np.int32]]], list[str]]
"""Token ids of documents back to texts."""


@dataclass(frozen=True, slots=True)
class Near:
    """What near reuse has for some documents. results: float32 [n, out], corrected. rows: int64 [n], of the best match.

    similarity, score: float [n]; the score is that of the gate. gate: int8 [n], a place in `GATES`.
    kinds: per document the kind of field that the guard found to differ, or None.
    """

    results: NDArray[np.float32] = field(repr=False)
    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    score: NDArray[np.float64]
    gate: NDArray[np.int8]
    kinds: list[str | None] = field(repr=False)


def entries_of(bank: Bank, but: set[int] | None = None) -> tuple[NDArray[np.int64], Entries]:
    """Live rows of a bank and what they hold, at most `MOST` of them. but: rows that are left out."""
    rows = bank.near.live()
    if but:
        rows = rows[~np.isin(rows, np.fromiter(but, np.int64))]
    rows = rows[:: max(1, -(-len(rows) // MOST))]
    features = bank.near.features(rows)
    reading = bank.read(rows)
    good = reading.intact & features.any(axis=1)
    kept = rows[good]
    tokens = [bank.tokens(int(row)) for row in kept]
    return kept, Entries(features[good], np.asarray(reading.values)[good], tokens)


class Reuse:
    """Answers documents from their neighbours, within the budget that was calibrated; audits see to it.

    It is off when calibration found no safe threshold, or when audits are certain that the budget is exceeded.
    """

    def __init__(self, bank: Bank, calibration: Calibration, fitted: Fitted, decode: Decode, share: float) -> None:
        """share: of the near hits, that are recomputed."""
        self._bank, self.calibration, self._fitted, self._decode, self.share = bank, calibration, fitted, decode, share
        self._judge = judge_of(calibration, fitted)
        self._memory: Memory | None = None
        self._rows = np.zeros(0, np.int64)
        self._random = np.random.default_rng()
        self.audits = Audits(1 - (calibration.confidence or 0.95))
        self._traffic = Shift.restored(calibration.traffic) if calibration.traffic else None
        self.shifted = ""
        """What is other about the documents asked than about those that it was calibrated on; "" for nothing."""
        self.asked = self.taken = 0
        self.off = calibration.reason if calibration.threshold is None else ""
        """Why nothing is reused; "" while something is."""

    def refresh(self) -> Memory:
        """The entries to find neighbours among; taken again when the bank has doubled."""
        if self._memory is None or len(self._bank) > 2 * len(self._rows):
            self._rows, entries = entries_of(self._bank)
            self._memory = Memory(entries, self._fitted.predictor, self.calibration.voting)
        return self._memory

    def look_up(self, features: NDArray[np.float32], tokens: Sequence[NDArray[np.int32]]) -> Near:
        """Near matches of some documents, and what decided on each. features: raw, [n, width], as the bank's."""
        memory = self.refresh()
        found = memory.look_up(
            Entries(half(features), np.zeros((len(features), 0), np.float32), tokens), self._judge.scores
        )
        self._watch(found.similarity)
        score = self._fitted.gate(found.evidence)
        threshold = np.inf if self.calibration.threshold is None else self.calibration.threshold
        gate = np.where(np.isfinite(score), np.where(score >= threshold, TAKEN, LOW), ALONE).astype(np.int8)
        rows = self._rows[found.nearest]
        kinds: list[str | None] = [None] * len(rows)
        passed = np.flatnonzero(gate == TAKEN)
        if self.calibration.guard and len(passed):
            mine = self._decode([tokens[i] for i in passed.tolist()])
            theirs = self._decode([self._bank.tokens(int(row)) for row in rows[passed]])
            differing = guard.refused(guard.digests(mine), guard.digests(theirs))
            for i, kind in zip(passed.tolist(), differing.tolist(), strict=True):
                if kind >= 0:
                    gate[i], kinds[i] = GUARDED, guard.KINDS[kind]
        return Near(found.results, rows, found.similarity, score, gate, kinds)

    def _watch(self, similarity: NDArray[np.float32]) -> None:
        if self._traffic is None or self.shifted:
            return
        self._traffic.observe(similarity)
        if self._traffic.raised:
            self.shifted, self.share = self._traffic.reason(), max(self.share, _WATCHFUL)
            log.warning("the traffic has changed since it was calibrated: %s; more hits are audited", self.shifted)

    def chosen_for_audit(self, near: Near) -> NDArray[np.bool_]:
        """Which of the hits are to be recomputed, drawn by chance; bool [n]."""
        drawn: NDArray[np.bool_] = self._random.random(len(near.gate)) < self.share
        return np.asarray(drawn & (near.gate == TAKEN), np.bool_)

    def audit(self, asked: int, taken: int, computed: NDArray[np.float32], reused: NDArray[np.float32]) -> NDArray[Any]:
        """Take note of documents asked and near hits among them, and of some that were computed after all.

        Returns the drift of these, float64 [n]. From when it is certain that the budget is exceeded, near reuse is off.
        """
        self.asked, self.taken = self.asked + asked, self.taken + taken
        if not len(computed):
            return np.zeros(0)
        drift = self._judge.drift(computed, reused)
        self.audits.observe(drift)
        allowed = min(1.0, self.calibration.budget * self.asked / max(1, self.taken))
        if not self.off and self.audits.exceeds(allowed):
            self.off = (
                f"{self.audits.count} audits show a drift of at least {self.audits.lower:.2%} of the near hits, more "
                f"than the budget of {self.calibration.budget:.2%} of all results allows; calibrate again"
            )
            log.warning("near reuse is off: %s", self.off)
        return drift


def half(features: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded as the bank has them, so that a repeat has similarity 1."""
    return np.nan_to_num(np.clip(features, -65504, 65504)).astype(np.float16)

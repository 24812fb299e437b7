"""Near reuse of one bank, as it was calibrated: neighbours' outputs, corrected, where a gate lets them through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.banks.break_even import LEAST, BreakEven
from llmcache.banks.device_cache import dtype_of
from llmcache.banks.pace import Pace
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.search.bank_index import half
from llmcache.near.calibration.calibrate import Calibration, FittedModels, judge_of
from llmcache.near.calibration.drift import Drift
from llmcache.near.calibration.recalibration import Refitting, grown
from llmcache.near.calibration.risk_control import WORST
from llmcache.near.guard import rules as guard
from llmcache.near.marks import FieldDigests
from llmcache.near.monitoring.audits import Audits
from llmcache.near.monitoring.distribution_shift import DistributionShift
from llmcache.near.neighbors.bank_entries import answering_keys, entries_of
from llmcache.near.neighbors.correction import EVIDENCE, NEIGHBOURS, eligible_sources
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, NeighborIndex
from llmcache.near.neighbors.index_torch import DeviceMemory
from llmcache.near.neighbors.near_matches import (
    ALONE,
    GUARDED,
    LOW,
    QUARANTINED,
    TAKEN,
    NearMatches,
    no_neighbours,
)
from llmcache.near.neighbors.prediction_bank import Distilled

log = logging.getLogger("llmcache")

_CONSENSUS = EVIDENCE.index("consensus")

UNREAD = "fields that are not stored with the entry under the rules in use"
"""What the guard says of an entry that was stored without digests of its fields, or with those of other rules."""
_BEFORE_SCOPES = "it was calibrated before entries said for which role and prompt they are; calibrate again"
Decode = Callable[[Sequence[NDArray[np.int32]]], list[str]]
"""Token ids of documents back to texts."""


class NearMatcher:
    """Answers documents from their neighbours, within the budget that was calibrated; audits see to it.

    It is off when calibration found no safe threshold, or when audits are certain that the budget is exceeded at every
    stricter one; and it stands aside while it costs more than it saves.
    """

    def __init__(
        self,
        bank: Bank,
        calibration: Calibration,
        fitted: FittedModels,
        fields: FieldDigests,
        config: CacheConfig,
        kept: Mapping[str, Any] | None = None,
        drift: Drift | None = None,
        distilled: Distilled | None = None,
    ) -> None:
        """fields: digests of texts and entries, for the guard. kept: a `state` to go on from. drift: the user's own
        function, for a calibration that was made by one. distilled: predictions of the entries, where they are kept.
        """
        self._bank, self._digests, self._config, self._own = bank, fields, config, drift
        self.distilled = distilled
        self.balance, self.pace = BreakEven(), Pace()
        self._unpriced = np.zeros(2, np.int64)  # tokens of hits and of audits from before the pace was known
        self.changed = False
        """Whether there is something to save: audits, or another calibration."""
        self._refitting: Refitting | None = None
        self._random = np.random.default_rng()
        self._audit_seconds = self._saved_seconds = 0.0
        self._place: torch.device | None = None
        self._begin(calibration, fitted)
        self.foreign = 0
        """Documents of other scopes than the calibrated one that came by in this opening; they were not looked up."""
        if kept and self.scope != UNKNOWN:
            self.audits.restore(kept["audits"])
            self.stopped = str(kept["stopped"])

    def _begin(self, calibration: Calibration, fitted: FittedModels) -> None:
        self.calibration, self.fitted = calibration, fitted
        self._memory: NeighborIndex | None = None
        self._too_few = ""
        self._rows, self._divergent = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._judge = judge_of(calibration, fitted, self._own)
        levels = calibration.levels()
        self.audits = Audits(
            [threshold for threshold, _ in levels], [hits for _, hits in levels], budget=calibration.tolerated,
            alpha=1 - (calibration.confidence or 0.95), share=self._config.audit_share,
        )  # fmt: skip
        self._traffic = DistributionShift.restored(calibration.traffic) if calibration.traffic else None
        self._guard = (
            guard.FieldGuard(calibration.guard_kinds, calibration.guard_pattern) if calibration.guard else None
        )
        self.shifted = ""
        """What is other about the documents asked than about those that it was calibrated on; "" for nothing."""
        self.stopped = calibration.reason if calibration.threshold is None else ""
        if self.scope == UNKNOWN:
            self.stopped = _BEFORE_SCOPES

    @property
    def scope(self) -> int:
        """The scope that is calibrated: whose entries answer, and whose documents are looked up."""
        return int(self.calibration.scope or "0", 16)

    @property
    def off(self) -> str:
        """Why nothing is reused; "" while something is."""
        return self.stopped or self._too_few

    @property
    def stands_aside(self) -> str:
        """Why hardly any document is looked up at the moment; "" when all are."""
        if self.balance.pays:
            return ""
        return (
            f"near reuse costs more than it saves: {self.balance.spent:.3g} seconds for {self.balance.saved:.3g} of "
            "the latest documents; a few are still looked up, and it goes on when it pays"
        )

    def state(self) -> dict[str, Any]:
        """What audits found, for JSON."""
        return {"audits": self.audits.state(), "stopped": self.stopped}

    def forget(self) -> None:
        """Rows have other numbers now: the entries are taken from the bank again."""
        self._memory, self._too_few = None, ""

    @property
    def place(self) -> torch.device | None:
        """The device whose memory holds the entries, and where they are looked up; None for the host."""
        return self._place

    @place.setter
    def place(self, place: torch.device | None) -> None:
        if place != self._place:
            self._place, self._memory = place, None

    def refresh(self) -> NeighborIndex | None:
        """The entries to find neighbours among: those that the calibration looked its documents up among.

        None where fewer are left than a result is made of, because they were evicted, purged or damaged: what was
        calibrated says nothing of results that are made of fewer, so near reuse is off then, and `off` says why.

        With others neither the measured hits nor the bound would hold: later ones may be of another kind, which the
        predictor has never seen, and a sample that was given was looked up without itself. They take part from the
        next calibration on, which is made when the bank has doubled.
        """
        if self._memory is None and not self._too_few:
            self._rows, entries = entries_of(self._bank, self.scope, answering=self.fitted.answering)
            if len(self._rows) < NEIGHBOURS:
                self._too_few = (
                    f"{len(self._rows)} entries are left of those that it was calibrated on, and a near match is made "
                    f"of {NEIGHBOURS}; calibrate again"
                )
                log.warning("near reuse is off: %s", self._too_few)
                return None
            predictor, known = self.fitted.predictor, None
            if self.distilled is not None:
                known = self.distilled.predictions(self._bank, self._rows, half(entries.features), predictor)
            self._memory = self._remembered(entries, known)
            self._divergent = self._bank.divergent(WORST)
        return self._memory

    def _remembered(self, entries: Entries, known: NDArray[np.float32] | None) -> NeighborIndex:
        predictor, voting = self.fitted.predictor, self.calibration.voting
        if self._place is not None:
            dtype = dtype_of(self._bank.facts)
            try:
                return DeviceMemory(entries, predictor, voting, self._place, predictions=known, dtype=dtype)
            except (ConfigError, RuntimeError) as error:  # out of memory is one, and a cache is never in the way
                log.warning(
                    "near reuse cannot hold %s entries in memory of %s: %s. Going on with them on the host",
                    f"{len(entries):,}", self._place, str(error).splitlines()[0],
                )  # fmt: skip
        return HostNeighborIndex(entries, predictor, voting, predictions=known)

    def select_for_lookup(self, n: int) -> NDArray[np.int64]:
        """Which of n documents to look up, int64, in order: all, a few while it does not pay, none while it is off."""
        self._refit()
        if not self.stopped and n:
            self.refresh()  # says whether there are entries at all
        return np.zeros(0, np.int64) if self.off else self.balance.select_for_lookup(n)

    def look_up(
        self,
        features: NDArray[np.float32] | torch.Tensor,
        tokens: Sequence[NDArray[np.int32]],
        texts: Sequence[str],
    ) -> NearMatches:
        """Near matches of some documents of the calibrated scope, and what decided on each.

        features: raw, [n, width], as the bank's. texts: the original ones, without their prompt, for the guard.
        """
        memory = self.refresh()
        if memory is None or not len(tokens):
            return no_neighbours(len(tokens), self._bank.facts.width)
        found = memory.match(features, tokens, self._judge.scores)
        closest = found.similarities[:, 0]
        score = safety(found.evidence)
        gate = np.where(np.isfinite(score), np.where(score >= self.audits.threshold, TAKEN, LOW), ALONE).astype(np.int8)
        rows, similarity = self._rows[found.neighbours[:, 0]], closest.copy()
        kinds: list[str | None] = [None] * len(rows)
        passed = np.flatnonzero(gate == TAKEN)
        if self._guard is not None and len(passed):
            neighbours, similarities = self._rows[found.neighbours[passed]], found.similarities[passed]
            mine = self._digests([texts[i] for i in passed.tolist()])
            place, differing = self._sharing(mine, neighbours, similarities, self._guard)
            each = np.arange(len(passed))
            rows[passed], similarity[passed] = neighbours[each, place], similarities[each, place]
            for i, kind in zip(passed.tolist(), differing.tolist(), strict=True):
                if kind >= 0:
                    gate[i], kinds[i] = GUARDED, guard.KINDS[kind]
            refused = np.flatnonzero(differing >= 0)
            unread = self._digests.unread(self._bank.marks(neighbours[refused, 0]))
            for i in passed[refused[unread]].tolist():
                kinds[i] = UNREAD
        gate[(gate == TAKEN) & np.isin(rows, self._divergent)] = QUARANTINED
        consensus = found.evidence[:, _CONSENSUS]
        return NearMatches(found.results, rows, similarity, consensus, score, gate, kinds, closest)

    def _sharing(
        self,
        mine: NDArray[np.uint64],
        neighbours: NDArray[np.int64],
        similarities: NDArray[np.float32],
        rules: guard.FieldGuard,
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """See `guard.Rules.sharing`; the other neighbours' fields are read only where those of the nearest differ."""
        first = self._fields_of(neighbours[:, 0])
        place, kind = np.zeros(len(mine), np.int64), rules.unequal(mine, first)
        open_ = np.flatnonzero(kind >= 0)
        if len(open_):
            eligible = eligible_sources(similarities[open_], self.calibration.voting.temperature)
            some = neighbours[open_]
            theirs = np.broadcast_to(first[open_][:, None], (*some.shape, first.shape[1])).copy()
            theirs[eligible] = self._fields_of(some[eligible])
            place[open_], kind[open_] = rules.sharing(mine[open_], theirs, eligible)
        return place, kind

    def _fields_of(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Digests of the fields of some entries, uint64 [n, kinds]."""
        return self._digests.of(self._bank.marks(rows))

    def neighbours(
        self, features: NDArray[np.float32], tokens: Sequence[NDArray[np.int32]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows int64 [n, k] of the nearest entries and their similarities, nearest first; k is 0 without entries."""
        memory = self.refresh()
        if memory is None:
            return np.zeros((len(tokens), 0), np.int64), np.zeros((len(tokens), 0), np.float32)
        places, similarity = memory.nearest(features, tokens)
        return self._rows[places], similarity

    def watch(self, similarity: NDArray[np.float32]) -> None:
        """Take note of how near live documents are to the entries: whether they are like the calibration sample."""
        if self._traffic is None or self.shifted:
            return
        self._traffic.observe(similarity)
        if self._traffic.raised:
            self.shifted, self.audits.shifted = self._traffic.reason(), True
            log.warning("the traffic has changed since it was calibrated: %s; more hits are audited", self.shifted)

    def chosen_for_audit(self, near: NearMatches) -> NDArray[np.bool_]:
        """Which hits are to be recomputed: drawn by chance, more than usual while something speaks against them and
        there is time for it, and all that are in quarantine; bool [n].
        """
        more = self._audit_seconds <= self._config.audit_time * self._saved_seconds
        drawn = self._random.random(len(near.gate)) < (self.audits.share_now if more else self.audits.share)
        return np.asarray((drawn & (near.gate == TAKEN)) | (near.gate == QUARANTINED), np.bool_)

    def audit(
        self, asked: int, near: NearMatches, again: NDArray[np.bool_], computed: NDArray[np.float32]
    ) -> NDArray[Any]:
        """Take note of documents asked, of what was found for them, and of those that were computed after all.

        again: bool, which of `near` were computed; computed: their outputs. Returns their drift, float64. From when it
        is certain that the budget is exceeded the next stricter threshold is used, or none.
        """
        drift = np.zeros(0)
        if len(computed):
            drift = np.clip(np.nan_to_num(self._judge.drift(computed, near.on_host(again)), nan=1.0), 0, 1)
            rows = near.rows[again]
            self._bank.audit(rows, drift.astype(np.float32))
            self._divergent = np.union1d(np.setdiff1d(self._divergent, rows), rows[drift > WORST])
        drawn = near.gate[again] == TAKEN  # those in quarantine were not drawn: they say nothing about the others
        found = self.audits.observe(
            asked, near.score[near.gate == TAKEN], near.score[again][drawn], np.asarray(drift)[drawn]
        )
        self.changed |= bool(len(drift))
        if found and not self.stopped:
            self._tighten(found)
        return drift

    def _tighten(self, reason: str) -> None:
        if self.audits.level < len(self.audits.thresholds):
            log.warning("near reuse is stricter from now on: %s", reason)
            return
        self.stopped = f"{reason}; calibrate again"
        log.warning("near reuse is off: %s", self.stopped)

    def paid(self, looked_up: int, given: int, spent: float, audited: int) -> tuple[float, float]:
        """Take note of what some documents have cost and saved, in seconds of the model on this machine.

        given, audited: tokens of the documents that were answered, and of those that are computed to audit them. spent:
        seconds of the look-up. Returns the seconds saved and those of audits; 0 until the pace of the model is known,
        then also those from before.
        """
        self._unpriced += given, audited
        if self.balance.documents + looked_up >= LEAST:
            self.pace.measure()
        saved, audits = (self.pace.seconds(int(tokens)) for tokens in self._unpriced)
        if self.pace.known:
            self._unpriced[:] = 0
        self._saved_seconds, self._audit_seconds = self._saved_seconds + saved, self._audit_seconds + audits
        if self.balance.observe(looked_up, saved, spent + audits):
            log.warning("%s", self.stands_aside or "near reuse pays again: all documents are looked up")
        return saved, audits

    # -- learning again -------------------------------------------------------------------------------------

    def _refit(self) -> None:
        """Once the cache has doubled, calibrate again in the background, and go on with that when it is there."""
        if self._refitting is None:
            if self._config.recalibrate and grown(self.calibration, len(self._bank)):
                mine = self._bank.in_scope(self.scope)
                if grown(self.calibration, len(mine)):
                    rows, entries = entries_of(self._bank, self.scope)
                    read, answering = self._fields_of(rows), answering_keys(self._bank, rows)
                    self._refitting = Refitting(entries, read, self.calibration, self.fitted, len(mine), answering)
            return
        if (found := self._refitting.result()) is None:
            return
        self._refitting = None
        calibration, fitted = found
        log.info("near reuse was calibrated again on %d entries: %s", calibration.entries, calibration.reason)
        self.distilled = None  # of the predictor before
        self._begin(calibration, fitted)
        self.changed = True

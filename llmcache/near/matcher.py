"""Calibrated near reuse of one bank: answer documents with the corrected outputs of their neighbours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.banks.break_even import LEAST, BreakEven
from llmcache.banks.device_cache import dtype_of
from llmcache.banks.pace import Pace
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.format.rows import Rows
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
from llmcache.near.neighbors.sides import exchanged, token_bags

log = logging.getLogger("llmcache")

_CONSENSUS = EVIDENCE.index("consensus")

UNREAD = "fields that are not stored with the entry under the rules in use"
"""Guard result for an entry that was stored without field digests, or with digests of other guard rules."""
SIDES = "the order of their sides"
"""Guard result for a pair of texts that would be answered by a pair whose sides are exchanged."""
_BEFORE_SCOPES = "it was calibrated before entries stored their role and prompt; calibrate again"
Decode = Callable[[Sequence[NDArray[np.int32]]], list[str]]
"""Type of a function that turns token ids of documents back into texts."""


class NearMatcher:
    """Near reuse of one bank under its calibration.

    Documents are answered from their nearest entries, within the calibrated drift budget. Audits recompute a share of
    the hits and tighten the threshold when the budget is exceeded.

    Near reuse is off when calibration found no safe threshold, or when audits showed that the budget is exceeded at
    every stricter threshold too. It stands aside (looks up only a few documents) while it costs more than it saves.
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
        pairs: bool = False,
    ) -> None:
        """Prepare near reuse; entries are read at the first look-up.

        fields: computes field digests of texts and entries, for the guard.
        kept: a saved `state` to resume from.
        drift: the user's drift function, required when the calibration was made with one.
        distilled: stored predictions for the entries; None to predict them on each opening.
        pairs: True if the documents are pairs of texts; matches whose sides are exchanged are then refused.
        """
        self._bank, self._digests, self._config, self._own = bank, fields, config, drift
        self.distilled, self._pairs = distilled, pairs
        self.balance, self.pace = BreakEven(), Pace()
        self._unpriced = np.zeros(2, np.int64)  # tokens of hits and of audits until the pace of the model is known
        self.changed = False
        """True when there is something to save: audit results or a new calibration."""
        self._refitting: Refitting | None = None
        self._random = np.random.default_rng()
        self._audit_seconds = self._saved_seconds = 0.0
        self._place: torch.device | None = None
        self._begin(calibration, fitted)
        self.foreign = 0
        """Number of documents of other scopes in this opening. They were not looked up."""
        if kept and self.scope != UNKNOWN:
            self.audits.restore(kept["audits"])
            self.stopped = str(kept["stopped"])

    def _begin(self, calibration: Calibration, fitted: FittedModels) -> None:
        self.calibration, self.fitted = calibration, fitted
        self._memory: NeighborIndex | None = None
        self._bags = np.zeros(0, np.uint64)  # of the entries, where the documents are pairs
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
        """Description of a shift of the traffic away from the calibration sample; "" while there is none."""
        self.stopped = calibration.reason if calibration.threshold is None else ""
        if self.scope == UNKNOWN:
            self.stopped = _BEFORE_SCOPES

    @property
    def scope(self) -> int:
        """The calibrated scope. Only its entries answer, and only its documents are looked up."""
        return int(self.calibration.scope or "0", 16)

    @property
    def off(self) -> str:
        """The reason why near reuse is off; "" while it is on."""
        return self.stopped or self._too_few

    @property
    def stands_aside(self) -> str:
        """The reason why only a few documents are looked up at the moment; "" when all are."""
        if self.balance.pays:
            return ""
        return (
            f"near reuse costs more than it saves: it took {self.balance.spent:.3g} seconds and saved "
            f"{self.balance.saved:.3g} on the latest documents; a few are still looked up, and it resumes when it pays"
        )

    def state(self) -> dict[str, Any]:
        """Return the audit results as JSON values, for the `kept` argument."""
        return {"audits": self.audits.state(), "stopped": self.stopped}

    def forget(self) -> None:
        """Drop the loaded entries, because row numbers have changed. The next look-up reads them from the bank."""
        self._memory, self._too_few = None, ""

    @property
    def place(self) -> torch.device | None:
        """The device that holds the entries and searches them; None for the host."""
        return self._place

    @place.setter
    def place(self, place: torch.device | None) -> None:
        if place != self._place:
            self._place, self._memory = place, None

    def refresh(self) -> NeighborIndex | None:
        """Load the entries to search, if they are not loaded yet: those that the calibration searched.

        Later entries do not answer, since neither the measured hits nor the bound would hold: they may be of a kind
        that the predictor has never seen. The documents of a calibration sample were looked up without each other, so
        they do not answer either. All of them take part from the next calibration on, which runs when the bank has
        doubled.

        Returns None, and sets the reason in `off`, when fewer than `NEIGHBOURS` entries are left (evicted, purged or
        damaged): the calibration does not cover results made of fewer neighbours.
        """
        if self._memory is None and not self._too_few:
            self._rows, entries = entries_of(self._bank, self.scope, answering=self.fitted.answering)
            if len(self._rows) < NEIGHBOURS:
                self._too_few = (
                    f"{len(self._rows)} entries are left of those calibrated, and a near match needs {NEIGHBOURS}; "
                    "calibrate again"
                )
                log.warning("near reuse is off: %s", self._too_few)
                return None
            predictor, predictions = self.fitted.predictor, None
            if self.distilled is not None:
                predictions = self.distilled.predictions(self._bank, self._rows, half(entries.features), predictor)
            self._memory = self._build_index(entries, predictions)
            if self._pairs:
                self._bags = token_bags(entries.tokens)
            self._divergent = self._bank.divergent(WORST)
        return self._memory

    def _build_index(self, entries: Entries, predictions: Floats32 | None) -> NeighborIndex:
        predictor, voting = self.fitted.predictor, self.calibration.voting
        if self._place is not None:
            dtype = dtype_of(self._bank.facts)
            try:
                return DeviceMemory(entries, predictor, voting, self._place, predictions=predictions, dtype=dtype)
            except (ConfigError, RuntimeError) as error:  # e.g. out of memory: a cache must not stop the call
                log.warning(
                    "near reuse cannot hold %s entries in the memory of %s: %s; continuing on the host",
                    f"{len(entries):,}", self._place, str(error).splitlines()[0],
                )  # fmt: skip
        return HostNeighborIndex(entries, predictor, voting, predictions=predictions)

    def select_for_lookup(self, n: int) -> NDArray[np.int64]:
        """Choose the documents to look up, out of n.

        Returns their positions, int64, ascending: all, a few while near reuse does not pay, none while it is off.
        """
        self._refit()
        if not self.stopped and n:
            self.refresh()  # turns near reuse off when too few entries are left
        return np.zeros(0, np.int64) if self.off else self.balance.select_for_lookup(n)

    def look_up(
        self,
        features: Floats32 | torch.Tensor,
        tokens: Sequence[NDArray[np.int32]],
        texts: Sequence[str],
    ) -> NearMatches:
        """Find near matches for documents of the calibrated scope, and apply every gate.

        features: unrounded, [n, width], of the bank's feature kind. tokens: ids of each document.
        texts: the original texts, without their prompt, for the guard.
        """
        index = self.refresh()
        if index is None or not len(tokens):
            return no_neighbours(len(tokens), self._bank.facts.width)
        matches = index.match(features, tokens, self._judge.scores)
        closest = matches.similarities[:, 0]
        score = safety(matches.evidence)
        gate = np.where(np.isfinite(score), np.where(score >= self.audits.threshold, TAKEN, LOW), ALONE).astype(np.int8)
        rows, similarity = self._rows[matches.neighbours[:, 0]], closest.copy()
        kinds: list[str | None] = [None] * len(rows)
        passed = np.flatnonzero(gate == TAKEN)
        if self._pairs and len(passed):
            eligible = eligible_sources(matches.similarities[passed], self.calibration.voting.temperature)
            neighbours, pairs = self._rows[matches.neighbours[passed]], [tokens[i] for i in passed.tolist()]
            wrong = exchanged(pairs, neighbours, eligible, self._bank.tokens_of)
            wrong |= np.isin(token_bags(pairs), self._bags)
            for i in passed[wrong].tolist():
                gate[i], kinds[i] = GUARDED, SIDES
            passed = passed[~wrong]
        if self._guard is not None and len(passed):
            neighbours, similarities = self._rows[matches.neighbours[passed]], matches.similarities[passed]
            query_digests = self._digests([texts[i] for i in passed.tolist()])
            source, differing = self._same_fields(query_digests, neighbours, similarities, self._guard)
            each = np.arange(len(passed))
            rows[passed], similarity[passed] = neighbours[each, source], similarities[each, source]
            for i, kind in zip(passed.tolist(), differing.tolist(), strict=True):
                if kind >= 0:
                    gate[i], kinds[i] = GUARDED, guard.KINDS[kind]
            refused = np.flatnonzero(differing >= 0)
            unread = self._digests.unread(self._bank.marks(neighbours[refused, 0]))
            for i in passed[refused[unread]].tolist():
                kinds[i] = UNREAD
        gate[(gate == TAKEN) & np.isin(rows, self._divergent)] = QUARANTINED
        consensus = matches.evidence[:, _CONSENSUS]
        return NearMatches(matches.results, rows, similarity, consensus, score, gate, kinds, closest)

    def _same_fields(
        self, query_digests: NDArray[np.uint64], neighbours: Rows, similarities: Floats32, rules: guard.FieldGuard
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Like `guard.FieldGuard.sharing`, but read further neighbours only where the nearest one differs."""
        nearest_digests = self._fields_of(neighbours[:, 0])
        source, kind = np.zeros(len(query_digests), np.int64), rules.unequal(query_digests, nearest_digests)
        open_ = np.flatnonzero(kind >= 0)
        if len(open_):
            eligible = eligible_sources(similarities[open_], self.calibration.voting.temperature)
            candidates = neighbours[open_]
            shape = (*candidates.shape, nearest_digests.shape[1])
            digests = np.broadcast_to(nearest_digests[open_][:, None], shape).copy()
            digests[eligible] = self._fields_of(candidates[eligible])
            source[open_], kind[open_] = rules.sharing(query_digests[open_], digests, eligible)
        return source, kind

    def _fields_of(self, rows: Rows) -> NDArray[np.uint64]:
        """Return the field digests of entries, uint64 [n, kinds]."""
        return self._digests.of(self._bank.marks(rows))

    def neighbours(self, features: Floats32, tokens: Sequence[NDArray[np.int32]]) -> tuple[Rows, Floats32]:
        """Return the nearest entries of each document and their similarities, nearest first.

        The result is rows, int64 [n, k], and similarities, float32 [n, k]; k is 0 while there are too few entries.
        """
        index = self.refresh()
        if index is None:
            return np.zeros((len(tokens), 0), np.int64), np.zeros((len(tokens), 0), np.float32)
        places, similarity = index.nearest(features, tokens)
        return self._rows[places], similarity

    def watch(self, similarity: Floats32) -> None:
        """Record similarities of live documents to their nearest entries, and raise auditing if the traffic shifts."""
        if self._traffic is None or self.shifted:
            return
        self._traffic.observe(similarity)
        if self._traffic.raised:
            self.shifted, self.audits.shifted = self._traffic.reason(), True
            log.warning("the traffic has changed since calibration: %s; more hits are audited", self.shifted)

    def chosen_for_audit(self, near: NearMatches) -> NDArray[np.bool_]:
        """Draw the hits to recompute; bool [n].

        Hits are drawn at random, with the raised share while there is evidence of drift and audits have time left.
        Matches in quarantine are always recomputed.
        """
        has_time = self._audit_seconds <= self._config.audit_time * self._saved_seconds
        drawn = self._random.random(len(near.gate)) < (self.audits.share_now if has_time else self.audits.share)
        return np.asarray((drawn & (near.gate == TAKEN)) | (near.gate == QUARANTINED), np.bool_)

    def audit(self, asked: int, near: NearMatches, again: NDArray[np.bool_], computed: Floats32) -> NDArray[Any]:
        """Record audit results, and tighten the threshold when the budget is certainly exceeded.

        asked: number of documents looked up. near: their matches. again: bool [n], the matches that were recomputed.
        computed: outputs of those, [audited, out].
        Returns their drift, float64 [audited]. After the strictest threshold near reuse is off.
        """
        drift = np.zeros(0)
        if len(computed):
            drift = np.clip(np.nan_to_num(self._judge.drift(computed, near.on_host(again)), nan=1.0), 0, 1)
            rows = near.rows[again]
            self._bank.audit(rows, drift.astype(np.float32))
            self._divergent = np.union1d(np.setdiff1d(self._divergent, rows), rows[drift > WORST])
        drawn = near.gate[again] == TAKEN  # matches in quarantine are no random sample of the hits
        reason = self.audits.observe(
            asked, near.score[near.gate == TAKEN], near.score[again][drawn], np.asarray(drift)[drawn]
        )
        self.changed |= bool(len(drift))
        if reason and not self.stopped:
            self._tighten(reason)
        return drift

    def _tighten(self, reason: str) -> None:
        if self.audits.level < len(self.audits.thresholds):
            log.warning("near reuse is stricter from now on: %s", reason)
            return
        self.stopped = f"{reason}; calibrate again"
        log.warning("near reuse is off: %s", self.stopped)

    def paid(self, looked_up: int, given: int, spent: float, audited: int) -> tuple[float, float]:
        """Record cost and savings of near reuse, in seconds of the model on this machine.

        looked_up: number of documents. given: tokens of the documents answered. audited: tokens of the documents
        recomputed for audits. spent: seconds of the look-up.
        Returns seconds saved and seconds of audits. Both are 0 until the pace of the model is known; then they include
        the earlier documents.
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

    # -- recalibration --------------------------------------------------------------------------------------

    def _refit(self) -> None:
        """Recalibrate in a background thread once the cache has doubled, and switch to the result when it is ready."""
        if self._refitting is None:
            if self._config.recalibrate and grown(self.calibration, len(self._bank)):
                in_scope = self._bank.in_scope(self.scope)
                if grown(self.calibration, len(in_scope)):
                    rows, entries = entries_of(self._bank, self.scope)
                    digests, answering = self._fields_of(rows), answering_keys(self._bank, rows)
                    self._refitting = Refitting(
                        entries, digests, self.calibration, self.fitted, len(in_scope), answering, self._pairs
                    )
            return
        if (result := self._refitting.result()) is None:
            return
        self._refitting = None
        calibration, fitted = result
        log.info("near reuse was calibrated again on %d entries: %s", calibration.entries, calibration.reason)
        self.distilled = None  # stored predictions are of the previous predictor
        self._begin(calibration, fitted)
        self.changed = True

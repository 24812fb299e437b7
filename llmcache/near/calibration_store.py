"""Calibrated near reuse of a cache: learnt from its entries, saved with its store, and made again from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.store import Store
from llmcache.near import fitted_models as fitting
from llmcache.near.calibration.calibrate import Calibration, FittedModels, calibrated
from llmcache.near.calibration.drift import Drift
from llmcache.near.calibration.head_fitting import Truth
from llmcache.near.marks import FieldDigests
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.bank_entries import answering_keys, entries_of
from llmcache.near.neighbors.index import Entries
from llmcache.near.neighbors.prediction_bank import Distilled
from llmcache.near.neighbors.predictor import LEAST
from llmcache.near.status import SETTING, calibrations_of, unreadable

log = logging.getLogger("llmcache")


_VERSION = 16  # digits of a key that name a version


class CalibrationStore:
    """What is calibrated for a bank. The choice is among the settings of its namespace, what was fitted in a bank."""

    def __init__(
        self,
        store: Store,
        namespace: str,
        config: CacheConfig,
        name: str,
        bank: Bank,
        fields: FieldDigests,
        drift: Drift | None = None,
    ) -> None:
        """name, bank: of the outputs. fields: digests of texts and entries, for the guard. drift: the user's own
        function.
        """
        self._store, self._namespace, self._config, self._bank = store, namespace, config, bank
        self._fields, self._drift = fields, drift
        self._setting = SETTING if name == "output" else f"{SETTING}-{name}"

    def saved(self) -> NearMatcher | None:
        """Near reuse as it was calibrated; None where it was not, or what was fitted is gone."""
        raw = self._saved().get(self._setting, {})
        if not raw:
            return None
        raw = dict(raw)
        try:
            if field := unreadable(raw):
                raise ConfigError(f"{field!r} of its calibration cannot be read; calibrate again")
            place, kept = raw.pop("fitted"), raw.pop("kept", None)
            found, fitted = Calibration.from_json(raw), fitting.get(self._fitted(), place)
            self._check(fitted)
            distilled = self._distilled(place)
            return NearMatcher(self._bank, found, fitted, self._fields, self._config, kept, self._drift, distilled)
        except ConfigError as error:
            log.warning("near reuse is off: %s", error)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            log.warning("near reuse is off: its calibration cannot be read (%r); calibrate again", error)
        return None

    def _check(self, fitted: FittedModels) -> None:
        """ConfigError when the predictor does not take this bank's features, or gives other outputs than its rows."""
        facts = self._bank.facts
        given = fitted.predictor(np.zeros((1, facts.feature_width), np.float32))
        if given.shape != (1, facts.width) or not len(fitted.predictor.fingerprints(given)):
            raise ConfigError(f"what was fitted gives {given.shape[-1]} numbers, outputs have {facts.width}")
        if fitted.boundary is not None and fitted.boundary.weights.shape[1] != facts.width:
            raise ConfigError(
                f"the head of its calibration takes {fitted.boundary.weights.shape[1]} numbers, outputs have "
                f"{facts.width}; calibrate again"
            )

    @property
    def pattern(self) -> str:
        """The regular expression for the user's own fields that a calibration was saved with; "" for none."""
        pattern = self._saved().get(self._setting, {}).get("guard_pattern", "")
        return pattern if isinstance(pattern, str) else ""

    def calibrate(
        self,
        known: NDArray[np.int64] | None,
        scope: int,
        *,
        commit: Callable[[], object],
        truth: tuple[NDArray[np.int64], Truth] | None = None,
        **settings: Any,
    ) -> Calibration:
        """Choose a threshold and save it, see `LLMCache.calibrate`.

        known: rows of the bank that answer, now and afterwards; the others are the sample. None: all of them are both.
        scope: only entries of this one take part, and answer afterwards. truth: rows of the sample and the right
        answers to them; where all of the sample is known, these rows alone answer. settings: of
        `calibrating.calibrated`.
        """
        live = self._bank.in_scope(scope)
        if len(live) < 2 * LEAST and len(self._bank) >= 2 * LEAST:
            if unknown := len(self._bank.in_scope(UNKNOWN)):
                raise ConfigError(
                    f"{unknown} of the {len(self._bank)} entries do not say for which role and prompt they are, as "
                    "older versions stored them, and answer no near match; store the documents in a fresh namespace"
                )
            raise ConfigError(
                f"{len(live)} of the {len(self._bank)} entries are for this role and prompt, which are too few; give "
                f"the role= and prompt= that the others are for, or warm the store with at least {2 * LEAST} documents"
            )
        answers: dict[int, Any] = {} if truth is None else dict(zip(truth[0].tolist(), truth[1].tolist(), strict=True))
        asked = np.setdiff1d(live, live if known is None else known)
        if known is not None and not len(asked):
            if not answers:
                raise ConfigError("every document of the sample is in the cache; give documents that it does not know")
            known = None
        rows, entries = entries_of(
            self._bank, scope, among=np.array(list(answers)) if answers and known is None else known
        )
        sample: Entries | None = None
        if known is not None:
            asked, sample = entries_of(self._bank, scope, among=asked)
        read, sample_read = (self._fields.of(self._bank.marks(some)) for some in (rows, asked))
        right = np.array([answers[row] for row in (rows if sample is None else asked).tolist()]) if answers else None
        found, fitted = calibrated(entries, read, sample, sample_read, truth=right, **settings)
        found = replace(found, size=len(live), scope=f"{scope:016x}")
        fitted = replace(fitted, answering=answering_keys(self._bank, rows))
        place = self.save(found, fitted, None, commit)
        if found.threshold is not None:  # stored now, so that no opening has to predict for all entries
            self._distilled(place).predictions(self._bank, rows, half(entries.features), fitted.predictor)
            commit()
        return found

    def save(
        self, found: Calibration, fitted: FittedModels, kept: Mapping[str, Any] | None, commit: Callable[[], object]
    ) -> Mapping[str, Any]:
        """Write a calibration with the settings of the namespace; returns where its numbers are.

        kept: what audits have found since.
        """
        place = fitting.put(self._fitted(), fitted)
        commit()
        self._declare({**found.to_json(), "fitted": place, **({"kept": kept} if kept else {})})
        self._distilled(place).drop_others([one["fitted"]["key"][:_VERSION] for one in self._saved().values()])
        return place

    def keep(self, reuse: NearMatcher, commit: Callable[[], object]) -> None:
        """Save what has changed in near reuse while it ran: what audits have found, or a newer calibration.

        What somebody else has calibrated meanwhile stands.
        """
        if not reuse.changed or not self._store.writable:
            return
        reuse.changed = False
        raw = self._saved().get(self._setting, {})
        calibration = reuse.calibration.to_json()
        if all(raw.get(name) == calibration[name] for name in ("threshold", "entries", "budget")):
            self._declare({**raw, "kept": reuse.state()})
        elif raw.get("size", 0) <= reuse.calibration.size:
            place = self.save(reuse.calibration, reuse.fitted, reuse.state(), commit)
            reuse.distilled = self._distilled(place)

    def _saved(self) -> dict[str, dict[str, Any]]:
        space = self._store.namespace(self._namespace)
        return calibrations_of(space.config) if space else {}

    def _declare(self, calibration: Mapping[str, Any]) -> None:
        space = self._store.namespace(self._namespace)
        assert space is not None
        self._store.declare(self._namespace, space.identity, {**space.config, self._setting: calibration})

    def _distilled(self, place: Mapping[str, Any]) -> Distilled:
        # under a budget entries are worth more than what can be predicted from them
        return Distilled(self._store, self._namespace, place["key"][:_VERSION], self._config.max_bytes is None)

    def _fitted(self) -> Bank:
        return self._store.bank(self._namespace, fitting.BANK, lambda: fitting.FACTS, self._config.near)

"""Calibrate near reuse on the entries of a cache, save the calibration in its store, and load it from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.store import Store
from llmcache.model.identity import CLASS
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

_VERSION = 16  # hexadecimal digits of the key of the fitted models that name the version of a predictor


class CalibrationStore:
    """The stored calibration of one bank.

    The threshold and measurements are in the settings of the namespace, the fitted models in a bank of their own.
    """

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
        """Refer to the calibration of a bank without reading it.

        name, bank: of the outputs. fields: computes field digests of texts and entries, for the guard.
        drift: the user's drift function; None without one.
        """
        self._store, self._namespace, self._config, self._bank = store, namespace, config, bank
        self._fields, self._drift = fields, drift
        self._setting = SETTING if name == "output" else f"{SETTING}-{name}"
        space = store.namespace(namespace)
        # heads of a CrossEncoder read single texts
        self._pairs = name == "output" and space is not None and _scores_pairs(space.identity)

    def saved(self) -> NearMatcher | None:
        """Load near reuse with the saved calibration. Returns None without one, and logs why if it is unreadable."""
        raw = self._saved().get(self._setting, {})
        if not raw:
            return None
        raw = dict(raw)
        try:
            if field := unreadable(raw):
                raise ConfigError(f"{field!r} of its calibration cannot be read; calibrate again")
            place, audits = raw.pop("fitted"), raw.pop("kept", None)
            calibration, fitted = Calibration.from_json(raw), fitting.get(self._fitted(), place)
            self._check(fitted)
            return NearMatcher(
                self._bank, calibration, fitted, self._fields, self._config, audits, self._drift,
                self._distilled(place), self._pairs,
            )  # fmt: skip
        except ConfigError as error:
            log.warning("near reuse is off: %s", error)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            log.warning("near reuse is off: its calibration cannot be read (%r); calibrate again", error)
        return None

    def _check(self, fitted: FittedModels) -> None:
        """Check the fitted models. ConfigError when they do not fit the features or outputs of this bank."""
        facts = self._bank.facts
        predicted = fitted.predictor(np.zeros((1, facts.feature_width), np.float32))
        if predicted.shape != (1, facts.width) or not len(fitted.predictor.fingerprints(predicted)):
            raise ConfigError(
                f"its predictor gives {predicted.shape[-1]} numbers, but outputs have {facts.width}; calibrate again"
            )
        if fitted.boundary is not None and fitted.boundary.weights.shape[1] != facts.width:
            raise ConfigError(
                f"the head of its calibration takes {fitted.boundary.weights.shape[1]} numbers, but outputs have "
                f"{facts.width}; calibrate again"
            )

    @property
    def pattern(self) -> str:
        """Regular expression for the user's own fields, saved with the calibration; "" for none."""
        pattern = self._saved().get(self._setting, {}).get("guard_pattern", "")
        return pattern if isinstance(pattern, str) else ""

    def calibrate(
        self,
        known: Rows | None,
        scope: int,
        *,
        commit: Callable[[], object],
        truth: tuple[Rows, Truth] | None = None,
        **settings: Any,
    ) -> Calibration:
        """Choose a threshold and save it; see `LLMCache.calibrate`.

        known: rows of the bank that answer; all other rows are the sample. None: all rows are both (cross-fitting).
        scope: only entries of this scope take part, and answer later.
        commit: commits the store.
        truth: rows of the sample and their correct labels. When the whole sample is already in the cache, only these
            rows answer.
        settings: of `calibrate.calibrated`.
        ConfigError when there are too few entries in this scope, or settings cannot work.
        """
        live = self._bank.in_scope(scope)
        if len(live) < 2 * LEAST and len(self._bank) >= 2 * LEAST:
            if unknown := len(self._bank.in_scope(UNKNOWN)):
                raise ConfigError(
                    f"{unknown} of the {len(self._bank)} entries were stored without role and prompt, by older "
                    "versions, and answer no near match; store the documents in a new namespace"
                )
            raise ConfigError(
                f"{len(live)} of the {len(self._bank)} entries have this role and prompt, which are too few; give the "
                f"role= and prompt= of the others, or warm the store with at least {2 * LEAST} documents"
            )
        labels: dict[int, Any] = {} if truth is None else dict(zip(truth[0].tolist(), truth[1].tolist(), strict=True))
        sample_rows = np.setdiff1d(live, live if known is None else known)
        if known is not None and not len(sample_rows):
            if not labels:
                raise ConfigError("every document of the sample is in the cache; give documents that are not")
            known = None
        rows, entries = entries_of(
            self._bank, scope, among=np.array(list(labels)) if labels and known is None else known
        )
        sample: Entries | None = None
        if known is not None:
            sample_rows, sample = entries_of(self._bank, scope, among=sample_rows)
        read, sample_read = (self._fields.of(self._bank.marks(each)) for each in (rows, sample_rows))
        labelled_rows = rows if sample is None else sample_rows
        correct = np.array([labels[row] for row in labelled_rows.tolist()]) if labels else None
        calibration, fitted = calibrated(
            entries, read, sample, sample_read, truth=correct, pairs=self._pairs, **settings
        )
        calibration = replace(calibration, size=len(live), scope=f"{scope:016x}")
        fitted = replace(fitted, answering=answering_keys(self._bank, rows))
        place = self.save(calibration, fitted, None, commit)
        if calibration.threshold is not None:  # store predictions now, so that no opening has to compute them
            self._distilled(place).predictions(self._bank, rows, half(entries.features), fitted.predictor)
            commit()
        return calibration

    def save(
        self, found: Calibration, fitted: FittedModels, kept: Mapping[str, Any] | None, commit: Callable[[], object]
    ) -> Mapping[str, Any]:
        """Write a calibration to the settings of the namespace, and its models to their bank.

        found: the calibration. kept: audit results since the calibration. commit: commits the store.
        Returns the reference to the models, see `fitted_models.put`.
        """
        place = fitting.put(self._fitted(), fitted)
        commit()
        self._declare({**found.to_json(), "fitted": place, **({"kept": kept} if kept else {})})
        self._distilled(place).drop_others([saved["fitted"]["key"][:_VERSION] for saved in self._saved().values()])
        return place

    def keep(self, reuse: NearMatcher, commit: Callable[[], object]) -> None:
        """Save changes of running near reuse: audit results, or a newer calibration.

        A calibration that another process has saved meanwhile is not overwritten.
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
        # under a byte budget the space is better used for entries, since predictions can be computed again
        return Distilled(self._store, self._namespace, place["key"][:_VERSION], self._config.max_bytes is None)

    def _fitted(self) -> Bank:
        return self._store.bank(self._namespace, fitting.BANK, lambda: fitting.FACTS, self._config.near)


def _scores_pairs(identity: Mapping[str, Any]) -> bool:
    """Return whether a namespace is of a CrossEncoder. identity: as stored, `Identity.to_json`."""
    return [CLASS, "CrossEncoder"] in [list(version) for version in identity.get("versions", ())]

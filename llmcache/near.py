"""Calibrated near reuse of a cache: learnt from its entries, saved with its store, and made again from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache import fitted as fitting
from llmcache.calibrating import Calibration, Fitted, Truth, calibrated
from llmcache.config import CacheConfig
from llmcache.crossfit import Entries
from llmcache.distilled import Distilled
from llmcache.drift import Drift
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.neighbours import half
from llmcache.indexes.store import Store
from llmcache.nearness import SETTING, calibrations_of
from llmcache.reuse import Decode, Reuse, answering_keys, entries_of

log = logging.getLogger("llmcache")


_VERSION = 16  # digits of a key that name a version


class NearReuse:
    """What is calibrated for a bank. The choice is among the settings of its namespace, what was fitted in a bank."""

    def __init__(
        self,
        store: Store,
        namespace: str,
        config: CacheConfig,
        name: str,
        bank: Bank,
        decode: Decode,
        drift: Drift | None = None,
    ) -> None:
        """name, bank: of the outputs. decode: token ids to texts, for the guard. drift: the user's own function."""
        self._store, self._namespace, self._config, self._bank = store, namespace, config, bank
        self._decode, self._drift = decode, drift
        self._setting = SETTING if name == "output" else f"{SETTING}-{name}"

    def saved(self) -> Reuse | None:
        """Near reuse as it was calibrated; None where it was not, or what was fitted is gone."""
        raw = self._saved().get(self._setting, {})
        if not raw:
            return None
        raw = dict(raw)
        try:
            place, kept = raw.pop("fitted"), raw.pop("kept", None)
            found, fitted = Calibration.from_json(raw), fitting.get(self._fitted(), place)
            distilled = self._distilled(place)
            return Reuse(self._bank, found, fitted, self._decode, self._config, kept, self._drift, distilled)
        except (ConfigError, KeyError) as error:
            log.warning("near reuse is off: %s", error)
            return None

    def calibrate(
        self,
        known: NDArray[np.int64] | None,
        *,
        commit: Callable[[], None],
        truth: tuple[NDArray[np.int64], Truth] | None = None,
        **settings: Any,
    ) -> Calibration:
        """Choose a threshold and save it, see `LLMCache.calibrate`.

        known: rows of the bank that answer, now and afterwards; the others are the sample. None: all of them are both.
        truth: rows of the sample and the right answers to them; where all of the sample is known, these rows alone
        answer. settings: of `calibrating.calibrated`.
        """
        live = self._bank.near.live()
        answers: dict[int, Any] = {} if truth is None else dict(zip(truth[0].tolist(), truth[1].tolist(), strict=True))
        asked = np.setdiff1d(live, live if known is None else known)
        if known is not None and not len(asked):
            if not answers:
                raise ConfigError("every document of the sample is in the cache; give documents that it does not know")
            known = None
        rows, entries = entries_of(self._bank, among=np.array(list(answers)) if answers and known is None else known)
        sample: Entries | None = None
        if known is not None:
            asked, sample = entries_of(self._bank, among=asked)
        of_sample = self._decode(sample.tokens) if sample is not None else []
        right = np.array([answers[row] for row in (rows if sample is None else asked).tolist()]) if answers else None
        found, fitted = calibrated(entries, self._decode(entries.tokens), sample, of_sample, truth=right, **settings)
        found = replace(found, size=len(live))
        fitted = replace(fitted, answering=answering_keys(self._bank, rows))
        place = self.save(found, fitted, None, commit)
        if found.threshold is not None:  # stored now, so that no opening has to predict for all entries
            self._distilled(place).predictions(self._bank, rows, half(entries.features), fitted.predictor)
            commit()
        return found

    def save(
        self, found: Calibration, fitted: Fitted, kept: Mapping[str, Any] | None, commit: Callable[[], None]
    ) -> Mapping[str, Any]:
        """Write a calibration with the settings of the namespace; returns where its numbers are.

        kept: what audits have found since.
        """
        place = fitting.put(self._fitted(), fitted)
        commit()
        self._declare({**found.to_json(), "fitted": place, **({"kept": kept} if kept else {})})
        self._distilled(place).drop_others([one["fitted"]["key"][:_VERSION] for one in self._saved().values()])
        return place

    def keep(self, reuse: Reuse, commit: Callable[[], None]) -> None:
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

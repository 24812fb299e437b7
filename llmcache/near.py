"""Calibrated near reuse of a cache: learnt from its entries, saved with its store, and made again from there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache import fitted as fitting
from llmcache.calibrating import Calibration, DriftKind, calibrated
from llmcache.config import CacheConfig
from llmcache.crossfit import Entries
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.store import Store
from llmcache.reuse import Decode, Reuse, entries_of

log = logging.getLogger("llmcache")

_SETTING = "calibration"  # of a namespace


class NearReuse:
    """What a namespace has calibrated. The choice is among its settings, what was fitted in a bank."""

    def __init__(self, store: Store, namespace: str, config: CacheConfig, bank: Bank, decode: Decode) -> None:
        """bank: of the outputs. decode: token ids back to texts, for the guard."""
        self._store, self._namespace, self._config, self._bank = store, namespace, config, bank
        self._decode = decode

    def saved(self) -> Reuse | None:
        """Near reuse as it was calibrated; None where it was not, or what was fitted is gone."""
        space = self._store.namespace(self._namespace)
        raw = dict(space.config.get(_SETTING) or {}) if space else {}
        if not raw:
            return None
        try:
            place = raw.pop("fitted")
            found = Calibration.from_json(raw)
            return Reuse(self._bank, found, fitting.get(self._fitted(), place), self._decode, self._config.audit_share)
        except (ConfigError, KeyError) as error:
            log.warning("near reuse is off: %s", error)
            return None

    def calibrate(
        self,
        known: NDArray[np.int64] | None,
        *,
        budget: float,
        drift: DriftKind,
        head: Any,
        limit: float | None,
        confidence: float | None,
        guarded: bool,
        commit: Callable[[], None],
    ) -> Calibration:
        """Choose a threshold and save it, see `LLMCache.calibrate`.

        known: rows of the bank that answer; the others are the sample. None: all of them are both.
        """
        rows, every = entries_of(self._bank)
        texts = self._decode(every.tokens)
        answer = np.arange(len(rows)) if known is None else np.flatnonzero(np.isin(rows, known))
        asked = np.setdiff1d(np.arange(len(rows)), answer)
        if known is not None and not len(asked):
            raise ConfigError("every document of the sample is in the cache; give documents that it does not know")
        sample: Entries | None = None if known is None else every.take(asked)
        found, fitted = calibrated(
            every.take(answer), [texts[i] for i in answer], sample, [texts[i] for i in asked], budget=budget,
            drift=drift, head=head, limit=limit, confidence=confidence, guarded=guarded,
        )  # fmt: skip
        place = fitting.put(self._fitted(), fitted)
        commit()
        space = self._store.namespace(self._namespace)
        assert space is not None
        settings = {**space.config, _SETTING: {**found.to_json(), "fitted": place}}
        self._store.declare(self._namespace, space.identity, settings)
        return found

    def _fitted(self) -> Bank:
        return self._store.bank(self._namespace, fitting.BANK, lambda: fitting.FACTS, self._config.near)

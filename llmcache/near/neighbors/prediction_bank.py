"""Predicted outputs of entries, stored in banks of the cache, so that opening a store need not compute them again.

Every predictor has its own bank, `distilled-<version>`. Its rows have the keys and sources of the entries, so purges
and merges apply to both. Missing predictions are computed when they are first needed.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.near.neighbors.index import rounded
from llmcache.near.neighbors.predictor import Predictor

PREFIX = "distilled-"


class Distilled:
    """Stored predictions of one predictor. version: identifies the predictor in the name of the bank."""

    def __init__(self, store: Store, namespace: str, version: str, kept: bool) -> None:
        """Refer to the bank without opening it. kept: write new predictions to the store."""
        self._store, self._namespace, self._kept = store, namespace, kept
        self._name = f"{PREFIX}{version}"

    def predictions(self, bank: Bank, rows: Rows, features: NDArray[np.float16], predictor: Predictor) -> Floats32:
        """Return predictions for rows of a bank of entries; read the stored ones, compute and store the others.

        rows: int64 [n], of `bank`. features: of these rows, [n, width].
        Returns float32 [n, out], rounded to float16.
        """
        width = len(predictor.offset)
        stored = self._bank(width)
        predictions, keys = np.zeros((len(rows), width), np.float32), bank.keys(rows)
        places = stored.find(keys) if stored.facts.width == width else np.full(len(rows), -1)
        known = np.flatnonzero(places >= 0)
        reading = stored.read(places[known], count=False)
        predictions[known] = np.asarray(reading.values)
        missing = np.setdiff1d(np.arange(len(rows)), known[reading.intact])
        if not len(missing):
            return predictions
        predictions[missing] = rounded(predictor(features[missing]))
        if self._kept and self._store.writable and stored.facts.width == width:
            stored.put(
                keys[missing], predictions[missing], tokens=[np.zeros(0, np.int32)] * len(missing),
                sources=bank.sources(rows[missing]),
                features=np.zeros((len(missing), 0), np.float32), cost=np.zeros(len(missing), np.float32),
            )  # fmt: skip
        return predictions

    def drop_others(self, versions: Collection[str]) -> None:
        """Delete the prediction banks of all predictors except this one and those of `versions`, in a commit each."""
        space = self._store.namespace(self._namespace)
        current = {self._name, *(f"{PREFIX}{version}" for version in versions)}
        for name in sorted(space.banks if space else ()):
            if name.startswith(PREFIX) and name not in current:
                self._store.drop(self._namespace, name)

    def _bank(self, width: int) -> Bank:
        facts = BankFacts("float16", width, 1, 0)
        return self._store.bank(self._namespace, self._name, lambda: facts, NearChoice("auto", "none", 2))

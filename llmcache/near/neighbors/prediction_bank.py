"""Predicted outputs of a cache's entries, kept in its store: derived numbers, so that an opening need not predict anew.

Every predictor has a bank of its own, `distilled-<version>`, whose rows have the keys and sources of the entries, so
that what is purged or merged there is purged or merged here. What is missing is predicted when it is first needed.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.near.neighbors.index import rounded
from llmcache.near.neighbors.predictor import Predictor

PREFIX = "distilled-"


class Distilled:
    """The predictions of one predictor for one bank of entries. version: of the predictor, a word."""

    def __init__(self, store: Store, namespace: str, version: str, kept: bool) -> None:
        """kept: whether what is predicted is written into the store."""
        self._store, self._namespace, self._kept = store, namespace, kept
        self._name = f"{PREFIX}{version}"

    def predictions(
        self, bank: Bank, rows: NDArray[np.int64], features: NDArray[np.float16], predictor: Predictor
    ) -> NDArray[np.float32]:
        """Of these rows of a bank, whose raw features are [n, width]; float32 [n, out], rounded to float16."""
        width = len(predictor.offset)
        mine = self._bank(width)
        found, keys = np.zeros((len(rows), width), np.float32), bank.keys(rows)
        there = mine.find(keys) if mine.facts.width == width else np.full(len(rows), -1)
        known = np.flatnonzero(there >= 0)
        reading = mine.read(there[known], count=False)
        found[known] = np.asarray(reading.values)
        missing = np.setdiff1d(np.arange(len(rows)), known[reading.intact])
        if not len(missing):
            return found
        found[missing] = rounded(predictor(features[missing]))
        if self._kept and self._store.writable and mine.facts.width == width:
            mine.put(
                keys[missing], found[missing], tokens=[np.zeros(0, np.int32)] * len(missing),
                sources=bank.sources(rows[missing]),
                features=np.zeros((len(missing), 0), np.float32), cost=np.zeros(len(missing), np.float32),
            )  # fmt: skip
        return found

    def drop_others(self, versions: Collection[str]) -> None:
        """Remove what predictors of none of these versions have predicted; a commit of its own."""
        space = self._store.namespace(self._namespace)
        kept = {self._name, *(f"{PREFIX}{version}" for version in versions)}
        for name in sorted(space.banks if space else ()):
            if name.startswith(PREFIX) and name not in kept:
                self._store.drop(self._namespace, name)

    def _bank(self, width: int) -> Bank:
        facts = BankFacts("float16", width, 1, 0)
        return self._store.bank(self._namespace, self._name, lambda: facts, NearChoice("auto", "none", 2))

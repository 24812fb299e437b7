"""Read the entries of a bank that near reuse searches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.model.tokens import in_vocabulary
from llmcache.near.neighbors.index import Entries

MOST = 200_000
"""Entries that are held in memory for near reuse; of more, so many are drawn evenly."""


def answering_keys(bank: Bank, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """First halves of the keys of some rows, uint64 [n], sorted: `FittedModels.answering` of a calibration on them."""
    return np.sort(bank.keys(rows)[:, 0])


def entries_of(
    bank: Bank,
    scope: int,
    most: int = MOST,
    among: NDArray[np.int64] | None = None,
    answering: NDArray[np.uint64] | None = None,
) -> tuple[NDArray[np.int64], Entries]:
    """Live rows of one scope of a bank and their contents, at most so many, spread evenly. It counts as no use of them.

    among: only these rows. answering: only rows with these first halves of keys, see `answering_keys`.
    """
    rows = bank.in_scope(scope)
    if among is not None:
        rows = rows[np.isin(rows, among)]
    if answering is not None:
        rows = rows[np.isin(bank.keys(rows)[:, 0], answering)]
    rows = rows[:: max(1, -(-len(rows) // most))]
    features = bank.near.features(rows)
    reading = bank.read(rows, count=False)
    tokens = bank.tokens_of(rows)
    good = reading.intact & features.any(axis=1) & in_vocabulary(tokens, np.iinfo(np.int32).max)
    kept = np.flatnonzero(good)
    return rows[kept], Entries(features[kept], np.asarray(reading.values)[kept], [tokens[i] for i in kept.tolist()])

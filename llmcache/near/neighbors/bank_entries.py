"""Read the entries of a bank that near reuse searches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Rows
from llmcache.model.tokens import in_vocabulary
from llmcache.near.neighbors.index import Entries

MOST = 200_000
"""Most entries in memory for near reuse. Larger banks are sampled at even steps."""


def answering_keys(bank: Bank, rows: Rows) -> NDArray[np.uint64]:
    """Return the first halves of the keys of rows, uint64 [n], sorted.

    They are stored as `FittedModels.answering` when a calibration searches these rows.
    """
    return np.sort(bank.keys(rows)[:, 0])


def entries_of(
    bank: Bank,
    scope: int,
    most: int = MOST,
    among: Rows | None = None,
    answering: NDArray[np.uint64] | None = None,
) -> tuple[Rows, Entries]:
    """Read the live rows of one scope of a bank, without updating their recency.

    most: most rows to read; more are sampled at even steps.
    among: restricts the result to these rows.
    answering: restricts the result to rows with these first halves of keys (`answering_keys`).
    Returns the rows, int64 [n], and their entries. Damaged rows and rows without features are left out.
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
    usable = reading.intact & features.any(axis=1) & in_vocabulary(tokens, np.iinfo(np.int32).max)
    places = np.flatnonzero(usable)
    return rows[places], Entries(
        features[places], np.asarray(reading.values)[places], [tokens[i] for i in places.tolist()]
    )

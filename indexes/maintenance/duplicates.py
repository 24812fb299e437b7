"""Duplicates: copies of one entry, stored by several writers that computed it at the same time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.store import Store

_PLACE = np.dtype([("bank", "<i8"), ("first", "<u8"), ("second", "<u8")])


def drop_duplicates(store: Store, *, dry_run: bool = False) -> int:
    """Drop all copies of an entry except the newest, which is the copy that readers use. Returns their number.

    The caller holds the maintainer lock. Uses about 120 bytes of memory per row.
    """
    candidates = eviction.candidates(store.folder, eviction.current(store.folder))
    superseded = _older(candidates)
    if not dry_run:
        store.forget(eviction.drop(store.folder, store.publish, candidates, superseded))
    return len(superseded)


def _older(candidates: eviction.Candidates) -> NDArray[np.int64]:
    """Return the positions of rows whose key a later row of the same bank has. A bank's last segment is its newest."""
    banks = {bank: number for number, bank in enumerate(sorted({place[:2] for place in candidates.places}))}
    bank_of = np.array([banks[place[:2]] for place in candidates.places], np.int64)
    table = np.zeros(len(candidates.rows), _PLACE)
    table["bank"] = bank_of[candidates.usage.segment] if len(candidates.rows) else 0
    table["first"], table["second"] = candidates.keys[:, 0], candidates.keys[:, 1]
    _, last = np.unique(table[::-1], return_index=True)
    return np.setdiff1d(np.arange(len(table)), len(table) - 1 - last)

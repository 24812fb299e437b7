"""History of a cache's runs: one record per day and corpus, stored beside the store for `llmcache report`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.counters import Counters
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.stats.counters import read_counters
from llmcache.indexes.stats.runs import (
    BINS,
    Record,
    day_of,
    read_journals,
    write_journal,
)
from llmcache.indexes.store import Store
from llmcache.indexes.urls import redacted

log = logging.getLogger("llmcache")

_RECORD_BYTES = 2048  # an upper bound for one record
_NO_DOCUMENTS = ("fitted",)  # banks that hold no documents


class History:
    """History of one opening of a store, by day and corpus. A failure to write it is logged and otherwise ignored.

    corpus: name of the current corpus, "" if none was given; see `begin`.
    """

    def __init__(self, store: Store, counters: Counters, namespace: str = "", model: str = "") -> None:
        self._store, self._counters = store, counters
        self.namespace, self.model = namespace, model
        self.corpus = ""
        self._closed: list[Record] = []
        self._start_record()

    def _start_record(self) -> None:
        self._begin = self._store.folder.now()
        self._counters_before = self._counters.as_dict()
        self._evicted_before = self._store.evicted
        self._asked, self._near = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)  # by bin of similarity
        self._forecast: dict[str, float] = {}

    def begin(self, corpus: str) -> None:
        """Attribute the following documents to this corpus."""
        corpus = redacted(corpus)
        if corpus != self.corpus:
            self._close()
            self.corpus = corpus

    def similar(self, similarity: NDArray[np.floating], taken: NDArray[np.bool_]) -> None:
        """Record similarities to the nearest entry, float [n]. taken: bool [n], documents that reused it."""
        bins = np.clip(np.nan_to_num(similarity, nan=0.0, neginf=0.0) * BINS, 0, BINS - 1).astype(np.int64)
        self._asked += np.bincount(bins, minlength=BINS)
        self._near += np.bincount(bins[taken], minlength=BINS)

    def forecast(self, compared: Mapping[str, float]) -> None:
        """Add the comparison of a run with its plan to the record (`plan.ForecastError.as_dict`)."""
        self._forecast = {name: float(value) for name, value in compared.items() if np.isfinite(value) and value >= 0}

    def write(self) -> None:
        """Write the records of this opening to the store's folder, unless the byte budget leaves no space for them."""
        if self._store.read_only:
            return
        if self._closed and day_of(self._begin) != self._day():
            self._close()
        current = self._record()
        records = [*self._closed, *([current] if current else [])]
        if not records:
            return
        try:
            budget = self._store.budget
            if budget and eviction.free_bytes(self._store.folder, budget) < _RECORD_BYTES * len(records):
                return
            write_journal(self._store.folder, self._store.writer, records)
        except (OSError, ValueError) as error:
            log.info("the record of this run was not written: %s", error)
        if day_of(self._begin) != self._day():
            self._close()

    def _day(self) -> str:
        return day_of(self._store.folder.now())

    def _close(self) -> None:
        if record := self._record():
            self._closed.append(record)
        self._start_record()

    def _record(self) -> Record | None:
        """Return the record since the last one was closed; None if nothing was counted."""
        now = self._counters.as_dict()
        delta = {name: value - self._counters_before.get(name, 0) for name, value in now.items()}
        counters = {name: value for name, value in delta.items() if value > 0}
        evicted = self._store.evicted - self._evicted_before
        if not counters and not evicted:
            return None
        entries, size = _size_of(self._store)
        record: Record = {
            "day": day_of(self._begin), "begin": self._begin, "end": self._store.folder.now(),
            "namespace": self.namespace, "corpus": self.corpus, "model": redacted(self.model), "runs": 1,
            "counters": counters, "evicted_rows": evicted, "entries": entries, "bytes": size,
        }  # fmt: skip
        if self._asked.any():
            record |= {"asked": self._asked.tolist(), "near": self._near.tolist()}
        if self._forecast:
            record["forecast"] = self._forecast
        return record


def note_eviction(store: Store, rows: int, room: int) -> None:
    """Record an eviction of rows. room: free bytes of the budget; nothing is written if a record may not fit."""
    now = store.folder.now()
    if not rows or room < _RECORD_BYTES:
        return
    record = {"day": day_of(now), "begin": now, "end": now, "evicted_rows": rows}
    try:
        write_journal(store.folder, store.writer, [record])
    except OSError as error:
        log.info("the eviction was not recorded: %s", error)


def _size_of(store: Store) -> tuple[int, int]:
    """Return the number of entries in the store's banks, and the bytes of their files, from the manifest."""
    banks = [(name, bank) for space in store.manifest.namespaces.values() for name, bank in space.banks.items()]
    entries = sum(segment.live for name, bank in banks if name not in _NO_DOCUMENTS for segment in bank.segments)
    return entries, sum(file.size for _, bank in banks for file in bank.all_files)


def records(store: Store) -> list[Record]:
    """Read the records of all openings of a store. Returns one per day, corpus, namespace and model, oldest first."""
    folder = store.folder
    try:
        counter_files = read_counters(folder)
        names = [name.removesuffix(".runs") for name in folder.names("stat") if name.endswith(".runs")]
    except OSError as error:
        log.info("the records of runs were not read: %s", error)
        return []
    folded = {name for content in counter_files.values() for name in _folded_files(content)}
    return read_journals(folder, [name for name in names if name not in folded])


def _folded_files(content: Mapping[str, Any]) -> list[str]:
    names = content.get("folded")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

"""The record of a cache's runs: a line per day and corpus, kept beside the store for `llmcache report`."""

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

_LITTLE = 2048  # bytes, more than a record takes
_NOT_A_ROW = ("fitted",)  # banks that hold no documents


class History:
    """What one opening of a store did, by day and corpus. Advisory: a failure to keep it is logged, and nothing else.

    corpus: name of what is being asked, "" where nobody said; see `begin`.
    """

    def __init__(self, store: Store, counters: Counters, namespace: str = "", model: str = "") -> None:
        self._store, self._counters = store, counters
        self.namespace, self.model = namespace, model
        self.corpus = ""
        self._done: list[Record] = []
        self._restart()

    def _restart(self) -> None:
        self._begin = self._store.folder.now()
        self._before = self._counters.as_dict()
        self._evicted = self._store.evicted
        self._asked, self._near = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        self._forecast: dict[str, float] = {}

    def begin(self, corpus: str) -> None:
        """From now on documents are of this corpus."""
        corpus = redacted(corpus)
        if corpus != self.corpus:
            self._close()
            self.corpus = corpus

    def similar(self, similarity: NDArray[np.floating], taken: NDArray[np.bool_]) -> None:
        """Documents were compared with the entries. similarity: float [n], to the nearest; taken: which were reused."""
        places = np.clip(np.nan_to_num(similarity, nan=0.0, neginf=0.0) * BINS, 0, BINS - 1).astype(np.int64)
        self._asked += np.bincount(places, minlength=BINS)
        self._near += np.bincount(places[taken], minlength=BINS)

    def forecast(self, compared: Mapping[str, float]) -> None:
        """Keep with the record how a run went beside its plan (`plan.ForecastError.as_dict`)."""
        self._forecast = {name: float(one) for name, one in compared.items() if np.isfinite(one) and one >= 0}

    def write(self) -> None:
        """Keep what was done so far beside the store."""
        if self._store.read_only:
            return
        if self._done and day_of(self._begin) != self._day():
            self._close()
        current = self._record()
        records = [*self._done, *([current] if current else [])]
        if not records:
            return
        try:
            budget = self._store.budget
            if budget and eviction.free_bytes(self._store.folder, budget) < _LITTLE * len(records):
                return
            write_journal(self._store.folder, self._store.writer, records)
        except (OSError, ValueError) as error:
            log.info("the record of this run was not kept: %s", error)
        if day_of(self._begin) != self._day():
            self._close()

    def _day(self) -> str:
        return day_of(self._store.folder.now())

    def _close(self) -> None:
        if record := self._record():
            self._done.append(record)
        self._restart()

    def _record(self) -> Record | None:
        """What was done since the last record; None where that was nothing."""
        now = self._counters.as_dict()
        delta = {name: value - self._before.get(name, 0) for name, value in now.items()}
        counters = {name: value for name, value in delta.items() if value > 0}
        evicted = self._store.evicted - self._evicted
        if not counters and not evicted:
            return None
        entries, size = _holds(self._store)
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
    """Keep beside the store that rows were evicted, where there is room for that, in bytes."""
    now = store.folder.now()
    if not rows or room < _LITTLE:
        return
    record = {"day": day_of(now), "begin": now, "end": now, "evicted_rows": rows}
    try:
        write_journal(store.folder, store.writer, [record])
    except OSError as error:
        log.info("the eviction was not recorded: %s", error)


def _holds(store: Store) -> tuple[int, int]:
    """Entries of the store's banks, and bytes of their files, as the manifest has them."""
    banks = [(name, bank) for space in store.manifest.namespaces.values() for name, bank in space.banks.items()]
    entries = sum(segment.live for name, bank in banks if name not in _NOT_A_ROW for segment in bank.segments)
    return entries, sum(file.size for _, bank in banks for file in bank.all_files)


def records(store: Store) -> list[Record]:
    """The records of all openings of a store, oldest first; one per day, corpus, namespace and model."""
    folder = store.folder
    try:
        counted = read_counters(folder)
        names = [name.removesuffix(".runs") for name in folder.names("stat") if name.endswith(".runs")]
    except OSError as error:
        log.info("the records of runs were not read: %s", error)
        return []
    folded = {one for content in counted.values() for one in _listed(content)}
    return read_journals(folder, [name for name in names if name not in folded])


def _listed(content: Mapping[str, Any]) -> list[str]:
    listed = content.get("folded")
    return [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []

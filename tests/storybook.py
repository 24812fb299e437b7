"""Stores with a past: weeks of runs, audits and evictions, written as caches write them, without a model."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.stats import runs as journal
from llmcache.indexes.stats.counters import write_counters
from llmcache.indexes.store import Store

WRITER = "a" * 32
CORPORA = (("tickets.jsonl", 42_000, 0.9), ("policies", 8_000, 0.5), ("logs.txt.gz", 90_000, 0.25))
FIRST = datetime.date(2026, 10, 1)


def filled(path: Path, entries: int = 200, config: dict[str, Any] | None = None) -> Store:
    """An open store with so many entries, of which the first tenth is used most."""
    store = Store.open(path, create=True)
    store.declare("default", {"name": "/models/all-MiniLM-L6-v2"}, config or {})
    if entries:
        bank = store.bank("default", "output", lambda: BankFacts("float32", 384, 1, 4), NearChoice())
        keys = np.arange(2 * entries, dtype=np.uint64).reshape(entries, 2)
        bank.put(
            keys, np.ones((entries, 384), np.float32), tokens=[np.arange(12, dtype=np.int32)] * entries,
            sources=[""] * entries, features=np.ones((entries, 4), np.float32),
            cost=np.full(entries, 0.003, np.float32),
        )  # fmt: skip
        for times in (1, 10, 100):
            for _ in range(times // 4 + 1):
                bank.read(np.arange(entries // times))
        store.commit()
    return store


def calibration(threshold: float | None = 2.1) -> dict[str, Any]:
    """As `llmcache.near.calibration.calibrate` saves one."""
    hits = np.linspace(0.02, 0.95, 60)
    drift = 0.0004 + 0.012 * hits**4
    bound = drift + 0.0011 + 0.001 * hits
    curve = [[6 - 5 * float(h), float(h), float(d), float(b)] for h, d, b in zip(hits, drift, bound, strict=True)]
    return {
        "budget": 0.005, "confidence": 0.95, "drift": "label", "limit": None, "threshold": threshold, "hits": 0.684,
        "expected": 0.0031, "bound": 0.00487, "bound_of_hits": 0.0071, "samples": 10_003, "needed": 0,
        "entries": 10_003, "reason": "" if threshold else "too few documents", "curve": curve,
    }  # fmt: skip


def told(store: Store, days: int = 34, seed: int = 0) -> None:
    """Write weeks of runs of three corpora into the store's journal and counters."""
    random, records, total = np.random.default_rng(seed), [], dict[str, float]()
    for day in range(days):
        for corpus, size, fresh in (
            ("tickets.jsonl", 42_000, 0.9),
            ("policies", 8_000, 0.5),
            ("logs.txt.gz", 90_000, 0.25),
        ):
            if (corpus == "policies" and day % 7) or (corpus == "logs.txt.gz" and day % 2):
                continue
            records.append(_record(random, day, corpus, int(size * random.uniform(0.8, 1.2)), fresh / (1 + day / 6)))
    for one in records:
        for name, value in one["counters"].items():
            total[name] = total.get(name, 0) + value
    journal.write_journal(store.folder, WRITER, records)
    write_counters(store.folder, WRITER, total)


def _record(random: np.random.Generator, day: int, corpus: str, size: int, fresh: float) -> journal.Record:
    when = datetime.datetime.combine(FIRST, datetime.time(2), datetime.UTC).timestamp() + 86_400 * day
    misses = int(size * min(1.0, fresh))
    near = int((size - misses) * (0.22 if corpus == "tickets.jsonl" else 0.04)) if day > 5 else 0
    tokens, repeats = int((size - misses - near) * 0.06), int((size - misses - near) * 0.15)
    audits = int(near * 0.02)
    counters = {
        "documents": size, "exact_text": size - misses - near - tokens - repeats, "exact_tokens": tokens,
        "repeats": repeats, "near": near, "misses": misses, "audits": audits,
        "audited_drift": audits * 0.004 * float(random.uniform(0.3, 1.6)), "model_seconds": misses * 0.0031,
        "overhead_seconds": size * 2e-5 + misses * 1e-4, "saved_seconds": (size - misses) * 0.0031,
        "layer-3.asked": misses, "layer-3.hits": misses * 0.1, "layer-3.saved_seconds": misses * 1e-4,
    }  # fmt: skip
    asked = np.histogram(random.beta(9, 2.2, misses + near), journal.BINS, (0, 1))[0]
    taken = (asked * np.clip((np.arange(journal.BINS) / journal.BINS - 0.72) * 5, 0, 1)).astype(int)
    record: journal.Record = {
        "day": journal.day_of(when), "begin": when, "end": when + 900, "namespace": "default", "corpus": corpus,
        "model": "/models/all-MiniLM-L6-v2", "runs": 1, "counters": counters,
        "evicted_rows": 1200 if day > 25 and corpus == "tickets.jsonl" else 0, "entries": 40_000 + 9_000 * day,
        "bytes": 90_000_000 + 21_000_000 * day,
    }  # fmt: skip
    if near:
        record |= {"asked": asked.tolist(), "near": taken.tolist()}
    if corpus == "policies":
        record["forecast"] = {"forecast_hit_rate": 1 - fresh, "hit_rate": 1 - fresh + 0.012, "forecast_seconds": 41.0,
                              "seconds": 43.2}  # fmt: skip
    return record

"""Measurement of one job in one process and on workers of a local Ray cluster, with and without a killed worker."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from llmcache.bench.harness.turns import Row
from llmcache.cache import LLMCache
from llmcache.distributed.compute import open_with_workers
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.store import Store

BATCH = 32


def spread(model: str, texts: Sequence[str], workers: int = 2) -> list[Row]:
    """Run the job in one process with a worker's threads, in one with all, on workers, and with one worker killed.

    Returns one row each. seconds: without the start of processes. identical: True when bits and provenance equal those
    of the first way. entries, segments: contents of the store. lost: documents that a later opening misses. duplicates:
    entries stored twice.
    """
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // workers)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        base = Path(folder)
        try:
            expected, rows = None, []
            for name, count in (("one process", threads), ("one process, all cores", cores)):
                torch.set_num_threads(count)
                with LLMCache.open(base / name, model) as cache:
                    facts, seconds = _job(cache, texts)
                expected = expected or facts
                rows.append(_row(name, 1, count, base / name, texts, seconds, facts == expected))
            for name, killing in ((f"{workers} workers", False), (f"{workers} workers, one killed", True)):
                cache, started = open_with_workers(base / name, model, workers, threads)
                with cache:
                    _warm_up(cache, workers)
                    facts, seconds = _job(cache, texts, started.pids()[:1] if killing else [])
                rows.append(_row(name, workers, threads, base / name, texts, seconds, facts == expected))
            return rows
        finally:
            torch.set_num_threads(before)


def _warm_up(cache: LLMCache, workers: int) -> None:
    """Let the workers load the model before the clock runs."""
    for _ in cache.run([f"warm up {i}" for i in range(BATCH * workers)], batch_size=BATCH):
        continue


def _job(cache: LLMCache, texts: Sequence[str], victims: Sequence[int] = ()) -> tuple[list[Any], float]:
    """Run the job. victims: processes to kill after the first batches. Returns results and seconds."""
    doomed = list(victims)

    def progress(_: int, computed: int) -> None:
        if computed and doomed:
            os.kill(doomed.pop(), signal.SIGKILL)

    began = time.perf_counter()
    results = list(cache.run(texts, batch_size=BATCH, progress=progress))
    cache.commit()
    seconds = time.perf_counter() - began
    return [
        (result.id, result.tier, result.source, result.similarity, result.output.tobytes()) for result in results
    ], seconds


def _row(
    name: str, workers: int, threads: int, path: Path, texts: Sequence[str], seconds: float, identical: bool
) -> Row:
    with LLMCache.open(path) as cache:
        lost = sum(one.tier != "exact" for one in cache.run(texts))
    with closing(Store.open(path)) as store:
        segments = store.manifest.namespaces["default"].banks["output"].segments
        twice = compact(store, duplicates=True, dry_run=True).duplicates
    return {
        "name": name, "workers": workers, "threads": threads, "documents": len(texts), "seconds": seconds,
        "identical": identical, "entries": sum(one.live for one in segments), "segments": len(segments), "lost": lost,
        "duplicates": twice,
    }  # fmt: skip

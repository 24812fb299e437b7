"""Metrics of a run for Prometheus: a file for the textfile collector, written atomically."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcache import __version__
from llmcache.errors import ConfigError
from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically

if TYPE_CHECKING:
    from llmcache.encoding.results import TierCounts
    from llmcache.report.statistics import Statistics

log = logging.getLogger("llmcache")

MetricsFile = Annotated[
    Path | None, typer.Option(help="File for Prometheus' textfile collector (*.prom), written after a successful run.")
]

_TOTALS = {  # counters summed over all openings of the store
    "documents": ("llmcache_documents", "Documents asked for."),
    "misses": ("llmcache_misses", "Documents that the model computed."),
    "near": ("llmcache_near_hits", "Documents answered from a near match."),
    "not_stored": ("llmcache_not_stored", "Documents computed and not kept."),
    "at_limit": ("llmcache_documents_at_limit", "Documents that fill the model's maximum length."),
    "damaged": ("llmcache_damaged_rows", "Rows that failed their checksum."),
    "audits": ("llmcache_audits", "Near hits that were recomputed."),
    "audited_drift": ("llmcache_audited_drift", "Sum of what audited hits were off by."),
    "exact_audits": ("llmcache_exact_audits", "Exact hits that were recomputed to check the store."),
    "exact_audit_seconds": ("llmcache_exact_audit_seconds", "Seconds of these audits."),
    "exact_mismatches": ("llmcache_exact_mismatches", "Openings in which stored results were not the model's."),
    "model_seconds": ("llmcache_model_seconds", "Seconds in the model."),
    "overhead_seconds": ("llmcache_cache_seconds", "Seconds in the cache."),
    "saved_seconds": ("llmcache_saved_seconds", "Seconds the model would have taken for what was reused."),
}


class Run:
    """One run of a command, timed from its creation."""

    def __init__(self, command: str, file: Path | None) -> None:
        """Start the clock. ConfigError, before any work, for a file that cannot be written."""
        self._command, self._file, self._started = command, file, time.monotonic()
        if file is None:
            return
        if importlib.util.find_spec("prometheus_client") is None:
            raise ConfigError("--metrics-file needs prometheus_client; pip install 'llmcache[metrics]'")
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ConfigError(f"{file} cannot be written: give a file in an existing folder")

    def ended(self, namespace: str, tally: TierCounts, stats: Statistics) -> None:
        """Log the counts of the run, and write the metrics file. OSError when it cannot be written."""
        seconds = time.monotonic() - self._started
        log.info(
            "%s is done: %d documents, %d exact, %d near, %d computed, %.1f s",
            self._command, tally.documents, tally.exact, tally.near, tally.misses, seconds,
            extra={"facts": {
                "llmcache.command": self._command, "llmcache.namespace": namespace,
                "llmcache.generation": stats.generation, "llmcache.duration_seconds": round(seconds, 3),
                **{f"llmcache.documents.{tier}": getattr(tally, tier) for tier in ("exact", "near", "misses")},
            }},
        )  # fmt: skip
        if self._file is not None:
            from prometheus_client import generate_latest

            # prometheus_client's own writer uses a predictable temporary name and follows links there
            data = generate_latest(_registry(self._command, namespace, seconds, tally, stats))
            write_atomically(self._file, data, mode=ordinary_mode())


def _registry(command: str, namespace: str, seconds: float, tally: TierCounts, stats: Statistics) -> Any:
    from prometheus_client import CollectorRegistry, Counter, Gauge

    registry = CollectorRegistry()
    Gauge("llmcache_build_info", "Version.", ["version"], registry=registry).labels(__version__).set(1)
    labels = {"command": command, "namespace": namespace}

    def gauge(name: str, text: str, value: float, **more: str) -> None:
        names = {**labels, **more}
        metric = gauges.get(name) or gauges.setdefault(name, Gauge(name, text, list(names), registry=registry))
        metric.labels(**names).set(value)

    gauges: dict[str, Any] = {}
    for tier, count in (("exact", tally.exact), ("near", tally.near), ("miss", tally.misses)):
        gauge("llmcache_run_documents", "Documents of the last run, by tier.", count, tier=tier)
    gauge("llmcache_run_duration_seconds", "Duration of the last run.", seconds)
    gauge("llmcache_run_last_success_timestamp_seconds", "When the last run ended well.", time.time())
    for name, (metric, text) in _TOTALS.items():
        Counter(metric, f"{text} All openings of the store.", registry=registry).inc(stats.lifetime.get(name, 0))
    Gauge("llmcache_store_generation", "Newest generation.", registry=registry).set(stats.generation)
    entries = Gauge("llmcache_store_entries", "Entries of a bank.", ["namespace", "layer"], registry=registry)
    size = Gauge("llmcache_store_bytes", "Bytes of a bank's files.", ["namespace", "layer"], registry=registry)
    for bank in stats.banks:
        entries.labels(bank.namespace, bank.layer).set(bank.entries)
        size.labels(bank.namespace, bank.layer).set(bank.bytes)
    return registry

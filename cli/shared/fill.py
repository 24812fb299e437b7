"""What `build` and `warm` have in common: documents through the cache, and a report of what was there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from llmcache.banks.namespaces import resolved_secret
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, bytes_of, progress
from llmcache.cli.shared.metrics import Run
from llmcache.cli.shared.options import Access
from llmcache.indexes.store import Store
from llmcache.pipeline.files import Reading
from llmcache.planning.plan import ForecastError, Plan

log = logging.getLogger("llmcache")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that both commands share. model: None uses the one the store was made with."""

    store: str
    model: str | None
    namespace: str
    role: str | None
    batch_size: int
    dry_run: bool
    json: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    plan: Path | None = None
    metrics_file: Path | None = None


def fill(asked: Asked, sources: Sources) -> None:
    """Bring a store up to date with the corpora, and print what was there, what was added and what it took."""
    if asked.dry_run:
        preview(asked.store, asked.namespace, asked.role, sources, asked.json, asked.access)
        return
    expected = None if asked.plan is None else Plan.read(asked.plan)
    timed = Run("build" if asked.model is not None else "warm", asked.metrics_file)
    from llmcache.cache import LLMCache
    from llmcache.config import CacheConfig

    printing.quiet()
    reading = Reading()
    documents = sources.documents(reading)
    config = CacheConfig(**asked.settings) if asked.settings else None
    access = asked.access.keywords()
    with LLMCache.open(asked.store, asked.model, config=config, namespace=asked.namespace, **access) as cache:
        if cache.read_only:  # everything would be computed for nothing
            cache.storing.store.commit()
        before = len(cache)
        cache.corpus = sources.name
        with progress(reading, bytes_of(sources.corpora)) as advance:
            tally = cache.warm(documents, role=asked.role, batch_size=asked.batch_size, progress=advance)
        if asked.model is not None or len(cache) > before:
            cache.rebuild()
        stats = cache.stats()
        forecast = None if expected is None else cache.compared(expected)
    timed.ended(asked.namespace, tally, stats)
    report(
        asked,
        reading,
        tally.as_dict(),
        {"added": len(cache) - before, "entries": len(cache), **stats.as_dict()},
        forecast,
    )


def report(
    asked: Asked,
    reading: Reading,
    tally: Mapping[str, Any],
    store: Mapping[str, Any],
    forecast: ForecastError | None = None,
) -> None:
    """Print what one run did."""
    if asked.json:
        shown = {**tally, **counts(reading), "bad": reading.bad, "duplicate_ids": reading.duplicate_ids, "store": store}
        printing.as_json(shown if forecast is None else {**shown, "plan": forecast.as_dict()})
        return
    bank = next(one for one in store["banks"] if one["namespace"] == asked.namespace)
    printing.facts(
        [
            ("records read", reading.documents + reading.bad),
            ("refused", reading.bad),
            ("documents", tally["documents"]),
            ("were there", tally["exact"]),
            ("computed", tally["misses"]),
            ("entries in the store", store["entries"]),
            ("added", store["added"]),
            ("model seconds", store["counters"]["model_seconds"]),
            ("seconds saved", store["counters"]["saved_seconds"]),
            ("bytes on disk", printing.size(bank["bytes"])),
            ("index", store["index"]),
        ]
    )
    if forecast is not None:
        typer.echo(str(forecast))
    warnings(reading, store["counters"].get("at_limit", 0))


def counts(reading: Reading) -> dict[str, int]:
    """Records that were read, refused ones among them, and files that were left out, for JSON."""
    return {
        "read": reading.documents + reading.bad,
        "refused": reading.bad,
        "files_skipped": reading.skipped.total(),
    }


def warnings(reading: Reading, at_limit: int = 0) -> None:
    """Report on standard error what of a corpus was not read, and ids that repeat.

    at_limit: documents that fill the model's maximum length.
    """
    if reading.skipped:
        log.warning("%s", reading.skipped_said)
    if reading.bad:
        first = f"; the first: {reading.errors[0]}" if reading.errors else ""
        log.warning("%s records were skipped%s", f"{reading.bad:,}", first)
    if reading.duplicate_ids:
        log.warning("%s documents repeat an earlier id; all were kept", f"{reading.duplicate_ids:,}")
    if at_limit:
        log.warning(
            "%s documents fill the model's maximum length, so the end of their text may not have been read; "
            "cut long documents into chunks (`llmcache run --chunk structure`)", f"{at_limit:,}",
        )  # fmt: skip


def preview(store: str, namespace: str, role: str | None, sources: Sources, json: bool, access: Access) -> None:
    """Count the corpora against the store as it is; nothing is computed or written."""
    from llmcache.planning.preview import forecast_against

    reading = Reading()
    there = Store.open(store, **access.of_store()) if Path(store, "FORMAT").exists() else None
    secret = resolved_secret(None, access.secret_file)
    found = forecast_against(there, namespace, role, sources.documents(reading), secret)
    if json:
        printing.as_json(
            {**counts(reading), "documents": found.documents, "distinct": found.distinct, "known": found.known}
        )
        return
    printing.facts(
        [
            ("records read", reading.documents + reading.bad),
            ("refused", reading.bad),
            ("documents", found.documents),
            ("distinct texts", found.distinct),
            ("there already", found.known),
            ("would be computed, at most", found.distinct - found.known),
        ]
    )
    warnings(reading)

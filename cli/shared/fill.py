"""Shared part of `build` and `warm`: bring a store up to date with corpora, and print the counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from llmcache.banks.namespaces import resolved_secret
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, bytes_of, progress
from llmcache.cli.shared.metrics import Run
from llmcache.cli.shared.options import Access
from llmcache.document import Document
from llmcache.indexes.store import Store
from llmcache.pipeline.files import CorpusReading
from llmcache.planning.plan import ForecastError, Plan

log = logging.getLogger("llmcache")


@dataclass(frozen=True, slots=True)
class FillOptions:
    """Options that both commands share. model, kind: None uses the model the store was created with."""

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
    kind: str | None = None


def fill(options: FillOptions, sources: Sources) -> None:
    """Bring a store up to date with the corpora, and print hits, added entries and seconds."""
    # before a store is made for the model
    sources = for_model(sources, options.store, options.namespace, options.access, options.model, options.kind)
    if options.dry_run:
        preview(options.store, options.namespace, options.role, sources, options.json, options.access)
        return
    expected = None if options.plan is None else Plan.read(options.plan)
    timed = Run("build" if options.model is not None else "warm", options.metrics_file)
    from llmcache.cache import LLMCache
    from llmcache.config import CacheConfig

    printing.quiet()
    reading = CorpusReading()
    documents = sources.documents(reading)
    config = CacheConfig(**options.settings) if options.settings else None
    settings = {"kind": options.kind, "config": config, "namespace": options.namespace, **options.access.keywords()}
    with LLMCache.open(options.store, options.model, **settings) as cache:
        sources.check(cache.identity.encoder)
        if cache.read_only:  # nothing could be stored, so fail before computing
            cache.storing.store.commit()
        before = len(cache)
        cache.corpus = sources.name
        with progress(reading, bytes_of(sources.corpora)) as advance:
            tally = cache.warm(documents, role=options.role, batch_size=options.batch_size, progress=advance)
        if options.model is not None or len(cache) > before:
            cache.rebuild()
        stats = cache.stats()
        forecast = None if expected is None else cache.compared(expected)
    timed.ended(options.namespace, tally, stats)
    report(
        options,
        reading,
        tally.as_dict(),
        {"added": len(cache) - before, "entries": len(cache), **stats.as_dict()},
        forecast,
    )


def for_model(
    sources: Sources,
    store: str,
    namespace: str,
    access: Access,
    model: str | None = None,
    kind: str | None = None,
) -> Sources:
    """Return the corpora with the fields that the model of a command reads; as they are if it is not known yet.

    model, kind: values of the options; None for the model of the store. ConfigError for fields that it does not read.
    """
    encoder = ""
    if model is not None:
        from llmcache.model.loading import encoder_class

        encoder = encoder_class(model, kind).__name__
    elif Path(store, "FORMAT").exists():
        from llmcache.model.identity import Identity

        opened = Store.open(store, **access.of_store())
        space = opened.namespace(namespace)
        opened.close()
        encoder = "" if space is None else Identity.from_json(space.identity).encoder
    return sources.read_by(encoder) if encoder else sources


def read(
    sources: Sources,
    reading: CorpusReading,
    store: str,
    namespace: str,
    access: Access,
    model: str | None = None,
    kind: str | None = None,
) -> Iterator[Document]:
    """Iterate over the documents for a store. Reads the first at once, so an unreadable corpus fails before any work.

    model, kind: as for `for_model`. CorpusError when the corpus cannot be read; ConfigError as `for_model`.
    """
    return for_model(sources, store, namespace, access, model, kind).documents(reading)


def report(
    options: FillOptions,
    reading: CorpusReading,
    tally: Mapping[str, Any],
    store: Mapping[str, Any],
    forecast: ForecastError | None = None,
) -> None:
    """Print the counts of one run."""
    if options.json:
        shown = {**tally, **counts(reading), "bad": reading.bad, "duplicate_ids": reading.duplicate_ids, "store": store}
        printing.as_json(shown if forecast is None else {**shown, "plan": forecast.as_dict()})
        return
    bank = next(bank for bank in store["banks"] if bank["namespace"] == options.namespace)
    printing.facts(
        [
            ("records read", reading.documents + reading.bad),
            ("refused", reading.bad),
            ("documents", tally["documents"]),
            ("already stored", tally["exact"]),
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


def counts(reading: CorpusReading) -> dict[str, int]:
    """Count the records read, those refused among them, and the files skipped, for JSON."""
    return {
        "read": reading.documents + reading.bad,
        "refused": reading.bad,
        "files_skipped": reading.skipped.total(),
    }


def warnings(reading: CorpusReading, at_limit: int = 0) -> None:
    """Warn of records and files of a corpus that were not read, and of repeated ids.

    at_limit: number of documents that fill the model's maximum length.
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
    """Count the documents of the corpora that the store has. Computes and writes nothing."""
    from llmcache.planning.preview import forecast_against

    reading = CorpusReading()
    existing = Store.open(store, **access.of_store()) if Path(store, "FORMAT").exists() else None
    secret = resolved_secret(None, access.secret_file)
    documents = read(sources, reading, store, namespace, access)
    forecast = forecast_against(existing, namespace, role, documents, secret)
    if json:
        printing.as_json(
            {**counts(reading), "documents": forecast.documents, "distinct": forecast.distinct, "known": forecast.known}
        )
        return
    printing.facts(
        [
            ("records read", reading.documents + reading.bad),
            ("refused", reading.bad),
            ("documents", forecast.documents),
            ("distinct texts", forecast.distinct),
            ("already stored", forecast.known),
            ("would be computed, at most", forecast.distinct - forecast.known),
        ]
    )
    warnings(reading)

"""`llmcache run`: documents in, vectors and provenance out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli import options, printing
from llmcache.cli.engine import Engine, Workers, opened
from llmcache.cli.filling import preview, warnings
from llmcache.cli.heads import run_heads
from llmcache.cli.metrics import MetricsFile, Run
from llmcache.cli.reading import Sources, bytes_of, progress
from llmcache.corpus import Reading
from llmcache.errors import ConfigError
from llmcache.results import result_writer

log = logging.getLogger("llmcache")


def run(
    corpus: options.Corpus,
    store: options.StorePath,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Result file: .parquet, .npy (with a .npy.jsonl) or .jsonl.")
    ],
    tau: options.Tau = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    text_field: options.TextField = "text",
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    stdin_format: options.StdinFormat = "jsonl",
    skip_bad: options.SkipBad = False,
    batch_size: options.BatchSize = 32,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model, where the store is not trusted to name it.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER of a model on the same trunk, as often as you like; each gets a result file OUT.NAME."
        ),
    ] = None,
    engine: Engine = "local",
    workers: Workers = None,
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    metrics_file: MetricsFile = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write one vector per document, in order, each with its tier, layer, source and similarity.

    What the store has is read, the rest is computed and stored.
    """
    sources = Sources(corpus, text_field, id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable, allow_untrusted)
    if dry_run:
        preview(store, namespace, role, sources, json, access)
        return
    timed = Run("run", metrics_file)
    from llmcache.cache import LLMCache
    from llmcache.tally import Tally

    printing.quiet()
    if any(out.resolve() == Path(one).resolve() for one in corpus):
        raise ConfigError(f"{out} is a corpus of this very run; write the results elsewhere")
    if head:
        if engine != "local":
            raise ConfigError("--head computes in one process; leave --engine out")
        with LLMCache.open(store, model, namespace=namespace, tau=tau, **access.keywords()) as cache:
            run_heads(cache, head, sources, out, role, batch_size, json)
        return
    reading, tally = Reading(), Tally()
    documents = sources.documents(reading)
    with (
        opened(engine, workers, store, model, namespace=namespace, tau=tau, **access.keywords()) as cache,
        result_writer(out, width=cache.width) as writer,
    ):
        with progress(reading, bytes_of(corpus)) as advance:
            writer.write(tally.counted(cache.run(documents, role=role, batch_size=batch_size, progress=advance)))
        stats = cache.stats()
    timed.ended(namespace, tally, stats)
    counters = stats.counters
    if json:
        printing.as_json({**tally.as_dict(), "out": str(out), "bad": reading.bad, "counters": counters.as_dict()})
        return
    printing.facts(
        [
            ("documents", tally.documents),
            ("exact", tally.exact),
            ("near", tally.near),
            ("computed", tally.misses),
            ("model seconds", counters.model_seconds),
            ("seconds saved", counters.saved_seconds),
            ("cache seconds", counters.overhead_seconds),
            ("written to", out),
        ]
    )
    if tau is not None and not tally.near:
        log.warning("no document had a neighbour at similarity %s or above", tau)
    warnings(reading)

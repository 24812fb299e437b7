"""`llmcache run`: compute or look up a vector for every document, and write them with their provenance."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcache.cli.shared import amounts, jobs, options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, bytes_of, fields_of, progress
from llmcache.cli.shared.engine import (
    Engine,
    Workers,
    committed,
    opened,
)
from llmcache.cli.shared.fill import counts, preview, read, warnings
from llmcache.cli.shared.heads import run_heads
from llmcache.cli.shared.metrics import MetricsFile, Run
from llmcache.errors import ConfigError
from llmcache.pipeline.files import CorpusReading
from llmcache.planning.plan import ForecastError, Plan

if TYPE_CHECKING:
    from llmcache.banks.counters import Counters
    from llmcache.pipeline.checkpoints import Written
    from llmcache.records import RejectedRecord

log = logging.getLogger("llmcache")

UNFINISHED = 3  # exit code when --max-seconds stopped the run; --resume continues


def run(
    corpus: options.Corpus,
    store: options.StorePath,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Result file: .parquet, .npy (with a .npy.jsonl beside it) or .jsonl.")
    ],
    tau: options.Tau = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    text_field: options.TextField = "text",
    pair_fields: options.PairFields = None,
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    stdin_format: options.StdinFormat = "jsonl",
    skip_bad: options.SkipBad = False,
    batch_size: options.BatchSize = 32,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model, for a store that does not exist yet, or is not trusted to name it."),
    ] = None,
    task: jobs.TaskOption = jobs.EMBED,
    template: jobs.Template = None,
    template_file: jobs.TemplateFile = None,
    syntax: jobs.Syntax = "format",
    system: jobs.System = None,
    chat: jobs.Chat = False,
    examples: jobs.Examples = None,
    answer: jobs.AnswerField = "answer",
    choice: jobs.Choice = None,
    choices_field: jobs.ChoicesField = None,
    separator: jobs.Separator = None,
    by: jobs.By = "total",
    too_long: jobs.TooLongOption = "refuse",
    no_provenance: jobs.NoProvenance = False,
    max_new_tokens: jobs.MaxNewTokens = None,
    setting: jobs.Setting = None,
    kind: options.Kind = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER of a model on the same trunk; repeatable. Each head gets a result file OUT.NAME."
        ),
    ] = None,
    engine: Engine = "local",
    workers: Workers = None,
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    chunk: Annotated[
        str,
        typer.Option(
            help="none, or structure: cut at headings, paragraphs and sentences; each chunk is looked up separately."
        ),
    ] = "none",
    per: Annotated[str, typer.Option(help="With --chunk, one row per document or per chunk.")] = "document",
    late: Annotated[
        bool,
        typer.Option(
            "--late",
            help="With --chunk, pool the chunks from token embeddings of the whole document, which are stored: another "
            "cutting then needs no model.",
        ),
    ] = False,
    output_value: Annotated[
        str | None,
        typer.Option(help="sentence_embedding, or token_embeddings for the vectors of all tokens of a document."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep unfinished results beside OUT, and continue from existing ones."),
    ] = False,
    max_seconds: Annotated[
        str | None, typer.Option(help="Stop after this time, such as 90s or 2h, with exit code 3; --resume continues.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Size limit of the store, such as 10GB; old entries are evicted for new ones.")
    ] = None,
    read_only: options.ReadOnly = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Load the model from this machine; download nothing.")
    ] = False,
    plan: options.PlanFile = None,
    metrics_file: MetricsFile = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write one result per document, in order, with where it came from.

    By default these are vectors, each with its tier, layer, source and similarity. With --task generate, score or
    classify a language model answers a prompt for each document; results are .jsonl or .parquet.

    For a cross-encoder these are the logits of each pair, before the activation. Sparse vectors and vectors of tokens
    are written as .parquet or .jsonl.

    Stored results are read, missing ones are computed and stored. With --read-only, or where the folder of the store
    cannot be written, missing ones are computed and not stored.
    """
    expected = None if plan is None else Plan.read(plan)
    sources = Sources(corpus, fields_of(text_field, pair_fields), id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable, allow_untrusted)
    limits = Limits.of(max_seconds, max_bytes)
    if chunk not in ("none", "structure"):
        raise ConfigError(f"--chunk is none or structure, got {chunk!r}")
    job = jobs.JobOptions(
        task, template, template_file, syntax, system, chat, examples, answer, choice or [], choices_field, by,
        too_long, no_provenance, max_new_tokens, setting or [], separator,
    )  # fmt: skip
    language = job.check({
        "--head": head, "--tau": tau, "--chunk": chunk != "none", "--late": late, "--per": per != "document",
        "--output-value": output_value, "--role": role, "--kind": kind, "--pair-fields": pair_fields,
        "--engine": engine != "local", "--text-field": text_field != "text", "--dry-run": dry_run,
    })  # fmt: skip
    if dry_run:
        preview(store, namespace, role, sources, json, access)
        return
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries that read it
    timed = Run("run", metrics_file)
    if any(out.resolve() == Path(name).resolve() for name in corpus):
        raise ConfigError(f"{out} is also a corpus of this run; write the results to another file")
    from llmcache.cache import LLMCache
    from llmcache.pipeline.pipeline import Pipeline

    printing.quiet()
    settings = {"namespace": namespace, "tau": tau, "max_bytes": limits.nbytes, **access.keywords()}
    if kind is not None:
        settings["kind"] = kind
    if read_only:
        if engine != "local":
            raise ConfigError("--read-only computes in one process; leave --engine out")
        settings["read_only"] = True
    if head:
        if resume or limits.seconds is not None or chunk != "none" or output_value is not None:
            raise ConfigError(
                "--head does not combine with --resume, --max-seconds, --chunk or --output-value; run the heads "
                "separately"
            )
        if engine != "local":
            raise ConfigError("--head computes in one process; leave --engine out")
        if pair_fields is not None:
            raise ConfigError("--head reads documents of one text; leave --pair-fields out")
        with LLMCache.open(store, model, **settings) as cache:
            run_heads(cache, head, sources, out, role, batch_size, json)
            committed(cache)
        return
    reading = CorpusReading()
    arguments: dict[str, Any] = {"batch_size": batch_size, "strict": not skip_bad}
    if language:
        arguments |= {"id_field": id_field, **job.arguments()}
        sources = replace(sources, text_field=job.read_fields(arguments["template"]), as_json=True)
        documents = sources.documents(reading)
        opening = jobs.opened(store, model, namespace, access, max_bytes=limits.nbytes, read_only=read_only)
    else:
        arguments |= {
            "chunk": None if chunk == "none" else chunk, "per": per, "late": late, "output_value": output_value,
            "role": role,
        }  # fmt: skip
        documents = read(sources, reading, store, namespace, access, model, kind)
        opening = opened(engine, workers, store, model, **settings)
    with opening as cache, progress(reading, bytes_of(corpus)) as advance:
        if not language:
            sources.check(cache.identity.encoder)
        cache.corpus = sources.name
        pipeline = Pipeline(cache, progress=advance, **arguments)
        written = pipeline.write(documents, out, resume=resume, max_seconds=limits.seconds)
        forecast = None if expected is None else cache.compared(expected)
    stats = cache.stats()
    timed.ended(namespace, written, stats)
    report(written, reading, pipeline.errors, stats.counters, forecast, json)
    warnings(reading, stats.counters.at_limit if chunk == "none" else 0)
    if tau is not None and not written.near:
        log.warning("no document had a neighbour at similarity %s or above", tau)
    if not written.finished:
        raise typer.Exit(UNFINISHED)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a run: seconds of time, and bytes of the store."""

    seconds: float | None
    nbytes: int | None

    @classmethod
    def of(cls, seconds: str | None, nbytes: str | None) -> Limits:
        return cls(
            None if seconds is None else amounts.seconds(seconds), None if nbytes is None else amounts.size(nbytes)
        )


def report(
    written: Written,
    reading: CorpusReading,
    errors: list[RejectedRecord],
    counters: Counters,
    forecast: ForecastError | None,
    json: bool,
) -> None:
    """Print the counts of a run, and the file of its results."""
    if json:
        outcome: dict[str, Any] = {
            **counts(reading),
            "refused": written.refused + reading.bad,
            "resumed": written.resumed,
            "finished": written.finished,
        }
        if forecast is not None:
            outcome["plan"] = forecast.as_dict()
        printing.as_json(
            {
                **written.as_dict(),
                "out": str(written.path),
                "bad": reading.bad,
                **outcome,
                "counters": counters.as_dict(),
            }
        )
    else:
        printing.facts(
            [
                ("records read", reading.documents + reading.bad),
                ("refused", written.refused + reading.bad),
                ("documents", written.documents),
                *([("of these in earlier sittings", written.resumed)] if written.resumed else []),
                ("exact", written.exact),
                ("near", written.near),
                ("computed", written.misses),
                *([("of these with a reused part", written.prefix)] if written.prefix else []),
                ("model seconds", counters.model_seconds + counters.prefix.model_seconds),
                ("seconds saved", counters.saved_seconds),
                ("cache seconds", counters.overhead_seconds),
                (
                    "written to",
                    written.path if written.finished else "nothing yet; the same command with --resume continues",
                ),
            ]
        )
        if forecast is not None:
            typer.echo(str(forecast))
    if errors:
        log.warning("%s records were refused; %s %s", f"{written.refused:,}", errors[0].id, errors[0].reason)

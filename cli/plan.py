"""`llmcache plan`: forecast the hits, seconds and bytes of a run."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from llmcache.cli.shared import jobs, options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, fields_of
from llmcache.cli.shared.fill import counts, read, warnings
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically
from llmcache.indexes.store import Store
from llmcache.pipeline.files import CorpusReading
from llmcache.planning.plan import Plan, seconds_said

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model, for a store that does not exist yet or is not trusted.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="File for the plan; run, build and warm take it as --plan.")
]


def plan(
    corpus: options.Corpus,
    store: options.StorePath,
    out: Out = None,
    model: ModelOption = None,
    kind: options.Kind = None,
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
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
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
    too_long: jobs.TooLongOption = "refuse",
    max_new_tokens: jobs.MaxNewTokens = None,
    setting: jobs.Setting = None,
    json: options.Json = False,
) -> None:
    """Forecast hits, seconds and bytes of a run, and advise on its settings. Nothing is stored.

    The corpus is read and hashed, samples of it are tokenised and looked up, and a few batches are computed. For
    --task generate, score or classify all prompts are made and looked up, and a few are computed.
    """
    job = jobs.JobOptions(
        task, template, template_file, syntax, system, chat, examples, answer, choice or [], choices_field,
        too_long=too_long, max_new_tokens=max_new_tokens, settings=setting or [],
        separator=separator,
    )  # fmt: skip
    if job.check({
        "--tau": tau, "--kind": kind, "--role": role, "--pair-fields": pair_fields, "--out": out,
        "--text-field": text_field != "text",
    }):  # fmt: skip
        access = options.Access(secret_file, key_file, key_variable, allow_untrusted)
        sources = Sources(corpus, "text", id_field, unit, skip_bad, stdin_format, as_json=True)
        _plan_job(job, sources, store, model, namespace, access, batch_size, json)
        return
    sources = Sources(corpus, fields_of(text_field, pair_fields), id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable, allow_untrusted)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"{out} cannot be written: give a file name in an existing folder")
    reading = CorpusReading()
    documents = read(sources, reading, store, namespace, access, model, kind)
    printing.quiet()
    with _opened(store, model, kind, namespace, tau, access) as cache:
        forecast = cache.plan(documents, role=role, batch_size=batch_size)
    if out is not None:
        write_plan(forecast, out)
    if json:
        printing.as_json({**forecast.to_json(), **counts(reading), "bad": reading.bad})
    else:
        show(forecast)
    warnings(reading)


def _plan_job(
    job: jobs.JobOptions,
    sources: Sources,
    store: str,
    model: str | None,
    namespace: str,
    access: options.Access,
    batch_size: int,
    json: bool,
) -> None:
    """Print the forecast of a language-model job."""
    from llmcache.pipeline.pipeline import Pipeline

    printing.quiet()
    arguments, reading = job.arguments(), CorpusReading()
    documents = replace(sources, text_field=job.read_fields(arguments["template"])).documents(reading)
    exists = Path(store, "FORMAT").exists()
    with ExitStack() as stack:
        where = (
            store if exists else str(Path(stack.enter_context(TemporaryDirectory(prefix="llmcache-plan-")), "store"))
        )
        cache = stack.enter_context(jobs.opened(where, model, namespace, access))
        strict = not sources.skip_bad
        pipeline = Pipeline(cache, batch_size=batch_size, id_field=sources.id_field, strict=strict, **arguments)
        forecast = pipeline.plan(documents)
    if json:
        printing.as_json({**forecast.as_dict(), **counts(reading), "bad": reading.bad, "task": job.task})
        return
    printing.facts(
        [
            ("documents", forecast.documents),
            ("without a prompt", forecast.refused),
            ("answers stored", forecast.stored),
            ("repeats inside the corpus", forecast.repeats),
            ("to compute", forecast.computed),
            ("their prompt tokens", forecast.prompt_tokens),
            ("of these restored from the store", forecast.restored),
            ("of these shared with other prompts", forecast.shared),
            ("of these to compute", forecast.new_tokens),
            ("tokens to generate, at most", forecast.generated),
            ("bytes stored per token", forecast.bytes_per_token),
            ("bytes to write, about", printing.size(forecast.new_bytes)),
            ("time, about", seconds_said(forecast.seconds)),
            ("without the cache, about", seconds_said(forecast.uncached_seconds)),
        ]
    )
    warnings(reading)


@contextmanager
def _opened(
    store: str, model: str | None, kind: str | None, namespace: str, tau: float | None, access: options.Access
) -> Iterator[LLMCache]:
    """Open the cache of a store, or a temporary empty one where the store does not exist, so that none is created."""
    from llmcache.cache import LLMCache

    if Path(store, "FORMAT").exists() and (model is None or _has(store, namespace, access)):
        with LLMCache.open(store, model, kind=kind, namespace=namespace, tau=tau, **access.keywords()) as cache:
            yield cache
        return
    if model is None:
        raise ConfigError(f"there is no store in {store} yet; name the model it will be for: --model M")
    with (
        TemporaryDirectory(prefix="llmcache-plan-") as folder,
        LLMCache.open(Path(folder, "store"), model, kind=kind, namespace=namespace, tau=tau) as cache,
    ):
        yield cache


def _has(store: str, namespace: str, access: options.Access) -> bool:
    opened = Store.open(store, **access.of_store())
    try:
        return opened.namespace(namespace) is not None
    finally:
        opened.close()


def write_plan(forecast: Plan, out: Path) -> None:
    """Write a plan, whole or not at all."""
    try:
        write_atomically(out, (jsons.dumps(forecast.to_json(), indent=2) + "\n").encode(), mode=ordinary_mode())
    except OSError as error:
        raise CorpusError(f"{out} cannot be written ({error.strerror or error}); choose another file") from None


def show(forecast: Plan) -> None:
    """Print a plan as text."""
    share = f"{forecast.hit_rate:.1%}" + (f" ± {100 * forecast.margin:.1f} points" if forecast.margin >= 0.0005 else "")
    times = forecast.uncached_seconds / forecast.seconds if forecast.seconds else 0.0
    printing.facts(
        [
            ("documents", forecast.documents),
            ("tokens, about", forecast.tokens),
            ("in the store", forecast.in_store),
            ("in the store by tokens, about", forecast.in_store_by_tokens),
            ("repeats inside the corpus", forecast.repeats),
            ("near, about", f"{forecast.near:,} ({forecast.near_from})"),
            *([] if forecast.drift is None else [("their drift, of all results", _drift(forecast))]),
            ("to compute", forecast.computed),
            ("hits", share),
            ("with the cache", f"{seconds_said(forecast.seconds)} (cost {forecast.cost_from})"),
            ("without the cache", f"{seconds_said(forecast.uncached_seconds)}, {times:.1f} times as long"),
            ("bytes to write", printing.size(forecast.new_bytes)),
            ("bytes of the store afterwards", printing.size(forecast.total_bytes)),
            ("this forecast took", seconds_said(forecast.pass_seconds)),
        ]
    )
    typer.echo()
    printing.facts((f"advice: {advice.about}", f"{advice.value} ({advice.why})") for advice in forecast.advice)


def _drift(forecast: Plan) -> str:
    bound = "" if forecast.bound is None else f", at most {forecast.bound:.2%} with the calibrated confidence"
    return f"{forecast.drift:.2%} expected{bound}"

"""`llmcache plan`: forecast the hits, seconds and bytes of a run."""

from __future__ import annotations

import json as jsons
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcache.cli.shared import options
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
    json: options.Json = False,
) -> None:
    """Forecast hits, seconds and bytes of a run, and advise on its settings. Nothing is stored.

    The corpus is read and hashed, samples of it are tokenised and looked up, and a few batches are computed.
    """
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
        tempfile.TemporaryDirectory(prefix="llmcache-plan-") as folder,
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

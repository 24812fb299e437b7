"""`llmcache plan`: what a run would meet and take, before anything is computed."""

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
from llmcache.cli.shared.corpora import Sources
from llmcache.cli.shared.fill import counts, warnings
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.store import Store
from llmcache.pipeline.files import Reading
from llmcache.planning.plan import Plan, seconds_said
from llmcache.private_files import write_whole

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="The model, for a store that is not there yet, or not trusted.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Keep the plan in this file; run, build and warm take it as --plan.")
]


def plan(
    corpus: options.Corpus,
    store: options.StorePath,
    out: Out = None,
    model: ModelOption = None,
    tau: options.Tau = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    text_field: options.TextField = "text",
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
    sources = Sources(corpus, text_field, id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable, allow_untrusted)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"{out} cannot be written: give the name of a file in a folder that is there")
    reading = Reading()
    documents = sources.documents(reading)
    printing.quiet()
    with _opened(store, model, namespace, tau, access) as cache:
        found = cache.plan(documents, role=role, batch_size=batch_size)
    if out is not None:
        written(found, out)
    if json:
        printing.as_json({**found.to_json(), **counts(reading), "bad": reading.bad})
    else:
        show(found)
    warnings(reading)


@contextmanager
def _opened(
    store: str, model: str | None, namespace: str, tau: float | None, access: options.Access
) -> Iterator[LLMCache]:
    """The cache of a store; of one that is not there yet, an empty one elsewhere, so that none is made."""
    from llmcache.cache import LLMCache

    if Path(store, "FORMAT").exists() and (model is None or _has(store, namespace, access)):
        with LLMCache.open(store, model, namespace=namespace, tau=tau, **access.keywords()) as cache:
            yield cache
        return
    if model is None:
        raise ConfigError(f"there is no store in {store} yet; say which model it will be for: --model M")
    with (
        tempfile.TemporaryDirectory(prefix="llmcache-plan-") as folder,
        LLMCache.open(Path(folder, "store"), model, namespace=namespace, tau=tau) as cache,
    ):
        yield cache


def _has(store: str, namespace: str, access: options.Access) -> bool:
    opened = Store.open(store, **access.of_store())
    try:
        return opened.namespace(namespace) is not None
    finally:
        opened.close()


def written(found: Plan, out: Path) -> None:
    """Write a plan, whole or not at all."""
    try:
        write_whole(out, (jsons.dumps(found.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        raise CorpusError(f"{out} cannot be written ({error.strerror or error}); choose another place") from None


def show(found: Plan) -> None:
    """Print a plan for a person."""
    share = f"{found.hit_rate:.1%}" + (f" ± {100 * found.margin:.1f} points" if found.margin >= 0.0005 else "")
    times = found.uncached_seconds / found.seconds if found.seconds else 0.0
    printing.facts(
        [
            ("documents", found.documents),
            ("tokens, about", found.tokens),
            ("in the store", found.in_store),
            ("in the store by tokens, about", found.in_store_by_tokens),
            ("repeats inside the corpus", found.repeats),
            ("near, about", f"{found.near:,} ({found.near_from})"),
            *([] if found.drift is None else [("their drift, of all results", _drift(found))]),
            ("left to compute", found.computed),
            ("hits", share),
            ("with the cache", f"{seconds_said(found.seconds)} (cost {found.cost_from})"),
            ("without", f"{seconds_said(found.uncached_seconds)}, {times:.1f} times as long"),
            ("bytes to write", printing.size(found.new_bytes)),
            ("bytes of the store then", printing.size(found.total_bytes)),
            ("this forecast took", seconds_said(found.pass_seconds)),
        ]
    )
    typer.echo()
    printing.facts((f"advice: {one.about}", f"{one.value} ({one.why})") for one in found.advice)


def _drift(found: Plan) -> str:
    bound = "" if found.bound is None else f", at most {found.bound:.2%} with the calibrated confidence"
    return f"{found.drift:.2%} expected{bound}"

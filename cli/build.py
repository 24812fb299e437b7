"""`llmcache build`: create a store from corpora."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared.corpora import Sources, fields_of
from llmcache.cli.shared.fill import FillOptions, fill
from llmcache.cli.shared.metrics import MetricsFile
from llmcache.errors import ConfigError

INDEXES = (
    "flat, ivf-flat, ivf-fp16, ivf-sq8, ivf-pq, hnsw, binary-flat, binary-ivf, binary-hnsw, torch, or auto by size."
)


def build(
    corpus: options.Corpus,
    model: options.Model,
    store: options.StorePath,
    kind: options.Kind = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    index: Annotated[str, typer.Option(help=INDEXES)] = "auto",
    fingerprint: Annotated[str, typer.Option(help="mean, or mean+attention.")] = "mean",
    projection: Annotated[str, typer.Option(help="pca, simhash or none.")] = "pca",
    dim: Annotated[int, typer.Option(help="Components of the PCA, or bits of the SimHash.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="Dtype of stored activations: auto, float32, float16, bfloat16, int8.")
    ] = "auto",
    layers: Annotated[str, typer.Option(help='Layers to store: "output", "all", or numbers such as 4,8.')] = "output",
    reuse: Annotated[
        str,
        typer.Option(help="Activation that a near match reuses: deepest, or layer (the paper's rule; needs --layers)."),
    ] = "deepest",
    text_field: options.TextField = "text",
    pair_fields: options.PairFields = None,
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    stdin_format: options.StdinFormat = "jsonl",
    skip_bad: options.SkipBad = False,
    batch_size: options.BatchSize = 32,
    plan: options.PlanFile = None,
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    metrics_file: MetricsFile = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Run corpora through a model once and store the outputs, with a FAISS index over them.

    After an interruption the same command continues where it stopped. Into an existing store it adds the missing
    documents, like `warm`.
    """
    settings = {
        "index": index,
        "fingerprint": fingerprint,
        "projection": projection,
        "dim": dim,
        "dtype": dtype,
        "layers": layer_numbers(layers),
        "reuse": reuse,
    }
    sources = Sources(corpus, fields_of(text_field, pair_fields), id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable)
    fill(
        FillOptions(
            store, model, namespace, role, batch_size, dry_run, json, settings, access, plan, metrics_file, kind
        ),
        sources,
    )


def layer_numbers(text: str) -> str | tuple[int, ...]:
    """Parse --layers: "output", "all", or numbers such as "4,8". ConfigError for anything else."""
    if text in ("output", "all"):
        return text
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f'--layers is "output", "all" or numbers such as 4,8, got {text!r}') from None

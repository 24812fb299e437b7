"""`llmcache warm`: add missing documents to a store."""

from __future__ import annotations

from llmcache.cli.shared import options
from llmcache.cli.shared.corpora import Sources, fields_of
from llmcache.cli.shared.fill import FillOptions, fill
from llmcache.cli.shared.metrics import MetricsFile


def warm(
    corpus: options.Corpus,
    store: options.StorePath,
    namespace: options.Namespace = "default",
    role: options.Role = None,
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
    """Add the documents of corpora that a store lacks, and print how many it had.

    Uses the model that the store was created with.
    """
    sources = Sources(corpus, fields_of(text_field, pair_fields), id_field, unit, skip_bad, stdin_format)
    access = options.Access(secret_file, key_file, key_variable)
    fill(
        FillOptions(store, None, namespace, role, batch_size, dry_run, json, {}, access, plan, metrics_file),
        sources,
    )

"""`llmcache calibrate`: choose the threshold of near reuse for an error budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, fields_of
from llmcache.cli.shared.fill import read, warnings
from llmcache.pipeline.files import CorpusReading


def calibrate(
    store: options.StorePath,
    budget: Annotated[float, typer.Option(help="Highest mean drift over all results: 0.005 is one in 200.")],
    sample: Annotated[
        list[str] | None,
        typer.Argument(
            help="Held-out documents, not in the store; without any, the entries are cross-fitted against each other."
        ),
    ] = None,
    drift: Annotated[
        str,
        typer.Option(
            help="label (of --head), accuracy (of --head, by --truth), cosine, beyond (1 - cosine above --limit) or kl."
        ),
    ] = "beyond",
    limit: Annotated[
        float | None, typer.Option(help="Limit of 1 - cosine for beyond (default 0.05), of nats for kl.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="For label: .npz with weights [classes, width] and offset [classes].")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="For accuracy: the correct class of each document of the sample, one number per line."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the bound; 0 uses the measured drift without a bound.")
    ] = 0.95,
    guard: Annotated[
        bool, typer.Option(help="Refuse matches whose numbers, dates, identifiers, quotations or negations differ.")
    ] = True,
    guard_kinds: Annotated[
        str | None, typer.Option(help="Only these kinds of fields, such as number,date,identifier,quoted,negation.")
    ] = None,
    guard_pattern: Annotated[
        str,
        typer.Option(help="Regular expression for further fields that must be equal, in texts stored from now on."),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Write the calibration curve to this image (needs matplotlib).")
    ] = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    text_field: options.TextField = "text",
    pair_fields: options.PairFields = None,
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    json: options.Json = False,
) -> None:
    """Choose the threshold of near reuse so that the mean drift over all results stays within a budget.

    The threshold is saved with the store, and `run` uses it. Where no threshold is safe, near reuse stays off.
    """
    from llmcache.cache import LLMCache
    from llmcache.encoding.heads import answers_from_file, head_from_file
    from llmcache.near.calibration.drift import DriftKind

    printing.quiet()
    reading = CorpusReading()
    answers = None if truth is None else answers_from_file(truth)
    access = options.Access(secret_file, key_file, key_variable)
    documents = None
    if sample:
        sources = Sources(sample, fields_of(text_field, pair_fields), id_field, unit)
        documents = read(sources, reading, store, namespace, access)
    classifier, kind = head_from_file(head) if head is not None else None, cast(DriftKind, drift)
    with LLMCache.open(store, namespace=namespace, **access.keywords()) as cache:
        calibration = cache.calibrate(
            documents, budget=budget, drift=kind, head=classifier, truth=answers, limit=limit,
            confidence=confidence or None, guard_pattern=guard_pattern, role=role,
            guard=tuple(guard_kinds.replace(",", " ").split()) if guard and guard_kinds else guard,
        )  # fmt: skip
    if plot is not None:
        from llmcache.near.calibration.plotting import curve

        curve(calibration, plot)
    if json:
        printing.as_json(calibration.to_json())
        return
    shown = calibration.curve[:: max(1, len(calibration.curve) // 12)]
    printing.table(
        ["threshold", "hits", "drift", "bound"],
        [[f"{t:.3f}", f"{hits:.1%}", f"{mean:.3%}", f"{bound:.3%}"] for t, hits, mean, bound in shown],
    )
    on = calibration.threshold is not None
    printing.facts(
        [
            ("near reuse", "on" if on else "off"),
            ("reason", calibration.reason),
            ("documents measured", calibration.samples),
            *([("hits", f"{calibration.hits:.1%}"), ("drift measured", f"{calibration.expected:.3%}"),
               ("upper bound, all results", f"{calibration.bound:.3%}"),
               ("upper bound, near hits", f"{calibration.bound_of_hits:.3%}")] if on else []),
            *([("further documents needed", calibration.needed)] if calibration.needed else []),
        ]
    )  # fmt: skip
    warnings(reading)

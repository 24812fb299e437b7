"""`llmcache calibrate`: from a budget to what near matches may be given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources
from llmcache.cli.shared.fill import warnings
from llmcache.pipeline.files import Reading


def calibrate(
    store: options.StorePath,
    budget: Annotated[float, typer.Option(help="Highest mean drift of all results: 0.005 is one in 200.")],
    sample: Annotated[
        list[str] | None,
        typer.Argument(help="Documents the store does not know; without any, its own entries, each against others."),
    ] = None,
    drift: Annotated[
        str,
        typer.Option(
            help="label (of --head), accuracy (of --head, by --truth), cosine, beyond (1 - cosine above --limit) or kl."
        ),
    ] = "beyond",
    limit: Annotated[float | None, typer.Option(help="For beyond: 1 - cosine that counts, 0.05; for kl: nats.")] = None,
    head: Annotated[
        Path | None, typer.Option(help="For label: .npz with weights [classes, width] and offset [classes].")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="For accuracy: the head's right answer to each document of the sample, a number per line."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="With which the bound holds; 0 takes the drift as measured, without a bound.")
    ] = 0.95,
    guard: Annotated[
        bool, typer.Option(help="Refuse matches whose numbers, dates, identifiers, quotations or negations differ.")
    ] = True,
    guard_kinds: Annotated[
        str | None, typer.Option(help="Only these kinds of fields, such as number,date,identifier,quoted,negation.")
    ] = None,
    guard_pattern: Annotated[
        str,
        typer.Option(
            help="A regular expression for fields of your own that have to be the same, in texts stored from now on."
        ),
    ] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into this image (needs matplotlib).")] = None,
    namespace: options.Namespace = "default",
    role: options.Role = None,
    text_field: options.TextField = "text",
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    json: options.Json = False,
) -> None:
    """Choose what near matches may be given, so that the drift of all results stays within a budget.

    The choice is saved with the store, and `run` goes by it; where no threshold is safe, near reuse stays off.
    """
    from llmcache.cache import LLMCache
    from llmcache.encoding.heads import answers_from_file, head_from_file
    from llmcache.near.calibration.drift import DriftKind

    printing.quiet()
    reading = Reading()
    right = None if truth is None else answers_from_file(truth)
    documents = Sources(sample, text_field, id_field, unit).documents(reading) if sample else None
    decides, kind = head_from_file(head) if head is not None else None, cast(DriftKind, drift)
    access = options.Access(secret_file, key_file, key_variable).keywords()
    with LLMCache.open(store, namespace=namespace, **access) as cache:
        found = cache.calibrate(
            documents, budget=budget, drift=kind, head=decides, truth=right, limit=limit,
            confidence=confidence or None, guard_pattern=guard_pattern, role=role,
            guard=tuple(guard_kinds.replace(",", " ").split()) if guard and guard_kinds else guard,
        )  # fmt: skip
    if plot is not None:
        from llmcache.near.calibration.plotting import curve

        curve(found, plot)
    if json:
        printing.as_json(found.to_json())
        return
    shown = found.curve[:: max(1, len(found.curve) // 12)]
    printing.table(
        ["threshold", "hits", "drift", "bound"],
        [[f"{t:.3f}", f"{hits:.1%}", f"{mean:.3%}", f"{bound:.3%}"] for t, hits, mean, bound in shown],
    )
    on = found.threshold is not None
    printing.facts(
        [
            ("near reuse", "on" if on else "off"),
            ("because", found.reason),
            ("documents behind it", found.samples),
            *([("hits", f"{found.hits:.1%}"), ("drift measured", f"{found.expected:.3%}"),
               ("upper bound, all results", f"{found.bound:.3%}"),
               ("upper bound, near hits", f"{found.bound_of_hits:.3%}")] if on else []),
            *([("documents still needed", found.needed)] if found.needed else []),
        ]
    )  # fmt: skip
    warnings(reading)

"""`llmcache bench near`, `reuse`, `rivals` and `guard`: near reuse within a budget, and the field guard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

Data = Annotated[Path, typer.Option("--data", help="Folder with labelled train and test as .csv, .tsv or .txt.")]


def near(
    data: Data,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of cross-fitting folds and samples.")] = 5,
    budget: Annotated[float, typer.Option(help="Share of all results that may change their label.")] = 0.005,
    exact: Annotated[bool, typer.Option(help="Also measure the exact kernel ridge of scikit-learn.")] = False,
    json: options.Json = False,
) -> None:
    """Fit and calibrate on train, report on test: hits, changed labels, accuracy, recall over the reused vectors."""
    from llmcache.bench import near as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measuring.near(demo_model(), data, seeds=seeds, budget=budget, exact=exact)
    found = measuring.summary(rows)
    if json:
        printing.as_json({**conditions(), "data": data.name, "seeds": seeds, "summary": found, "rows": rows})
        return
    printing.table(
        ["method", "drift of", "budget", "hits", "drift", "worst", "accuracy drop"],
        [
            [one["method"], one["drift_is"], one["budget"], f"{one['hits']:.1%}", f"{one['drift']:.3%}",
             f"{one['worst_drift']:.3%}", f"{one['accuracy_drop']:.2%}"]
            for one in found
        ],
    )  # fmt: skip
    printing.facts(conditions().items())


def reusing(
    data: Data,
    drift: Annotated[str, typer.Option(help="accuracy, or label.")] = "accuracy",
    budget: Annotated[float, typer.Option(help="Budget of the mean drift over all results.")] = 0.005,
    confidence: Annotated[float, typer.Option(help="Confidence of the bound; 0 uses the measured drift.")] = 0.0,
    guard: Annotated[bool, typer.Option(help="Refuse hits whose fields differ.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of cross-fitting folds.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each run, in turn with the model alone.")] = 3,
    json: options.Json = False,
) -> None:
    """Run a cache that holds train and is calibrated on it over test, beside the model alone."""
    from llmcache.bench import reusing as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measuring.reusing(
        demo_model(),
        data,
        drift=drift,
        budget=budget,
        confidence=confidence or None,
        guard=guard,
        seeds=seeds,
        repeats=repeats,
    )
    if json:
        printing.as_json({**conditions(), "data": data.name, "rows": rows})
        return
    printing.table(
        ["seed", "hits", "flips", "accuracy drop", "times the model alone", "with loading", "look-up ms", "audits"],
        [
            [one["seed"], f"{one['hits']:.1%}", f"{one['flips']:.2%}", f"{one['accuracy_drop']:.2%}",
             f"{one['ratio']:.2f}", f"{one['with_first']:.2f}", f"{one['look_up_milliseconds']:.3f}", one["audits"][0]]
            for one in rows
        ],
    )  # fmt: skip
    for one in rows:
        typer.echo(f"seed {one['seed']}: {one['reason']}; near reuse was {one['state'][0]}")
    printing.facts(conditions().items())


def rivals(
    data: Data,
    budget: Annotated[float, typer.Option(help="Share of all results that may be wrong.")] = 0.005,
    json: options.Json = False,
) -> None:
    """Count hits and wrong hits beside a fixed similarity and a cache of final outputs, on the same fingerprints."""
    from llmcache.bench.competitors import gptcache_rule as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measuring.rivals(demo_model(), data, budget=budget)
    if json:
        printing.as_json({**conditions(), "data": data.name, "rows": rows})
        return
    names = [name for name in rows[0] if name not in ("asked", "hit_rate", "wrong_of_hits", "wrong_of_all", "budget")]
    printing.table(
        [*names, "hit rate", "wrong, of hits"],
        [[*(one[name] for name in names), f"{one['hit_rate']:.1%}", f"{one['wrong_of_hits']:.1%}"] for one in rows],
    )
    printing.facts([("asked", rows[0]["asked"]), *conditions().items()])


def _cell(value: Any) -> Any:
    """Return a cell of a table: counts by kind as text, everything else as it is."""
    if isinstance(value, dict):
        return ", ".join(f"{kind} {count:,}" for kind, count in value.items()) or "none"
    return value


def guarded(
    data: Annotated[Path, typer.Option("--data", help="Folder of the pair and revision corpora.")],
    json: options.Json = False,
) -> None:
    """Count the pairs accepted with and without the field guard, and their precision."""
    from llmcache.bench import guard as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measuring.measure(data, demo_model().encode)
    if json:
        printing.as_json({**conditions(), "rows": rows})
        return
    by_columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_columns.setdefault(tuple(row), []).append(row)
    for names, some in by_columns.items():
        printing.table([name.replace("_", " ") for name in names], [list(map(_cell, row.values())) for row in some])
    printing.facts(conditions().items())

"""Benchmarks of near reuse within a budget, and of the field guard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.bench.command import BenchRecord, loaded
from llmcache.cli.shared import output as printing

Data = Annotated[Path, typer.Option("--data", help="Folder with labelled train and test as .csv, .tsv or .txt.")]


def near(
    data: Data,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of cross-fitting folds and samples.")] = 5,
    budget: Annotated[float, typer.Option(help="Share of all results that may change their label.")] = 0.005,
    exact: Annotated[bool, typer.Option(help="Also measure the exact kernel ridge of scikit-learn.")] = False,
) -> BenchRecord:
    """Fit and calibrate on train, report on test: hits, changed labels, accuracy, recall over the reused vectors."""
    from llmcache.bench.near import near

    return {"data": data.name, **near(loaded(), data, seeds=seeds, budget=budget, exact=exact)}


def reusing(
    data: Data,
    drift: Annotated[str, typer.Option(help="accuracy, or label.")] = "accuracy",
    budget: Annotated[float, typer.Option(help="Budget of the mean drift over all results.")] = 0.005,
    confidence: Annotated[float, typer.Option(help="Confidence of the bound; 0 uses the measured drift.")] = 0.0,
    guard: Annotated[bool, typer.Option(help="Refuse hits whose fields differ.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of cross-fitting folds.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each run, in turn with the model alone.")] = 3,
) -> BenchRecord:
    """Run a cache that holds train and is calibrated on it over test, beside the model alone."""
    from llmcache.bench.reusing import reusing

    settings: dict[str, Any] = {"drift": drift, "budget": budget, "confidence": confidence or None, "guard": guard}
    return {"data": data.name, "rows": reusing(loaded(), data, **settings, seeds=seeds, repeats=repeats)}


def show_reusing(record: BenchRecord) -> None:
    """Print the reason of each threshold, and the state of near reuse."""
    for row in record["rows"]:
        typer.echo(f"seed {row['seed']}: {row['reason']}; near reuse was {row['state'][0]}")


def rivals(
    data: Data,
    budget: Annotated[float, typer.Option(help="Share of all results that may be wrong.")] = 0.005,
) -> BenchRecord:
    """Count hits and wrong hits beside a fixed similarity and a cache of final outputs, on the same fingerprints."""
    from llmcache.bench.competitors.gptcache_rule import rivals

    return {"data": data.name, "rows": rivals(loaded(), data, budget=budget)}


def show_rivals(record: BenchRecord) -> None:
    """Print the rules, with the labels of pairs where the data have them."""
    rows = record["rows"]
    names = [name for name in ("method", "hits", "wrong", "labelled_hits", "labelled_wrong") if name in rows[0]]
    printing.table(
        [*names, "hit rate", "wrong, of hits"],
        [[*(row[name] for name in names), f"{row['hit_rate']:.1%}", f"{row['wrong_of_hits']:.1%}"] for row in rows],
    )


def guarded(
    data: Annotated[Path, typer.Option("--data", help="Folder of the pair and revision corpora.")],
) -> BenchRecord:
    """Count the pairs accepted with and without the field guard, and their precision."""
    from llmcache.bench.guard import measure

    return {"rows": measure(data, loaded().encode)}


def show_guarded(record: BenchRecord) -> None:
    """Print one table for all rows of the same columns."""
    by_columns: dict[tuple[str, ...], list[BenchRecord]] = {}
    for row in record["rows"]:
        by_columns.setdefault(tuple(row), []).append(row)
    for names, some in by_columns.items():
        printing.table([name.replace("_", " ") for name in names], [list(map(_counts, row.values())) for row in some])


def _counts(value: Any) -> Any:
    """Format counts by kind as text; other values stay."""
    if isinstance(value, dict):
        return ", ".join(f"{kind} {count:,}" for kind, count in value.items()) or "none"
    return value

"""`llmcache bench near` and `bench guard`: near reuse within a budget, and what the field guard refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli import options, printing


def near(
    data: Annotated[Path, typer.Option("--data", help="Folder with labelled train and test as .csv, .tsv or .txt.")],
    seeds: Annotated[int, typer.Option(min=1, help="Foldings and draws.")] = 5,
    budget: Annotated[float, typer.Option(help="Share of all results that may change their label.")] = 0.005,
    exact: Annotated[bool, typer.Option(help="Also the exact kernel ridge of scikit-learn.")] = False,
    json: options.Json = False,
) -> None:
    """Fit and calibrate on train, report on test: hits, flips, accuracy, and recall over the reused vectors."""
    from llmcache.bench import near as measuring
    from llmcache.bench.conditions import conditions
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


def guarded(
    data: Annotated[Path, typer.Option("--data", help="Folder that holds the pair and revision corpora.")],
    json: options.Json = False,
) -> None:
    """Pairs accepted with and without the field guard, and their precision."""
    from llmcache.bench import guard as measuring
    from llmcache.bench.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measuring.measure(data, demo_model().encode)
    if json:
        printing.as_json({**conditions(), "rows": rows})
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    printing.table(names, [[row.get(name) for name in names] for row in rows])
    printing.facts(conditions().items())

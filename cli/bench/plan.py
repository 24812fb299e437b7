"""`llmcache bench plan`: forecasts of runs beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def plan(
    data: Annotated[Path, typer.Option("--data", help="Folder with cls-banking77, the policies and the logs.")],
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 3,
    only: Annotated[str, typer.Option(help="Cases whose names contain this.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=100, help="At most this many documents stored, and in the run.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare hits and seconds forecast by `llmcache plan` with those of the run; measure the forecast's time."""
    from llmcache.bench.harness.conditions import conditions
    from llmcache.bench.planning import measured
    from llmcache.demo import demo_model

    printing.quiet()
    rows = measured(
        demo_model(), data, repeats=repeats, wanted=only, limit=limit, say=lambda line: typer.echo(line, err=True)
    )
    if json:
        printing.as_json({**conditions(), "data": data.name, "rows": rows})
        return
    printing.table(
        ["", "documents", "hits forecast", "hits", "s forecast", "s", "uncached s forecast", "uncached s", "pass"],
        [
            [one["case"], one["documents"], f"{one['forecast_hit_rate']:.1%}", f"{one['hit_rate']:.1%}",
             f"{one['forecast_seconds']:.1f}", f"{one['seconds']:.1f}", f"{one['forecast_uncached']:.1f}",
             f"{one['uncached']:.1f}", f"{one['pass_share']:.2%}"]
            for one in rows
        ],
    )  # fmt: skip
    printing.facts(conditions().items())

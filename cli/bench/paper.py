"""`llmcache bench paper`: the experiments of the paper (arXiv 2512.16843), measured with this implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.bench.command import BenchRecord, say
from llmcache.cli.shared import output as printing


def paper(
    data: Annotated[Path, typer.Option(help="Folder of the public data sets.")],
    models: Annotated[Path, typer.Option(help="Folder with tok-bert-base-uncased and tok-gpt2.")],
    only: Annotated[
        str | None,
        typer.Option(
            help="Experiments, separated by commas: latency, layers, accuracy, memory, tau, fingerprints, eviction."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=32, help="At most this many stored documents; a quarter of it as queries.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds of timed experiments.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the records and figures; existing ones are kept.")] = Path(
        "results/paper"
    ),
    again: Annotated[bool, typer.Option("--again", help="Measure existing records again.")] = False,
) -> BenchRecord:
    """Measure the paper's tables: latency, hits per layer, accuracy, memory; tau, fingerprints, eviction.

    Each experiment has one JSON file and one figure, written part by part. After an interruption the same command
    continues.
    """
    from llmcache.bench.paper import records
    from llmcache.bench.paper.experiments import EXPERIMENTS
    from llmcache.bench.paper.plots import plot
    from llmcache.errors import ConfigError

    names = records.chosen(EXPERIMENTS, only)
    printing.quiet()
    work = records.Work(data, models, limit, repeats)
    found = records.run(EXPERIMENTS, names, work, out, again=again, say=say)
    for record in found:
        try:
            plot(record, out / f"{record['experiment']}.png")
        except ConfigError as error:
            say(f"{record['experiment']}: no figure: {error}")
    return {"out": str(out), "records": found}


def show(record: BenchRecord) -> None:
    """Print the table of each experiment, and the parts left out."""
    from llmcache.bench.paper.records import rows
    from llmcache.bench.paper.tables import BLOCKS

    for one in record["records"]:
        typer.echo(f"\n{one['experiment']}\n\n{BLOCKS[one['experiment']](rows(one))}")
        for part, reason in one["skipped"].items():
            typer.echo(f"left out: {part}: {reason}")

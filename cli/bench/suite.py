"""`llmcache bench list` and `bench run`: named benchmarks beside rivals, recorded in a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.bench.command import BenchRecord, Cell, Columns, Gpt2Folder, ModelName, loaded, say
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

DATA = "Folder of the data sets; `llmcache bench list --data DIR` shows missing ones."
_COLUMNS: dict[str, Cell] = {
    "": "name", "texts": "documents", "per second": "per_second:,.0f", "x model": "ratio:.2f",
    "slowest/quickest": lambda row: _spread(row["slowest_of_quickest"]), "computed": "computed",
    "max diff": "difference:.1e",
}  # fmt: skip


def list_(
    data: Annotated[Path | None, typer.Option("--data", help=DATA)] = None, tokenizer: Gpt2Folder = None
) -> BenchRecord:
    """List the benchmarks of `bench run`, with their missing data and rivals."""
    from llmcache.bench.harness.suite import benchmarks, rivals

    found = [
        {"name": one.name, "about": one.about, "needs": list(one.needs),
         "missing": None if data is None else one.missing(data, tokenizer) or None}
        for one in benchmarks().values()
    ]  # fmt: skip
    return {"benchmarks": found, "rivals_left_out": {one.name: one.missing for one in rivals() if one.missing}}


def show_list(record: BenchRecord) -> None:
    """Print each benchmark with the reason why it cannot run, and the rivals that cannot take part."""
    printing.facts(
        (one["name"], one["about"] + (f" (cannot run: {one['missing']})" if one["missing"] else ""))
        for one in record["benchmarks"]
    )
    typer.echo()
    for name, why in record["rivals_left_out"].items():
        typer.echo(f"{name}: {why}")


def run(
    names: Annotated[list[str], typer.Argument(help="Names of `bench list`, patterns such as 'hit-*', or all.")],
    data: Annotated[Path, typer.Option("--data", help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder for NAME.json and NAME.png of each benchmark.")] = Path("results"),
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, or seeds where a benchmark has these.")] = 3,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many texts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of streams and samples.")] = 0,
    tokenizer: Gpt2Folder = None,
    model: ModelName = None,
    again: Annotated[bool, typer.Option("--again", help="Measure recorded benchmarks again.")] = False,
    json: options.Json = False,
) -> None:
    """Measure benchmarks one after the other, and write each record when it is complete.

    After Ctrl-C the same command continues. Exit code 1 when a benchmark could not be measured.
    """
    from functools import cache

    from llmcache.bench.harness import recording
    from llmcache.bench.harness.suite import Sizes, chosen
    from llmcache.errors import ConfigError

    wanted = chosen(names)
    if not data.is_dir():
        raise ConfigError(f"{data} is no folder; --data names the folder of the data sets")
    sizes = Sizes(data, repeats, limit, seed, tokenizer, model=cache(lambda: loaded(model)))
    # records are shared, so paths of this machine are replaced
    folders = {str(data): "DATA", str(out): "OUT", str(tokenizer): "TOKENIZER", str(model): "MODEL"}
    command = " ".join(["llmcache", *(folders.get(word, word) for word in sys.argv[1:])])
    failures = 0
    for one, record in recording.run(wanted, sizes, out, command, again=again, say=say):
        failures += "skipped" in record or "failed" in record
        if json:
            printing.as_json(record)
        else:
            _show(one.name, record)
    if failures:
        typer.echo(f"llmcache: {failures} of {len(wanted)} could not be measured", err=True)
        raise typer.Exit(1)


def _show(name: str, record: BenchRecord) -> None:
    if why := record.get("skipped") or record.get("failed"):
        typer.echo(f"{name}: not measured: {why}")
        return
    if "kept" in record:
        typer.echo(
            f"{name}: recorded already in {record['kept']}, at commit {record['commit']}; --again measures again"
        )
        return
    rows = record.get("rows")
    if isinstance(rows, list) and "per_second" in rows[0]:
        measured = [row for row in rows if "skipped" not in row]
        Columns(_COLUMNS, title=f"{name}: {record['about']}").show({"rows": measured})
        for row in rows:
            if "skipped" in row:
                typer.echo(f"{row['name']}: {row['skipped']}")
            if "noted" in row:
                typer.echo(f"{row['name']}: {', '.join(f'{key}: {value}' for key, value in row['noted'].items())}")
    else:
        typer.echo(f"{name}: measured")
    for target in record.get("targets", ()):
        if target["found"] is not None:
            met = "met" if target["met"] else "not met"
            typer.echo(
                f"{target['contender']}: {target['found']:.3g} times {target['base']}, "
                f"wanted {target['at_least']:g}: {met}"
            )
    for note in record["notes"]:
        typer.echo(f"note: {note}")


def _spread(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"

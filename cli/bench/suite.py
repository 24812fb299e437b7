"""`llmcache bench list` and `bench run`: named benchmarks beside rivals, recorded in a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

DATA = "Folder of the data sets; `llmcache bench list --data DIR` shows missing ones."


def list_(
    data: Annotated[Path | None, typer.Option("--data", help=DATA)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of GPT-2's tokenizer, for the decoders.")] = None,
    json: options.Json = False,
) -> None:
    """List the benchmarks of `bench run`, with their missing data and rivals."""
    from llmcache.bench.harness.suite import benchmarks, rivals

    found = [
        {"name": one.name, "about": one.about, "needs": list(one.needs),
         "missing": None if data is None else one.missing(data, tokenizer) or None}
        for one in benchmarks().values()
    ]  # fmt: skip
    absent = {one.name: one.missing for one in rivals() if one.missing}
    if json:
        printing.as_json({"benchmarks": found, "rivals_left_out": absent})
        return
    printing.facts((str(one["name"]), f"{one['about']}{_lacking(one['missing'])}") for one in found)
    typer.echo()
    for name, why in absent.items():
        typer.echo(f"{name}: {why}")


def _lacking(missing: object) -> str:
    return f" (cannot run: {missing})" if missing else ""


def run(
    names: Annotated[list[str], typer.Argument(help="Names of `bench list`, patterns such as 'hit-*', or all.")],
    data: Annotated[Path, typer.Option("--data", help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder for NAME.json and NAME.png of each benchmark.")] = Path("results"),
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, or seeds where a benchmark has these.")] = 3,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many texts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of streams and samples.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of GPT-2's tokenizer, for the decoders.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to use instead of all-MiniLM-L6-v2 of the demo extra.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure recorded benchmarks again.")] = False,
    json: options.Json = False,
) -> None:
    """Measure benchmarks one after the other, and write each record when it is complete.

    After Ctrl-C the same command continues. Exit code 1 when a benchmark could not be measured.
    """
    from functools import cache

    from sentence_transformers import SentenceTransformer

    from llmcache.bench.harness import recording
    from llmcache.bench.harness.suite import Sizes, chosen
    from llmcache.demo import demo_model
    from llmcache.errors import ConfigError

    wanted = chosen(names)
    if not data.is_dir():
        raise ConfigError(f"{data} is no folder; --data names the folder of the data sets")
    printing.quiet()
    load = cache(lambda: SentenceTransformer(model) if model else demo_model())
    sizes = Sizes(data, repeats, limit, seed, tokenizer, model=load)
    # records are shared, so paths of this machine are replaced
    folders = {str(data): "DATA", str(out): "OUT", str(tokenizer): "TOKENIZER", str(model): "MODEL"}
    command = " ".join(["llmcache", *(folders.get(word, word) for word in sys.argv[1:])])
    failures = 0
    for one, record in recording.run(wanted, sizes, out, command, again=again, say=_print_line):
        failures += "skipped" in record or "failed" in record
        if json:
            printing.as_json(record)
        else:
            _show(one.name, record)
    if failures:
        typer.echo(f"llmcache: {failures} of {len(wanted)} could not be measured", err=True)
        raise typer.Exit(1)


def _print_line(line: str) -> None:
    typer.echo(line, err=True)


def _show(name: str, record: dict[str, Any]) -> None:
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
        printing.table(
            ["", "texts", "per second", "x model", "slowest/quickest", "computed", "max diff"],
            [_cells(row) for row in rows if "skipped" not in row],
            title=f"{name}: {record['about']}",
        )
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


def _cells(row: dict[str, Any]) -> list[object]:
    spread = row["slowest_of_quickest"]
    return [
        row["name"], row["documents"], f"{row['per_second']:,.0f}", f"{row['ratio']:.2f}",
        "-" if spread is None else f"{spread:.2f}", row["computed"], f"{row['difference']:.1e}",
    ]  # fmt: skip

"""Benchmarks of stores and indexes: rows, opening, search, limits of the machine, and very many documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.bench.scale import COMPUTED, Job, arithmetic
from llmcache.cli.bench.command import BenchRecord, Limit, ModelName, Repeats, loaded, texts
from llmcache.cli.shared import amounts, options
from llmcache.cli.shared import output as printing

KINDS = "flat,ivf-flat,ivf-fp16,ivf-sq8,ivf-pq,hnsw"


def index(
    kinds: Annotated[str, typer.Option(help="Index kinds, separated by commas.")] = KINDS,
    count: Annotated[int, typer.Option(min=1000, help="Vectors.")] = 100_000,
    dim: Annotated[int, typer.Option(min=8, help="Components of a vector.")] = 128,
) -> BenchRecord:
    """Measure recall and search time of the FAISS indexes on clustered vectors, with queries in batches of 64."""
    from llmcache.bench.encoding import index

    return {"rows": index(kinds.split(","), count=count, dim=dim)}


def open_(
    model: ModelName = None,
    count: Annotated[int, typer.Option(min=1000, help="Synthetic entries in the store.")] = 100_000,
    repeats: Repeats = 3,
) -> BenchRecord:
    """Measure time and memory from opening a large store to its first exact and first near answer."""
    from llmcache.bench.encoding import reopen
    from llmcache.demo import demo_model_path

    return reopen(str(Path(model) if model else demo_model_path()), count=count, repeats=repeats)


def store(
    payload: Annotated[str, typer.Option(help="Bytes of activations in the store of each row size.")] = "1GiB",
    rows: Annotated[str, typer.Option("--rows", help="Row sizes, separated by commas.")] = "256KiB,1536",
    folder: Annotated[
        str | None,
        typer.Option(help="Folder for the stores, on the disk to measure. Default: the folder for temporary files."),
    ] = None,
    repeats: Repeats = 5,
) -> BenchRecord:
    """Compare rows written, read and merged per second with bare system calls; measure bytes added per entry."""
    from llmcache.bench.store import measured

    sizes = [amounts.size(text) for text in rows.split(",")]
    return {"payload": payload, **measured(sizes, amounts.size(payload), folder, repeats)}


def show_store(record: BenchRecord) -> None:
    """Print a table of rates and merges, and the bytes added, for each row size."""
    for added in record["overhead"]:
        size = added["row_bytes"]
        rates, merges = ([row for row in record[kind] if row["row_bytes"] == size] for kind in ("rates", "merges"))
        cells = [[_operation(row), row["contender"], f"{row['rows_per_second']:,.0f}", *_ratios(row)] for row in rates]
        cells += [["merge", row["contender"], "", *_ratios(row)] for row in merges]
        columns = ["", "contender", "rows/s", "MiB/s", "x", "best", "of"]
        printing.table(columns, cells, title=f"{size:,}-byte rows")
        typer.echo(
            f"Beyond activations, fingerprints and token ids: {added['overhead_bytes_per_entry']:.1f} bytes per entry, "
            f"{added['overhead_share']:.2%}.\n"
        )
    typer.echo(record["cold"])
    typer.echo("x: median of the repeats, each against its own base; best: of the quickest repeats.")


def _operation(rate: BenchRecord) -> str:
    return ", ".join(filter(None, (rate["operation"], rate["cache"], rate["cache"] and rate["order"])))


def _ratios(row: BenchRecord) -> list[str]:
    ratios = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio", "ratio_of_best")]
    return [f"{row['mib_per_second']:,.0f}", *ratios, row["base"]]


def place(record: BenchRecord) -> Iterable[tuple[str, object]]:
    """Return the file system of the stores, and the load of the machine."""
    return [("file system", record["file_system"]), _load(record)]


def _load(record: BenchRecord) -> tuple[str, str]:
    return "load", " to ".join(f"{load:.1f}" for load in record["load"])


def roofline(
    data: Annotated[list[str], typer.Option("--data", help="Corpus of short documents; repeatable.")],
    entries: Annotated[str, typer.Option(help="Store sizes for near look-ups, separated by commas.")] = (
        "10000,1000000"
    ),
    repeats: Repeats = 5,
    limit: Limit = 3000,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
) -> BenchRecord:
    """Compare bytes and operations of each tier with memory copy and matrix product, measured in turn."""
    from llmcache.errors import ConfigError

    try:
        sizes = [int(size) for size in entries.split(",")]
    except ValueError:
        raise ConfigError(f"--entries are whole numbers separated by commas, got {entries!r}") from None
    if min(sizes) < 1000:
        raise ConfigError(f"a near look-up is measured among at least 1,000 entries, got {min(sizes):,}")
    from llmcache.bench.roofline import roofline

    found = roofline(loaded(), texts(data, limit, text_field, unit), repeats=repeats, entries=sizes)
    return {"data": data, **found}


def limits(record: BenchRecord) -> Iterable[tuple[str, object]]:
    """Return the limits of the machine, and its load."""
    return [
        ("memory copy", f"{record['copy_bytes_per_second'] / 1e9:.1f} GB/s"),
        ("matrix product", f"{record['operations_per_second'] / 1e9:.0f} GFLOP/s"),
        _load(record),
    ]


def scale(
    documents: Annotated[float, typer.Option(help="Number of documents; 1e9 is a billion.")] = 1e9,
    width: Annotated[int, typer.Option(min=1, help="Components of an output.")] = 384,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per document.")] = 150,
    shards: Annotated[int, typer.Option(min=1, help="Stores, one per machine.")] = 16,
    memory: Annotated[str, typer.Option(help="Memory of a machine.")] = "64GB",
    gigabits: Annotated[float, typer.Option(help="Network speed of a machine, gigabits per second.")] = 10,
    rate: Annotated[float, typer.Option(help="Documents that one machine computes per second.")] = COMPUTED,
    index: Annotated[str, typer.Option(help="ivf-sq8, ivf-fp16 or hnsw.")] = "ivf-sq8",
) -> BenchRecord:
    """Estimate disk, memory, network and time for a corpus, from constants measured on two cores."""
    return {"rows": arithmetic(Job(documents, width, tokens, shards, amounts.size(memory), gigabits, rate, index))}


def shown(value: Any) -> str:
    """Format an estimate: three figures below 1,000, grouped digits above."""
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else printing.formatted(value)

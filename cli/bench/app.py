"""`llmcache bench`: repeatable measurements, among them the figures of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.bench import decoding as bench_decoding
from llmcache.cli.bench import gpu as bench_gpu
from llmcache.cli.bench import layers as bench_layers
from llmcache.cli.bench import near as bench_near
from llmcache.cli.bench import paper as bench_paper
from llmcache.cli.bench import pipelines as bench_pipelines
from llmcache.cli.bench import plan as bench_plan
from llmcache.cli.bench import ray as bench_ray
from llmcache.cli.bench import roofline as bench_roofline
from llmcache.cli.bench import scale as bench_scale
from llmcache.cli.bench import suite as bench_suite
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

app = typer.Typer(
    help="Measure on this machine: medians and ratios of contenders that run in turn in one process.",
    no_args_is_help=True,
)

app.command(name="list")(bench_suite.list_)
app.command()(bench_suite.run)
app.command()(bench_layers.layers)
app.command()(bench_decoding.decoding)
app.command()(bench_near.near)
app.command(name="reuse")(bench_near.reusing)
app.command()(bench_near.rivals)
app.command()(bench_ray.ray)
app.command()(bench_roofline.roofline)
app.command()(bench_scale.scale)
app.command(name="guard")(bench_near.guarded)
app.command()(bench_pipelines.pipeline)
app.command()(bench_pipelines.chunks)
app.command()(bench_plan.plan)
app.command()(bench_gpu.gpu)
app.command()(bench_paper.paper)

KINDS = "flat,ivf-flat,ivf-fp16,ivf-sq8,ivf-pq,hnsw"
Repeats = Annotated[int, typer.Option(min=1, help="Measured rounds.")]
BenchModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Model to use instead of all-MiniLM-L6-v2 of the demo extra.")
]


@app.command()
def encode(
    data: Annotated[list[str], typer.Option("--data", help="Corpus to encode; repeatable.")],
    model: BenchModel = None,
    repeats: Repeats = 3,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many documents.")] = None,
    batch_size: options.BatchSize = 32,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
    json: options.Json = False,
) -> None:
    """Compare the model alone with a cache that holds none, all and half of the corpus."""
    from itertools import islice

    from sentence_transformers import SentenceTransformer

    from llmcache.bench import encoding as bench
    from llmcache.demo import demo_model
    from llmcache.pipeline.files import documents

    printing.quiet()
    loaded = SentenceTransformer(model) if model else demo_model()
    texts = [document.text for document in islice(documents(data, text_field=text_field, unit=unit), limit)]
    rows = bench.encode(loaded, texts, repeats=repeats, batch_size=batch_size)
    base = rows[0]
    if json:
        found = [
            {"name": row.name, "documents": row.documents, "seconds": row.seconds, "rate": row.rate,
             "ratio": bench.ratio(base, row), "difference": row.difference}
            for row in rows
        ]  # fmt: skip
        printing.as_json({**bench.conditions(), "data": data, "batch_size": batch_size, "rows": found})
        return
    printing.table(
        ["", "docs", "docs/s", "x model", "seconds", "max diff"],
        [
            [row.name, row.documents, f"{row.rate:,.0f}", f"{bench.ratio(base, row):.2f}",
             f"{min(row.seconds):.3f}-{max(row.seconds):.3f}", f"{row.difference:.1e}"]
            for row in rows
        ],
    )  # fmt: skip
    by_name = {row.name: row for row in rows}
    thrice = by_name["each text 3 times"].median / by_name["all miss"].median
    typer.echo(f"Every text three times in one call takes {thrice:.2f} times as long as once.")
    printing.facts(bench.conditions().items())


@app.command()
def index(
    kinds: Annotated[str, typer.Option(help="Index kinds, separated by commas.")] = KINDS,
    count: Annotated[int, typer.Option(min=1000, help="Vectors.")] = 100_000,
    dim: Annotated[int, typer.Option(min=8, help="Components of a vector.")] = 128,
    json: options.Json = False,
) -> None:
    """Measure recall and search time of the FAISS indexes on clustered vectors, with queries in batches of 64."""
    from llmcache.bench import encoding as bench

    rows = bench.index(kinds.split(","), count=count, dim=dim)
    if json:
        printing.as_json({**bench.conditions(), "rows": rows})
        return
    printing.table(
        ["index", "vectors", "build s", "recall@1", "fresh", "ms/query", "bytes/vector"],
        [
            [row["index"], row["vectors"], f"{row['build_seconds']:.1f}", f"{row['recall_noisy']:.4f}",
             f"{row['recall_fresh']:.4f}",             f"{row['ms_per_query']:.3f}", f"{row['bytes_per_vector']:.0f}"]
            for row in rows
        ],
    )  # fmt: skip
    printing.facts(bench.conditions().items())


@app.command()
def fingerprint(
    data: Annotated[str, typer.Option("--data", help="Labelled documents to store.")],
    asked: Annotated[str, typer.Option("--asked", help="Labelled queries; nothing is fitted on them.")],
    label_field: Annotated[str, typer.Option(help="Field or column of the label.")] = "label",
    text_field: options.TextField = "text",
    model: BenchModel = None,
    json: options.Json = False,
) -> None:
    """Measure how often the nearest neighbour has the same label, by fingerprint and projection."""
    from sentence_transformers import SentenceTransformer

    from llmcache.bench import encoding as bench
    from llmcache.demo import demo_model
    from llmcache.pipeline.files import documents

    printing.quiet()
    loaded = SentenceTransformer(model) if model else demo_model()
    known, queries = (list(documents(path, text_field=text_field, id_field=label_field)) for path in (data, asked))
    rows = bench.fingerprints(loaded, known, queries)
    if json:
        printing.as_json({**bench.conditions(), "data": data, "asked": asked, "rows": rows})
        return
    columns = ["fingerprint", "projection", "agreement", "coverage_at_99", "coverage_at_95"]
    printing.table(columns, [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    printing.facts(bench.conditions().items())


@app.command()
def store(
    payload: Annotated[str, typer.Option(help="Bytes of activations in the store of each row size.")] = "1GiB",
    rows: Annotated[str, typer.Option("--rows", help="Row sizes, separated by commas.")] = "256KiB,1536",
    folder: Annotated[
        str | None,
        typer.Option(help="Folder for the stores, on the disk to measure. Default: the folder for temporary files."),
    ] = None,
    repeats: Repeats = 5,
    json: options.Json = False,
) -> None:
    """Compare rows written, read and merged per second with bare system calls; measure bytes added per entry."""
    from llmcache.bench.harness.conditions import conditions
    from llmcache.bench.store import measured
    from llmcache.cli.shared import amounts

    sizes = [amounts.size(text) for text in rows.split(",")]
    found = measured(sizes, amounts.size(payload), folder, repeats)
    if json:
        printing.as_json({**conditions(), "payload": payload, **found})
        return
    for size in sizes:
        tables = {
            kind: [row for row in found[kind] if row["row_bytes"] == size] for kind in ("rates", "merges", "overhead")
        }
        printing.table(
            ["", "contender", "rows/s", "MiB/s", "x", "best", "of"],
            [
                [_label(row), row["contender"], f"{row['rows_per_second']:,.0f}", f"{row['mib_per_second']:,.0f}",
                 _times(row["ratio"]), _times(row["ratio_of_best"]), row["base"]]
                for row in tables["rates"]
            ]
            + [
                ["merge", row["contender"], "", f"{row['mib_per_second']:,.0f}", _times(row["ratio"]),
                 _times(row["ratio_of_best"]), row["base"]]
                for row in tables["merges"]
            ],
            title=f"{size:,}-byte rows",
        )  # fmt: skip
        for row in tables["overhead"]:
            typer.echo(
                f"Beyond activations, fingerprints and token ids: {row['overhead_bytes_per_entry']:.1f} bytes per "
                f"entry, {row['overhead_share']:.2%}.\n"
            )
    typer.echo(found["cold"])
    typer.echo("x: median of the repeats, each against its own base; best: of the quickest repeats.")
    printing.facts(
        [
            ("file system", found["file_system"]),
            ("load", " to ".join(f"{load:.1f}" for load in found["load"])),
            *conditions().items(),
        ]
    )


def _label(rate: dict[str, Any]) -> str:
    return ", ".join(filter(None, (rate["operation"], rate["cache"], rate["cache"] and rate["order"])))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


@app.command(name="open")
def open_(
    model: BenchModel = None,
    count: Annotated[int, typer.Option(min=1000, help="Synthetic entries in the store.")] = 100_000,
    repeats: Repeats = 3,
    json: options.Json = False,
) -> None:
    """Measure time and memory from opening a large store to its first exact and first near answer."""
    from llmcache.bench import encoding as bench
    from llmcache.demo import demo_model_path

    found = bench.reopen(str(Path(model) if model else demo_model_path()), count=count, repeats=repeats)
    if json:
        printing.as_json({**bench.conditions(), **found})
        return
    printing.facts([*found.items(), *bench.conditions().items()])

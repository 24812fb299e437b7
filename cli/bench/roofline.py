"""`llmcache bench roofline`: each tier beside the limits of the machine."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def roofline(
    data: Annotated[list[str], typer.Option("--data", help="Corpus of short documents; repeatable.")],
    entries: Annotated[str, typer.Option(help="Store sizes for near look-ups, separated by commas.")] = (
        "10000,1000000"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many documents.")] = 3000,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
    json: options.Json = False,
) -> None:
    """Compare bytes and operations of each tier with memory copy and matrix product, measured in turn."""
    from llmcache.bench import roofline as bench
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model
    from llmcache.errors import ConfigError
    from llmcache.pipeline.files import documents

    try:
        sizes = [int(size) for size in entries.split(",")]
    except ValueError:
        raise ConfigError(f"--entries are whole numbers separated by commas, got {entries!r}") from None
    if min(sizes) < 1000:
        raise ConfigError(f"a near look-up is measured among at least 1,000 entries, got {min(sizes):,}")
    printing.quiet()
    texts = [document.text for document in islice(documents(data, text_field=text_field, unit=unit), limit)]
    found = bench.roofline(demo_model(), texts, repeats=repeats, entries=sizes)
    if json:
        printing.as_json({**conditions(), "data": data, **found})
        return
    printing.table(
        ["tier", "", "us/doc", "floor us/doc", "share of it", "bound by"],
        [
            [row["tier"], row["what"], f"{row['microseconds_per_document']:,.2f}",
             f"{1e6 * row['floor_seconds'] / row['documents']:,.2f}", f"{row['share']:.2f}", row["bound"]]
            for row in found["rows"]
        ],
    )  # fmt: skip
    printing.table(
        ["entries", "model ms", "corrected ms", "of the model", "plain ms", "of the model"],
        [
            [row["entries"], f"{row['model_milliseconds']:.3f}", f"{row['corrected_milliseconds']:.3f}",
             f"{row['corrected_share']:.1%}", f"{row['plain_milliseconds']:.3f}", f"{row['plain_share']:.1%}"]
            for row in found["near"]
        ],
        title="near look-ups, per query of 12 tokens",
    )  # fmt: skip
    printing.facts(
        [
            ("memory copy", f"{found['copy_bytes_per_second'] / 1e9:.1f} GB/s"),
            ("matrix product", f"{found['operations_per_second'] / 1e9:.0f} GFLOP/s"),
            ("load", " to ".join(f"{load:.1f}" for load in found["load"])),
            *conditions().items(),
        ]
    )

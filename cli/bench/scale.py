"""`llmcache bench scale`: arithmetic for stores too large to measure."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcache.bench.scale import COMPUTED, Job, arithmetic
from llmcache.cli.shared import amounts, options
from llmcache.cli.shared import output as printing


def scale(
    documents: Annotated[float, typer.Option(help="Number of documents; 1e9 is a billion.")] = 1e9,
    width: Annotated[int, typer.Option(min=1, help="Components of an output.")] = 384,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per document.")] = 150,
    shards: Annotated[int, typer.Option(min=1, help="Stores, one per machine.")] = 16,
    memory: Annotated[str, typer.Option(help="Memory of a machine.")] = "64GB",
    gigabits: Annotated[float, typer.Option(help="Network speed of a machine, gigabits per second.")] = 10,
    rate: Annotated[float, typer.Option(help="Documents that one machine computes per second.")] = COMPUTED,
    index: Annotated[str, typer.Option(help="ivf-sq8, ivf-fp16 or hnsw.")] = "ivf-sq8",
    json: options.Json = False,
) -> None:
    """Estimate disk, memory, network and time for a corpus, from constants measured on two cores."""
    rows = arithmetic(Job(documents, width, tokens, shards, amounts.size(memory), gigabits, rate, index))
    if json:
        printing.as_json({"rows": rows})
        return
    printing.table(["", "in all", "a shard"], [[_shown(name, value) for name, value in row.items()] for row in rows])


def _shown(name: str, value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else printing.formatted(value)

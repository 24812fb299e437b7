"""`llmcache bench ray`: one process against workers of a local Ray cluster."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.pipeline.files import documents


def ray(
    data: Annotated[list[str], typer.Option("--data", help="Corpus to encode; repeatable.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to use instead of all-MiniLM-L6-v2 of the demo extra.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the cluster.")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many documents.")] = None,
    text_field: options.TextField = "text",
    json: options.Json = False,
) -> None:
    """Run one job in one process, on workers, and with a worker killed; compare seconds and results."""
    from llmcache.bench.distributed import spread
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model_path

    texts = [document.text for document in islice(documents(data, text_field=text_field), limit)]
    rows = [asdict(row) for row in spread(model or str(demo_model_path()), texts, workers)]
    if json:
        printing.as_json({**conditions(), "data": data, "rows": rows})
        return
    printing.table(list(rows[0]), [list(row.values()) for row in rows])
    printing.facts(conditions().items())

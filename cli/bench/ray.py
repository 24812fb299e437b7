"""`llmcache bench ray`: one process against the workers of a local Ray cluster."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.pipeline.files import documents


def ray(
    data: Annotated[list[str], typer.Option("--data", help="Corpus to encode; may be given more than once.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Another model than all-MiniLM-L6-v2 of the demo extra.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the cluster.")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many documents.")] = None,
    text_field: options.TextField = "text",
    json: options.Json = False,
) -> None:
    """The same job in one process, on workers, and with one of them killed: seconds, and whether all is equal."""
    from llmcache.bench.distributed import spread
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model_path

    texts = [one.text for one in islice(documents(data, text_field=text_field), limit)]
    rows = [asdict(one) for one in spread(model or str(demo_model_path()), texts, workers)]
    if json:
        printing.as_json({**conditions(), "data": data, "rows": rows})
        return
    printing.table(list(rows[0]), [list(one.values()) for one in rows])
    printing.facts(conditions().items())

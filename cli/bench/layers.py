"""`llmcache bench layers`: attached models, stored layers, and heads on one trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def layers(
    data: Annotated[list[str], typer.Option("--data", help="Paragraphs: a corpus, or a file of SQuAD (.json.gz).")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="BERT-like model to use instead of the demo extra's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    limit: Annotated[int, typer.Option(min=64, help="At most this many documents.")] = 256,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
    json: options.Json = False,
) -> None:
    """Compare a mixed batch, a second head and an attached model with an empty store with their ideal times."""
    from itertools import islice

    from sentence_transformers import SentenceTransformer

    from llmcache.bench import layers as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model
    from llmcache.pipeline.files import documents

    printing.quiet()
    loaded = SentenceTransformer(model) if model else demo_model()
    if data[0].endswith(".json.gz"):
        texts = measuring.squad_paragraphs(Path(data[0]), limit)
    else:
        texts = [document.text for document in islice(documents(data, text_field=text_field, unit=unit), limit)]
    rows = measuring.layers(loaded, texts, repeats=repeats)
    if json:
        printing.as_json(
            {**conditions(), "data": [Path(name).name for name in data], "rows": [row.as_dict() for row in rows]}
        )
        return
    printing.table(
        ["", "against", "docs", "ratio", "seconds", "max diff"],
        [
            [row.name, row.base, row.documents, f"{row.ratio:.2f}",
             f"{min(row.seconds):.3f}-{max(row.seconds):.3f}", f"{row.difference:.1e}"]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        printing.facts((f"{row.name}: {name.replace('_', ' ')}", value) for name, value in row.facts.items())
    printing.facts(conditions().items())

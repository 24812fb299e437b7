"""`llmcache verify-model`: whether a model gives the same cold and warm."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources
from llmcache.pipeline.files import Reading


def verify_model(
    model: Annotated[str, typer.Option("--model", "-m", help="Name or folder of a SentenceTransformer, or any model.")],
    data: Annotated[list[str], typer.Option("--data", "-d", help="Files with documents, as for `build`.")],
    layers: Annotated[str, typer.Option(help='Layers with banks: "output", "all", or numbers such as 4,8.')] = "all",
    limit: Annotated[int, typer.Option(min=1, help="Documents to compare; the first ones are taken.")] = 200,
    text_field: options.TextField = "text",
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    batch_size: options.BatchSize = 32,
    json: options.Json = False,
) -> None:
    """Run the same documents uncached, cold, warm, and warm after a reload; exit with 1 when a result differs.

    What differs is printed beside the difference that other batch sizes alone make.
    """
    from itertools import islice

    from llmcache.cli.build import layer_numbers
    from llmcache.model.loading import load_any
    from llmcache.verification import verify_model as checks

    printing.quiet()
    documents = Sources(data, text_field, id_field, unit, False, "jsonl").documents(Reading())
    texts = [document.text for document in islice(documents, limit)]
    loaded, tokenizer = load_any(model)
    with TemporaryDirectory() as folder:
        store = Path(folder, "store")
        found = list(checks(loaded, tokenizer, texts, store, layers=layer_numbers(layers), batch_size=batch_size))
    failed = [one for one in found if not one.passed]
    if json:
        printing.as_json({"checks": [one.as_dict() for one in found], "passed": not failed})
    else:
        printing.table(
            ["tier", "run", "documents", "reused", "difference", "allowed", "same bits", ""],
            [
                [one.tier, one.run, one.documents, one.reused, f"{one.difference:.2e}", f"{one.limit:.2e}",
                 {None: "", True: "yes", False: "no"}[one.same], "" if one.passed else "DIFFERS"]
                for one in found
            ],
        )  # fmt: skip
        if any(one.tier not in ("output", "model") for one in found):
            printing.facts([("not compared", "positions that the attention mask hides, of which nothing is kept")])
    if failed:
        raise typer.Exit(1)

"""`llmcache bench pipeline` and `bench chunks`: long corpora, and revised documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def pipeline(
    data: Annotated[Path, typer.Option("--data", help="Folder with dup-loghub and cls-banking77.")],
    documents: Annotated[int, typer.Option(min=2000, help="Documents of the long corpus.")] = 100_000,
    distinct: Annotated[int, typer.Option(min=100, help="Distinct texts among them.")] = 10_000,
    json: options.Json = False,
) -> None:
    """Measure peak memory and overlap of a pipeline over a long corpus, and over a fifth of the corpus."""
    from llmcache.bench import pipelines as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model_path

    rows = measuring.measured(str(demo_model_path()), data, (documents // 5, documents), distinct)
    if json:
        printing.as_json({**conditions(), "rows": rows})
        return
    for row in rows:
        printing.facts([*row.items(), ("", "")])
    printing.facts(conditions().items())


def chunks(
    data: Annotated[Path, typer.Option("--data", help="File revisions.jsonl.xz of dup-site-policy-revisions.")],
    histories: Annotated[int, typer.Option(min=1, help="Documents of which all revisions are encoded.")] = 6,
    json: options.Json = False,
) -> None:
    """Compare exact repeats in chunks by structure and in windows; revisions per second with and without cache."""
    from llmcache.bench import chunks as measuring
    from llmcache.bench.harness.conditions import conditions
    from llmcache.demo import demo_model

    printing.quiet()
    found = measuring.measured(demo_model(), data, histories)
    if json:
        printing.as_json({**conditions(), "histories": histories, **found})
        return
    printing.table(
        ["chunks are", "chunks", "mean characters", "exact repeats"],
        [
            [row["chunks_are"], row["chunks"], f"{row['mean_characters']:.0f}", f"{row['repeated']:.1%}"]
            for row in found["rows"]
        ],
    )
    printing.table(
        ["", "revisions", "per second", "times", "max diff"],
        [
            [one["name"], one["documents"], f"{one['documents_per_second']:.1f}", f"{one['times']:.1f}",
             "" if one["difference"] is None else f"{one['difference']:.1e}"]
            for one in found["rates"]
        ],
    )  # fmt: skip
    printing.facts(conditions().items())

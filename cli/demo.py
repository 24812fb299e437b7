"""`llmcache demo`: embed a small corpus, first with an empty store and then with a warm one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def demo(
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="Folder to keep the store in; a temporary one by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to use instead of all-MiniLM-L6-v2.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Embed a small corpus, close the store, and embed tomorrow's version: only new documents are computed."""
    from sentence_transformers import SentenceTransformer

    from llmcache.demo import demo_model, nights

    printing.quiet()
    loaded = SentenceTransformer(model) if model else demo_model()
    results = list(nights(loaded, store))
    if json:
        printing.as_json([asdict(night) for night in results])
        return
    printing.table(
        ["run", "docs", "exact", "computed", "seconds", "model alone", "faster", "max diff"],
        [
            [night.name, night.documents, night.exact, night.computed,
             f"{night.seconds:.2f}", f"{night.model_seconds:.2f}",
             f"{night.model_seconds / night.seconds:.1f}x", f"{night.difference:.1e}"]
            for night in results
        ],
    )  # fmt: skip
    saved = sum(night.model_seconds - night.seconds for night in results)
    reused = sum(night.exact for night in results)
    typer.echo(
        f"{reused:,} of {sum(night.documents for night in results):,} documents were not computed again: "
        f"{saved:.1f} seconds saved. Seconds include opening, look-up and writing the store; every run opens the store."
    )

"""`llmcache demo`: the main job on a small corpus, cold and then warm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def demo(
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="Keep the store here; without it, it is temporary.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model than all-MiniLM-L6-v2.")] = None,
    json: options.Json = False,
) -> None:
    """Embed a small corpus, close the store, and embed tomorrow's version of it: only what is new is computed."""
    from sentence_transformers import SentenceTransformer

    from llmcache.demo import demo_model, nights

    printing.quiet()
    loaded = SentenceTransformer(model) if model else demo_model()
    found = list(nights(loaded, store))
    if json:
        printing.as_json([asdict(night) for night in found])
        return
    printing.table(
        ["run", "docs", "exact", "computed", "seconds", "model alone", "faster", "max diff"],
        [
            [one.name, one.documents, one.exact, one.computed, f"{one.seconds:.2f}", f"{one.model_seconds:.2f}",
             f"{one.model_seconds / one.seconds:.1f}x", f"{one.difference:.1e}"]
            for one in found
        ],
    )  # fmt: skip
    saved = sum(one.model_seconds - one.seconds for one in found)
    spared = sum(one.exact for one in found)
    typer.echo(
        f"{spared:,} of {sum(one.documents for one in found):,} documents were not computed again: {saved:.1f} seconds "
        f"saved. Seconds include opening, look-up and writing the store; every run opens the store anew."
    )

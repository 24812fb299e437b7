"""`llmcache gc`: remove files that no reader needs any more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmcache.cli.shared import amounts, options
from llmcache.cli.shared import output as printing
from llmcache.indexes.maintenance.gc import gc as collect
from llmcache.indexes.store import Store


def gc(
    store: options.StoreArgument,
    grace: Annotated[str, typer.Option(help="Leave alone what was needed this recently, such as 1h or 2d.")] = "1h",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Remove superseded manifests, and files that killed writers, evictions and compactions left."""
    seconds = amounts.seconds(grace)
    opened = Store.open(store)
    try:
        done = collect(opened, seconds, dry_run=dry_run)
    finally:
        opened.close()
    if json:
        printing.as_json(asdict(done))
        return
    if done.blocked:
        typer.echo(f"nothing removed: {', '.join(done.blocked)} damaged, so what they need is not known", err=True)
    printing.facts(
        [
            ("files to remove" if dry_run else "files removed", done.files),
            ("of these manifests", done.manifests),
            ("bytes", printing.size(done.bytes)),
            ("writers' counters folded", done.folded),
        ]
    )

"""`llmcache gc`: remove files that no reader needs."""

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
    grace: Annotated[str, typer.Option(help="Keep files that were in use within this time, such as 1h or 2d.")] = "1h",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Remove superseded manifests, and files left by killed writers, evictions and compactions."""
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
        typer.echo(
            f"nothing removed: {', '.join(done.blocked)} damaged, so the files in use are unknown; run llmcache repair",
            err=True,
        )
    printing.facts(
        [
            ("files to remove" if dry_run else "files removed", done.files),
            ("manifests among them", done.manifests),
            ("bytes", printing.size(done.bytes)),
            ("writers' counters folded", done.folded),
        ]
    )

"""`llmcache compact`: rewrite segments that hold mostly evicted rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.indexes.maintenance.compact import compact as compact_segments
from llmcache.indexes.store import Store


def compact(
    store: options.StoreArgument,
    duplicates: Annotated[
        bool,
        typer.Option("--duplicates", help="First drop duplicate entries that several writers stored at the same time."),
    ] = False,
    small: Annotated[bool, typer.Option("--small", help="Also join small segments.")] = False,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Rewrite segments with less than half of their rows alive. `llmcache gc` then frees the space."""
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        done = compact_segments(opened, duplicates=duplicates, small=small, dry_run=dry_run)
    finally:
        opened.close()
    if json:
        printing.as_json(asdict(done))
        return
    printing.facts(
        [
            ("segments to rewrite" if dry_run else "segments rewritten", done.segments),
            ("entries", done.rows),
            ("damaged entries left out", done.damaged),
            *([("duplicates dropped", done.duplicates)] if duplicates else []),
            ("bytes for gc to free", printing.size(done.bytes)),
        ]
    )

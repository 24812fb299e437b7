"""`llmcache compact`: rewrite segments that are mostly evicted."""

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
        bool, typer.Option("--duplicates", help="First drop entries that several writers stored at the same time.")
    ] = False,
    small: Annotated[bool, typer.Option("--small", help="Make one of many small segments, too.")] = False,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Rewrite the segments of which less than half is alive. `llmcache gc` then frees their space."""
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
            ("damaged, left behind", done.damaged),
            *([("copies dropped", done.duplicates)] if duplicates else []),
            ("left for gc", printing.size(done.bytes)),
        ]
    )

"""`llmcache compact`: rewrite segments that are mostly evicted."""

from __future__ import annotations

from dataclasses import asdict

from llmcache.cli import options, printing
from llmcache.indexes.maintenance import compact as compact_segments
from llmcache.indexes.store import Store


def compact(
    store: options.StoreArgument,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Rewrite the segments of which less than half is alive. `llmcache gc` then frees their space."""
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        done = compact_segments(opened, dry_run=dry_run)
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
            ("left for gc", printing.size(done.bytes)),
        ]
    )

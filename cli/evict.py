"""`llmcache evict`: shrink a store to a size."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmcache.banks.history import note_eviction
from llmcache.cli.shared import amounts, options
from llmcache.cli.shared import output as printing
from llmcache.indexes.maintenance.evict import evict as evict_rows
from llmcache.indexes.store import Store


def evict(
    store: options.StoreArgument,
    max_bytes: Annotated[str, typer.Option("--max-bytes", help="Size limit of the store, such as 10GB or 512MiB.")],
    policy: Annotated[str, typer.Option(help="Eviction policy: lru, lfu, decay, cost or divergence.")] = "lru",
    half_life: Annotated[
        str, typer.Option(help="For decay: age at which a use counts half, such as 12h or 7d.")
    ] = "7d",
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Evict entries in the order of a policy until the store fits the size."""
    most, half = amounts.size(max_bytes), amounts.seconds(half_life)
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        done = evict_rows(opened, most, policy=policy, half_life=half, dry_run=dry_run)
        if not dry_run:
            note_eviction(opened, done.rows, most - done.bytes_after)
    finally:
        opened.close()
    if json:
        printing.as_json(asdict(done))
        return
    printing.facts(
        [
            ("would be evicted" if dry_run else "evicted", done.rows),
            ("segments dropped whole", done.segments),
            ("before", printing.size(done.bytes_before)),
            ("after, about" if dry_run else "after", printing.size(done.bytes_after)),
        ]
    )

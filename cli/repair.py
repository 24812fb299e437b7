"""`llmcache repair`: make a damaged store usable again, with the entries that are intact."""

from __future__ import annotations

from dataclasses import asdict

import typer

from llmcache import snapshot
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def repair(
    store: options.StoreArgument,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Move damaged files to STORE/quarantine and keep every intact entry. Deletes nothing."""
    done = snapshot.repair(store, dry_run=dry_run, key=options.signing_key(key_file, key_variable))
    if json:
        printing.as_json({**asdict(done), "dry_run": dry_run})
        return
    for name in done.set_aside:
        typer.echo(f"{'to quarantine' if dry_run else 'quarantined'}: {name}")
    counts = [("segments rewritten", done.rewritten), ("segments adopted", done.adopted), ("entries lost", done.lost)]
    printing.facts([("generation", done.generation), *counts])

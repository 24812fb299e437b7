"""`llmcache inspect`: models, settings and files of a store."""

from __future__ import annotations

from typing import Any

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.indexes.format.manifest import BankFacts, NamespaceFacts
from llmcache.indexes.store import Store


def inspect(
    store: options.StoreArgument,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    json: options.Json = False,
) -> None:
    """Show identities, settings and files of a store. Reads the manifest only; loads no model."""
    opened = Store.open(store, **options.Access(None, key_file, key_variable, allow_untrusted).of_store())
    try:
        manifest = opened.manifest
    finally:
        opened.close()
    if json:
        spaces = {name: _space(space) for name, space in manifest.namespaces.items()}
        facts = {"generation": manifest.generation, "writer": manifest.writer, "trust": opened.trust}
        printing.as_json({**facts, "namespaces": spaces})
        return
    printing.facts([("generation", manifest.generation), ("last writer", manifest.writer), ("trust", opened.trust)])
    for name, space in sorted(manifest.namespaces.items()):
        typer.echo(f"\nnamespace {printing.printable(name)}{' (with a secret)' if space.secret_check else ''}")
        printing.facts([("  " + key, _short(value)) for key, value in [*space.identity.items(), *space.config.items()]])
        for layer, bank in sorted(space.banks.items()):
            rows = [(name, size, digest[:12]) for name, size, digest in _files(bank)]
            index = f", index {bank.index.kind}" if bank.index else ""
            printing.table(["file", "bytes", "sha256"], rows, title=f"\nbank {printing.printable(layer)}{index}")
            printing.table(["writer", "entries"], _writers(bank).items())


def _space(space: NamespaceFacts) -> dict[str, Any]:
    banks = {
        layer: {
            "dtype": bank.dtype,
            "width": bank.width,
            "entries": sum(segment.live for segment in bank.segments),
            "writers": _writers(bank),
            "index": bank.index.kind if bank.index else None,
            "files": [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in _files(bank)],
        }
        for layer, bank in space.banks.items()
    }
    secret = bool(space.secret_check)
    return {"identity": dict(space.identity), "config": dict(space.config), "secret": secret, "banks": banks}


def _writers(bank: BankFacts) -> dict[str, int]:
    """Count the entries of each writer, for `llmcache purge --writer`."""
    entries: dict[str, int] = {}
    for segment in bank.segments:
        entries[segment.writer] = entries.get(segment.writer, 0) + segment.rows
    return entries


def _files(bank: BankFacts) -> list[tuple[str, int, str]]:
    return [(file.name, file.size, file.sha256 or "by row") for file in bank.all_files]


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."

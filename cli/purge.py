"""`llmcache purge`: remove entries from a store, with every file that could hold them."""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import typer

from llmcache.cli import options, printing
from llmcache.cli.reading import Sources
from llmcache.corpus import Reading
from llmcache.errors import ConfigError
from llmcache.indexes.purge import Doomed
from llmcache.indexes.purge import purge as purged
from llmcache.indexes.records import Keys
from llmcache.indexes.store import Store
from llmcache.namespace import resolved_secret
from llmcache.purging import keys_of_texts

_KEY = re.compile(r"[0-9a-fA-F]{32}")


def purge(
    store: options.StoreArgument,
    namespace: Annotated[
        str | None, typer.Option(help="Namespace that goes; with another option, where to look for entries.")
    ] = None,
    writer: Annotated[str | None, typer.Option(help="All that this writer stored; llmcache inspect names it.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Entries with this key, 32 hexadecimal digits.")] = None,
    text_file: Annotated[
        str | None, typer.Option(help="Entries of these documents: .jsonl .csv .tsv .txt .parquet, - for input.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt the documents were encoded with, beside those of the model.")
    ] = None,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
    stdin_format: options.StdinFormat = "jsonl",
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Remove a namespace, what a writer stored, or single entries, at once and with all old generations.

    Stop other writers of the store first. Snapshots and other copies are stores of their own: purge them too.
    """
    given = [one for one in (writer, key, text_file) if one]
    if len(given) > 1:
        raise ConfigError("one purge takes one of --writer, --key and --text-file; run it once for each")
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        keys = _keys(key) if key else None
        if text_file is not None:
            namespace = namespace or "default"
            sources = Sources([text_file], text_field, unit=unit, stdin_format=stdin_format)
            texts = [document.text for document in sources.documents(Reading())]
            secret = resolved_secret(None, secret_file)
            keys = keys_of_texts(opened, namespace, texts, secret=secret, prompts=prompt or [])
        found = purged(opened, Doomed(namespace, writer, keys), dry_run=dry_run)
    finally:
        opened.close()
    if json:
        printing.as_json({**found.as_dict(), "dry_run": dry_run})
        return
    printing.facts(
        [
            ("entries that would go" if dry_run else "entries removed", found.rows),
            ("other names of entries", found.aliases),
            ("damaged entries", found.damaged),
            ("segments", found.segments),
            ("files", found.files),
            ("bytes", printing.size(found.bytes)),
            ("bytes of copies", printing.size(found.written)),
        ]
    )
    if not found.rows and not found.damaged:
        typer.echo("llmcache: no entry of the newest generation matches", err=True)


def _keys(given: list[str]) -> Keys:
    wrong = [one for one in given if not _KEY.fullmatch(one)]
    if wrong:
        raise ConfigError(f"a key is 32 hexadecimal digits, got {wrong[0]!r}")
    return np.frombuffer(bytes.fromhex("".join(given)), np.uint64).reshape(-1, 2)

"""`llmcache purge`: remove entries from a store, with every file that could hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.banks.namespaces import resolved_secret
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources
from llmcache.errors import ConfigError
from llmcache.indexes.maintenance.purge import Doomed
from llmcache.indexes.maintenance.purge import purge as purged
from llmcache.indexes.store import Store
from llmcache.pipeline.files import Reading
from llmcache.planning.purging import keys_of, reader_of, with_texts


def purge(
    store: options.StoreArgument,
    namespace: Annotated[
        str | None, typer.Option(help="Namespace that goes; with another option, where to look for entries.")
    ] = None,
    writer: Annotated[str | None, typer.Option(help="All that this writer stored; llmcache inspect names it.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Entries with this key, 32 hexadecimal digits.")] = None,
    id: Annotated[
        list[str] | None, typer.Option(help="Entries of the document with this id, and of its chunks.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Entries of all documents whose ids begin with this, such as a path.")
    ] = None,
    text_file: Annotated[
        str | None, typer.Option(help="Entries of these documents: .jsonl .csv .tsv .txt .parquet, - for input.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt the documents were encoded with, beside those of the model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that reads the texts, to find what heads, layers and decoders stored of them."),
    ] = None,
    unfinished: Annotated[
        list[Path] | None,
        typer.Option(help="Unfinished run (its folder, or its result file) to throw away, if the store is not told."),
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
    """Remove a namespace, what a writer stored, or single documents, at once and with all old generations.

    A document goes from every bank of the namespace. Calibrations that it may have gone into are given up, and
    unfinished runs are thrown away. Stop other writers of the store first. Snapshots, other copies and finished result
    files are not touched: purge or remove them too.
    """
    if sum(bool(one) for one in (writer, key or id or source, text_file)) > 1:
        raise ConfigError(
            "one purge takes one of --writer, --key and --text-file; run it once for each (--id, --source join --key)"
        )
    if model is not None and text_file is None:
        raise ConfigError("--model reads the texts of --text-file; give both, or leave it out")
    if text_file is not None:
        namespace = namespace or "default"
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        doomed = Doomed(
            namespace, writer, keys_of(key) if key else None, id or (), source or (), unfinished=unfinished or ()
        )
        if text_file is not None:
            sources = Sources([text_file], text_field, unit=unit, stdin_format=stdin_format)
            texts = [document.text for document in sources.documents(Reading())]
            reader = None if model is None else reader_of(model)
            secret = resolved_secret(None, secret_file)
            doomed = with_texts(opened, doomed, texts, secret=secret, prompts=prompt or [], reader=reader)
        found = purged(opened, doomed, dry_run=dry_run)
        unread = _not_read(opened, doomed) if text_file is not None and model is None else []
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
            ("calibrations given up", found.calibrations),
            ("unfinished runs thrown away", found.unfinished),
        ]
    )
    if not found.rows and not found.damaged:
        typer.echo("llmcache: no entry of the newest generation matches", err=True)
    if found.calibrations:
        typer.echo(
            "llmcache: near reuse is off where a calibration was given up, which may hold features of what was named; "
            "llmcache calibrate turns it on again",
            err=True,
        )
    if unread:
        typer.echo(
            f"llmcache: {', '.join(unread)} was searched for what entries of these texts lead to; --model finds also "
            "what was stored without such an entry",
            err=True,
        )


def _not_read(store: Store, doomed: Doomed) -> list[str]:
    """Banks whose text keys are of other models, or which have none."""
    space = store.latest().namespaces.get(doomed.namespace or "")
    return sorted(name for name in (space.banks if space else ()) if name.startswith(("head-", "layer-", "prefix")))

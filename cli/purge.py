"""`llmcache purge`: remove entries from a store, with every file that may contain them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.banks.namespaces import resolved_secret
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources
from llmcache.document import only_text
from llmcache.errors import ConfigError
from llmcache.indexes.maintenance.purge import Doomed
from llmcache.indexes.maintenance.purge import purge as purged
from llmcache.indexes.store import Store
from llmcache.pipeline.files import CorpusReading
from llmcache.planning.purging import is_decoder, keys_of, kind_of, reader_of, with_texts


def purge(
    store: options.StoreArgument,
    namespace: Annotated[
        str | None, typer.Option(help="Namespace to remove; with another option, the namespace to search.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="Everything this writer stored; llmcache inspect lists writers.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Entries with this key, 32 hexadecimal digits.")] = None,
    id: Annotated[
        list[str] | None, typer.Option(help="Entries of the document with this id, and of its chunks.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Entries of all documents whose id begins with this, such as a path.")
    ] = None,
    text_file: Annotated[
        str | None,
        typer.Option(
            help="Entries of these documents, as whole texts: .jsonl .csv .tsv .txt .parquet, - for standard input. "
            "Purge chunks by --id."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt the documents were encoded with, besides the prompts of the model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that tokenises the texts, to find the rows that heads, layers and decoders stored for them."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of that model, as for build. By default that of the namespace's model.")
    ] = None,
    unfinished: Annotated[
        list[Path] | None,
        typer.Option(help="Unfinished run to delete (its folder or result file), if the store has no record of it."),
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
    """Remove a namespace, the entries of a writer, or single documents, at once and with all old generations.

    A document is removed from every bank of the namespace. Calibrations that may contain it are dropped, and
    unfinished runs are deleted. Stop other writers of the store first. Snapshots, other copies and finished result
    files are not changed: purge or remove them too.
    """
    if sum(bool(selection) for selection in (writer, key or id or source, text_file)) > 1:
        raise ConfigError(
            "one purge takes one of --writer, --key and --text-file; run it once for each (--id, --source join --key)"
        )
    if model is not None and text_file is None:
        raise ConfigError("--model tokenises the texts of --text-file; give both, or neither")
    if kind is not None and model is None:
        raise ConfigError("--kind says how to load the model of --model; give both, or neither")
    if text_file is not None:
        namespace = namespace or "default"
    opened = Store.open(store, trust="own", key=options.signing_key(key_file, key_variable))
    try:
        doomed = Doomed(
            namespace, writer, keys_of(key) if key else None, id or (), source or (), unfinished=unfinished or ()
        )
        if text_file is not None:
            sources = Sources([text_file], text_field, unit=unit, stdin_format=stdin_format)
            texts = [*map(only_text, sources.documents(CorpusReading()))]
            reader = None
            if model is not None:
                given = kind or kind_of(opened, str(namespace))
                reader = reader_of(model, given, tokenizer=kind is None and is_decoder(opened, str(namespace)))
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
            ("entries to remove" if dry_run else "entries removed", found.rows),
            ("further keys of entries", found.aliases),
            ("damaged entries", found.damaged),
            ("segments", found.segments),
            ("files", found.files),
            ("bytes", printing.size(found.bytes)),
            ("bytes rewritten", printing.size(found.written)),
            ("calibrations dropped", found.calibrations),
            ("unfinished runs deleted", found.unfinished),
        ]
    )
    if not found.rows and not found.damaged:
        typer.echo("llmcache: no entry of the newest generation matches", err=True)
    if found.calibrations:
        typer.echo(
            "llmcache: near reuse is off where a calibration was dropped, since it may contain features of the purged "
            "documents; llmcache calibrate turns it on again",
            err=True,
        )
    if unread:
        typer.echo(
            f"llmcache: {', '.join(unread)} was searched through the entries of these texts only; --model also finds "
            "rows stored without such an entry",
            err=True,
        )


def _not_read(store: Store, doomed: Doomed) -> list[str]:
    """List the banks that have no text keys, or text keys of other models."""
    space = store.latest().namespaces.get(doomed.namespace or "")
    return sorted(name for name in (space.banks if space else ()) if name.startswith(("head-", "layer-", "prefix")))

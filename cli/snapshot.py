"""`llmcache snapshot`: stores as folders to copy, join, compare and check."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmcache import snapshot
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

app = typer.Typer(
    help="Save, load, merge, compare and verify stores. A snapshot is a folder: copy it with cp or rsync.",
    no_args_is_help=True,
)

Copy = Annotated[bool, typer.Option("--copy", help="Copy files, also where they could share the disk by hard links.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="Path of a new folder.")]


@app.command()
def save(
    store: options.StoreArgument,
    target: Target,
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make a snapshot of a store: linked on one disk, else copied and checked on the way."""
    _transferred(snapshot.save(store, target, copy=copy, dry_run=dry_run), json=json)


@app.command()
def load(
    source: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Folder of the snapshot.")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Path of the new store.")],
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make a store from a snapshot, checking every byte."""
    _transferred(snapshot.load(source, store, copy=copy, dry_run=dry_run), json=json)


@app.command()
def push(
    store: options.StoreArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to: file://, s3://, ... whatever fsspec knows.")],
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Take what is there with the right size for whole; read nothing back.")
    ] = False,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Bring a store to a URL, the manifest last. What is there and whole is not sent again."""
    key = options.signing_key(key_file, key_variable)
    _carried(snapshot.push(store, url, key=key, sizes_only=sizes_only, dry_run=dry_run), json=json)


@app.command()
def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where a store was pushed to; also http:// and https://.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new folder, or one that was pulled from there.")],
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Bring a store from a URL into a folder, checking every byte, the manifest last. What is there is not loaded."""
    key = options.signing_key(key_file, key_variable)
    _carried(snapshot.pull(url, folder, key=key, dry_run=dry_run), json=json)


def _carried(done: snapshot.TransferResult, *, json: bool) -> None:
    if json:
        printing.as_json(asdict(done))
        return
    over = "would go over" if done.dry_run else "went over"
    counts = [("generation", done.generation), ("entries", done.entries), ("files", done.files)]
    sent = [(f"files that {over}", done.sent), ("of it", printing.size(done.sent_bytes))]
    printing.facts([("url", done.url), ("folder", done.path), *counts, ("size", printing.size(done.bytes)), *sent])


def _transferred(made: snapshot.Snapshot, *, json: bool) -> None:
    if json:
        printing.as_json(asdict(made))
        return
    sizes = [("size", printing.size(made.bytes)), ("of it linked", printing.size(made.linked))]
    counts = [("generation", made.generation), ("entries", made.entries), ("files", made.files)]
    printing.facts([("folder", made.path), *counts, *sizes])


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(metavar="STORE...", help="Folders of the stores to join.")],
    into: Annotated[str, typer.Option("--into", help="A new folder, or a store that takes the entries in.")],
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Join the stores of many workers, without a model and without duplicates."""
    merged = snapshot.merge(sources, into, copy=copy, dry_run=dry_run)
    if json:
        printing.as_json({"target": into, "banks": [asdict(one) for one in merged]})
        return
    columns = ["namespace", "layer", "entries added", "duplicates", "segments whole", "rewritten"]
    rows = [[one.namespace, one.bank, one.entries, one.duplicates, one.whole, one.rewritten] for one in merged]
    printing.table(columns, rows)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of one store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of the other.")],
    json: options.Json = False,
) -> None:
    """Show which entries and settings of two stores differ. Reads keys and checksums only."""
    found = snapshot.diff(a, b)
    if json:
        printing.as_json({"banks": [asdict(one) for one in found]})
        return
    columns = ["namespace", "layer", "same", "only in A", "only in B", "changed"]
    rows = [[x.namespace, x.bank, x.same, len(x.only_a), len(x.only_b), len(x.changed)] for x in found]
    printing.table(columns, rows)
    for one in found:
        for name, left, right in one.settings:
            typer.echo(f"{one.namespace}/{one.bank} {name}: {left} in A, {right} in B")


@app.command()
def verify(store: options.StoreArgument, json: options.Json = False) -> None:
    """Read every byte of a store and name what is damaged. Exit code 1 when something is."""
    found = snapshot.verify(store)
    if json:
        printing.as_json({**asdict(found), "whole": found.whole})
    else:
        counts = [("generation", found.generation), ("entries", found.entries), ("files", found.files)]
        printing.facts([*counts, ("size", printing.size(found.bytes)), ("other files", printing.size(found.others))])
        for one in found.findings:
            typer.echo(f"{'damaged' if one.damage else 'left over'}: {one.file}: {one.what}; lost: {one.lost}")
        typer.echo("whole" if found.whole else f"damaged; `llmcache repair {store}` sets it aside and keeps the rest")
    if not found.whole:
        raise typer.Exit(1)

"""`llmcache snapshot`: save, load, push, pull, merge, compare and verify stores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmcache import snapshot
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing

app = typer.Typer(
    help="Save, load, push, pull, merge, compare and verify stores. A snapshot is a folder: copy it with cp or rsync.",
    no_args_is_help=True,
)

Copy = Annotated[bool, typer.Option("--copy", help="Copy files even where hard links are possible.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="Path of a new folder.")]


@app.command()
def save(
    store: options.StoreArgument,
    target: Target,
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make a snapshot of a store: by hard links on one disk, otherwise by checked copies."""
    _print_snapshot(snapshot.save(store, target, copy=copy, dry_run=dry_run), json=json)


@app.command()
def load(
    source: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Folder of the snapshot.")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Path of the new store.")],
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Create a store from a snapshot, checking every byte."""
    _print_snapshot(snapshot.load(source, store, copy=copy, dry_run=dry_run), json=json)


@app.command()
def push(
    store: options.StoreArgument,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Target: file://, s3://, or any other URL that fsspec supports.")
    ],
    sizes_only: Annotated[
        bool,
        typer.Option(
            "--sizes-only", help="Trust files at the URL that have the right size, instead of reading them back."
        ),
    ] = False,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Upload a store to a URL, the manifest last. Files that are there and intact are not sent again."""
    key = options.signing_key(key_file, key_variable)
    _print_transfer(snapshot.push(store, url, key=key, sizes_only=sizes_only, dry_run=dry_run), json=json)


@app.command()
def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a pushed store; also http:// and https://.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new folder, or one pulled from this URL before.")],
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Download a store from a URL, checking every byte, the manifest last. Existing intact files are skipped."""
    key = options.signing_key(key_file, key_variable)
    _print_transfer(snapshot.pull(url, folder, key=key, dry_run=dry_run), json=json)


def _print_transfer(done: snapshot.TransferResult, *, json: bool) -> None:
    if json:
        printing.as_json(asdict(done))
        return
    label = "files to transfer" if done.dry_run else "files transferred"
    counts = [("generation", done.generation), ("entries", done.entries), ("files", done.files)]
    sent = [(label, done.sent), ("bytes of these", printing.size(done.sent_bytes))]
    printing.facts([("url", done.url), ("folder", done.path), *counts, ("size", printing.size(done.bytes)), *sent])


def _print_snapshot(made: snapshot.Snapshot, *, json: bool) -> None:
    if json:
        printing.as_json(asdict(made))
        return
    sizes = [("size", printing.size(made.bytes)), ("bytes linked", printing.size(made.linked))]
    counts = [("generation", made.generation), ("entries", made.entries), ("files", made.files)]
    printing.facts([("folder", made.path), *counts, *sizes])


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(metavar="STORE...", help="Folders of the stores to merge.")],
    into: Annotated[str, typer.Option("--into", help="Target: a new folder, or a store to add the entries to.")],
    copy: Copy = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Merge the stores of many workers, without a model and without duplicates."""
    merged = snapshot.merge(sources, into, copy=copy, dry_run=dry_run)
    if json:
        printing.as_json({"target": into, "banks": [asdict(one) for one in merged]})
        return
    columns = ["namespace", "layer", "entries added", "duplicates", "segments whole", "rewritten"]
    rows = [[one.namespace, one.bank, one.entries, one.duplicates, one.whole, one.rewritten] for one in merged]
    printing.table(columns, rows)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of the first store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of the second store.")],
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
    """Read every byte of a store and list damage. Exit code 1 when there is any."""
    found = snapshot.verify(store)
    if json:
        printing.as_json({**asdict(found), "whole": found.whole})
    else:
        counts = [("generation", found.generation), ("entries", found.entries), ("files", found.files)]
        printing.facts([*counts, ("size", printing.size(found.bytes)), ("other files", printing.size(found.others))])
        for finding in found.findings:
            kind = "damaged" if finding.damage else "left over"
            typer.echo(f"{kind}: {finding.file}: {finding.what}; lost: {finding.lost}")
        typer.echo("whole" if found.whole else f"damaged; `llmcache repair {store}` moves it aside and keeps the rest")
    if not found.whole:
        raise typer.Exit(1)

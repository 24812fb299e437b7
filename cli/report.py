"""`llmcache report`: one page that says what a store did and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.errors import ConfigError
from llmcache.indexes.store import Store


def report(
    store: options.StoreArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, .html.")],
    price_per_hour: Annotated[
        float | None, typer.Option(help="What an hour of the machine costs; time saved is then money too.")
    ] = None,
    currency: Annotated[str, typer.Option(help="Sign before amounts of money.")] = "$",
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write one self-contained page: hits by tier, layer and day, time and money saved, drift, memory and evictions.

    It needs no network and no script, and is light or dark as its reader prefers.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: give the name of a file in a folder that is there")
    from llmcache import __version__
    from llmcache.report.facts import facts
    from llmcache.report.page import rendered, write

    opened = Store.open(store, uses=False, **options.Access(None, key_file, key_variable, allow_untrusted).of_store())
    try:
        found = facts(opened, price=price_per_hour, currency=currency)
    finally:
        opened.close()
    size = len(rendered(found, __version__).encode()) if dry_run else write(found, out, __version__)
    if json:
        printing.as_json({**found.summary(), "out": None if dry_run else str(out), "bytes": size})
        return
    printing.facts(
        [
            ("documents", int(found.total.documents)),
            ("hits", f"{found.total.hit_rate:.1%}"),
            ("net seconds saved", found.total.net_seconds),
            *([] if found.money is None else [("money saved", f"{currency}{found.money:,.2f}")]),
            ("would be written to" if dry_run else "written to", f"{out} ({printing.size(size)})"),
        ]
    )

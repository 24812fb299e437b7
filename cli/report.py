"""`llmcache report`: an HTML page with the hits and savings of a store."""

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
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of a machine hour, to express saved time as money.")
    ] = None,
    currency: Annotated[str, typer.Option(help="Currency sign before amounts.")] = "$",
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write one self-contained page: hits by tier, layer and day, time and money saved, drift, memory and evictions.

    The page needs no network and no script, and follows the light or dark setting of the browser.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: give a file name in an existing folder")
    from llmcache import __version__
    from llmcache.report.facts import facts
    from llmcache.report.page import rendered, write

    opened = Store.open(store, uses=False, **options.Access(None, key_file, key_variable, allow_untrusted).of_store())
    try:
        collected = facts(opened, price=price_per_hour, currency=currency)
    finally:
        opened.close()
    size = len(rendered(collected, __version__).encode()) if dry_run else write(collected, out, __version__)
    if json:
        printing.as_json({**collected.summary(), "out": None if dry_run else str(out), "bytes": size})
        return
    printing.facts(
        [
            ("documents", int(collected.total.documents)),
            ("hits", f"{collected.total.hit_rate:.1%}"),
            ("net seconds saved", collected.total.net_seconds),
            *([] if collected.money is None else [("money saved", f"{currency}{collected.money:,.2f}")]),
            ("to be written to" if dry_run else "written to", f"{out} ({printing.size(size)})"),
        ]
    )

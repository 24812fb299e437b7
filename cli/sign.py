"""`llmcache sign`: sign a store that was written without a key."""

from __future__ import annotations

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.errors import ConfigError
from llmcache.indexes.maintenance.sign import sign as signed
from llmcache.indexes.store import Store


def sign(
    store: options.StoreArgument,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Sign a whole store of your own: segments written without a key are rewritten.

    Afterwards every writer of the store needs the key.
    """
    key = options.signing_key(key_file, key_variable)
    if key is None:
        raise ConfigError("a store is signed with a key: give --key-file or --key-variable")
    opened = Store.open(store, trust="own", key=key)
    try:
        found = signed(opened, dry_run=dry_run)
    finally:
        opened.close()
    if json:
        printing.as_json({**found.as_dict(), "dry_run": dry_run})
        return
    printing.facts([("segments rewritten", found.segments), ("damaged entries", found.damaged)])

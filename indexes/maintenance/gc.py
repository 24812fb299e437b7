"""Garbage collection: remove the files that no reader needs."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass

from llmcache.indexes.errors import ConfigError
from llmcache.indexes.eviction import garbage as collection
from llmcache.indexes.eviction.budget import GRACE
from llmcache.indexes.eviction.garbage import garbage
from llmcache.indexes.maintenance.exclusive import locked
from llmcache.indexes.stats import counters as counting
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")


@dataclass(frozen=True, slots=True)
class Collected:
    """Result of a garbage collection: files removed, manifests among them, and bytes of all these files.

    folded: writers whose advisory files were merged. blocked: damaged manifests, because of which no file was removed.
    """

    files: int
    manifests: int
    bytes: int
    folded: int
    blocked: tuple[str, ...]
    dry_run: bool


def gc(store: Store, grace_seconds: float = GRACE, *, dry_run: bool = False) -> Collected:
    """Remove files that no reader has needed for `grace_seconds`.

    These are: files in no manifest, left by killed writers; manifests with a successor, except the newest one's
    predecessor; files that only such manifests name; and temporary files. The advisory files of writers that have not
    written for that long are merged. With a damaged manifest in the store no file is removed, since the files it names
    are unknown. Files that a running process is writing are kept whatever the grace, if the file system has locks.
    ConfigError for a negative grace; Busy while another process maintains the store.
    """
    if not grace_seconds >= 0:
        raise ConfigError(f"the grace is a number of seconds from 0 on, got {grace_seconds}")
    with locked(store, dry_run):
        unused = garbage(store.folder, grace_seconds, grace_seconds)
        writers = _old_writers(store, grace_seconds)
        if not dry_run:
            collection.remove(store.folder, list(unused.sizes))
            if len(writers) > 1:
                _fold(store, writers)
        folded = len(writers) if len(writers) > 1 else 0
        return Collected(
            len(unused.sizes), unused.manifests, sum(unused.sizes.values()), folded, unused.blocked, dry_run
        )


def _old_writers(store: Store, grace: float) -> list[str]:
    """List the writers, except this one, none of whose advisory files was written within the grace."""
    now = store.folder.now()
    changed: dict[str, float] = {}
    for name, (_, when) in store.folder.listing("stat").items():
        writer, _, ending = name.rpartition(".")
        if ending in {"json", "use", "runs"} and counting.WRITER.fullmatch(writer) and writer != store.writer:
            changed[writer] = max(changed.get(writer, 0), when)
    return sorted(writer for writer, when in changed.items() if now - when > grace)


def _fold(store: Store, writers: list[str]) -> None:
    try:
        counting.fold(store.folder, writers, uuid.uuid4().hex)
    except OSError as error:
        log.warning("the counters of %d writers were not merged: %s", len(writers), error)

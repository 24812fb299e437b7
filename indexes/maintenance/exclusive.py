"""Maintenance of a store by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from llmcache.indexes.commits.publish import fencing
from llmcache.indexes.store import Store


@contextmanager
def locked(store: Store, dry_run: bool) -> Iterator[None]:
    """Hold the store's maintainer lock inside the block, and turn disk errors there into StoreFenced or StoreFull.

    A dry run takes no lock. Busy when another process has it.
    """
    with fencing(), nullcontext() if dry_run else store.folder.lock():
        yield

"""Caches that nobody closed are closed when Python exits, so that nothing they computed is lost."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Protocol
from weakref import WeakSet

from llmcache.errors import LLMCacheError

log = logging.getLogger("llmcache")


class Closes(Protocol):
    def close(self) -> None: ...


_OPEN: WeakSet[Closes] = WeakSet()


def opened(cache: Closes) -> None:
    """Take note of a cache, which may be closed, or forgotten, before the end."""
    _OPEN.add(cache)


@atexit.register
def _close_all() -> None:
    for cache in list(_OPEN):
        try:
            cache.close()
        except (LLMCacheError, OSError) as error:
            log.warning("%s", error)


os.register_at_fork(after_in_child=_OPEN.clear)  # a child may not use what its parent opened

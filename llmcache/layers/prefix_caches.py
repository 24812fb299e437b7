"""Prefix caches of an attached decoder, one for each running mode."""

from __future__ import annotations

from collections.abc import Callable

from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.model.forward_patch import StandIn, install, remove
from llmcache.model.trial import explained

OFF = "the prefix cache is off (prefix_block=0)"
"""Reason without a prefix cache that the caller has asked for."""


class PrefixCaches:
    """Prefix caches of one trunk by running mode (autocast and other process-wide settings), made when first used.

    open_prefixes: makes the prefix cache for a running mode; None when prefix caching is off, ConfigError when the
    prefixes of this model cannot be reused.
    """

    def __init__(self, open_prefixes: Callable[[str], PrefixCache | None]) -> None:
        self._open = open_prefixes
        self._by_mode: dict[str, PrefixCache | str] = {}

    def get(self, mode: str, stand_in: StandIn) -> PrefixCache | str:
        """Return the prefix cache for a running mode, or the reason why there is none. stand_in: of the trunk."""
        if mode not in self._by_mode:
            remove(stand_in)  # the trials of a new prefix cache call the model's own forward
            try:
                prefixes = self._open(mode)
                self._by_mode[mode] = OFF if prefixes is None else prefixes
            except ConfigError as error:
                self._by_mode[mode] = str(error)
            except Exception as error:
                self._by_mode[mode] = f"its prefixes cannot be reused: a trial failed with {explained(error)}"
            finally:
                install(stand_in)
        return self._by_mode[mode]

    def clear(self) -> None:
        """Forget all prefix caches, as when the model has changed."""
        self._by_mode.clear()

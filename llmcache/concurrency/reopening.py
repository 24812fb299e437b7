"""Arguments with which a cache was opened, to open it again in a forked child or from a pickle."""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from llmcache.config import CacheConfig
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.commits.trust import Trust
from llmcache.indexes.store import Store
from llmcache.near.calibration.drift import Drift

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

log = logging.getLogger("llmcache")

_HELD = 4  # caches out of pickles that a worker process keeps open, for the next task that brings the same one


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The arguments of `LLMCache.open`, as far as they are needed to open the store again.

    model: the name or path that was given, else the model itself. secret_in_memory: the argument that gave a secret as
    bytes; "" where there is none.
    """

    path: str
    model: Module | str
    tokenizer: Any
    config: CacheConfig
    namespace: str
    drift: Drift | None = None
    secret_file: str | None = None
    trust: Trust = "auto"
    key: bytes | None = field(default=None, repr=False)
    key_file: str | None = None
    min_generation: int = 0
    allow_untrusted: bool = False
    secret_in_memory: str = ""
    pid: int = field(default_factory=os.getpid)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def store(self) -> Store:
        """The store, opened in this process. Errors as `Store.open`."""
        store = Store.open(
            self.path,
            trust=self.trust,
            key=self.key,
            min_generation=self.min_generation,
            allow_untrusted=self.allow_untrusted,
        )
        store.folder.reading = self.config.reading
        return store

    def __reduce__(self) -> Any:
        if self.secret_in_memory:
            raise ConfigError(
                f"a cache opened with {self.secret_in_memory}= cannot be pickled, since the secret would be in the "
                f"pickle; open it with {self.secret_in_memory}_file=, or open it in the worker"
            )
        arguments = {name: getattr(self, name) for name in self.__slots__ if name not in ("key", "secret_in_memory")}
        return _opening, (arguments,)


def _opening(arguments: dict[str, Any]) -> Opening:
    return Opening(**arguments)


_reopened: dict[str, LLMCache] = {}


def reopened(kind: type[LLMCache], opening: Opening) -> LLMCache:
    """The cache of a pickle. In another process than its own, the one that is open there already, if there is."""
    elsewhere = opening.pid != os.getpid()
    known = _reopened.get(opening.id) if elsewhere else None
    if known is not None and known.is_open:
        return known
    cache = kind.open(
        opening.path,
        opening.model,
        tokenizer=opening.tokenizer,
        config=opening.config,
        namespace=opening.namespace,
        drift=opening.drift,
        secret_file=opening.secret_file,
        trust=opening.trust,
        key_file=opening.key_file,
        min_generation=opening.min_generation,
        allow_untrusted=opening.allow_untrusted,
    )
    if elsewhere:
        cache.works_for_another_process()
        _reopened[opening.id] = cache
        while len(_reopened) > _HELD:
            _let_go(_reopened.pop(next(iter(_reopened))))
    return cache


def _let_go(cache: LLMCache) -> None:
    """Commit what a cache has computed that may be in use no more."""
    try:
        cache.commit()
    except LLMCacheError as error:
        log.warning("%s", error)

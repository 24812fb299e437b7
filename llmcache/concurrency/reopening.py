"""Reopen a cache in a forked child or from a pickle, with the arguments of its first opening."""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from llmcache.concurrency.calls import one_thread_each
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.commits.trust import Trust
from llmcache.indexes.store import Store
from llmcache.near.calibration.drift import Drift

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

log = logging.getLogger("llmcache")

_IMPORTED_IN = os.getpid()  # differs from the id of a process that was forked since
_MOST = 4  # unpickled caches that a worker process keeps open for later tasks with the same cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Arguments of `LLMCache.open` that are needed to open the store again.

    model: the name or path passed to `open`, else the model itself. kind: of a model that is loaded by name.
    secret_in_memory: name of the argument that passed a secret as bytes; "" for none. pid: process of the first
    opening. id: of this opening.
    """

    path: str
    model: Module | str
    tokenizer: Any
    config: CacheConfig
    namespace: str
    kind: str | None = None
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
        """Open the store in this process. Errors as `Store.open`."""
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
    """Return the cache of a pickle. Another process than the first reuses its open cache of the same opening."""
    elsewhere = opening.pid != os.getpid()
    known = _reopened.get(opening.id) if elsewhere else None
    if known is not None and known.is_open:
        return known
    if os.getpid() != _IMPORTED_IN:
        one_thread_each()
    cache = kind.open(
        opening.path,
        opening.model,
        kind=opening.kind,
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
        while len(_reopened) > _MOST:
            _commit_evicted(_reopened.pop(next(iter(_reopened))))
    return cache


def _commit_evicted(cache: LLMCache) -> None:
    """Commit a cache that is no longer kept open here, since nobody may close it."""
    try:
        cache.commit()
    except LLMCacheError as error:
        log.warning("%s", error)

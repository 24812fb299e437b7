"""Drop-ins: instances of the classes of sentence-transformers whose `encode` or `predict` goes through a cache.

A drop-in has the very `__dict__` of the cache's model. So a setting made on one is made on the other, the check for
changes of the model sees it, and everything but `encode` and `predict` is the model's own.

KeyBERT and BERTopic recognise a model by "sentence_transformers" in the full name of its class, and silently load
another model otherwise. Therefore this module has that name.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import TYPE_CHECKING, Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from llmcache.errors import ConfigError

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

NAME = "llmcache"
"""Attribute of a drop-in with its cache."""


def drop_in(cache: LLMCache, kind: type[Any]) -> Any:
    """Return a drop-in for the cache's model. ConfigError unless the model is of this kind."""
    if not isinstance(cache.model, kind):
        raise ConfigError(f"the model of this cache is a {type(cache.model).__name__}, not a {kind.__name__}")
    instance = object.__new__(_CLASSES[kind])
    object.__setattr__(instance, "__dict__", vars(cache.model))
    object.__setattr__(instance, NAME, cache)
    return instance


class _DropIn:
    """Copies and pickles of a drop-in: a deep copy is a copy of the model alone, a pickle opens the store again."""

    __slots__ = ()
    llmcache: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.llmcache.model, memo)

    def __copy__(self) -> Any:
        return copy.copy(self.llmcache.model)

    def __reduce__(self) -> Any:
        return drop_in, (self.llmcache, _kind(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    # evaluators store these methods in the model's card; methods of the drop-in would make the model refer to its cache
    @property
    def similarity(self) -> Any:
        return self.llmcache.model.similarity

    @property
    def similarity_pairwise(self) -> Any:
        return self.llmcache.model.similarity_pairwise

    def start_multi_process_pool(self, *arguments: Any, **settings: Any) -> Any:
        """Start processes of the model alone, which compute without the cache; see the model's own method."""
        return self.llmcache.model.start_multi_process_pool(*arguments, **settings)

    @property
    def uncached_model(self) -> Any:
        """The model itself, without the cache."""
        return self.llmcache.model


class CachedSentenceTransformer(_DropIn, SentenceTransformer):
    """SentenceTransformer whose `encode`, `encode_query` and `encode_document` go through a cache."""

    __slots__ = (NAME,)

    @wraps(SentenceTransformer.encode)
    def encode(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]  # one of many overloads
        return self.llmcache.encode(*arguments, **settings)


class CachedCrossEncoder(_DropIn, CrossEncoder):
    """CrossEncoder whose `predict` and `rank` go through a cache."""

    __slots__ = (NAME,)

    @wraps(CrossEncoder.predict)
    def predict(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]  # one of many overloads
        return self.llmcache.predict(*arguments, **settings)


class CachedSparseEncoder(_DropIn, SparseEncoder):
    """SparseEncoder whose `encode`, `encode_query` and `encode_document` go through a cache."""

    __slots__ = (NAME,)

    @wraps(SparseEncoder.encode)
    def encode(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]  # one of many overloads
        return self.llmcache.encode(*arguments, **settings)


class CachedMultiVectorEncoder(_DropIn, MultiVectorEncoder):
    """MultiVectorEncoder whose `encode`, `encode_query` and `encode_document` go through a cache."""

    __slots__ = (NAME,)

    @wraps(MultiVectorEncoder.encode)
    def encode(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]  # one of many overloads
        return self.llmcache.encode(*arguments, **settings)


_CLASSES: dict[type[Any], type[Any]] = {
    SentenceTransformer: CachedSentenceTransformer,
    CrossEncoder: CachedCrossEncoder,
    SparseEncoder: CachedSparseEncoder,
    MultiVectorEncoder: CachedMultiVectorEncoder,
}


def _kind(instance: Any) -> type[Any]:
    return next(kind for kind in _CLASSES if isinstance(instance, kind))

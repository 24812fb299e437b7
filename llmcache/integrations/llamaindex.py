"""LlamaIndex embedding from a cache. Needs the extra `llamaindex`."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from llmcache.cache import LLMCache

_MOST_TEXTS = 2048


class CachedEmbedding(BaseEmbedding):
    """LlamaIndex `BaseEmbedding` from a cache, for `Settings.embed_model`, indexes and node parsers.

    Stored texts cost a lookup. Queries and texts never share an entry. A batch is one call of the cache, also in the
    asynchronous methods, which compute in a thread. Calls from several threads wait for each other.
    The caller closes the cache. Unpickling, as in the workers of an `IngestionPipeline` with `num_workers`, opens the
    cache again.
    """

    _cache: LLMCache = PrivateAttr()

    def __init__(self, cache: LLMCache, **others: Any) -> None:
        """cache: an open cache with a SentenceTransformer. others: fields of BaseEmbedding.

        embed_batch_size defaults to the largest that LlamaIndex allows: the cache sorts the texts of a call by length
        and makes the batches for the model itself.
        """
        super().__init__(**{"model_name": cache.identity.name, "embed_batch_size": _MOST_TEXTS, **others})
        self._cache = cache

    @classmethod
    def class_name(cls) -> str:
        return "llmcache"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the fields and `vectors_id`, so that keys of an `IngestionCache` differ between models."""
        return {**super().to_dict(**kwargs), "vectors_id": self._cache.vectors_id}

    def __reduce__(self) -> Any:
        fields = {name: value for name, value in self.__dict__.items() if name != "callback_manager"}
        return _opened, (type(self), self._cache, fields)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._cache.encode_document(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._cache.encode_query(query).tolist()
        return vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def _opened(kind: type[CachedEmbedding], cache: LLMCache, fields: dict[str, Any]) -> CachedEmbedding:
    """Make the embedding of a pickle."""
    return kind(cache, **fields)

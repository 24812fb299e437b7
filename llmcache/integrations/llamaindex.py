"""An embedding for LlamaIndex, from a cache. Needs the extra `llamaindex`."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from llmcache.cache import LLMCache


class CachedEmbedding(BaseEmbedding):
    """What `llama_index.core` takes for an embedding: `Settings.embed_model`, indexes, node parsers.

    Texts that the cache knows cost a look-up. Queries and texts never share an entry. Calls from several threads wait
    for each other. The cache stays the caller's, to be closed by the caller. A pickle, as `num_workers` of an
    `IngestionPipeline` makes it, opens the cache again where it is loaded.
    """

    _cache: LLMCache = PrivateAttr()

    def __init__(self, cache: LLMCache, **others: Any) -> None:
        """cache: open, with a SentenceTransformer. others: of BaseEmbedding.

        embed_batch_size is 256 unless given: the cache itself makes batches for the model.
        """
        super().__init__(**{"model_name": cache.identity.name, "embed_batch_size": 256, **others})
        self._cache = cache

    @classmethod
    def class_name(cls) -> str:
        return "llmcache"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The fields, and what tells the vectors of two models apart: `IngestionCache` makes its keys of this."""
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
    """The embedding of a pickle."""
    return kind(cache, **fields)

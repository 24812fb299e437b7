"""An embedding for LlamaIndex, from a cache. Needs the extra `llamaindex`."""

from __future__ import annotations

import asyncio
from threading import Lock
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from llmcache.cache import LLMCache


class CachedEmbedding(BaseEmbedding):
    """What `llama_index.core` takes for an embedding: `Settings.embed_model`, indexes, node parsers.

    Texts that the cache knows cost a look-up. Queries and texts never share an entry. Calls from several threads wait
    for each other. The cache stays the caller's, to be closed by the caller.
    """

    _cache: LLMCache = PrivateAttr()
    _lock: Any = PrivateAttr(default_factory=Lock)

    def __init__(self, cache: LLMCache, **others: Any) -> None:
        """cache: open, with a SentenceTransformer, and used by nobody else meanwhile. others: of BaseEmbedding.

        embed_batch_size is 256 unless given: the cache itself makes batches for the model.
        """
        super().__init__(**{"model_name": cache.identity.name, "embed_batch_size": 256, **others})
        self._cache = cache

    @classmethod
    def class_name(cls) -> str:
        return "llmcache"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        with self._lock:
            found: list[list[float]] = self._cache.encode_document(texts).tolist()
        return found

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        with self._lock:
            found: list[float] = self._cache.encode_query(query).tolist()
        return found

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

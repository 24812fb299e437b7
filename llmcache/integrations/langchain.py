"""LangChain embeddings from a cache. Needs the extra `langchain`."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from llmcache.cache import LLMCache


class CachedEmbeddings(Embeddings):
    """LangChain `Embeddings` from a cache, for vector stores, retrievers and indexing.

    Stored texts cost a lookup. Queries and documents never share an entry. The asynchronous methods, which LangChain
    runs in threads, wait for each other. The caller closes the cache. Unpickling opens the cache again.
    """

    def __init__(self, cache: LLMCache, *, batch_size: int = 32) -> None:
        """cache: an open cache with a SentenceTransformer. batch_size: of the model."""
        self.cache = cache
        self._batch_size = batch_size

    @property
    def namespace(self) -> str:
        """Name of the vectors of this model and these settings, for `CacheBackedEmbeddings(namespace=...)`.

        Different models or settings have different names.
        """
        return self.cache.vectors_id

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector per text, as the model's `encode_document`."""
        if not texts:
            return []
        vectors: list[list[float]] = self.cache.encode_document(texts, batch_size=self._batch_size).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query, as the model's `encode_query`."""
        vector: list[float] = self.cache.encode_query(text).tolist()
        return vector

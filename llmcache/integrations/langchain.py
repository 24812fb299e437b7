"""Embeddings for LangChain, from a cache. Needs the extra `langchain`."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from llmcache.cache import LLMCache


class CachedEmbeddings(Embeddings):
    """What `langchain_core` takes for embeddings: vector stores, retrievers, indexing.

    Texts that the cache knows cost a look-up. Queries and documents never share an entry. The asynchronous methods,
    which LangChain runs in threads, wait for each other. The cache stays the caller's, to be closed by the caller.
    A pickle opens the cache again where it is loaded.
    """

    def __init__(self, cache: LLMCache, *, batch_size: int = 32) -> None:
        """cache: open, with a SentenceTransformer. batch_size: of the model."""
        self.cache = cache
        self._batch_size = batch_size

    @property
    def namespace(self) -> str:
        """A name for vectors of this model and these settings, for `CacheBackedEmbeddings(namespace=...)` and the like.

        Two models, or one model with other settings, never have the same one.
        """
        return self.cache.vectors_id

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text, as the model's `encode_document` gives it."""
        if not texts:
            return []
        vectors: list[list[float]] = self.cache.encode_document(texts, batch_size=self._batch_size).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """As the model's `encode_query` gives it."""
        vector: list[float] = self.cache.encode_query(text).tolist()
        return vector

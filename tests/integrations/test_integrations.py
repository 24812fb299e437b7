"""Other libraries with the cache inside: LangChain, LlamaIndex, transformers' pipelines, datasets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import LLMCache

TEXTS = ["Where is my card?", "The fee was too high", "Where is my card?", "Cats like fish"]
EXTRA = "install the extra 'test' for other libraries"


@pytest.fixture
def cache(store: Path, model: SentenceTransformer, one_thread: None) -> Iterator[LLMCache]:
    with LLMCache.open(store, model) as opened:
        yield opened


def computed(cache: LLMCache) -> int:
    return cache.stats().counters.misses


def test_langchain_gets_the_models_vectors_and_repeats_from_the_cache(
    cache: LLMCache, model: SentenceTransformer
) -> None:
    pytest.importorskip("langchain_core", reason=EXTRA)
    from llmcache.integrations.langchain import CachedEmbeddings

    embeddings = CachedEmbeddings(cache)
    found = embeddings.embed_documents(TEXTS)
    assert all(type(number) is float for vector in found for number in vector)
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-6)
    assert computed(cache) == 3
    assert embeddings.embed_documents(TEXTS) == found
    assert embeddings.embed_documents([]) == []
    assert computed(cache) == 3
    np.testing.assert_allclose(embeddings.embed_query("a card"), model.encode_query("a card"), atol=1e-6)


def test_a_langchain_vector_store_finds_what_it_should(cache: LLMCache) -> None:
    pytest.importorskip("langchain_core", reason=EXTRA)
    from langchain_core.documents import Document
    from langchain_core.vectorstores import InMemoryVectorStore

    from llmcache.integrations.langchain import CachedEmbeddings

    store = InMemoryVectorStore(CachedEmbeddings(cache))
    store.add_documents([Document(page_content=text, id=str(i)) for i, text in enumerate(TEXTS)])
    assert store.similarity_search("costs", k=1)[0].page_content == "The fee was too high"
    before = computed(cache)
    again = InMemoryVectorStore(CachedEmbeddings(cache))
    again.add_documents([Document(page_content=text) for text in TEXTS])
    assert computed(cache) == before


def test_langchain_may_ask_from_many_threads_at_once(cache: LLMCache, model: SentenceTransformer) -> None:
    pytest.importorskip("langchain_core", reason=EXTRA)
    from llmcache.integrations.langchain import CachedEmbeddings

    embeddings = CachedEmbeddings(cache)

    async def all_at_once() -> list[list[list[float]]]:
        return await asyncio.gather(*(embeddings.aembed_documents([f"text {i % 5}", TEXTS[i % 4]]) for i in range(20)))

    found = asyncio.run(all_at_once())
    expected = [model.encode_document([f"text {i % 5}", TEXTS[i % 4]]) for i in range(20)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert computed(cache) == 5 + 3


def test_llamaindex_gets_the_models_vectors_and_repeats_from_the_cache(
    cache: LLMCache, model: SentenceTransformer
) -> None:
    pytest.importorskip("llama_index.core", reason=EXTRA)
    from llmcache.integrations.llamaindex import CachedEmbedding

    embedding = CachedEmbedding(cache)
    found = embedding.get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-6)
    assert computed(cache) == 3
    assert embedding.get_text_embedding(TEXTS[1]) == found[1]
    assert asyncio.run(embedding.aget_text_embedding(TEXTS[1])) == found[1]
    assert computed(cache) == 3
    np.testing.assert_allclose(embedding.get_query_embedding("a card"), model.encode_query("a card"), atol=1e-6)
    assert asyncio.run(embedding.aget_query_embedding("a card")) == embedding.get_query_embedding("a card")


def test_a_llamaindex_index_finds_what_it_should(cache: LLMCache) -> None:
    pytest.importorskip("llama_index.core", reason=EXTRA)
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from llmcache.integrations.llamaindex import CachedEmbedding

    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=CachedEmbedding(cache))
    (best,) = index.as_retriever(similarity_top_k=1).retrieve("costs")
    assert best.text == "The fee was too high"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that `encode_document` of caches was called with."""
    asked: list[int] = []
    plain = LLMCache.encode_document

    def counting(cache: LLMCache, texts: Any, *arguments: Any, **settings: Any) -> Any:
        asked.append(len(texts))
        return plain(cache, texts, *arguments, **settings)

    monkeypatch.setattr(LLMCache, "encode_document", counting)
    return asked


MANY = [f"{text} {i}" for i, text in enumerate(TEXTS * 5)]


def test_llamaindex_asks_for_a_batch_in_one_call_also_asynchronously(
    cache: LLMCache, model: SentenceTransformer, calls: list[int]
) -> None:
    pytest.importorskip("llama_index.core", reason=EXTRA)
    from llmcache.integrations.llamaindex import CachedEmbedding

    embedding = CachedEmbedding(cache)
    found = asyncio.run(embedding.aget_text_embedding_batch(MANY))
    np.testing.assert_allclose(found, model.encode_document(MANY), atol=1e-6)
    assert embedding.get_text_embedding_batch(MANY) == found
    assert calls == [20, 20]
    small = CachedEmbedding(cache, embed_batch_size=8, num_workers=2)
    assert asyncio.run(small.aget_text_embedding_batch(MANY)) == found
    assert sorted(calls[2:]) == [4, 8, 8]
    assert computed(cache) == 20


def test_a_llamaindex_pipeline_gives_the_same_vectors_asynchronously(
    cache: LLMCache, model: SentenceTransformer, calls: list[int]
) -> None:
    pytest.importorskip("llama_index.core", reason=EXTRA)
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import TextNode

    from llmcache.integrations.llamaindex import CachedEmbedding

    pipeline = IngestionPipeline(transformations=[CachedEmbedding(cache)], disable_cache=True)

    def nodes() -> list[Any]:
        return [TextNode(text=text, id_=str(i)) for i, text in enumerate(MANY)]

    def vectors(given: Any) -> list[Any]:
        assert [node.text for node in given] == MANY
        return [node.embedding for node in given]

    found = vectors(asyncio.run(pipeline.arun(nodes=nodes())))
    np.testing.assert_allclose(found, model.encode_document(MANY), atol=1e-6)
    assert vectors(pipeline.run(nodes=nodes())) == found
    assert calls == [20, 20]
    assert computed(cache) == 20


def test_the_langchain_indexing_api_embeds_new_and_changed_documents_only(
    cache: LLMCache, model: SentenceTransformer, calls: list[int]
) -> None:
    pytest.importorskip("langchain_core", reason=EXTRA)
    from langchain_core.documents import Document
    from langchain_core.indexing import InMemoryRecordManager, index
    from langchain_core.vectorstores import InMemoryVectorStore

    from llmcache.integrations.langchain import CachedEmbeddings

    records = InMemoryRecordManager(namespace="documents")
    records.create_schema()
    store = InMemoryVectorStore(CachedEmbeddings(cache))

    def indexed(texts: list[str], into: InMemoryVectorStore, memory: InMemoryRecordManager) -> dict[str, int]:
        documents = [Document(page_content=text, metadata={"source": i}) for i, text in enumerate(texts)]
        counts = index(
            documents, memory, into, cleanup="incremental", source_id_key="source", key_encoder="sha256", batch_size=8
        )
        return {name: count for name, count in counts.items() if count}  # type: ignore[misc]

    def stored(given: InMemoryVectorStore) -> dict[str, Any]:
        return {entry["text"]: entry["vector"] for entry in given.store.values()}

    assert indexed(MANY, store, records) == {"num_added": 20}
    assert (calls, computed(cache)) == ([8, 8, 4], 20)
    np.testing.assert_allclose([stored(store)[text] for text in MANY], model.encode_document(MANY), atol=1e-6)

    assert indexed(MANY, store, records) == {"num_skipped": 20}
    assert (calls, computed(cache)) == ([8, 8, 4], 20)

    changed = [*MANY[:3], "The fee is fair", *MANY[4:]]
    assert indexed(changed, store, records) == {"num_added": 1, "num_deleted": 1, "num_skipped": 19}
    assert (calls, computed(cache)) == ([8, 8, 4, 1], 21)
    assert sorted(stored(store)) == sorted(changed)
    np.testing.assert_allclose(stored(store)["The fee is fair"], model.encode_document("The fee is fair"), atol=1e-6)

    # another vector store without records asks for all texts, and nothing is computed
    fresh = InMemoryRecordManager(namespace="documents")
    fresh.create_schema()
    again = InMemoryVectorStore(CachedEmbeddings(cache))
    assert indexed(changed, again, fresh) == {"num_added": 20}
    assert stored(again) == stored(store)
    assert computed(cache) == 21


def test_a_data_set_is_mapped_through_the_cache(cache: LLMCache, model: SentenceTransformer) -> None:
    datasets = pytest.importorskip("datasets", reason=EXTRA)
    data = datasets.Dataset.from_dict({"text": TEXTS})

    def with_vectors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "vector": list(cache.encode(batch["text"]))}

    mapped = data.map(with_vectors, batched=True, batch_size=2, new_fingerprint="vectors", keep_in_memory=True)
    np.testing.assert_allclose(mapped["vector"][:], model.encode(TEXTS), atol=1e-6)
    assert computed(cache) == 3
    streamed = data.to_iterable_dataset().map(with_vectors, batched=True)
    np.testing.assert_allclose([row["vector"] for row in streamed], model.encode(TEXTS), atol=1e-6)
    assert computed(cache) == 3

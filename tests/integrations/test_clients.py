"""Other libraries with a drop-in: their results are those with the plain model, and a second run computes nothing."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, util
from sentence_transformers.cross_encoder import evaluation as of_pairs
from sentence_transformers.multi_vector_encoder import evaluation as of_tokens
from sentence_transformers.sentence_transformer import evaluation as of_vectors
from sentence_transformers.sparse_encoder import evaluation as of_sparse

from llmcache import LLMCache
from tests import kinds
from tests.small_sentences import sentences, tiny_folder

TEXTS = sentences(24)
LEFT, RIGHT, OTHERS = TEXTS[:8], TEXTS[8:16], TEXTS[16:]
CLOSENESS = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4]
SAME = [1, 0, 1, 0, 1, 0, 1, 0]
QUERIES: Any = {f"q{i}": text for i, text in enumerate(LEFT)}
CORPUS: Any = {f"d{i}": text for i, text in enumerate(RIGHT + OTHERS)}
RELEVANT: Any = {f"q{i}": {f"d{i}", f"d{i + 8}"} for i in range(8)}
SAMPLES: Any = [
    {"query": one, "positive": [right], "negative": [*OTHERS[:3], RIGHT[0]]}
    for one, right in zip(LEFT, RIGHT, strict=True)
]
DOCUMENTS: Any = [
    {"query": sample["query"], "positive": sample["positive"], "documents": TEXTS[8:]} for sample in SAMPLES
]
PAIRS = [list(pair) for pair in zip(LEFT, RIGHT, strict=True)]

# third parties warn about their own dependencies, and torch about its sparse tensors
pytestmark = pytest.mark.filterwarnings("ignore")

AS: dict[str, Callable[[LLMCache], Any]] = {
    "SentenceTransformer": LLMCache.as_sentence_transformer,
    "CrossEncoder": LLMCache.as_cross_encoder,
    "SparseEncoder": LLMCache.as_sparse_encoder,
    "MultiVectorEncoder": LLMCache.as_multi_vector_encoder,
}
Job = Callable[[Any], Any]
"""Asks a model, by way of another library, for a result of plain values and arrays."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def given(request: pytest.FixtureRequest, folder: str) -> Any:
    return kinds.MAKERS[getattr(request, "param", "SentenceTransformer")](folder)


@pytest.fixture
def cache(given: Any, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", given) as opened:
        yield opened


def check_equal(ours: Any, plain: Any, at: str = "result") -> None:
    """Compare two results value by value, numbers within 1e-5."""
    if isinstance(plain, dict):
        assert list(ours) == list(plain), at
        for name in plain:
            check_equal(ours[name], plain[name], f"{at}[{name!r}]")
    elif isinstance(plain, list | tuple):
        assert len(ours) == len(plain), at
        for i, (our, one) in enumerate(zip(ours, plain, strict=True)):
            check_equal(our, one, f"{at}[{i}]")
    elif isinstance(plain, np.ndarray | torch.Tensor):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(plain), atol=1e-5, err_msg=at)
    elif isinstance(plain, float):
        assert math.isclose(ours, plain, rel_tol=0, abs_tol=1e-5) or (math.isnan(ours) and math.isnan(plain)), at
    else:
        assert ours == plain, at


def check(job: Job, cache: LLMCache) -> None:
    """Compare a job with the plain model, cold and warm; the cold run uses the cache, the warm one computes nothing."""
    expected = job(cache.model)
    made: Any = AS[type(cache.model).__name__](cache)
    check_equal(job(made), expected)
    counters = cache.stats().counters
    computed, asked = counters.misses, counters.documents
    assert computed > 0
    check_equal(job(made), expected)
    counters = cache.stats().counters
    assert counters.misses == computed
    assert counters.documents > asked
    assert counters.bypassed == 0


# -- sentence-transformers itself ------------------------------------------------------------------------------

EVALUATORS: dict[str, dict[str, Callable[[], Job]]] = {
    "SentenceTransformer": {
        "similarity": lambda: of_vectors.EmbeddingSimilarityEvaluator(LEFT, RIGHT, CLOSENESS),
        "similarity of few bits": lambda: of_vectors.EmbeddingSimilarityEvaluator(
            LEFT, RIGHT, CLOSENESS, precision="binary", truncate_dim=16
        ),
        "retrieval": lambda: of_vectors.InformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT, truncate_dim=24),
        "retrieval with prompts": lambda: of_vectors.InformationRetrievalEvaluator(
            QUERIES, CORPUS, RELEVANT, query_prompt="find: ", corpus_prompt="read: "
        ),
        "two classes": lambda: of_vectors.BinaryClassificationEvaluator(LEFT, RIGHT, SAME),
        "triplets": lambda: of_vectors.TripletEvaluator(LEFT, RIGHT, OTHERS),
        "paraphrases": lambda: of_vectors.ParaphraseMiningEvaluator(CORPUS, [("d0", "d8"), ("d1", "d9")]),
        "reranking": lambda: of_vectors.RerankingEvaluator(SAMPLES),
        "reranking one by one": lambda: of_vectors.RerankingEvaluator(SAMPLES, use_batched_encoding=False),
        "translation": lambda: of_vectors.TranslationEvaluator(LEFT, RIGHT),
    },
    "CrossEncoder": {
        "classes": lambda: of_pairs.CrossEncoderClassificationEvaluator(PAIRS, SAME),
        "correlation": lambda: of_pairs.CrossEncoderCorrelationEvaluator(PAIRS, CLOSENESS),
        "reranking": lambda: of_pairs.CrossEncoderRerankingEvaluator(SAMPLES),
        "reranking of documents": lambda: of_pairs.CrossEncoderRerankingEvaluator(DOCUMENTS),
    },
    "SparseEncoder": {
        "similarity": lambda: of_sparse.SparseEmbeddingSimilarityEvaluator(LEFT, RIGHT, CLOSENESS),
        "retrieval": lambda: of_sparse.SparseInformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT),
        "few dimensions": lambda: of_sparse.SparseInformationRetrievalEvaluator(
            QUERIES, CORPUS, RELEVANT, max_active_dims=9
        ),
        "two classes": lambda: of_sparse.SparseBinaryClassificationEvaluator(LEFT, RIGHT, SAME),
        "triplets": lambda: of_sparse.SparseTripletEvaluator(LEFT, RIGHT, OTHERS),
        "reranking": lambda: of_sparse.SparseRerankingEvaluator(SAMPLES),
        "translation": lambda: of_sparse.SparseTranslationEvaluator(LEFT, RIGHT),
    },
    "MultiVectorEncoder": {
        "retrieval": lambda: of_tokens.MultiVectorInformationRetrievalEvaluator(QUERIES, CORPUS, RELEVANT),
        "reranking": lambda: of_tokens.MultiVectorRerankingEvaluator(SAMPLES),
        "triplets": lambda: of_tokens.MultiVectorTripletEvaluator(LEFT, RIGHT, OTHERS),
        "distillation": lambda: of_tokens.MultiVectorDistillationEvaluator(LEFT, RIGHT, CLOSENESS),
    },
}


@pytest.mark.parametrize(
    ("given", "make"),
    [pytest.param(kind, make, id=f"{kind}-{name}") for kind, made in EVALUATORS.items() for name, make in made.items()],
    indirect=["given"],
)
def test_an_evaluator_scores_a_drop_in_as_the_model(make: Callable[[], Job], cache: LLMCache) -> None:
    check(lambda model: make()(model), cache)


def test_squared_errors_to_a_teacher_behind_the_cache_are_those_to_the_model(cache: LLMCache) -> None:
    def job(teacher: Any) -> Any:
        return of_vectors.MSEEvaluator(LEFT, RIGHT, teacher_model=teacher)(teacher)

    check(job, cache)


def test_paraphrases_are_mined_as_with_the_model(cache: LLMCache) -> None:
    check(lambda model: util.paraphrase_mining(model, TEXTS, top_k=5), cache)


def mined(model: Any, reranker: CrossEncoder | None = None) -> Any:
    datasets = pytest.importorskip("datasets", reason="install the extra 'test' for data sets")
    data = datasets.Dataset.from_dict({"query": LEFT, "answer": RIGHT})
    return util.mine_hard_negatives(
        data, model, corpus=OTHERS, cross_encoder=reranker, num_negatives=2, range_max=6, max_score=2.0, verbose=False
    ).to_dict()


def test_hard_negatives_are_mined_as_with_the_model(cache: LLMCache) -> None:
    check(mined, cache)


@pytest.mark.parametrize("given", ["CrossEncoder"], indirect=True)
def test_hard_negatives_are_rescored_by_a_cross_encoder_as_by_the_model(cache: LLMCache, folder: str) -> None:
    retriever = kinds.sentence_transformer(folder)
    check(lambda model: mined(retriever, model), cache)


# -- libraries that are no requirement of the tests ------------------------------------------------------------

MISSING = "not installed; docs/clients.md names the tested version"


def test_keybert_finds_the_same_keywords(cache: LLMCache) -> None:
    keybert = pytest.importorskip("keybert", reason=MISSING)

    def job(model: Any) -> Any:
        return keybert.KeyBERT(model).extract_keywords(TEXTS, keyphrase_ngram_range=(1, 2), top_n=4)

    check(job, cache)


def test_bertopic_finds_the_same_topics(cache: LLMCache) -> None:
    bertopic = pytest.importorskip("bertopic", reason=MISSING)
    from bertopic.dimensionality import BaseDimensionalityReduction
    from sklearn.cluster import KMeans

    def job(model: Any) -> Any:
        topics = bertopic.BERTopic(
            embedding_model=model,
            umap_model=BaseDimensionalityReduction(),
            hdbscan_model=KMeans(4, random_state=0, n_init=1),
        )
        found, _ = topics.fit_transform(TEXTS)
        return found, topics.find_topics("a letter", 3), topics.get_topic_info()["Name"].tolist()

    check(job, cache)


def test_setfit_fits_the_same_head_and_predicts_the_same(cache: LLMCache) -> None:
    setfit = pytest.importorskip("setfit", reason=MISSING)
    from sklearn.linear_model import LogisticRegression

    def job(model: Any) -> Any:
        classifier = setfit.SetFitModel(model_body=model, model_head=LogisticRegression(C=100), labels=["no", "yes"])
        classifier.fit(LEFT + RIGHT, SAME + SAME, num_epochs=1)
        return classifier.predict_proba(TEXTS, as_numpy=True), list(classifier.predict(TEXTS))

    check(job, cache)


def test_semhash_removes_the_same_texts(cache: LLMCache) -> None:
    semhash = pytest.importorskip("semhash", reason=MISSING)

    def job(model: Any) -> Any:
        index = semhash.SemHash.from_records(records=LEFT + RIGHT, model=model)
        kept = index.self_deduplicate(threshold=0.98)
        return kept.selected, index.deduplicate(records=OTHERS, threshold=0.98).selected

    check(job, cache)


def test_txtai_finds_the_same_documents(cache: LLMCache) -> None:
    embeddings = pytest.importorskip("txtai.embeddings", reason=MISSING)

    def job(model: Any) -> Any:
        def vectors(texts: list[str]) -> Any:
            return model.encode(texts)

        index = embeddings.Embeddings(method="external", transform=vectors, backend="numpy")
        index.index(TEXTS)
        return [index.search(text, 5) for text in LEFT]

    check(job, cache)


def test_chroma_finds_the_same_documents(cache: LLMCache) -> None:
    chromadb = pytest.importorskip("chromadb", reason=MISSING)

    class Vectors(chromadb.EmbeddingFunction):  # type: ignore[misc,name-defined]
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self, input: list[str]) -> Any:
            return list(self.model.encode(input))

        @staticmethod
        def name() -> str:
            return "llmcache"

        def get_config(self) -> dict[str, Any]:
            return {}

    def job(model: Any) -> Any:
        client = chromadb.EphemeralClient()
        collection = client.create_collection("texts", embedding_function=Vectors(model))
        collection.add(ids=list(CORPUS), documents=list(CORPUS.values()))
        found = collection.query(query_texts=LEFT, n_results=5)
        client.delete_collection("texts")
        return found["ids"], [[float(one) for one in row] for row in found["distances"]]

    check(job, cache)


def test_chromas_own_function_takes_a_drop_in(cache: LLMCache) -> None:
    pytest.importorskip("chromadb", reason=MISSING)
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    def job(model: Any) -> Any:
        SentenceTransformerEmbeddingFunction.models["cached"] = model
        return SentenceTransformerEmbeddingFunction("cached", normalize_embeddings=True)(TEXTS)

    check(job, cache)


def test_haystacks_embedders_give_the_same_vectors(cache: LLMCache, tmp_path: Path) -> None:
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers", reason=MISSING)
    from haystack import Document
    from haystack.utils import ComponentDevice

    cache.model.save(str(tmp_path / "saved"))  # type: ignore[operator]
    settings = {"model": str(tmp_path / "saved"), "device": ComponentDevice.from_str("cpu"), "progress_bar": False}

    def job(model: Any) -> Any:
        documents = embedders.SentenceTransformersDocumentEmbedder(**settings, normalize_embeddings=True)
        query = embedders.SentenceTransformersTextEmbedder(**settings, prefix="find: ")
        for embedder in (documents, query):
            embedder.warm_up()
            embedder.embedding_backend.model = model
        found = documents.run([Document(content=text) for text in TEXTS])["documents"]
        return [one.embedding for one in found], query.run(LEFT[0])["embedding"]

    check(job, cache)


@pytest.mark.parametrize("given", ["SparseEncoder"], indirect=True)
def test_haystacks_sparse_embedder_gives_the_same_entries(cache: LLMCache, tmp_path: Path) -> None:
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers", reason=MISSING)
    from haystack import Document
    from haystack.utils import ComponentDevice

    cache.model.save(str(tmp_path / "saved"))  # type: ignore[operator]

    def job(model: Any) -> Any:
        embedder = embedders.SentenceTransformersSparseDocumentEmbedder(
            model=str(tmp_path / "saved"), device=ComponentDevice.from_str("cpu"), progress_bar=False
        )
        embedder.warm_up()
        embedder.embedding_backend.model = model
        found = embedder.run([Document(content=text) for text in TEXTS])["documents"]
        return [(one.sparse_embedding.indices, one.sparse_embedding.values) for one in found]

    check(job, cache)


@pytest.mark.parametrize("given", ["CrossEncoder"], indirect=True)
def test_haystacks_ranker_gives_the_same_order(cache: LLMCache, tmp_path: Path) -> None:
    rankers = pytest.importorskip("haystack_integrations.components.rankers.sentence_transformers", reason=MISSING)
    from haystack import Document
    from haystack.utils import ComponentDevice

    cache.model.save(str(tmp_path / "saved"))  # type: ignore[operator]

    def job(model: Any) -> Any:
        ranker = rankers.SentenceTransformersSimilarityRanker(
            model=str(tmp_path / "saved"), device=ComponentDevice.from_str("cpu")
        )
        ranker.warm_up()
        ranker._cross_encoder = model
        found = ranker.run(query=LEFT[0], documents=[Document(content=text) for text in RIGHT])["documents"]
        return [(one.content, one.score) for one in found]

    check(job, cache)


@pytest.mark.parametrize("given", ["CrossEncoder"], indirect=True)
def test_llamaindexs_reranker_gives_the_same_order(cache: LLMCache, tmp_path: Path) -> None:
    pytest.importorskip("llama_index.core", reason=MISSING)
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    cache.model.save(str(tmp_path / "saved"))  # type: ignore[operator]

    def job(model: Any) -> Any:
        reranker = SentenceTransformerRerank(model=str(tmp_path / "saved"), top_n=5, device="cpu")
        reranker._model = model
        nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in RIGHT]
        found = reranker.postprocess_nodes(nodes, query_str=LEFT[0])
        return [(one.node.get_content(), float(one.score or 0)) for one in found]

    check(job, cache)


def test_langchains_own_tests_of_embeddings_pass(cache: LLMCache) -> None:
    suite = pytest.importorskip("langchain_tests.integration_tests", reason=MISSING).EmbeddingsIntegrationTests
    from llmcache.integrations.langchain import CachedEmbeddings

    class OfTheCache(suite):  # type: ignore[misc,valid-type]
        embeddings_class = CachedEmbeddings
        embedding_model_params = {"cache": cache}  # noqa: RUF012

    tests, embeddings = OfTheCache(), CachedEmbeddings(cache)
    asked = [getattr(tests, name) for name in dir(suite) if name.startswith("test_")]
    asked = [test for test in asked if "model" in inspect.signature(test).parameters]
    assert len(asked) >= 4
    for test in asked:
        answer = test(embeddings)
        if asyncio.iscoroutine(answer):
            asyncio.run(answer)

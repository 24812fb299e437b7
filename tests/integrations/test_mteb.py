"""MTEB over a cache: the scores are those of the plain model, and a second evaluation computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcache import LLMCache
from llmcache.errors import ConfigError, ModelMismatch
from tests import kinds
from tests.integrations.test_clients import CLOSENESS, CORPUS, LEFT, QUERIES, RELEVANT, RIGHT, SAME, check_equal
from tests.small_sentences import tiny_folder

mteb: Any = pytest.importorskip("mteb", reason="install the extra 'test' for MTEB")
datasets: Any = pytest.importorskip("datasets", reason="install the extra 'test' for data sets")

from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402

from llmcache.integrations.mteb import cached_model  # noqa: E402

# MTEB warns about prompts that are not its own, and its tasks about sparse tensors
pytestmark = pytest.mark.filterwarnings("ignore")

RELEVANT_DOCUMENTS = {query: dict.fromkeys(documents, 1) for query, documents in RELEVANT.items()}
CANDIDATES = {query: [*sorted(RELEVANT[query]), *list(CORPUS)[i : i + 5]] for i, query in enumerate(QUERIES)}


def metadata(name: str, kind: str, score: str) -> Any:
    return mteb.TaskMetadata(
        name=name, description="a few texts", type=kind, category="t2t", modalities=["text"], reference=None,
        eval_splits=["test"], eval_langs=["eng-Latn"], main_score=score, dataset={"path": "none", "revision": "none"},
        date=None, domains=[], task_subtypes=[], license=None, annotations_creators=None, dialect=[],
        sample_creation=None, bibtex_citation="",
    )  # fmt: skip


class Closeness(AbsTaskSTS):  # type: ignore[misc]
    metadata = metadata("Closeness", "STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **_: Any) -> None:
        rows = {"sentence1": LEFT, "sentence2": RIGHT, "score": CLOSENESS}
        self.dataset = {"test": datasets.Dataset.from_dict(rows)}
        self.data_loaded = True


class Search(AbsTaskRetrieval):  # type: ignore[misc]
    metadata = metadata("Search", "Retrieval", "ndcg_at_10")
    candidates: dict[str, list[str]] | None = None

    def load_data(self, **_: Any) -> None:
        texts = {
            name: datasets.Dataset.from_list([{"id": key, "text": text} for key, text in given.items()])
            for name, given in (("queries", QUERIES), ("corpus", CORPUS))
        }
        split = {**texts, "relevant_docs": dict(RELEVANT_DOCUMENTS), "top_ranked": self.candidates}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Reranking(Search):
    metadata = metadata("Reranking", "Reranking", "map_at_1000")
    candidates = CANDIDATES


class Classes(AbsTaskClassification):  # type: ignore[misc]
    metadata = metadata("Classes", "Classification", "accuracy")
    n_experiments, samples_per_label = 2, 4

    def load_data(self, **_: Any) -> None:
        self.dataset = {
            "train": datasets.Dataset.from_dict({"text": LEFT, "label": SAME}),
            "test": datasets.Dataset.from_dict({"text": RIGHT, "label": SAME}),
        }
        self.data_loaded = True


TASKS: dict[str, list[Callable[[], Any]]] = {
    "SentenceTransformer": [Closeness, Search, Reranking, Classes],
    "CrossEncoder": [Reranking],
    "SparseEncoder": [Closeness, Search, Reranking, Classes],
    "MultiVectorEncoder": [Search, Reranking],
}
"""Tasks that MTEB has for models of each kind."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def scores(model: Any, tasks: list[Callable[[], Any]]) -> Any:
    """Evaluate a model. Returns the scores by task."""
    found = mteb.evaluate(
        model, [task() for task in tasks], cache=None, overwrite_strategy="always", show_progress_bar=False
    )
    assert not found.exceptions
    return {
        one.task_name: {name: value for name, value in one.scores["test"][0].items() if isinstance(value, float)}
        for one in found.task_results
    }


@pytest.mark.parametrize("kind", TASKS)
def test_all_tasks_score_as_with_the_model_and_are_computed_once(kind: str, folder: str, store: Path) -> None:
    expected = scores(kinds.MAKERS[kind](folder), TASKS[kind])
    assert len({value for each in expected.values() for value in each.values()}) > 5
    with cached_model(store, kinds.MAKERS[kind](folder)) as model:
        check_equal(scores(model, TASKS[kind]), expected)
        assert model.cache.stats().counters.misses > 0
    with cached_model(store, kinds.MAKERS[kind](folder)) as model:
        check_equal(scores(model, TASKS[kind]), expected)
        counters = model.cache.stats().counters
    assert (counters.misses, counters.bypassed) == (0, 0)
    assert counters.documents > 0


def test_a_text_of_two_tasks_is_computed_once(folder: str, store: Path) -> None:
    with cached_model(store, kinds.sentence_transformer(folder)) as model:
        scores(model, [Search])
        computed = model.cache.stats().counters.misses
        scores(model, [Reranking])
        assert model.cache.stats().counters.misses == computed == len(QUERIES) + len(CORPUS)


def test_models_have_namespaces_of_their_own_in_one_store(folder: str, store: Path) -> None:
    makers: list[Callable[[str], Any]] = [
        kinds.sentence_transformer, kinds.cross_encoder, lambda name: kinds.sentence_transformer(name).half(),
    ]  # fmt: skip
    names = []
    for make in makers:
        with cached_model(store, make(folder)) as model:
            expected = scores(make(folder), [Reranking])
            check_equal(scores(model, [Reranking]), expected)
            assert model.cache.stats().counters.misses > 0
            names.append(model.cache.namespace)
    assert len(set(names)) == 3
    assert all(name.startswith("mteb-") for name in names)


def test_a_cross_encoder_whose_head_mteb_replaces_is_cached_with_that_head(folder: str, store: Path) -> None:
    expected = scores(kinds.cross_encoder(folder).bfloat16(), [Reranking])
    for computes in (True, False):
        with cached_model(store, kinds.cross_encoder(folder).bfloat16()) as model:
            check_equal(scores(model, [Reranking]), expected)
            assert (model.cache.stats().counters.misses > 0) == computes
    with (
        LLMCache.open(store, kinds.cross_encoder(folder).bfloat16()) as cache,
        pytest.raises(ModelMismatch, match="classifier"),
    ):
        scores(cache.as_cross_encoder(), [Reranking])


def test_a_model_of_mteb_keeps_its_prompts_and_metadata(folder: str, store: Path) -> None:
    prompts = {"Search-query": "search: ", "document": "text: ", "STS": "compare: "}

    def made() -> Any:
        return mteb.models.SentenceTransformerEncoderWrapper(kinds.sentence_transformer(folder), model_prompts=prompts)

    plain = made()
    expected = scores(plain, [Closeness, Search])
    for computes in (True, False):
        given = made()
        with cached_model(store, given) as model:
            assert type(model) is type(given)
            assert model.mteb_model_meta == given.mteb_model_meta
            check_equal(scores(model, [Closeness, Search]), expected)
            assert (model.cache.stats().counters.misses > 0) == computes
        check_equal(scores(given, [Closeness, Search]), expected)  # the given model is as it was


def test_a_drop_in_scores_as_the_model(folder: str, store: Path) -> None:
    expected = scores(kinds.sentence_transformer(folder), TASKS["SentenceTransformer"])
    with LLMCache.open(store, kinds.sentence_transformer(folder)) as cache:
        for _ in range(2):
            check_equal(scores(cache.as_sentence_transformer(), TASKS["SentenceTransformer"]), expected)
            computed = cache.stats().counters.misses
        assert cache.stats().counters.misses == computed > 0


@pytest.mark.parametrize("given", ["all-MiniLM-L6-v2", torch.nn.Linear(2, 2), object()])
def test_a_model_that_cannot_be_cached_is_refused_by_its_class(given: Any, store: Path) -> None:
    with pytest.raises(ConfigError, match=type(given).__name__), cached_model(store, given):
        pass
    assert not store.exists()

"""Drop-ins in worker processes of other libraries: results are the model's, and the store has them all afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from llmcache import LLMCache
from tests import kinds
from tests.integrations.test_clients import AS
from tests.small_sentences import sentences, tiny_folder

TEXTS = sentences(24)
KNOWN = 3
"""Texts that are computed and committed before the workers begin."""
EXTRA = "install the extra 'test' for other libraries"

pytestmark = pytest.mark.usefixtures("one_thread")


class Ask:
    """Asks a model for dense results of texts, float32 [n, width]; a class, so that it can be pickled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, texts: list[str]) -> Any:
        if hasattr(self.model, "predict"):
            return self.model.predict([("a question", text) for text in texts]).reshape(-1, 1)
        found = self.model.encode_document(texts)
        if isinstance(found, torch.Tensor):  # of a SparseEncoder
            return found.to_dense().numpy()
        return np.stack([np.asarray(one).mean(0) if one.ndim > 1 else one for one in found])


def through_joblib(ask: Ask) -> Any:
    joblib = pytest.importorskip("joblib", reason=EXTRA)
    parts = [TEXTS[start : start + 6] for start in range(0, 24, 6)]
    return np.concatenate(joblib.Parallel(n_jobs=2)(joblib.delayed(ask)(part) for part in parts))


def through_datasets(ask: Ask) -> Any:
    datasets = pytest.importorskip("datasets", reason=EXTRA)
    rows = datasets.Dataset.from_dict({"text": TEXTS})

    def with_results(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"result": list(ask(batch["text"]))}

    mapped = rows.map(with_results, batched=True, batch_size=5, num_proc=2, new_fingerprint="results")
    return np.array(mapped["result"][:])


def texts() -> torch.utils.data.Dataset[str]:
    return cast(torch.utils.data.Dataset[str], TEXTS)


def through_a_loader(ask: Ask) -> Any:
    """By a DataLoader whose workers make the batches."""
    return np.concatenate(list(torch.utils.data.DataLoader(texts(), batch_size=5, collate_fn=ask, num_workers=2)))


def through_a_loader_that_pickles(ask: Ask) -> Any:
    return np.concatenate(
        list(
            torch.utils.data.DataLoader(
                texts(), batch_size=12, collate_fn=ask, num_workers=2, multiprocessing_context="spawn"
            )
        )
    )


EVERY_KIND = [through_joblib, through_datasets, through_a_loader]
CASES = [(kind, way) for kind in kinds.MAKERS for way in EVERY_KIND]
CASES.append(("SentenceTransformer", through_a_loader_that_pickles))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def no_workers_left() -> Iterator[None]:
    yield
    try:
        from joblib.externals.loky import get_reusable_executor
    except ImportError:
        return
    get_reusable_executor().shutdown(kill_workers=True)


@pytest.mark.parametrize(("kind", "way"), [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in CASES])
def test_workers_give_the_models_results_and_store_them(
    kind: str, way: Callable[[Ask], Any], folder: str, store: Path
) -> None:
    model = kinds.MAKERS[kind](folder)
    expected = Ask(model)(TEXTS)
    with LLMCache.open(store, model) as cache:
        ask = Ask(AS[kind](cache))
        ask(TEXTS[:KNOWN])
        cache.commit()
        np.testing.assert_allclose(way(ask), expected, atol=3e-5)
        assert cache.stats().counters.misses == KNOWN  # the rest is computed by the workers
    with LLMCache.open(store, model) as cache:
        np.testing.assert_allclose(Ask(AS[kind](cache))(TEXTS), expected, atol=3e-5)
        assert cache.stats().counters.misses == 0


def test_workers_of_an_asynchronous_llamaindex_pipeline_give_the_models_vectors_and_store_them(
    folder: str, store: Path
) -> None:
    pytest.importorskip("llama_index.core", reason=EXTRA)
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import TextNode

    from llmcache.integrations.llamaindex import CachedEmbedding

    model = kinds.sentence_transformer(folder)
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    with LLMCache.open(store, model) as cache:
        pipeline = IngestionPipeline(transformations=[CachedEmbedding(cache)], disable_cache=True)
        found = asyncio.run(pipeline.arun(nodes=nodes, num_workers=2))
        assert [node.id_ for node in found] == [node.id_ for node in nodes]
        vectors: Any = [node.embedding for node in found]
        np.testing.assert_allclose(vectors, model.encode_document(TEXTS), atol=3e-5)
        assert cache.stats().counters.misses == 0
    with LLMCache.open(store, model) as cache:
        cache.encode_document(TEXTS)
        assert cache.stats().counters.misses == 0

"""Larger trained models: results equal the plain library's, cold, warm and reopened; skipped where there are none.

`LLMCACHE_MODELS_LARGE` names a folder with models of sentence-transformers (all-mpnet-base-v2, splade-tiny, ...), and
with a CrossEncoder made by `python -m tests.fine_tune_pairs` (qqp-cross-encoder).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from llmcache import LLMCache, Pipeline
from llmcache.model.loading import encoder_class
from tests.encoding.test_kinds import close

LARGE = os.environ.get("LLMCACHE_MODELS_LARGE")
NAMES = ("all-mpnet-base-v2", "splade-tiny", "qqp-cross-encoder")
TEXTS = [
    "Where is my card? It was sent two weeks ago.",
    "",
    "The committee meets on 4 May 2021; 17 members voted against, none abstained.",
    "A much longer text about the same. " * 60,
    "卡在哪里。",
    "Where is my card? It was sent two weeks ago.",
]
PAIRS = [(query, document) for query in TEXTS[:3] for document in TEXTS]


def opened(name: str) -> Any:
    if LARGE is None:
        pytest.skip("LLMCACHE_MODELS_LARGE names no folder with larger models")
    folder = Path(LARGE, name)
    if not folder.exists():
        pytest.skip(f"{name} is not in {LARGE}")
    return encoder_class(str(folder))(str(folder), device="cpu")


def asked(owner: Any, kind: str) -> Any:
    return owner.predict(PAIRS) if kind == "CrossEncoder" else owner.encode(TEXTS)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_the_plain_librarys(name: str, tmp_path: Path) -> None:
    check(opened(name), tmp_path)


def test_token_vectors_of_a_new_projection_on_a_trained_model(model_path: str, tmp_path: Path) -> None:
    check(MultiVectorEncoder(model_path, device="cpu"), tmp_path)


def check(model: Any, folder: Path) -> None:
    kind = type(model).__name__
    plain = asked(model, kind)
    with LLMCache.open(folder / "store", model) as cache:
        cold = asked(cache, kind)
        warm = asked(cache, kind)
        assert cache.stats().counters.misses == len({*PAIRS} if kind == "CrossEncoder" else {*TEXTS})
    with LLMCache.open(folder / "store", model) as cache:
        reopened = asked(cache, kind)
        assert cache.stats().counters.misses == 0
    assert close(cold, plain, 2e-5)
    assert close(warm, cold, 0.0)
    assert close(reopened, cold, 0.0)


def test_one_pass_gives_vectors_and_late_chunks_of_a_trained_model(tmp_path: Path) -> None:
    model: SentenceTransformer = opened("all-mpnet-base-v2")
    plain: Any = model.encode(TEXTS)
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.warm(TEXTS, output_value="token_embeddings")
        computed = cache.stats().counters.misses
        np.testing.assert_allclose(cache.encode(TEXTS), plain, atol=2e-6)
        documents = [text for text in TEXTS if text and len(text) < 1000]
        for limit in (40, 20):
            cut: Any = lambda text, limit=limit: [(0, limit), (limit, len(text))] if len(text) > limit else [text]  # noqa: E731
            results = list(Pipeline(cache, chunk=cut, per="chunk", late=True).run(documents))
            assert {result.tier for result in results} == {"exact"}
        assert cache.stats().counters.misses == computed

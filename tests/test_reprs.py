"""Public objects show what matters about them in one to five lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from tests.small_sentences import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_folder(tmp_path_factory.mktemp("tiny"))), device="cpu")


def test_a_cache_shows_its_store_model_and_entries(tmp_path: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(["one", "two"])
        shown = repr(cache)
    assert str(tmp_path / "store") in shown
    assert "2 entries" in shown
    assert "closed" in repr(cache)
    with LLMCache.open(tmp_path / "store", model, read_only=True) as cache:
        assert "2 entries, read-only" in repr(cache)


def test_results_show_their_origin_and_not_their_numbers(tmp_path: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(tau=0.5)) as cache:
        first, second = cache.run([{"id": "a", "text": "one two three"}, {"id": "b", "text": "one two three"}])
        (near,) = cache.run([{"id": "c", "text": "one two three four"}])
    assert repr(first) == f"Result(id='a', tier='miss', output=float32[{len(first.output)}])"
    assert repr(second).startswith("Result(id='b', tier='exact', source='a', similarity=1, output=")
    assert repr(near).startswith("Result(id='c', tier='near', source='a', similarity=0.")


def test_plans_statistics_and_explanations_take_at_most_five_lines(tmp_path: Path, model: SentenceTransformer) -> None:
    texts = [f"document {number}" for number in range(40)]
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(texts[:20])
        cache.commit()
        plan, statistics = cache.plan(texts), cache.stats()
        known, new = cache.explain(texts[0]), cache.explain("another text")
    assert "40 documents: 20 hits (50.0%), 20 to compute" in repr(plan)
    assert "20 documents: 20 computed, 0 near, hit rate 0.0%" in repr(statistics)
    assert "20 entries in 1 banks" in repr(statistics)
    assert repr(known).startswith("Explanation(exact: ")
    assert repr(new).startswith("Explanation(miss: ")
    for shown in (plan, statistics, known, new):
        assert 1 <= len(repr(shown).split("\n")) <= 5
        assert "array(" not in repr(shown)


def test_settings_show_what_differs_from_the_defaults() -> None:
    assert repr(CacheConfig()) == "CacheConfig()"
    assert repr(CacheConfig(tau=0.9, max_bytes=1 << 30)) == "CacheConfig(tau=0.9, max_bytes=1073741824)"
    paper = CacheConfig(layers=(1, 2), reuse="layer", layer_tau={1: 0.95})
    assert repr(paper) == "CacheConfig(layers=(1, 2), reuse='layer', layer_tau={1: 0.95})"

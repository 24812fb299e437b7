"""Token embeddings that are stored once give sentence embeddings: those of the model, with their provenance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from torch.nn import Module

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError, ModelMismatch
from tests import kinds
from tests.encoding.test_kinds import close
from tests.small_sentences import PROMPTS, WIDTH, sentences, tiny_folder, with_router

TEXTS = ["", "a", *sentences(12), "x y z " * 60]  # the last is longer than the model reads
CLOSE: Any = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


class Doubled(Module):
    """Module that changes the token embeddings after they were pooled."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"token_embeddings": features["token_embeddings"] * 2}


class BesideInputs(Module):
    """Module that needs a feature that only the Transformer gives."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states = features["all_layer_embeddings"]
        return features | {"sentence_embedding": features["sentence_embedding"] + states[0][:, 0]}


def tails() -> dict[str, list[Module]]:
    torch.manual_seed(5)
    both: Any = ("mean", "max")
    return {
        **{mode: [Pooling(WIDTH, pooling_mode=mode)] for mode in ("mean", "cls", "max", "lasttoken", "weightedmean")},
        "two modes": [Pooling(WIDTH, pooling_mode=both)],
        "dense and norm": [Pooling(WIDTH, pooling_mode="mean"), Dense(WIDTH, 12), LayerNorm(12), Normalize()],
        "without prompt": [Pooling(WIDTH, pooling_mode="mean", include_prompt=False), Normalize()],
    }


@pytest.fixture(scope="module", params=sorted(tails()))
def model(request: pytest.FixtureRequest, folder: str) -> SentenceTransformer:
    modules = [Transformer(folder), *tails()[request.param]]
    return SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu")


@pytest.fixture
def cache(model: SentenceTransformer, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


@pytest.mark.parametrize("settings", [{}, {"role": "query"}, {"prompt_name": "topic"}, {"prompt": "about: "}])
def test_stored_token_embeddings_give_the_models_vectors(
    cache: LLMCache, model: SentenceTransformer, settings: dict[str, Any]
) -> None:
    computed = cache.warm(TEXTS, output_value="token_embeddings", **settings)
    assert computed.misses == len(TEXTS)
    results = list(cache.run(TEXTS, **settings))
    assert {(result.tier, result.layer) for result in results} == {("exact", "tokens")}
    assert [result.source for result in results] == [str(i) for i in range(len(TEXTS))]
    prompt = {"query": PROMPTS["query"]}.get(settings.get("role", ""), settings.get("prompt"))
    own = model.encode(TEXTS, prompt_name=settings.get("prompt_name"), prompt=prompt)
    np.testing.assert_allclose([result.output for result in results], own, **CLOSE)
    assert cache.stats().counters.misses == len(TEXTS)
    again = list(cache.run(TEXTS, **settings))  # now stored as sentence embeddings, bit for bit
    assert {(result.tier, result.layer) for result in again} == {("exact", "output")}
    for first, second in zip(results, again, strict=True):
        np.testing.assert_array_equal(first.output, second.output)


def test_a_new_opening_pools_what_an_earlier_one_stored(model: SentenceTransformer, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(TEXTS[:6], output_value="token_embeddings")
    with LLMCache.open(tmp_path / "store", model) as cache:
        vectors = cache.encode(TEXTS)
        counters = cache.stats().counters
    np.testing.assert_allclose(vectors, model.encode(TEXTS), **CLOSE)
    assert counters.misses == len(TEXTS) - 6
    assert counters.exact_audits > 0  # token embeddings of another opening are not believed unseen


def test_other_roles_and_prompts_get_nothing(cache: LLMCache, model: SentenceTransformer) -> None:
    cache.warm(TEXTS, output_value="token_embeddings", role="query")
    assert {result.tier for result in cache.run(TEXTS, role="document")} == {"miss"}
    np.testing.assert_allclose(cache.encode_document(TEXTS), model.encode_document(TEXTS), **CLOSE)


@pytest.mark.parametrize("name", ["doubled", "inputs", "router"])
def test_a_tail_that_does_not_work_alone_is_not_used(folder: str, tmp_path: Path, name: str) -> None:
    settings: Any
    if name == "router":
        model, settings = with_router(folder), {"role": "query"}
    else:
        extra: Module = Doubled() if name == "doubled" else BesideInputs()
        first = Transformer(folder, config_kwargs={"output_hidden_states": True})
        order = [extra, Pooling(WIDTH)] if name == "doubled" else [Pooling(WIDTH), extra]
        model, settings = SentenceTransformer(modules=[first, *order], device="cpu"), {}
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.warm(TEXTS, output_value="token_embeddings", **settings)
        results = list(cache.run(TEXTS, **settings))
        own = model.encode_query(TEXTS) if settings else model.encode(TEXTS)
        np.testing.assert_allclose([result.output for result in results], own, **CLOSE)


def test_forged_token_embeddings_are_found(folder: str, tmp_path: Path) -> None:
    model = kinds.sentence_transformer(folder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.warm(TEXTS, output_value="token_embeddings")
        tokens = cache._token_execution().bank
        rows = np.arange(len(tokens))
        values = [value + 1 for value in tokens.read(rows).values]
        forged: Any = [tokens.keys(rows), values, tokens.tokens_of(rows), tokens.sources(rows)]
    with LLMCache.open(tmp_path / "other", model) as cache:
        bank = cache._token_execution().bank
        bank.put(
            forged[0], forged[1], tokens=forged[2], sources=forged[3],
            features=np.zeros((len(rows), bank.facts.feature_width), np.float32),
            cost=np.ones(len(rows), np.float32),
        )  # fmt: skip
    with LLMCache.open(tmp_path / "other", model) as cache, pytest.raises(ModelMismatch):
        cache.encode(TEXTS)


def test_run_gives_token_embeddings_with_provenance(cache: LLMCache, model: SentenceTransformer) -> None:
    first = list(cache.run(TEXTS, output_value="token_embeddings"))
    again = list(cache.run(TEXTS, output_value="token_embeddings"))
    for text, cold, warm in zip(TEXTS, first, again, strict=True):
        own = model.encode(text, output_value="token_embeddings").numpy()
        np.testing.assert_allclose(cold.output, own, **CLOSE)
        np.testing.assert_array_equal(cold.output, warm.output)
        assert (warm.tier, warm.layer) == ("exact", "tokens")
    assert {result.tier for result in cache.run(TEXTS)} == {"exact"}


def test_float16_rounds_what_is_stored_and_nothing_else(folder: str, tmp_path: Path) -> None:
    model = kinds.sentence_transformer(folder)
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(dtype="float16")) as cache:
        cache.warm(TEXTS, output_value="token_embeddings")
        np.testing.assert_allclose(cache.encode(TEXTS), model.encode(TEXTS), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounded_token_embeddings_give_no_stored_vectors(folder: str, tmp_path: Path, dtype: Any) -> None:
    """Vectors pooled from rounded states would not stand up to audits, and are not stored."""
    model = kinds.sentence_transformer(folder)
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(dtype=dtype)) as cache:
        cache.warm(TEXTS, output_value="token_embeddings")
        cache.encode(TEXTS)
        assert len(cache) == 0
    for _ in range(2):
        with LLMCache.open(tmp_path / "store", model) as cache:
            cache.encode([*TEXTS, "a new one"])
            assert cache.stats().counters.exact_mismatches == 0


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder", "SentenceTransformer"])
def test_results_of_matrices_are_read_only_until_and_after_they_are_stored(
    folder: str, tmp_path: Path, kind: str
) -> None:
    model = kinds.MAKERS[kind](folder)
    how: Any = {"output_value": "token_embeddings"} if kind == "SentenceTransformer" else {}
    with LLMCache.open(tmp_path / "store", model) as cache:
        for result in [*cache.run(TEXTS, **how), *cache.run(TEXTS, **how)]:
            if result.output.size:
                with pytest.raises(ValueError, match="read-only"):
                    np.multiply(result.output, 2, out=result.output)


@pytest.mark.parametrize("kind", ["SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"])
@pytest.mark.parametrize("task", ["query", "document"])
def test_a_task_alone_adds_no_prompt(folder: str, tmp_path: Path, kind: str, task: str) -> None:
    """Only `encode_query` and `encode_document` use the prompt of the role."""
    model = kinds.MAKERS[kind](folder)
    with LLMCache.open(tmp_path / "store", model) as cache:
        for _ in range(2):
            for how in ({"task": task}, {"task": task, "prompt_name": "query"}, {"task": task, "prompt": "x: "}):
                assert close(cache.encode(TEXTS, **how), model.encode(TEXTS, **how))
            for name in ("encode_query", "encode_document"):
                assert close(getattr(cache, name)(TEXTS), getattr(model, name)(TEXTS))
                assert close(getattr(cache, name)(TEXTS, None, "p: "), getattr(model, name)(TEXTS, None, "p: "))


@pytest.mark.parametrize("kind", sorted(kinds.MAKERS))
def test_an_output_that_a_model_does_not_give_is_refused(folder: str, tmp_path: Path, kind: str) -> None:
    with LLMCache.open(tmp_path / "store", kinds.MAKERS[kind](folder)) as cache:
        with pytest.raises(ConfigError, match="output_value"):
            cache.run(TEXTS, output_value="sentences")
        if kind in ("CrossEncoder", "SparseEncoder"):
            with pytest.raises(ConfigError, match="gives no token embeddings"):
                cache.run(TEXTS, output_value="token_embeddings")

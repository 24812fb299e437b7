"""Plans for models that are no SentenceTransformer: pairs of texts, and bytes of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from llmcache import CacheConfig, Document, LLMCache
from llmcache.errors import ConfigError, CorpusError
from llmcache.planning.survey import Folding
from tests import kinds
from tests.small_sentences import sentences, tiny_folder

Pair = tuple[str, str]
QUERIES, DOCUMENTS = sentences(12), sentences(40, seed=1)
PAIRS: list[Pair] = [(query, document) for query in QUERIES for document in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reranker(folder: str) -> CrossEncoder:
    return kinds.cross_encoder(folder)


def files(store: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in store.rglob("*"))


def size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


# -- pairs --------------------------------------------------------------------------------------------------


def test_hits_and_repeats_of_pairs_are_forecast_as_the_run_finds_them(store: Path, reranker: CrossEncoder) -> None:
    asked = PAIRS[150:400] + PAIRS[350:400]
    with LLMCache.open(store, reranker) as cache:
        cache.predict(PAIRS[:200])
        plan = cache.plan(asked)
        tiers = [result.tier for result in cache.run(asked)]
    assert (plan.documents, plan.in_store, plan.repeats, plan.near) == (300, 50, 50, 0)
    assert plan.computed == tiers.count("miss") == 200
    assert plan.hit_rate == pytest.approx(tiers.count("exact") / 300)
    assert plan.characters == sum(len(query) + len(document) for query, document in asked)
    tokens = sum(map(len, reranker.tokenizer(*map(list, zip(*asked, strict=True)))["input_ids"]))
    assert plan.tokens == pytest.approx(tokens, rel=0.05)


def test_every_form_of_a_pair_is_planned_alike(store: Path, reranker: CrossEncoder) -> None:
    given = PAIRS[:60]
    forms: list[list[Any]] = [
        given,
        [list(pair) for pair in given],
        [Document(str(i), pair) for i, pair in enumerate(given)],
        [{"query": query, "document": document} for query, document in given],
    ]
    with LLMCache.open(store, reranker) as cache:
        cache.predict(PAIRS[:20])
        plans = [cache.plan(form) for form in forms]
    assert {(plan.documents, plan.in_store, plan.computed, plan.tokens) for plan in plans} == {
        (60, 20, 40, plans[0].tokens)
    }


def test_the_sides_of_a_pair_are_not_exchanged_and_prompts_are_told_apart(store: Path, reranker: CrossEncoder) -> None:
    turned = [(document, query) for query, document in PAIRS[:30]]
    with LLMCache.open(store, reranker) as cache:
        cache.predict(PAIRS[:30])
        assert cache.plan(turned).in_store == 0
        assert cache.plan(turned).computed == 30
        assert cache.plan(PAIRS[:30], prompt="judge: ").in_store == 0
        assert cache.plan([*PAIRS[:1], *turned[:1]]).repeats == 0
        assert cache.plan([("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]).repeats == 0


def test_pairs_with_equal_tokens_are_repeats_or_found_in_the_store(store: Path, reranker: CrossEncoder) -> None:
    asked = [("Where is IT?", "it is  here"), ("where is it?", " It is here"), ("where is it?", "it is here.")]
    with LLMCache.open(store, reranker) as cache:
        plan = cache.plan(asked)
        assert [result.tier for result in cache.run(asked)].count("miss") == plan.computed == 2
        spelt = [(query.upper(), document) for query, document in PAIRS[:50]]
        cache.predict(PAIRS[:50])
        found = cache.plan(spelt)
        assert (found.in_store, found.in_store_by_tokens) == (0, 50)


@pytest.mark.parametrize("limit", [61, 64])
def test_folds_of_pairs_are_equal_where_the_model_reads_the_same(model: SentenceTransformer, limit: int) -> None:
    """Compare with the tokenizer: sides of different lengths, cut, extended or changed at generated places."""
    random, fold = np.random.default_rng(0), Folding(model.tokenizer, limit, None)
    text = " ".join(sentences(60, seed=2))

    def read(pair: Pair) -> list[int]:
        ids: list[int] = model.tokenizer(*pair, truncation=True, max_length=limit)["input_ids"]
        return ids

    def changed(side: str) -> str:
        place = int(random.integers(0, len(side) + 1))
        return str(random.choice([side, side[:place], side + " and more", side[:place] + "zz" + side[place:]]))

    wrong = {True: 0, False: 0}
    for _ in range(1000):
        query, document = random.choice([5, 70, 150, 400, 1500]), random.choice([20, 90, 200, 500, 1800])
        one = (text[:query], text[-document:])
        other = (changed(one[0]), changed(one[1]))
        same = read(one) == read(other)
        wrong[same] += same != (fold(one) == fold(other))
    assert wrong[True] <= 10, "few repeats are missed"
    assert wrong[False] <= 10, "few different pairs are taken for repeats"


def test_a_text_that_the_model_reads_whole_is_no_repeat_of_a_longer_one(model: SentenceTransformer) -> None:
    limit, words = 256, "international " * 50
    assert 2 * limit < len(words)
    assert len(model.tokenizer(words + "more")["input_ids"]) < limit
    fold = Folding(model.tokenizer, limit, None)
    assert len({str(fold(text)) for text in (words, words + "more", words + "more yet")}) == 3
    assert len({fold((text, "a side")) for text in (words, words + "more", words + "more yet")}) == 3


def test_a_plan_of_pairs_writes_nothing(store: Path, reranker: CrossEncoder) -> None:
    with LLMCache.open(store, reranker) as cache:
        cache.predict(PAIRS[:40])
    with LLMCache.open(store, reranker) as cache:
        before = files(store)
        plan = cache.plan(PAIRS[:80])
        assert len(cache) == 40
        assert files(store) == before
        assert plan.cost_from.startswith("recorded")
        assert 0 < plan.seconds < plan.uncached_seconds
        list(cache.run(PAIRS[:80]))
        error = cache.compared(plan)
    assert error.points == 0
    assert (error.documents, error.computed) == (80, 40)


def test_records_that_are_no_pairs_stop_a_plan(store: Path, reranker: CrossEncoder) -> None:
    with LLMCache.open(store, reranker) as cache:
        cases: list[tuple[Any, str]] = [
            ([{"query": "a"}], "document 0 has no field 'document', only 'query'"),
            ([("a", "b"), "a"], "document 1 "),
            ([("a",)], "has 1 text, not the two of a pair"),
            ([], "no documents"),
        ]
        for wrong, said in cases:
            with pytest.raises(CorpusError, match=said):
                cache.plan(wrong)
        with pytest.raises(ConfigError, match="one pair"):
            cache.plan(("a", "b"))


# -- bytes --------------------------------------------------------------------------------------------------


def selective(folder: str) -> SparseEncoder:
    """A sparse model whose vectors have more dimensions for more different letters."""
    model = kinds.sparse_encoder(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("predictions.bias") or name.endswith("decoder.bias"):
                parameter.sub_(0.25)
    return model


MODELS: dict[str, Any] = {
    "CrossEncoder": kinds.cross_encoder,
    "SparseEncoder": kinds.sparse_encoder,
    "SparseEncoder with a varying number of dimensions": selective,
    "SparseEncoder that limits its dimensions": kinds.sparse_auto_encoder,
    "MultiVectorEncoder": kinds.multi_vector_encoder,
}


def corpus(n: int, seed: int, *, pairs: bool) -> Sequence[Any]:
    """Different documents of very different lengths, some beyond what the models read."""
    random = np.random.default_rng(seed)
    words = " ".join(sentences(200)).split()
    lengths = np.exp(random.normal(1.8, 0.9, 2 * n)).astype(int) + 1
    texts = [" ".join(random.choice(words, length)) + f" {seed}.{i}" for i, length in enumerate(lengths)]
    return list(zip(texts[:n], texts[n:], strict=True)) if pairs else texts[:n]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_forecast_are_within_a_quarter_of_those_stored(
    name: str, dtype: Any, store: Path, folder: str
) -> None:
    model = MODELS[name](folder)
    for seed, count in enumerate((300, 200)):  # nothing is stored at first, and then the rows of the first run
        asked = corpus(count, seed, pairs=isinstance(model, CrossEncoder))
        with LLMCache.open(store, model, config=CacheConfig(dtype=dtype)) as cache:
            before = size(store)
            plan = cache.plan(asked)
            list(cache.run(asked))
        stored = size(store) - before
        assert plan.computed == count
        assert plan.new_bytes == pytest.approx(stored, rel=0.25)
        assert plan.total_bytes == pytest.approx(before + plan.new_bytes, abs=1)


def test_bytes_follow_the_lengths_of_the_documents_that_are_new(store: Path, folder: str) -> None:
    """Stored are many long documents, to compute are few short ones: a mean over all would be far too high."""
    model = kinds.multi_vector_encoder(folder)
    known = [f"{text} {text} {i}" for i, text in enumerate(sentences(100))]
    with LLMCache.open(store, model) as cache:
        list(cache.run(known))
        cache.commit()
        before = size(store)
        plan = cache.plan([*known, *(f"a {i}" for i in range(80))])
        list(cache.run(f"a {i}" for i in range(80)))
    assert plan.new_bytes == pytest.approx(size(store) - before, rel=0.25)


def test_a_role_with_a_shorter_limit_is_planned_with_it(store: Path, folder: str) -> None:
    model: Any = kinds.multi_vector_encoder(folder)
    model[0].query_length = 24
    asked = [f"{text} {text} {i}" for i, text in enumerate(sentences(100))]
    with LLMCache.open(store, model) as cache:
        before = size(store)
        plan = cache.plan(asked, role="query")
        list(cache.run(asked, role="query"))
    assert plan.tokens == 24 * len(asked)
    assert plan.new_bytes == pytest.approx(size(store) - before, rel=0.25)


def test_no_setting_is_advised_that_a_model_cannot_have(store: Path, folder: str, tmp_path: Path) -> None:
    for maker in (kinds.sparse_encoder, kinds.multi_vector_encoder):
        with LLMCache.open(tmp_path / maker.__name__, maker(folder), max_bytes=1 << 20) as cache:
            list(cache.run(sentences(600)))
            plan = cache.plan(corpus(3000, 3, pairs=False))
        said = {advice.about: advice for advice in plan.advice}
        assert said["tau"].value == "none"
        assert "calibrate`" not in said["tau"].why
        if maker is kinds.sparse_encoder:
            assert said["dtype"].value == "float32", "dimensions are stored as float32 whatever the setting"

"""`LLMCache.encode` against `SentenceTransformer.encode`, with the real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.model.batching import token_embedding

TEXTS = [
    "How do I locate my card?",
    "I still have not received my new card, I ordered over a week ago.",
    "Can I top up with a cheque?",
    "",
    "Ünïcode, 漢字 and \U0001f600",
    "a " * 400,
]


def rebatching(model: SentenceTransformer, texts: list[str]) -> float:
    """Return the largest difference between the model's own vectors at different batch sizes."""
    base = model.encode(texts)
    return max(float(np.abs(model.encode(texts, batch_size=size) - base).max()) for size in (1, 3, 64))


def test_cold_vectors_are_the_models_own_within_what_rebatching_shows(
    model: SentenceTransformer, store: Path, queries: list[str]
) -> None:
    texts = queries[:400]
    expected = model.encode(texts)
    with LLMCache.open(store, model) as cache:
        cold = cache.encode(texts)
    tolerance = rebatching(model, texts)
    assert 0 < tolerance < 1e-5
    assert np.abs(cold - expected).max() <= 2 * tolerance


def test_a_repeat_is_bit_for_bit_the_stored_vector(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cold = cache.encode(TEXTS)
        warm = cache.encode(TEXTS)
        assert cache.stats().counters.misses == len(TEXTS)
    np.testing.assert_array_equal(cold.view(np.uint32), warm.view(np.uint32))


def test_another_process_gets_the_same_bits_after_a_restart(
    model: SentenceTransformer, model_path: str, store: Path, tmp_path: Path
) -> None:
    with LLMCache.open(store, model) as cache:
        cold = cache.encode(TEXTS)
    program = (
        "import sys, numpy as np\n"
        "from llmcache import LLMCache\n"
        "with LLMCache.open(sys.argv[1], sys.argv[2]) as cache:\n"
        "    texts = sys.stdin.buffer.read().decode().split('\\0')\n"
        "    np.save(sys.argv[3], cache.encode(texts))\n"
        "    assert cache.stats().counters.misses == 0, cache.stats()\n"
    )
    out = tmp_path / "warm.npy"
    subprocess.run(
        [sys.executable, "-c", program, str(store), model_path, str(out)],
        input="\0".join(TEXTS).encode(),
        check=True,
    )
    np.testing.assert_array_equal(np.load(out).view(np.uint32), cold.view(np.uint32))


def test_the_forward_pass_sees_only_what_is_new_and_each_text_once(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    forward = model.forward

    def counting(features: dict[str, torch.Tensor], **others: Any) -> Any:
        nonlocal seen
        seen += len(features["input_ids"])
        return forward(features, **others)

    monkeypatch.setattr(model, "forward", counting)
    with LLMCache.open(store, model) as cache:
        seen = 0
        cache.encode([*TEXTS, *TEXTS, *TEXTS])
        assert seen == len(TEXTS)
        cache.encode([*TEXTS, "something new"])
        assert seen == len(TEXTS) + 1


def test_texts_that_tokenise_alike_share_an_entry(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        first = cache.encode(["where is my card"])
        second = cache.encode(["WHERE is my   card"])  # the tokenizer ignores case and repeated spaces
        third = cache.encode(["WHERE is my   card"])
        counters = cache.stats().counters
        assert len(cache) == 1
    assert (counters.misses, counters.exact_tokens, counters.exact_text) == (1, 1, 1)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_texts_that_differ_only_behind_the_models_length_share_an_entry(
    model: SentenceTransformer, store: Path
) -> None:
    with LLMCache.open(store, model) as cache:
        vectors = cache.encode(["word " * 300 + "one", "word " * 300 + "two"])
        assert len(cache) == 1
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_results_come_back_in_input_order_whatever_was_known(model: SentenceTransformer, store: Path) -> None:
    expected = model.encode(TEXTS)
    with LLMCache.open(store, model) as cache:
        cache.encode(TEXTS[1::2])
        for order in ([5, 0, 3, 3, 1, 4, 2, 0], [2, 2, 2], [4]):
            vectors = cache.encode([TEXTS[i] for i in order])
            np.testing.assert_allclose(vectors, expected[order], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_tensor": True, "normalize_embeddings": True, "truncate_dim": 32},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"precision": "ubinary"},
        {"prompt": "query: "},
        {"batch_size": 2},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "inputs", [TEXTS[:4], tuple(TEXTS[:4]), np.array(TEXTS[:4]), TEXTS[0], []], ids=lambda v: type(v).__name__
)
def test_every_argument_gives_the_type_shape_and_values_of_the_model(
    model: SentenceTransformer, store: Path, inputs: Any, options: dict[str, Any]
) -> None:
    if options.get("precision") == "int8" and not isinstance(inputs, list):
        pytest.skip("int8 without ranges depends on the other vectors of the call")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sentence_transformers.util.quantization.logger.warning", lambda *_: None)
        expected = model.encode(inputs, **options)
        with LLMCache.open(store, model) as cache:
            for actual in (cache.encode(inputs, **options), cache.encode(inputs, **options)):
                same(actual, expected, atol=1 if "precision" in options else 1e-6)


def same(actual: Any, expected: Any, atol: float) -> None:
    """Assert equal types, shapes and dtypes, and values equal within `atol`."""
    assert type(actual) is type(expected)
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other, atol)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
    else:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), atol=atol)


def test_a_text_as_query_as_document_and_as_neither_has_three_entries(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(TEXTS[:2])
        cache.encode_query(TEXTS[:2])
        cache.encode_document(TEXTS[:2])
        assert cache.stats().counters.misses == 6
        assert len(cache) == 6
        cache.encode_query(TEXTS[:2])
        cache.encode_document(TEXTS[:2])
        assert cache.stats().counters.misses == 6


def test_prompts_are_those_of_the_model(fresh_model: SentenceTransformer, store: Path) -> None:
    fresh_model.prompts = {"query": "search_query: ", "document": "search_document: ", "topic": "topic: "}
    fresh_model.default_prompt_name = "topic"
    with LLMCache.open(store, fresh_model) as cache:
        for name in ("encode", "encode_query", "encode_document"):
            actual = getattr(cache, name)(TEXTS[:3])
            np.testing.assert_allclose(actual, getattr(fresh_model, name)(TEXTS[:3]), atol=1e-6)
        named = cache.encode(TEXTS[:3], prompt_name="query")
        np.testing.assert_allclose(named, fresh_model.encode(TEXTS[:3], prompt_name="query"), atol=1e-6)
        with pytest.raises(ConfigError, match="'qery'"):
            cache.encode(TEXTS[:1], prompt_name="qery")


def test_a_prompt_that_is_left_out_of_the_pooling_is_left_out(fresh_model: SentenceTransformer, store: Path) -> None:
    fresh_model.set_pooling_include_prompt(False)
    with LLMCache.open(store, fresh_model) as cache:
        for prompt in ("query: ", "a much longer prompt: "):
            expected = fresh_model.encode(TEXTS[:3], prompt=prompt)
            np.testing.assert_allclose(cache.encode(TEXTS[:3], prompt=prompt), expected, atol=1e-6)
            np.testing.assert_allclose(cache.encode(TEXTS[:3], prompt=prompt), expected, atol=1e-6)


def test_vectors_of_a_bfloat16_model_come_back_bit_for_bit(fresh_model: SentenceTransformer, store: Path) -> None:
    fresh_model.bfloat16()
    with LLMCache.open(store, fresh_model) as cache:
        cold = cache.encode(TEXTS, convert_to_tensor=True)
        cache.commit()
        warm = cache.encode(TEXTS, convert_to_tensor=True)
        assert cache.stats().banks[0].payload_bytes == len(TEXTS) * 384 * 2
    assert cold.dtype == warm.dtype == torch.bfloat16
    assert torch.equal(cold, warm)
    torch.testing.assert_close(cold, fresh_model.encode(TEXTS, convert_to_tensor=True), atol=0.02, rtol=0.05)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 4e-3), ("int8", 4e-3)])
def test_a_smaller_stored_type_rounds_the_hits_and_only_them(
    model: SentenceTransformer, store: Path, dtype: Any, error: float
) -> None:
    expected = model.encode(TEXTS)
    with LLMCache.open(store, model, config=CacheConfig(dtype=dtype)) as cache:
        np.testing.assert_allclose(cache.encode(TEXTS), expected, atol=1e-6)
        hits = cache.encode(TEXTS)
    difference = np.abs(hits - expected).max()
    assert 0 < difference < error


def test_not_a_number_is_returned_and_never_stored(fresh_model: SentenceTransformer, store: Path) -> None:
    please = fresh_model.tokenizer.convert_tokens_to_ids("please")
    with torch.no_grad():
        token_embedding(fresh_model)[please] = float("nan")
    with LLMCache.open(store, fresh_model) as cache:
        for _ in range(2):
            vectors = cache.encode(["where is my card", "where is it, please"])
            assert np.isfinite(vectors[0]).all()
            assert np.isnan(vectors[1]).all()
        counters = cache.stats().counters
        assert len(cache) == 1
    assert (counters.not_stored, counters.misses, counters.exact_text) == (2, 3, 1)


def test_inputs_that_are_not_texts_go_past_the_cache(model: SentenceTransformer, store: Path) -> None:
    pairs = [("a question", "its answer"), ("another", "one")]
    with LLMCache.open(store, model) as cache:
        np.testing.assert_allclose(cache.encode(pairs), model.encode(pairs), atol=1e-6)
        assert cache.stats().counters.bypassed == 2
        assert len(cache) == 0


def test_a_document_of_10_megabytes_is_cut_where_the_model_cuts_it(model: SentenceTransformer, store: Path) -> None:
    text = "a long story, " * 750_000
    with LLMCache.open(store, model) as cache:
        actual = cache.encode([text, "a short one"])
        again = cache.encode([text])
        assert cache.stats().counters.misses == 2
    np.testing.assert_allclose(actual, model.encode([text[:20_000], "a short one"]), atol=1e-6)
    np.testing.assert_array_equal(actual[0], again[0])


def test_a_single_device_moves_the_model_as_encode_does(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        np.testing.assert_allclose(cache.encode(TEXTS[:2], device="cpu"), model.encode(TEXTS[:2]), atol=1e-6)
        assert cache.stats().counters.bypassed == 0


def test_a_batch_size_of_nothing_is_refused(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache, pytest.raises(ConfigError, match="batch_size"):
        cache.encode(TEXTS, batch_size=0)


def test_a_closed_cache_says_so(model: SentenceTransformer, store: Path) -> None:
    cache = LLMCache.open(store, model)
    cache.close()
    cache.close()
    with pytest.raises(LLMCacheError, match="closed"):
        cache.encode(TEXTS)

"""Tests of threads that share a cache, a model and its tokenizer: results equal those of the model alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.decoders import scoring
from llmcache.errors import LLMCacheError, ModelMismatch
from llmcache.model.locks import CallLock, LockCycle
from tests import architectures, threads

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = 60


@pytest.fixture
def tiny(tmp_path: Path) -> SentenceTransformer:
    return threads.tiny_sentences(tmp_path / "model")


@pytest.mark.parametrize("kind", threads.KINDS)
def test_whatever_is_shared_every_result_is_the_models(kind: str, tmp_path: Path) -> None:
    counted, stored = threads.run(kind, tmp_path, lambda counted: counted.calls < CALLS, texts=120)
    assert counted.calls >= CALLS
    assert (counted.errors, counted.wrong, stored) == ([], 0, 0)


@pytest.mark.parametrize("kind", ["one cache", "generators"])
def test_the_comparison_finds_a_tokenizer_that_is_shared_with_the_caller(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    from llmcache.model import tokens

    @contextmanager
    def shared(source: Any) -> Iterator[Any]:
        source.tokenizer("w1 w2", padding="max_length", max_length=9, truncation=True)
        yield source
        source.tokenizer("w1 w2", padding="max_length", max_length=9, truncation=True)

    original = tokens._ids

    def disturbed(tokenizer: Any, texts: list[str]) -> Any:
        ids = original(tokenizer, texts[:1])
        tokenizer("w1 w2", padding="max_length", max_length=9, truncation=True)  # as another thread might
        library = tokenizer.backend_tokenizer
        return ids + [np.array(row.ids, np.int32) for row in library.encode_batch_fast(list(texts[1:]))]

    monkeypatch.setattr(tokens, "private_copy", shared)
    monkeypatch.setattr(tokens, "_ids", disturbed)
    monkeypatch.setattr(tokens, "_agreed", lambda rows, ids: 1000)
    try:
        counted, stored = threads.run(kind, tmp_path, lambda counted: counted.calls < 200, texts=120)
    except ModelMismatch:  # the audits of exact hits compare token ids too
        return
    assert counted.wrong or stored or counted.errors


def test_a_cache_that_is_closed_during_calls_lets_them_end_and_refuses_later_ones(
    tiny: SentenceTransformer, store: Path
) -> None:
    texts = threads.texts_of(300)
    expected = tiny.encode(texts)
    cache = LLMCache.open(store, tiny)
    begun = threading.Event()
    ended: list[str] = []

    def ask(number: int) -> None:
        for start in range(0, 300, 10):
            try:
                vectors = cache.encode(texts[start : start + 10])
            except LLMCacheError as error:
                ended.append(str(error))
                return
            np.testing.assert_allclose(vectors, expected[start : start + 10], atol=2e-5)
            if number == 0 and start == 50:
                begun.set()

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        assert begun.wait(60)
        cache.close()
        for one in asked:
            one.result()
    assert all("the cache is closed" in message for message in ended)
    with LLMCache.open(store, tiny) as again:
        assert len(again) >= 60
        np.testing.assert_allclose(again.encode(texts), expected, atol=2e-5)


def test_results_that_are_waiting_do_not_keep_others_from_the_cache(tiny: SentenceTransformer, store: Path) -> None:
    texts = threads.texts_of(40)
    with LLMCache.open(store, tiny) as cache:
        first, second = cache.run(texts, chunk=4), cache.run(reversed(texts), chunk=3)
        next(first)
        with ThreadPoolExecutor(1) as pool:
            assert len(pool.submit(lambda: list(second)).result(60)) == 40
            assert pool.submit(cache.encode, texts).result(60).shape == (40, 32)
        assert len(list(first)) == 39


def test_a_model_that_is_attached_by_one_thread_is_right_in_another_and_after_the_cache_is_closed(store: Path) -> None:
    model, (ids, mask) = architectures.model("bert"), architectures.rows(9, 5, 12)
    visible, expected = mask.bool(), architectures.states(model, ids, mask)
    cache = LLMCache.open(store, model, config=CacheConfig(layers="all"))
    attachment = cache.attached()
    with ThreadPoolExecutor(3) as pool, attachment:
        found = [pool.submit(architectures.states, model, ids, mask) for _ in range(12)]
        assert all(torch.allclose(one.result(60)[visible], expected[visible], atol=1e-5) for one in found)
        cache.close()
        assert torch.allclose(architectures.states(model, ids, mask), expected, atol=1e-5)
    assert "forward" not in vars(model)


def test_what_scores_pick_of_the_states_is_not_picked_for_other_threads() -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=304, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=3, bos_token_id=2
    )
    model: Any = t.GPT2LMHeadModel(config)
    model.eval()
    ids = torch.arange(4, 14)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    found: list[torch.Tensor] = []

    def other() -> None:
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits)

    def at_work(module: Any, arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not found:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    hook = model.transformer.h[0].register_forward_pre_hook(at_work)
    scoring.score(model, threads.tiny_tokenizer(), ["w1 w2"], [" w3", " w4 w5"])
    hook.remove()
    assert found
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_two_threads_that_would_wait_for_each_other_end_in_one_error_instead() -> None:
    first, second = CallLock(), CallLock()
    both = threading.Barrier(2, timeout=60)
    raised: list[LockCycle] = []

    def nested(outer: CallLock, inner: CallLock) -> None:
        with outer:
            both.wait()
            try:
                with inner:
                    pass
            except LockCycle as error:
                raised.append(error)

    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(nested, first, second), pool.submit(nested, second, first)]:
            work.result(60)
    assert len(raised) == 1
    assert (first.depth, second.depth) == (0, 0)


def test_an_empty_cache_is_true(tiny: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, tiny) as cache:
        assert len(cache) == 0
        assert cache
        assert (cache or None) is cache

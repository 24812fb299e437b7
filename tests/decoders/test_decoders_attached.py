"""Decoders through a cache: `attached`, `generate`, `score` and `perplexity` against the model alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmcache import CacheConfig, LLMCache
from llmcache.decoders import generation as decoding
from llmcache.decoders import scoring
from llmcache.errors import ConfigError
from tests.conftest import MODELS

hf: Any = transformers
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
LONG = {"intermediate_size": 64, "max_position_embeddings": 128}
PLAIN = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MAKERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LONG, **PLAIN, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=128, **PLAIN)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, **PLAIN, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32)
    ),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=list(MAKERS))
def decoder(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MAKERS[request.param]().train(False)


def prompts() -> dict[str, torch.Tensor]:
    """Return four prompts, padded on the left, two of them with a common prefix."""
    rows = [list(range(2, 40)), [*range(2, 30), 90, 91], list(range(50, 58)), [7]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def test_generate_of_an_attached_model_writes_the_same(decoder: Any, store: Path) -> None:
    inputs = prompts()
    plain = decoder.generate(**inputs, **GREEDY)
    for _ in range(2):
        with LLMCache.open(store, decoder) as cache, cache.attached():
            for _ in range(2):
                assert torch.equal(decoder.generate(**inputs, **GREEDY), plain)
            counters = cache.stats().counters.prefix
            assert counters.bypassed == 0
    assert counters.computed == 0, "all of it was stored"
    assert counters.restored + counters.shared == counters.tokens > 0


@torch.inference_mode()
def test_logits_of_plain_calls_are_the_models_own(decoder: Any, store: Path) -> None:
    ids = torch.arange(2, 66).reshape(2, 32)
    plain = decoder(input_ids=ids).logits
    with LLMCache.open(store, decoder) as cache, cache.attached():
        cold, warm = decoder(input_ids=ids).logits, decoder(input_ids=ids).logits
        uncached = decoder(input_ids=ids, use_cache=False)
        half = decoder(input_ids=ids[:, :20]).logits
    for one in (cold, warm, uncached.logits):
        torch.testing.assert_close(one, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(half, plain[:, :20], atol=1e-5, rtol=1e-4)
    assert uncached.past_key_values is None


@torch.inference_mode()
def test_with_layer_banks_a_call_without_keys_and_values_enters_after_a_layer(decoder: Any, store: Path) -> None:
    ids = torch.arange(2, 66).reshape(2, 32)
    plain = decoder(input_ids=ids, use_cache=False).logits
    with LLMCache.open(store, decoder, config=CacheConfig(layers=(1,))) as cache, cache.attached() as attachment:
        for entered in (0, 2):
            found = decoder(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
            assert attachment.entered.tolist() == [entered] * 2
        assert cache.stats().counters.prefix.calls == 0
        decoder(input_ids=ids)
        assert cache.stats().counters.prefix.calls == 1


@torch.inference_mode()
def test_without_blocks_decoding_calls_go_past_the_cache(
    decoder: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = prompts()
    plain = decoder.generate(**inputs, **GREEDY)
    config = CacheConfig(prefix_block=0)
    caplog.set_level(logging.WARNING, "llmcache")
    with LLMCache.open(store, decoder, config=config) as cache, cache.attached():
        assert torch.equal(decoder.generate(**inputs, **GREEDY), plain)
        assert torch.equal(decoder.generate(**inputs, **GREEDY), plain)
        assert cache.stats().counters.bypassed == 8
    assert [one.message for one in caplog.records if "past the cache" in one.message][1:] == []


@torch.inference_mode()
def test_changed_weights_are_not_given_what_others_computed(store: Path) -> None:
    torch.manual_seed(0)
    one = MAKERS["llama"]().train(False)
    inputs = prompts()
    with LLMCache.open(store, one) as cache, cache.attached():
        before = one(**inputs).logits
        one.model.layers[0].mlp.up_proj.weight.add_(0.05)
        changed = one(**inputs).logits
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(changed[visible], one(**inputs).logits[visible], atol=1e-5, rtol=1e-4)
    assert (changed[visible] - before[visible]).abs().max() > 1e-3


# -- real weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[Any, Any]:
    folder = MODELS / "stories260k-llama"
    if not folder.exists():
        pytest.skip(f"stories260k-llama is not at {folder}; set LLMCACHE_MODELS to the folder that holds it")
    return hf.AutoModelForCausalLM.from_pretrained(folder).train(False), hf.AutoTokenizer.from_pretrained(folder)


def test_a_cache_generates_scores_and_measures_like_the_model(stories: Any, store: Path) -> None:
    model, tokenizer = stories
    asked = ["Once upon a time there was a little girl", "Once upon a time there was a dog", "Tim"]
    choices = [" who loved to play.", " who was sad."]
    text = "Once upon a time there was a little girl named Lily. She loved to play with her dog. " * 6
    written = decoding.generate(model, tokenizer, asked, max_new_tokens=12, do_sample=False)
    scores = scoring.score(model, tokenizer, asked, choices)
    perplexity = scoring.perplexity(model, tokenizer, text, window=64)
    for answers in (True, True, False):
        with LLMCache.open(store, model, tokenizer=tokenizer, config=CacheConfig(answers=answers)) as cache:
            assert cache.generate(asked, max_new_tokens=12, do_sample=False).texts == written.texts
            found = cache.score(asked, choices)
            np.testing.assert_allclose(found.total, scores.total, rtol=1e-4)
            assert (found.total.argmax(1) == scores.total.argmax(1)).all()
            assert cache.perplexity(text, window=64) == pytest.approx(perplexity, rel=1e-4)
            restored = cache.stats().counters.prefix.restored
    assert restored > 0


def test_what_cannot_be_done_says_so(stories: Any, store: Path, tmp_path: Path) -> None:
    model, tokenizer = stories
    with LLMCache.open(store, model) as cache, pytest.raises(ConfigError, match="tokenizer="):
        cache.generate(["a"])
    with LLMCache.open(store, model) as cache, pytest.raises(ConfigError, match="sentence-transformers"):
        cache.encode(["a"])
    config = hf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    t5 = hf.T5ForConditionalGeneration(config)
    with LLMCache.open(tmp_path / "t5", t5, tokenizer=tokenizer) as cache, pytest.raises(ConfigError, match="causal"):
        cache.score(["a"], ["b"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_kv_blocks_keep_the_models_dtype(decoder: Any, tmp_path: Path, dtype: Any) -> None:
    """Rounded activations are a choice for outputs; rounded keys and values would change the tokens after them."""
    inputs = prompts()
    plain = decoder.generate(**inputs, **GREEDY)
    for _ in range(2):
        with LLMCache.open(tmp_path / "store", decoder, config=CacheConfig(dtype=dtype)) as cache, cache.attached():
            assert torch.equal(decoder.generate(**inputs, **GREEDY), plain)
            restored = cache.stats().counters.prefix.restored
    assert restored > 0

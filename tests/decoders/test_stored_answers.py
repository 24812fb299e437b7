"""Finished answers of decoders: read again where they are the model's, continued, never shared by other settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmcache import CacheConfig, LLMCache
from llmcache.decoders import generation, scoring
from llmcache.decoders.answer_bank import unpacked
from llmcache.errors import ModelMismatch
from llmcache.planning.purging import purge_documents
from tests import threads

hf: Any = transformers
PROMPTS = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11 w12 w13", "w1 w2 w3 w9", "w5 w6"]
CHOICES = [" w3", " w4 w5", " w200 w201 w202"]
SIZES = {"vocab_size": 304, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def llama() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **sizes, max_position_embeddings=128))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**SIZES, **sizes, decoder_start_token_id=0))


def bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
    config = hf.BartConfig(**SIZES, **sizes, **heads, decoder_start_token_id=3, forced_eos_token_id=None)
    return hf.BartForConditionalGeneration(config)


MAKERS = {"llama": llama, "gpt2": gpt2, "t5": t5, "bart": bart}


def made(name: str) -> Any:
    torch.manual_seed(4)
    model = MAKERS[name]().eval()
    with torch.no_grad():  # logits that differ, so that rounding decides nothing
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
    return model


@pytest.fixture(scope="module", params=sorted(MAKERS))
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.fixture
def causal() -> Any:
    return made("llama")


@pytest.fixture
def tokenizer() -> Any:
    return threads.tiny_tokenizer()


def opened(store: Path, model: Any, **settings: Any) -> LLMCache:
    config = CacheConfig(**{"answers": True, **settings.pop("config", {})})
    return LLMCache.open(store, model, tokenizer=threads.tiny_tokenizer(), config=config, **settings)


@pytest.fixture
def cache(causal: Any, tmp_path: Path) -> Iterator[LLMCache]:
    with opened(tmp_path / "store", causal) as one:
        yield one


def plain(model: Any, prompts: list[str] = PROMPTS, **how: Any) -> list[list[int]]:
    """Return the answers of the model to each prompt alone."""
    found = [generation.generate(model, threads.tiny_tokenizer(), [prompt], **how) for prompt in prompts]
    return [ids.tolist() for one in found for ids in one.ids]


def lists(generated: generation.Generated) -> list[list[int]]:
    return [ids.tolist() for ids in generated.ids]


# -- answers ------------------------------------------------------------------------------------------------


def test_the_same_job_again_computes_nothing(model: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    expected = plain(model, **how)
    with opened(tmp_path / "store", model) as cache:
        cold = cache.generate(PROMPTS, **how)
        assert (lists(cold), cold.reused, cold.not_stored) == (expected, [0.0] * 5, "")
        before = cache.stats().counters.prefix.calls
        warm = cache.generate(PROMPTS, **how)
        assert (lists(warm), warm.texts, warm.reused) == (expected, cold.texts, [1.0] * 5)
        assert cache.stats().counters.answers_stored == 5
        assert cache.stats().counters.prefix.calls == before
    with opened(tmp_path / "store", model, read_only=True) as cache:
        assert lists(cache.generate(PROMPTS[::-1], **how)) == expected[::-1]
        assert cache.stats().counters.answers_stored == 5
        assert cache.stats().counters.exact_audits > 0
        assert cache.stats().counters.saved_seconds > 0


def test_answers_have_the_log_likelihoods_of_their_tokens(model: Any, tmp_path: Path) -> None:
    whole = bool(model.config.is_encoder_decoder)
    tokenizer = threads.tiny_tokenizer()
    for how in (
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "num_beams": 3},
        {"max_new_tokens": 4, "top_k": 5, "do_sample": True},
    ):
        torch.manual_seed(7)
        with opened(tmp_path / "store", model) as cache:
            found = cache.generate(PROMPTS, likelihoods=True, **how)
        for prompt, ids, likely in zip(PROMPTS, found.ids, found.likelihoods, strict=True):
            given = torch.tensor([tokenizer(prompt)["input_ids"]])
            new = torch.from_numpy(ids)[None]
            with torch.inference_mode():
                if whole:
                    logits, expected = model(input_ids=given, decoder_input_ids=new).logits[0], [0.0]
                    wanted, at = new[0, 1:], logits[:-1]
                else:
                    given = given[:, :-1] if given[0, -1] == tokenizer.eos_token_id else given
                    logits, expected = model(torch.cat([given, new], 1)).logits[0], []
                    wanted, at = new[0], logits[given.shape[1] - 1 : -1]
            expected += torch.log_softmax(at.float(), -1)[torch.arange(len(wanted)), wanted].tolist()
            assert likely.tolist() == pytest.approx(expected, abs=1e-4)
        assert set(found.finish) <= {"end", "length"}


@pytest.mark.parametrize("limits", [(3, 9, 6), (9, 3, 12), (1, 2, 4, 8, 16), (16, 1)])
def test_answers_are_cut_and_continued(cache: LLMCache, causal: Any, limits: tuple[int, ...]) -> None:
    most = 0
    for limit in limits:
        how: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False}
        found = cache.generate(PROMPTS, **how)
        expected = plain(causal, **how)
        assert lists(found) == expected
        reused = [min(1.0, most / len(ids)) for ids in expected]
        assert found.reused == pytest.approx(reused)
        most = max(most, limit)


def test_an_answer_that_has_ended_is_whole(cache: LLMCache, causal: Any) -> None:
    how: dict[str, Any] = {"do_sample": False}
    first, *_ = plain(causal, max_new_tokens=8, **how)
    end = first[3]
    short = cache.generate(PROMPTS, max_new_tokens=8, eos_token_id=end, **how)
    assert lists(short)[0] == first[: first.index(end) + 1]
    longer = cache.generate(PROMPTS, max_new_tokens=20, eos_token_id=end, **how)
    assert lists(longer) == plain(causal, max_new_tokens=20, eos_token_id=end, **how)
    assert longer.reused[0] == 1.0


class Shift(hf.LogitsProcessor):  # type: ignore[misc]  # `hf` has no types
    """Processor of one's own, with a parameter."""

    def __init__(self, token: int, amount: float = 50.0) -> None:
        self.token, self.amount = token, amount

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] += self.amount
        return scores


class Stop(hf.StoppingCriteria):  # type: ignore[misc]
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "at least": {"min_new_tokens": 6, "eos_token_id": 20},
    "another end": {"eos_token_id": 20},
    "suppressed": {"suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12]},
    "others suppressed": {"suppress_tokens": list(range(100, 200))},
    "beams": {"num_beams": 3},
    "more beams": {"num_beams": 5, "length_penalty": 2.0},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "forced": {"forced_eos_token_id": 20},
}
NOT_STORED: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"do_sample": True}, "it samples"),
    "time": ({"max_time": 60.0}, "time"),
    "length with the padding": ({"max_new_tokens": None, "max_length": 20}, "max_length"),
    "penalty": ({"repetition_penalty": 1.7}, "padding"),
    "ngrams": ({"no_repeat_ngram_size": 1}, "padding"),
    "bad words": ({"bad_words_ids": [[7], [8]]}, "padding"),
    "bias": ({"sequence_bias": [[[60], 40.0]]}, "padding"),
    "decay": ({"exponential_decay_length_penalty": (1, 1.5)}, "padding"),
    "own processor": ({"logits_processor": [Shift(50)]}, "logits_processor"),
    "own criterion": ({"stopping_criteria": [Stop(9)]}, "stopping_criteria"),
    "function": ({"prefix_allowed_tokens_fn": lambda _, __: list(range(4, 60))}, "prefix_allowed_tokens_fn"),
    "given": ({"generation_config": hf.GenerationConfig(max_new_tokens=4, pad_token_id=0)}, "generation_config"),
}


def test_settings_never_share_answers(cache: LLMCache, causal: Any) -> None:
    """Every setting gives the model's own answers, whatever was stored before, and finds its own again."""
    expected = {name: plain(causal, do_sample=False, max_new_tokens=7, **how) for name, how in SETTINGS.items()}
    assert len({str(ids) for ids in expected.values()}) > len(SETTINGS) // 2
    assert {cache.generate(PROMPTS[:1], max_new_tokens=8, **how).not_stored for how in SETTINGS.values()} == {""}
    for again in (False, True):
        for name, how in SETTINGS.items():
            found = cache.generate(PROMPTS, do_sample=False, max_new_tokens=7, **how)
            assert lists(found) == expected[name], name
            assert set(found.reused) == {float(again)}, name
    for name in ("at least", "beams", "forced"):  # a lower limit is no beginning here
        how = SETTINGS[name]
        found = cache.generate(PROMPTS, do_sample=False, max_new_tokens=6, **how)
        assert lists(found) == plain(causal, do_sample=False, max_new_tokens=6, **how), name


@pytest.mark.parametrize("name", sorted(NOT_STORED))
def test_what_may_depend_on_more_than_a_key_names_is_not_stored(cache: LLMCache, causal: Any, name: str) -> None:
    given, reason = NOT_STORED[name]
    for _ in range(2):
        torch.manual_seed(1)
        found = cache.generate(PROMPTS, **({"max_new_tokens": 4} | given))
        torch.manual_seed(1)
        expected = generation.generate(causal, threads.tiny_tokenizer(), PROMPTS, **({"max_new_tokens": 4} | given))
        assert reason in found.not_stored
        assert (found.reused, lists(found)) == ([0.0] * 5, lists(expected))
    assert cache.stats().counters.answers_stored == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.5},
        {"num_beams": 4},
        {"suppress_tokens": [95]},
        {"eos_token_id": 95},
    ],
)
def test_settings_of_the_models_own_configuration_decide_too(
    causal: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6}
    with opened(tmp_path / "store", causal) as cache:
        before = lists(cache.generate(PROMPTS, **how))
        causal.generation_config.update(**settings)
        torch.manual_seed(1)
        found = cache.generate(PROMPTS[:1], **how)
        torch.manual_seed(1)
        assert lists(found) == plain(causal, PROMPTS[:1], **how)
        assert lists(found)[0] != before[0] or found.reused == [1.0]
    with opened(tmp_path / "store", causal) as cache:  # and no false alarm in a new opening
        torch.manual_seed(1)
        assert lists(cache.generate(PROMPTS[:1], **how)) == lists(found)


def test_a_model_that_reads_later_tokens_stores_no_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    both_ways = hf.BertLMHeadModel(hf.BertConfig(**SIZES, **sizes, max_position_embeddings=128)).eval()
    for _ in range(2):
        with opened(tmp_path / "store", both_ways) as cache:
            found = cache.generate(PROMPTS, max_new_tokens=3)
            assert "later tokens" in found.not_stored
            cache.score(PROMPTS, CHOICES)
            assert cache.stats().counters.answers_stored == 0


def test_rows_beyond_the_original_context_of_a_rope_are_not_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 12}
    config = hf.LlamaConfig(**SIZES, **sizes, max_position_embeddings=12, rope_parameters=rope)
    model = hf.LlamaForCausalLM(config).eval()
    for limit in (1, 2, 4, 20, 20):
        with opened(tmp_path / "store", model) as cache:
            found = cache.generate(PROMPTS, max_new_tokens=limit, do_sample=False)
            assert lists(found) == plain(model, max_new_tokens=limit, do_sample=False)
            if limit == 20:
                assert found.reused == [0.0] * 5


@pytest.mark.parametrize("what", ["answers", "likelihoods"])
def test_a_mismatch_can_be_bypassed(causal: Any, tmp_path: Path, what: str) -> None:
    """With on_mismatch="bypass" the model answers itself, and nothing is stored any more."""
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}

    def ask(cache: LLMCache) -> Any:
        return lists(cache.generate(PROMPTS, **how)) if what == "answers" else cache.score(PROMPTS, CHOICES).total

    with opened(tmp_path / "store", causal) as cache:
        ask(cache)
    with opened(tmp_path / "store", causal, config={"on_mismatch": "bypass"}) as cache:
        identity = cache._identity_now()
        cache.__dict__["_identity_now"] = lambda: identity
        with torch.no_grad():
            causal.lm_head.weight.mul_(-1)
        found = ask(cache)
        assert cache.stats().counters.exact_mismatches == 1
    tokenizer = threads.tiny_tokenizer()
    if what == "answers":
        assert found == plain(causal, **how)
    else:
        np.testing.assert_allclose(found, scoring.score(causal, tokenizer, PROMPTS, CHOICES).total, atol=1e-4)


def test_settings_without_answers_store_none(causal: Any, tmp_path: Path) -> None:
    with opened(tmp_path / "store", causal, config={"answers": False}) as cache:
        for _ in range(2):
            assert cache.generate(PROMPTS, max_new_tokens=3).reused == [0.0] * 5
            cache.score(PROMPTS, CHOICES)
        assert cache.stats().counters.answers_stored == 0


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [1],
        [0, 5, 7],
        [0, -2, 0, -2],
        [np.nan, 1, 3],
        [0, np.inf],
        [0, 1, -4, -1],
        [0, 1, 304, -1],
        [0, 1, 4, 1],
        [0, 1, 4],
    ],
)
def test_numbers_of_a_forged_store_are_no_answers(numbers: list[float]) -> None:
    assert unpacked(np.array(numbers, np.float32), 304) is None


# -- truth --------------------------------------------------------------------------------------------------


def test_a_changed_model_gives_answers_of_its_own(cache: LLMCache, causal: Any) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    before, weight = lists(cache.generate(PROMPTS, **how)), causal.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-4)
    changed = cache.generate(PROMPTS, **how)
    assert lists(changed) == plain(causal, **how) != before
    with torch.no_grad():
        weight.copy_(kept)
    back = cache.generate(PROMPTS, **how)
    assert (lists(back), set(back.reused)) == (before, {1.0})


@pytest.mark.parametrize("what", ["answers", "likelihoods"])
def test_results_that_are_not_the_models_are_found(causal: Any, tmp_path: Path, what: str) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}

    def ask(cache: LLMCache) -> None:
        cache.generate(PROMPTS, **how) if what == "answers" else cache.score(PROMPTS, CHOICES)

    with opened(tmp_path / "store", causal) as cache:
        ask(cache)
    with opened(tmp_path / "store", causal) as cache:  # the weights change behind the identity
        identity = cache._identity_now()
        cache.__dict__["_identity_now"] = lambda: identity
        with torch.no_grad():
            causal.lm_head.weight.mul_(-1)
        with pytest.raises(ModelMismatch):
            ask(cache)


def test_a_purge_by_text_removes_answers_and_scores(causal: Any, tokenizer: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with opened(tmp_path / "store", causal) as cache:
        cache.generate(PROMPTS, **how)
        cache.generate(PROMPTS, max_new_tokens=6, do_sample=False)
        cache.score(PROMPTS, CHOICES)
    purge_documents(tmp_path / "store", texts=[PROMPTS[0]], reader=tokenizer)
    with opened(tmp_path / "store", causal) as cache:
        assert cache.generate(PROMPTS, **how).reused == [0.0, 1.0, 1.0, 1.0, 1.0]
        cache.score(PROMPTS[:1], CHOICES)
        assert cache.stats().counters.answers_stored == 4


# -- scores -------------------------------------------------------------------------------------------------


def test_scores_again_compute_nothing(cache: LLMCache, causal: Any, tokenizer: Any) -> None:
    expected = scoring.score(causal, tokenizer, PROMPTS, CHOICES)
    cold = cache.score(PROMPTS, CHOICES)
    asked = cache.stats().counters.answers_stored
    assert asked == 0
    warm = cache.score(PROMPTS[::-1], CHOICES)
    np.testing.assert_allclose(cold.total, expected.total, atol=1e-4)
    np.testing.assert_array_equal(warm.total[::-1], cold.total)
    np.testing.assert_array_equal(warm.tokens, expected.tokens[::-1])
    assert cache.stats().counters.answers_stored == len(PROMPTS) * len(CHOICES)
    more = cache.score(PROMPTS, [*CHOICES, " w99"])  # only the new choice is computed
    np.testing.assert_array_equal(more.total[:, :3], cold.total)
    assert cache.stats().counters.answers_stored == 2 * len(PROMPTS) * len(CHOICES)


def test_the_same_tokens_with_another_border_are_another_result(cache: LLMCache, causal: Any, tokenizer: Any) -> None:
    for prompt, choice in (("w1 w2", " w3 w4"), ("w1 w2 w3", " w4"), ("w1", " w2 w3 w4")):
        expected = scoring.score(causal, tokenizer, [prompt], [choice])
        found = cache.score([prompt], [choice])
        np.testing.assert_allclose(found.total, expected.total, atol=1e-4)
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_perplexity_again_computes_nothing(cache: LLMCache, causal: Any, tokenizer: Any) -> None:
    text = " ".join(f"w{i % 50}" for i in range(90))
    expected = scoring.perplexity(causal, tokenizer, text, window=16, stride=8)
    found = [cache.perplexity(text, window=16, stride=8) for _ in range(2)]
    assert found == pytest.approx([expected] * 2, rel=1e-5)
    assert found[0] == found[1]
    assert cache.stats().counters.answers_stored > 0

"""Generation, scoring and perplexity: results equal those of transformers, with and without a prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcache import LLMCache
from llmcache.bench.decoding import choices, prefill
from llmcache.decoders.generation import generate
from llmcache.decoders.prompts import padded
from llmcache.decoders.scoring import Scores, perplexity, score
from llmcache.errors import ConfigError
from tests.conftest import DATA
from tests.decoders.test_prefix_cache import MODELS, Opener, assert_same, one_thread, seeded, tier

__all__ = ["one_thread", "tier"]  # fixtures

REAL = ["stories260k-llama", "babyllama105-llama", "slm4096-gpt2"]


def real(name: str) -> tuple[Any, Any]:
    """Load a model with trained weights, and its tokenizer."""
    folder = MODELS / name
    if not folder.exists():
        pytest.skip(f"{name} is not in {MODELS}; set LLMCACHE_MODELS to the folder that holds it")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def running_text() -> str:
    folder = DATA / "text-tinystories-sample"
    if not folder.exists():
        pytest.skip(f"text-tinystories-sample is not in {DATA}; set LLMCACHE_DATA to the folder that holds it")
    return max(folder.glob("*.txt"), key=lambda file: file.stat().st_size).read_text(encoding="utf-8")


def prompts_of(name: str, tokenizer: Any, count: int, longest: int) -> list[str]:
    """Return starts of stories (or of texts that the model memorised), several with the same first words."""
    text = (MODELS / name / "corpus.txt").read_text() if name.startswith("slm") else running_text()
    known = set(tokenizer.get_vocab()) if len(tokenizer.get_vocab()) < 256 else None
    random = np.random.default_rng(0)
    prompts = []
    for i in range(count):
        start = int(np.random.default_rng(i // 5).integers(0, len(text) - longest))  # five prompts share a prefix
        prompt = text[start : start + int(random.integers(3, longest))]
        prompts.append("".join(one for one in prompt if known is None or one in known or one == " ") or "a")
    return prompts


@pytest.mark.parametrize("name", REAL)
def test_logits_of_real_weights_are_the_same_cold_warm_and_after_reopening(tier: Opener, name: str) -> None:
    model, tokenizer = real(name)
    rows = [tokenizer(prompt)["input_ids"][:100] for prompt in prompts_of(name, tokenizer, 24, 90)]
    ids, mask = padded(rows, 0, "cpu")
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = model(**call)
    one = tier(model, block=16)
    cold, warm = one(**call), one(**call)
    one.store.commit()
    one = tier(model, block=16)
    reopened = one(**call)
    assert one.computed() == 0
    for found in (cold, warm, reopened):
        assert_same(found, expected, mask)


@pytest.mark.parametrize("name", REAL)
def test_greedy_generation_is_the_same_token_for_token(tier: Opener, name: str) -> None:
    model, tokenizer = real(name)
    prompts = prompts_of(name, tokenizer, 200, 60)
    alone = generate(model, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    one = tier(model, block=16)
    for size in (32, 27):
        found = generate(
            model, tokenizer, prompts, attached=one.attached, batch_size=size, max_new_tokens=12, do_sample=False
        )
        assert [ids.tolist() for ids in trimmed(found.ids, tokenizer)] == [
            ids.tolist() for ids in trimmed(alone.ids, tokenizer)
        ]
        assert found.texts == alone.texts
    assert one.restored() > 0
    assert one.prefixes.counters.shared > 0


def trimmed(rows: Sequence[Any], tokenizer: Any) -> list[Any]:
    """Cut a row after its first end-of-text token: the rest is padding to the longest row of the batch."""
    ends = [np.flatnonzero(row == tokenizer.eos_token_id) for row in rows]
    return [row[: end[0] + 1] if len(end) else row for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_beams_and_seeded_sampling_are_the_same(tier: Opener, how: dict[str, Any]) -> None:
    model, tokenizer = real("stories260k-llama")
    prompts = prompts_of("stories260k-llama", tokenizer, 20, 60)
    one = tier(model)
    torch.manual_seed(5)
    alone = generate(model, tokenizer, prompts, batch_size=8, max_new_tokens=10, **how)
    for _ in range(2):
        torch.manual_seed(5)
        found = generate(model, tokenizer, prompts, attached=one.attached, batch_size=8, max_new_tokens=10, **how)
        assert found.texts == alone.texts
        assert all(map(np.array_equal, found.ids, alone.ids))
    assert len(found.texts) == len(prompts) * how.get("num_return_sequences", 1)
    assert one.restored() > 0


def test_generation_of_one_prompt_and_of_none(tier: Opener) -> None:
    model, tokenizer = real("stories260k-llama")
    one = tier(model)
    alone = generate(model, tokenizer, ["Once upon"], max_new_tokens=5)
    assert generate(model, tokenizer, ["Once upon"], attached=one.attached, max_new_tokens=5).texts == alone.texts
    assert generate(model, tokenizer, [], attached=one.attached).texts == []


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "gemma2", "gpt_neox"])
def test_other_architectures_write_the_same(tier: Opener, name: str) -> None:
    """Cover windows, learned positions and positions counted by the mask; a second call continues the first."""
    model = seeded(name)
    rows = np.random.default_rng(0).integers(2, 97, (6, 21)).tolist()
    rows = [row[: 21 - 3 * i] for i, row in enumerate(rows)] + [rows[0][:15] + rows[1][:4]]
    ids, mask = padded(rows, 0, "cpu")
    one = tier(model)
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, attention_mask=mask, **how)
    for _ in range(2):
        with one.attached():
            assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **how), alone)
    assert one.restored() > 0


def test_a_prompt_beyond_the_context_ends_in_the_models_own_error(tier: Opener) -> None:
    model, tokenizer = real("slm4096-gpt2")
    prompt = prompts_of("slm4096-gpt2", tokenizer, 1, 60)[0] * 60
    with pytest.raises(IndexError) as alone:
        generate(model, tokenizer, [prompt], max_new_tokens=2)
    with pytest.raises(IndexError) as found:
        generate(model, tokenizer, [prompt], attached=tier(model).attached, max_new_tokens=2)
    assert str(found.value) == str(alone.value)


def by_hand(model: Any, tokenizer: Any, prompt: str, choice: str) -> tuple[float, int]:
    """Return the log-likelihood of a choice from the logits of the whole model, one row at a time."""
    stem = len(tokenizer(prompt.rstrip(" "))["input_ids"])
    ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
    with torch.no_grad():
        likely = functional.log_softmax(model(ids).logits[0].double(), -1)
    return sum(float(likely[at - 1, ids[0, at]]) for at in range(stem, ids.shape[1])), ids.shape[1] - stem


def test_scores_are_those_of_single_rows_and_a_stem_is_computed_once(tier: Opener) -> None:
    model, tokenizer = real("stories260k-llama")
    prompts = ["Once upon a time there was a", "The cat and the dog went to the ", "Lily saw"]
    choices = [[" girl", " big red ball.", " tree"], ["park", "moon"], [" a bird in the big old tree"]]
    one = tier(model)
    cases: list[dict[str, Any]] = [{}, {"attached": one.attached}, {"attached": one.attached}]
    for attached in cases:
        found = score(model, tokenizer, prompts, choices, batch_size=3, **attached)
        assert found.total.dtype == np.float64
        for i, (prompt, some) in enumerate(zip(prompts, choices, strict=True)):
            for j, choice in enumerate(some):
                expected, tokens = by_hand(model, tokenizer, prompt, choice)
                assert found.total[i, j] == pytest.approx(expected, rel=1e-4)
                assert found.tokens[i, j] == tokens
                assert found.per_token[i, j] == pytest.approx(expected / tokens, rel=1e-4)
        assert found.total[2, 1] == -np.inf
    counters = one.prefixes.counters
    asked = sum(len(tokenizer(p + c)["input_ids"]) - 1 for p, some in zip(prompts, choices, strict=True) for c in some)
    assert counters.tokens == 2 * asked
    assert counters.computed < asked - 20
    assert counters.restored + counters.shared >= asked


def test_one_list_of_choices_serves_all_prompts_and_empty_prompts_begin_with_a_special_token() -> None:
    model, tokenizer = real("stories260k-llama")
    found = score(model, tokenizer, ["", "Once upon a"], [" time", " cat"])
    assert np.isfinite(found.total).all()
    assert found.total[1].argmax() == 0
    assert score(model, tokenizer, [], ["a", "b"]).total.shape[0] == 0


def test_a_choice_without_tokens_and_lists_that_do_not_fit_say_so() -> None:
    model, tokenizer = real("stories260k-llama")
    with pytest.raises(ConfigError, match="prompt 0: choice 1 has no tokens"):
        score(model, tokenizer, ["Once"], [" upon", ""])
    with pytest.raises(ConfigError, match="2 prompts and 1 lists"):
        score(model, tokenizer, ["Once", "There"], [["a", "b"]])
    with pytest.raises(ConfigError, match="batch_size"):
        generate(model, tokenizer, ["Once"], batch_size=0)


def windows_by_hand(model: Any, tokenizer: Any, text: str, window: int, stride: int) -> float:
    """Compute perplexity as in the transformers guide: overlapping windows, with tokens of earlier windows masked."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    before, total, count = 0, 0.0, 0
    for start in range(0, ids.shape[1], stride):
        stop = min(start + window, ids.shape[1])
        piece, target = ids[:, start:stop], ids[:, start:stop].clone()
        target[:, : -(stop - before)] = -100
        with torch.no_grad():
            loss = model(piece, labels=target).loss
        seen = int((target[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * seen if seen else total, count + seen, stop
        if stop == ids.shape[1]:
            break
    return math.exp(total / count)


@pytest.mark.parametrize("stride", [128, 256])
def test_perplexity_is_that_of_the_model_alone(tier: Opener, stride: int) -> None:
    model, tokenizer = real("stories260k-llama")
    text = running_text()[:12_000]
    expected = windows_by_hand(model, tokenizer, text, 256, stride)
    one = tier(model, block=16)
    alone = perplexity(model, tokenizer, text, window=256, stride=stride)
    cold = perplexity(model, tokenizer, text, window=256, stride=stride, attached=one.attached)
    warm = perplexity(model, tokenizer, text, window=256, stride=stride, attached=one.attached)
    assert one.restored() > 0
    for found in (alone, cold, warm):
        assert f"{found:.3f}" == f"{expected:.3f}"


def test_perplexity_of_single_stories_is_what_is_known_of_the_model(tier: Opener) -> None:
    model, tokenizer = real("stories260k-llama")
    running_text()  # skips the test without the text
    file = DATA / "text-tinystories-sample" / "tinystories_sample_cs336.txt"
    stories = [story.strip() for story in file.read_text(encoding="utf-8").split("<|endoftext|>") if story.strip()]
    one = tier(model, block=16)
    for _ in range(2):
        assert 3.4 < perplexity(model, tokenizer, stories, window=512, attached=one.attached) < 3.7  # 3.55 elsewhere


def test_perplexity_of_the_running_text_is_equal_to_four_digits(tier: Opener) -> None:
    model, tokenizer = real("stories260k-llama")
    text = running_text()
    alone = perplexity(model, tokenizer, text, window=256)
    one = tier(model, block=16)
    for _ in range(2):
        found = perplexity(model, tokenizer, text, window=256, attached=one.attached)
        assert f"{found:.4g}" == f"{alone:.4g}"


def test_perplexity_of_nothing_says_so() -> None:
    model, tokenizer = real("stories260k-llama")
    with pytest.raises(ConfigError, match="no token that follows"):
        perplexity(model, tokenizer, [], window=16)
    with pytest.raises(ConfigError, match="stride"):
        perplexity(model, tokenizer, ["a b c"], window=16, stride=17)


def test_scores_divide_by_tokens() -> None:
    found = Scores(np.array([[-4.0, -np.inf]]), np.array([[2, 0]]))
    assert found.per_token.tolist() == [[-2.0, -np.inf]]


def test_the_benchmarks_compare_equal_results() -> None:
    model, tokenizer = real("stories260k-llama")
    text = "Once upon a time there was a little girl named Lily. She liked to play in the park with her big red ball."
    requests = [(text[i:], f"What did {name} see?") for i in (0, 5) for name in ("Lily", "Tom", "the cat")]
    reports = prefill(model, tokenizer, requests, rows=2)
    assert [one["name"] for one in reports] == [
        "plain", "first pass", "known paragraphs", "repeated",
        "kept by the caller, first pass", "kept by the caller, known paragraphs",
    ]  # fmt: skip
    assert reports[2]["restored"] > 0
    assert reports[3]["computed"] == 0
    asked = choices(model, tokenizer, [("Once upon a", [" time", " cat"]), ("Lily went to the", [" park", " sun"])])
    assert all(one["same_choices"] == 2 for one in asked)
    assert all(one["relative_difference"] < 1e-4 for one in reports + asked)


@pytest.mark.parametrize("prompt", ["The sky", "Once upon a time there was a little girl who had a very big dog"])
def test_the_first_call_of_a_fresh_cache_scores_like_the_model_alone(store: Path, prompt: str) -> None:
    model, tokenizer = real("stories260k-llama")
    choices = [" is blue", " was green"]
    expected = []
    for choice in choices:
        stem, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + choice)["input_ids"]
        with torch.inference_mode():
            likely = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        expected.append(sum(float(likely[i - 1, ids[i]]) for i in range(len(stem), len(ids))))
    with LLMCache.open(store, model, tokenizer=tokenizer) as cache:
        first, second = (cache.score([prompt], choices).total[0] for _ in range(2))
        assert cache.stats().counters.prefix.bypassed == 0
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    np.testing.assert_allclose(second, expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [None, 7, b"a", ["a"], float("nan")])
def test_prompts_choices_and_texts_that_are_not_texts_are_refused_by_their_place(bad: Any) -> None:
    model, tokenizer = real("slm4096-gpt2")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("prompts", lambda: generate(model, tokenizer, ["a", bad], max_new_tokens=1)),
        ("prompts", lambda: score(model, tokenizer, ["a", bad], [" b"])),
        ("choices", lambda: score(model, tokenizer, ["a", "b"], [" b", bad])),
        ("choices of a prompt", lambda: score(model, tokenizer, ["a"], [[" b", bad]])),
        ("texts", lambda: perplexity(model, tokenizer, ["a", bad], window=8)),
    ]
    for what, call in calls:
        with pytest.raises(ConfigError, match=f"{what} are texts, and number 1 is a {type(bad).__name__}"):
            call()
    if not isinstance(bad, list):  # a list of prompts is allowed
        with pytest.raises(ConfigError):
            generate(model, tokenizer, bad)
        with pytest.raises(ConfigError):
            score(model, tokenizer, ["a"], bad)

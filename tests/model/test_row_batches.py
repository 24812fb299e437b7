"""Scores, perplexities and generated texts of causal models: in any batch a row gets its result alone and unpadded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcache import LLMCache
from llmcache.decoders import generation as decoding
from llmcache.decoders import scoring
from llmcache.errors import ConfigError
from tests.tiny import VOCABULARY, architectures, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
CAUSAL = {model_type: name for kind, model_type, name in architectures() if kind == "decoder"}
NORMAL = (
    "bart", "bert", "big_bird", "bloom", "ctrl", "falcon", "gpt2", "jamba", "llama", "mamba2", "marian", "mistral",
    "mixtral", "mpt", "opt", "pegasus", "phi3", "recurrent_gemma", "roberta", "rwkv", "xglm", "xlm-roberta", "xlnet",
)  # fmt: skip
CHOSEN = sorted(CAUSAL) if os.environ.get("LLMCACHE_FUZZ") == "all" else [one for one in NORMAL if one in CAUSAL]
PROMPTS = ["abc", "the quick brown fox", "hello wo", "a prompt, say"]
CHOICES = [" yes", " no way"]


class Letters:
    """A tokenizer with a token for each letter."""

    pad_token_id, bos_token_id, eos_token_id, eos_token = 0, 1, 2, "</s>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % (VOCABULARY - 4) for letter in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


LETTERS = Letters()


def made(model_type: str) -> Any:
    """Return a model; skips the test where the installed transformers cannot build it."""
    try:
        model = tiny_model(model_type, CAUSAL[model_type])
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
    except Exception as error:
        pytest.skip(f"{model_type} cannot be built small: {type(error).__name__}")
    return model


def likelihoods(model: Any, ids: list[int]) -> torch.Tensor:
    """Return log-likelihoods of all tokens after each token of one row, run alone."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def total(model: Any, ids: list[int], counted: int) -> float:
    """Return the log-likelihood of the last tokens of one row."""
    likely = likelihoods(model, ids)
    return sum(float(likely[at - 1, ids[at]]) for at in range(len(ids) - counted, len(ids)))


@pytest.mark.parametrize("model_type", CHOSEN)
def test_a_score_is_the_likelihood_of_the_row_alone(model_type: str, store: Path) -> None:
    model = made(model_type)
    expected = [[total(model, LETTERS(prompt + one)["input_ids"], len(one)) for one in CHOICES] for prompt in PROMPTS]
    found = scoring.score(model, LETTERS, PROMPTS, CHOICES).total
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    with LLMCache.open(store, model) as cache:
        attached = cache.attached
        try:
            both = [scoring.score(model, LETTERS, PROMPTS, CHOICES, attached=attached).total for _ in range(2)]
        except ConfigError:  # models that cannot be attached raise the reason at once
            return
    for one in both:
        np.testing.assert_allclose(one, expected, rtol=2e-4)


@pytest.mark.parametrize("model_type", CHOSEN)
def test_perplexity_is_that_of_each_window_alone(model_type: str) -> None:
    model, texts = made(model_type), ["some text that is long enough", "another", "x y"]
    found = scoring.perplexity(model, LETTERS, texts, window=16, stride=8)
    sums, count = 0.0, 0
    for text in texts:
        ids, done = LETTERS(text)["input_ids"], 1
        for start in range(0, len(ids), 8):
            stop = min(start + 16, len(ids))
            counted = min(stop - done, stop - start - 1)
            if counted > 0:
                sums, count = sums + total(model, ids[start:stop], counted), count + counted
            done = stop
            if stop == len(ids):
                break
    assert found == pytest.approx(math.exp(-sums / count), rel=2e-4)


@pytest.mark.parametrize("model_type", CHOSEN)
def test_what_is_generated_after_a_prompt_is_what_is_generated_after_it_alone(model_type: str) -> None:
    model = made(model_type)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    alone = []
    for prompt in PROMPTS:
        ids = torch.tensor([LETTERS(prompt)["input_ids"]])
        try:
            written = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        except Exception as error:
            pytest.skip(f"{model_type} does not generate: {type(error).__name__}")
        alone.append(written[0, ids.shape[1] :].tolist())
    found = [ids.tolist() for ids in decoding.generate(model, LETTERS, PROMPTS, **how).ids]
    for mine, theirs in zip(found, alone, strict=True):
        assert mine[: len(theirs)] == theirs
        assert set(mine[len(theirs) :]) <= {0}  # padding after the end of text


class Merging(Letters):
    """A tokenizer that merges white space as byte-pair encodings do: with the next letters, and with itself."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        pieces: list[str] = []
        for letter in text:
            run = pieces and pieces[-1][-1:].isspace() and (pieces[-1][-1] == letter == "\n" or pieces[-1] == " ")
            if run and letter != " ":
                pieces[-1] += letter
            else:
                pieces.append(letter)
        return {"input_ids": [4 + sum(map(ord, piece)) * 31 % (VOCABULARY - 4) for piece in pieces]}


@pytest.mark.parametrize("tokenizer", [LETTERS, Merging()], ids=["letters", "merging"])
@pytest.mark.parametrize("space", [" ", "\t", "\n", "\n\n", " \n", "\u00a0", "\u3000", "\r\n", "  "])
def test_white_space_at_the_end_of_a_prompt_counts_for_the_choice(space: str, tokenizer: Any) -> None:
    model = made("gpt2")
    prompt, choices = "the end of", ["it", "\nno", " x"]
    found = scoring.score(model, tokenizer, [prompt + space], choices)
    stem = tokenizer(prompt)["input_ids"]
    for place, choice in enumerate(choices):
        ids = tokenizer(prompt + space + choice)["input_ids"]
        assert ids[: len(stem)] == stem
        assert found.tokens[0, place] == len(ids) - len(stem)
        assert found.total[0, place] == pytest.approx(total(model, ids, len(ids) - len(stem)), rel=2e-4)


class Pairs(Letters):
    """A tokenizer with a token for every two letters, so that a choice may change the last token of its prompt."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        pieces = [text[at : at + 2] for at in range(0, len(text), 2)]
        return {"input_ids": [4 + sum(map(ord, piece)) * 7 % (VOCABULARY - 4) for piece in pieces]}


@pytest.mark.parametrize("prompt", ["a", "abc", "abcd", "abcde"])
def test_a_token_that_prompt_and_choice_share_counts_for_the_choice(prompt: str) -> None:
    model, tokenizer = made("gpt2"), Pairs()
    found = scoring.score(model, tokenizer, [prompt], ["xyz"])
    ids = tokenizer(prompt + "xyz")["input_ids"]
    shared = len(prompt) // 2
    row, counted = (ids, len(ids) - shared) if shared else ([tokenizer.bos_token_id, *ids], len(ids))
    assert found.tokens[0, 0] == counted
    assert found.total[0, 0] == pytest.approx(total(model, row, counted), rel=2e-4)


def test_trying_out_how_rows_may_share_a_batch_leaves_no_trace() -> None:
    for name in ("big_bird", "phi3", "gpt2"):
        model = made(name)
        before = {key: value.clone() for key, value in model.state_dict(keep_vars=False).items()}
        kinds = [getattr(one, "attention_type", None) for one in model.modules()]
        random = torch.get_rng_state()
        scoring.score(model, LETTERS, ["ab"], ["c"])
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        if name != "big_bird":  # it changes itself during the call
            assert kinds == [getattr(one, "attention_type", None) for one in model.modules()]

"""Encoder-decoders: the encoder's states are reused, and the decoder's output is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from llmcache import LLMCache
from tests.conftest import MODELS


@pytest.fixture(scope="module")
def g2p() -> tuple[Any, list[str], list[str]]:
    """A model from words to pronunciations, with words and their pronunciations."""
    folder = MODELS / "bart-g2p-us"
    if not folder.exists():
        pytest.skip(f"bart-g2p-us is not at {folder}; set LLMCACHE_MODELS to the folder that holds it")
    lines = (folder / "gold_500.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    model = BartForConditionalGeneration.from_pretrained(folder)
    return model.train(False), [a for a, _ in pairs], [b for _, b in pairs]


def pronounced(model: Any, words: list[str]) -> list[str]:
    """Return greedy pronunciations, computed for 250 words at a time."""
    letters, phonemes = model.config.grapheme_chars, model.config.phoneme_chars
    found = []
    for start in range(0, len(words), 250):
        rows = [[1, *(letters.index(one) for one in word if one in letters), 2] for word in words[start : start + 250]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=30, do_sample=False, num_beams=1
            )
        found += ["".join(phonemes[i] for i in row.tolist() if i > 3) for row in written]
    return found


def test_pronunciations_of_a_real_model_are_the_same_cold_warm_and_reloaded(g2p: Any, store: Path) -> None:
    model, words, gold = g2p
    plain = pronounced(model, words)
    exact = sum(a == b for a, b in zip(plain, gold, strict=True))
    assert exact == 356, "71.2 % of 500"
    with LLMCache.open(store, model) as cache, cache.attached() as attachment:
        assert pronounced(model, words) == plain
        assert pronounced(model, words[:100]) == plain[:100]
        assert (attachment.entered == 1).all(), "the encoder's only layer is skipped for every word"
    with LLMCache.open(store, model) as cache, cache.attached() as attachment:
        assert pronounced(model, words[100:]) == plain[100:]
        assert (attachment.entered == 1).all()
        assert cache.stats().counters.model_seconds < 1


def test_a_t5_writes_the_same_from_stored_encoder_states(store: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    model = T5ForConditionalGeneration(config).train(False)
    model.generation_config.decoder_start_token_id = 0
    ids = torch.randint(2, 100, (6, 11))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        plain = model.generate(input_ids=ids, **arguments)
        beams = model.generate(input_ids=ids, num_beams=3, **arguments)
        with LLMCache.open(store, model) as cache, cache.attached() as attachment:
            cold = model.generate(input_ids=ids, **arguments)
            warm = model.generate(input_ids=ids, **arguments)
            assert (attachment.entered == 3).all()
            warm_beams = model.generate(input_ids=ids, num_beams=3, **arguments)
    assert torch.equal(cold, plain)
    assert torch.equal(warm, plain)
    assert torch.equal(warm_beams, beams)


def test_teacher_forcing_goes_through_the_stored_encoder_states(store: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    model = T5ForConditionalGeneration(config).train(False)
    ids, targets = torch.randint(2, 100, (4, 9)), torch.randint(2, 100, (4, 5))
    with torch.inference_mode():
        plain = model(input_ids=ids, decoder_input_ids=targets).logits
        with LLMCache.open(store, model) as cache, cache.attached():
            cold = model(input_ids=ids, decoder_input_ids=targets).logits
            warm = model(input_ids=ids, decoder_input_ids=targets).logits
    torch.testing.assert_close(cold, plain)
    assert torch.equal(warm, cold)

"""Tests of `llmcache verify-model`: cold and warm runs agree, and a difference is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache.cache import LLMCache
from llmcache.errors import ConfigError
from llmcache.verification import verify_model
from tests.conftest import MODELS, Command

TEXTS = ["How do I locate my card?", "I have not received it", "", "a " * 300, "How do I locate my card?"]


def test_every_tier_of_a_sentence_transformer_is_within_what_rebatching_shows(
    model: SentenceTransformer, store: Path
) -> None:
    checks = list(verify_model(model, model.tokenizer, TEXTS, store))
    assert [result.tier for result in checks] == [
        "model",
        "output",
        "output",
        "output",
        *(f"layer-{i}" for i in range(6)),
    ]
    assert all(one.passed for one in checks)
    cold, warm, reloaded = checks[1:4]
    assert (warm.reused, reloaded.reused) == (len(TEXTS), len(TEXTS))
    assert (warm.same, reloaded.same, cold.same) == (True, True, None)
    assert all(one.reused == 4 for one in checks[4:]), "each distinct text once"


def test_a_tier_that_gives_something_else_is_found(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = LLMCache.encode
    calls = 0

    def wrong_when_warm(self: LLMCache, *args: Any, **others: Any) -> Any:
        nonlocal calls
        calls += 1
        vectors = encode(self, *args, **others)
        return vectors if calls == 1 else np.nextafter(vectors, np.float32(2))

    monkeypatch.setattr(LLMCache, "encode", wrong_when_warm)
    checks = list(verify_model(model, model.tokenizer, TEXTS, store, layers="output"))
    assert [one.passed for one in checks[:4]] == [True, True, False, False], "one bit is enough"


def test_a_decoder_is_compared_by_its_logits(store: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = MODELS / "stories260k-llama"
    if not folder.exists():
        pytest.skip(f"stories260k-llama is not at {folder}; set LLMCACHE_MODELS to the folder that holds it")
    decoder = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    checks = list(verify_model(decoder, tokenizer, ["Once upon a time", "Once upon a dog", "Tim"], store))
    assert [result.tier for result in checks] == ["model", "prefix", "prefix", "prefix"]
    assert all(one.passed for one in checks)
    assert checks[2].reused > 0


def test_nothing_to_compare_is_one_clear_error(model: SentenceTransformer, store: Path) -> None:
    with pytest.raises(ConfigError, match="no document"):
        list(verify_model(model, model.tokenizer, [], store))
    with pytest.raises(ConfigError, match="no tokenizer"):
        list(verify_model(torch.nn.Linear(1, 1), None, ["a"], store))


def test_the_command_prints_the_checks_and_ends_with_0(llmcache: Command, model_path: str, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("where is my card\nit has not come\n")
    done = llmcache("verify-model", "-m", model_path, "-d", data, "--layers", "2,5", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["passed"]
    assert [one["tier"] for one in found["checks"]] == ["model", "output", "output", "output", "layer-2", "layer-5"]


def test_a_layer_that_is_not_there_is_one_line(llmcache: Command, model_path: str, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("where is my card\n")
    done = llmcache("verify-model", "-m", model_path, "-d", data, "--layers", "9")
    assert done.code == 2
    assert done.err.strip().splitlines() == ["llmcache: there is no layer 9: the model has 6, numbered from 0 to 5"]
    done = llmcache("verify-model", "-m", model_path, "-d", data, "--layers", "all,2")
    assert done.code == 2
    assert "--layers" in done.err

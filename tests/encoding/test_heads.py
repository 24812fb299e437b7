"""Tests of `run_heads`: several heads on one trunk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.encoding.heads import shared_depths
from llmcache.errors import ConfigError
from llmcache.model.forward_patch import OwnHook
from llmcache.model.identity import identify

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "How do I locate my card?",
    "I still have not received my new card, I ordered over a week ago.",
    "Can I top up with a cheque?",
    "How do I locate my card?",
    "Why was my transfer declined, and when will the money be back in my account?",
]


def head(path: str, seed: int, labels: int, from_layer: int | None = None) -> Any:
    """Return a classifier on MiniLM whose layers differ from `from_layer` on."""
    torch.manual_seed(seed)
    made: Any = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    made.eval()
    if from_layer is not None:
        with torch.no_grad():
            for parameter in made.bert.encoder.layer[from_layer:].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return made


def alone(model: Any, tokenizer: Any, texts: list[str]) -> NDArray[np.float32]:
    """Return the outputs of the head alone, computed text by text."""
    with torch.inference_mode():
        outputs = [model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0] for text in texts]
    return torch.stack(outputs).numpy()


@pytest.fixture(scope="module")
def topic(model_path: str) -> Any:
    return head(model_path, 1, 4)


@pytest.fixture(scope="module")
def tone(model_path: str) -> Any:
    return head(model_path, 2, 7, from_layer=4)


def test_the_second_head_starts_where_it_differs_and_gives_what_it_gives_alone(
    model: SentenceTransformer, topic: Any, tone: Any, store: Path
) -> None:
    reached: list[int] = []
    hooks = [
        layer.attention.register_forward_pre_hook(OwnHook(layer.attention, lambda _, args, n=n: reached.append(n)))
        for n, layer in enumerate(tone.bert.encoder.layer)
    ]
    with LLMCache.open(store, model) as cache:
        results = list(cache.run_heads(TEXTS, {"topic": topic, "tone": tone}))
        assert set(reached) >= {4, 5}
        for name, module in (("topic", topic), ("tone", tone)):
            outputs = np.array([result[name].output for result in results])
            assert np.abs(outputs - alone(module, model.tokenizer, TEXTS)).max() < 1e-5
        assert [(by_head["topic"].tier, by_head["topic"].layer) for by_head in results] == [
            *[("miss", None)] * 3, ("exact", "output"), ("miss", None),
        ]  # fmt: skip
        assert [(by_head["tone"].tier, by_head["tone"].layer) for by_head in results] == [
            *[("exact", "layer-3")] * 3, ("exact", "layer-3"), ("exact", "layer-3"),
        ]  # fmt: skip
        again = list(cache.run_heads(TEXTS, {"topic": topic, "tone": tone}))
        for name in ("topic", "tone"):
            assert {(by_head[name].tier, by_head[name].layer) for by_head in again} == {("exact", "output")}
            np.testing.assert_array_equal(
                [by_head[name].output for by_head in again], [by_head[name].output for by_head in results]
            )
        cache.commit()
        banks = {bank.layer: bank.entries for bank in cache.stats().banks}
        assert banks["layer-3"] == 4
        assert sum(name.startswith("head-") for name in banks) == 2
    for hook in hooks:
        hook.remove()
    assert "forward" not in topic.bert.__dict__
    assert "forward" not in tone.bert.__dict__


def test_a_head_that_comes_in_a_later_run_starts_from_the_stored_layer(
    model: SentenceTransformer, model_path: str, topic: Any, tone: Any, store: Path
) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run_heads(TEXTS, {"topic": topic, "tone": tone}))
    later = head(model_path, 3, 2, from_layer=5)
    with LLMCache.open(store, model) as cache:
        results = list(cache.run_heads(TEXTS, {"later": later, "tone": tone}))
        assert {by_head["later"].layer for by_head in results} == {"layer-3"}
        outputs = np.array([by_head["later"].output for by_head in results])
        assert np.abs(outputs - alone(later, model.tokenizer, TEXTS)).max() < 1e-5


@pytest.mark.parametrize(("different_from", "depth"), [(0, -1), (1, 0), (5, 4), (None, 5)])
def test_the_shared_depth_is_found_from_the_weights(
    model_path: str, topic: Any, different_from: int | None, depth: int
) -> None:
    other = head(model_path, 5, 3, different_from)
    identities = {"one": identify(topic.bert), "other": identify(other.bert)}
    assert shared_depths(identities) == {("one", "other"): depth}


def test_heads_without_a_shared_layer_are_computed_whole_and_that_is_said(
    model: SentenceTransformer, model_path: str, topic: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = head(model_path, 6, 3, from_layer=0)
    with caplog.at_level(logging.WARNING), LLMCache.open(store, model) as cache:
        results = list(cache.run_heads(TEXTS[:2], {"topic": topic, "other": other}))
    assert "the head other shares no layer with another one" in caplog.text
    for name, module in (("topic", topic), ("other", other)):
        outputs = np.array([result[name].output for result in results])
        assert np.abs(outputs - alone(module, model.tokenizer, TEXTS[:2])).max() < 1e-5


def test_two_sentence_models_with_other_poolings_share_the_trunk(model: SentenceTransformer, store: Path) -> None:
    from sentence_transformers.sentence_transformer import modules

    pooled: Any = modules.Pooling(384, pooling_mode="cls")
    other = SentenceTransformer(modules=[model[0], pooled])
    with LLMCache.open(store, model) as cache:
        results = list(cache.run_heads(TEXTS, {"mean": model, "first": other}))
        assert {by_head["first"].layer for by_head in results} == {"layer-5"}
        for name, module in (("mean", model), ("first", other)):
            outputs = np.array([result[name].output for result in results])
            assert np.abs(outputs - module.encode(TEXTS)).max() < 1e-5


def test_no_head_and_a_head_that_gives_no_vector_are_refused(
    model: SentenceTransformer, model_path: str, store: Path
) -> None:
    tokens: Any = transformers.AutoModelForTokenClassification.from_pretrained(model_path)
    with LLMCache.open(store, model) as cache:
        with pytest.raises(ConfigError, match="no heads were given"):
            list(cache.run_heads(TEXTS, {}))
        with pytest.raises(ConfigError, match="a head gives logits"):
            list(cache.run_heads(TEXTS, {"tokens": tokens}))
    assert "forward" not in tokens.bert.__dict__


def test_a_head_of_another_vocabulary_is_refused(model: SentenceTransformer, topic: Any, store: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    small: Any = transformers.BertForSequenceClassification(config)
    small.eval()
    with LLMCache.open(store, model) as cache, pytest.raises(ConfigError, match="knows 50 tokens and was given number"):
        list(cache.run_heads(TEXTS, {"topic": topic, "small": small}))


def test_a_head_that_needs_its_layers_for_every_document_has_banks_at_all_of_them(
    model: SentenceTransformer, topic: Any, tone: Any, store: Path
) -> None:
    with LLMCache.open(store, model, config=CacheConfig(layers="all")) as cache:
        results = list(cache.run_heads(TEXTS, {"tone": tone, "topic": topic}))
        assert {by_head["topic"].layer for by_head in results} == {"layer-3"}
        cache.commit()
        assert {f"layer-{i}" for i in range(6)} <= {bank.layer for bank in cache.stats().banks}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_heads_on_a_decoder(kind: str, store: Path) -> None:
    from tests.layers.test_attachment import tokenizer

    def made(seed: int, labels: int) -> Any:
        torch.manual_seed(0)
        common: dict[str, Any] = {
            "vocab_size": 100,
            "pad_token_id": 0,
            "num_labels": labels,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        one: Any
        if kind == "gpt2":
            one = transformers.GPT2ForSequenceClassification(
                transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, **common)
            )
            blocks = one.transformer.h
        else:
            llama: Any = transformers.LlamaForSequenceClassification
            one = llama(
                transformers.LlamaConfig(
                    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, **common
                )
            )
            blocks = one.model.layers
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in [*blocks[3].parameters(), *one.score.parameters()]:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return one.eval()

    one, other, words = made(1, 2), made(2, 5), tokenizer()
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w2"]
    with LLMCache.open(store, one, tokenizer=words) as cache:
        results = list(cache.run_heads(texts, {"a": one, "b": other}))
        assert {result["b"].layer for result in results} == {"layer-2"}
        for name, head_ in (("a", one), ("b", other)):
            outputs = np.array([result[name].output for result in results])
            with torch.inference_mode():
                expected = [
                    head_(**{k: v for k, v in words(text, return_tensors="pt").items() if k != "token_type_ids"}).logits
                    for text in texts
                ]
            assert np.abs(outputs - torch.cat(expected).numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", ["list", "text", "name of a folder", "nothing"])
def test_heads_that_are_not_models_by_name_are_refused(
    store: Path, model: SentenceTransformer, topic: Any, kind: str
) -> None:
    given: Any = {"list": [topic], "text": "topic", "name of a folder": {"topic": "folder"}, "nothing": None}[kind]
    with LLMCache.open(store, model) as cache, pytest.raises(ConfigError, match="heads are models by name"):
        list(cache.run_heads(TEXTS, given))

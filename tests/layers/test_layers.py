"""`encode` and `run` with layer banks of the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.model.forward_patch import OwnHook

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "How do I locate my card?",
    "I still have not received my new card, I ordered over a week ago.",
    "Can I top up with a cheque?",
    "",
    "\u6f22\u5b57 and \U0001f600",
]


def rebatching(model: SentenceTransformer, texts: list[str]) -> float:
    """Return the largest difference between the model's own vectors at several batch sizes."""
    base = model.encode(texts)
    return max(1e-6, *(float(np.abs(model.encode(texts, batch_size=size) - base).max()) for size in (1, 3)))


@pytest.mark.parametrize("layers", ["all", (2,), (0, 4)])
def test_encode_with_layer_banks_is_the_models_encode(model: SentenceTransformer, store: Path, layers: Any) -> None:
    expected, allowed = model.encode(TEXTS), 2 * rebatching(model, TEXTS)
    with LLMCache.open(store, model, config=CacheConfig(layers=layers)) as cache:
        cold = cache.encode(TEXTS)
        assert np.abs(cold - expected).max() <= allowed
        np.testing.assert_array_equal(cache.encode(TEXTS).view(np.uint32), cold.view(np.uint32))
        numbers = range(6) if layers == "all" else layers
        banks = {bank.layer: bank.entries for bank in _committed(cache).banks}
        assert banks == {"output": 5, **{f"layer-{layer}": 5 for layer in numbers}}
    with LLMCache.open(store, model) as cache:
        np.testing.assert_array_equal(cache.encode(TEXTS).view(np.uint32), cold.view(np.uint32))
        assert cache.stats().counters.misses == 0
    assert "forward" not in vars(model.transformers_model)


def _committed(cache: LLMCache) -> Any:
    cache.commit()
    return cache.stats()


def test_documents_whose_layer_alone_is_known_enter_there_and_say_so(model: SentenceTransformer, store: Path) -> None:
    expected, allowed = model.encode(TEXTS), 2 * rebatching(model, TEXTS)
    ids = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    with LLMCache.open(store, model, config=CacheConfig(layers=(2, 4))) as cache:
        with cache.attached():  # stores three texts in the layer banks, none in the output bank
            model.encode(TEXTS[:3])
        results = list(cache.run(ids))
        assert [one.tier for one in results] == ["exact"] * 3 + ["miss"] * 2
        assert [one.layer for one in results] == ["layer-4"] * 3 + [None] * 2
        assert all(len(one.source or "") == 32 for one in results[:3])
        assert np.abs(np.array([one.output for one in results]) - expected).max() <= allowed
        again = list(cache.run(ids))
        assert [(one.tier, one.layer, one.source) for one in again] == [("exact", "output", f"d{i}") for i in range(5)]
        counters = cache.stats().counters
        four, two = counters.layers["layer-4"], counters.layers["layer-2"]
        assert (four.asked, four.hits) == (3 + 5, 3)
        assert (two.asked, two.hits) == (3 + 2, 0)
        assert four.saved_seconds > 0
        assert four.load_seconds > 0
        assert counters.misses == 2
        flat = counters.as_dict()
        assert flat["layer-4.hits"] == 3
    with LLMCache.open(store, model) as cache:
        assert cache.stats().lifetime["layer-4.hits"] == 3


def test_layers_below_what_is_known_are_not_computed(model: SentenceTransformer, store: Path) -> None:
    trunk: Any = model.transformers_model
    reached: list[int] = []
    with LLMCache.open(store, model, config=CacheConfig(layers=(2,))) as cache:
        with cache.attached():
            model.encode(TEXTS)
        hooks = [
            layer.attention.register_forward_pre_hook(
                OwnHook(layer.attention, lambda _, args, number=number: reached.append(number))
            )
            for number, layer in enumerate(trunk.encoder.layer)
        ]
        cache.encode(TEXTS)
        for one in hooks:
            one.remove()
    assert reached == [3, 4, 5]


def test_layers_that_are_not_there_are_refused(model: SentenceTransformer, store: Path) -> None:
    with pytest.raises(ConfigError, match="no layer 6: the model has 6, numbered from 0 to 5"):
        LLMCache.open(store, model, config=CacheConfig(layers=(2, 6))).encode(TEXTS)
    for wrong in ("some", (-1,), (1.5,), [1, 2], (True,)):
        with pytest.raises(ConfigError, match="numbers of layers"):
            CacheConfig(layers=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="numbers of layers"):
        CacheConfig(layers=())


# -- the paper's rule ---------------------------------------------------------------------------------------

KNOWN = ["How do I locate my card?", "What is the exchange rate today?"]
NEAR = ["How do I locate my card", "What is the exchange rate of today?"]


def test_the_layer_rule_gives_the_neighbours_answer(model: SentenceTransformer, store: Path) -> None:
    config = CacheConfig(layers=(1, 3), reuse="layer", tau=0.8)
    with LLMCache.open(store, model, config=config) as cache:
        known = cache.encode(KNOWN)
        results = list(cache.run(NEAR))
        assert [(one.tier, one.layer) for one in results] == [("near", "layer-3")] * 2
        assert all(one.similarity is not None and 0.8 <= one.similarity < 1 for one in results)
        assert np.abs(np.array([one.output for one in results]) - known).max() < 1e-5
        counters = cache.stats().counters
        assert (counters.near, counters.layers["layer-3"].near, counters.misses) == (2, 2, 2)
        assert "layer-1" not in counters.layers or counters.layers["layer-1"].near == 0
        # an answer of a neighbour is not stored as an entry
        assert [one.tier for one in cache.run(NEAR)] == ["near"] * 2
        assert len(cache) == 2


def test_the_deepest_layer_whose_own_tau_is_reached_wins(model: SentenceTransformer, store: Path) -> None:
    config = CacheConfig(layers=(1, 3, 5), reuse="layer", layer_tau={5: 0.9999, 3: 0.95, 1: 0.5})
    with LLMCache.open(store, model, config=config) as cache:
        known = cache.encode(KNOWN)
        assert cache.stats().counters.near == 0
        results = list(cache.run([NEAR[0], "Where is my card, and how do I locate it?", "Bananas grow in bunches"]))
        similarity = [one.similarity or 0 for one in results]
        layers = [one.layer for one in results]
        assert layers == ["layer-3", "layer-1", None]
        assert similarity[0] >= 0.95 > similarity[1] >= 0.5
        found = np.array([one.output for one in results[:2]])
        assert np.abs(found - known[0]).max() < 1e-5


def test_states_of_token_ids_whose_role_and_prompt_nobody_knows_answer_no_near_match(
    model: SentenceTransformer, store: Path
) -> None:
    config = CacheConfig(layers=(3,), reuse="layer", layer_tau={3: 0.8})
    with LLMCache.open(store, model, config=config) as cache:
        with cache.attached():
            model.encode(KNOWN)
        results = list(cache.run(NEAR))
        assert [one.tier for one in results] == ["miss", "miss"]
        assert [(one.tier, one.layer) for one in cache.run(KNOWN)] == [("exact", "layer-3")] * 2
        assert [(one.tier, one.layer) for one in cache.run([NEAR[0] + " please"])] == [("near", "layer-3")]


def test_near_outputs_are_given_as_before_when_the_rule_is_the_deepest(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model, config=CacheConfig(layers=(3,), tau=0.8)) as cache:
        known = cache.encode(KNOWN)
        results = list(cache.run(NEAR))
        assert [(one.tier, one.layer) for one in results] == [("near", "output")] * 2
        np.testing.assert_array_equal(np.array([one.output for one in results]), known)


def test_weights_changed_after_opening_do_not_answer_from_old_layers(
    fresh_model: SentenceTransformer, store: Path
) -> None:
    with LLMCache.open(store, fresh_model, config=CacheConfig(layers=(2,))) as cache:
        cache.encode(TEXTS[:2])
        with torch.no_grad():
            for parameter in fresh_model.parameters():
                parameter.mul_(1.01)
        expected = fresh_model.encode(TEXTS)
        with cache.attached() as attachment:
            found = fresh_model.encode(TEXTS)
        assert not attachment.entered.any()
        assert np.abs(found - expected).max() < 1e-5

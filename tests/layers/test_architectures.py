"""Layer banks for many architectures, compared with the model without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.model.architecture import find_trunk
from tests.architectures import MODELS, Plain, alone, difference, model, rows, states, tolerance, vit

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = pytest.mark.parametrize("name", list(MODELS))


def entered(cache: LLMCache) -> list[int]:
    return cache.attached().entered.tolist()


def bits(states: Tensor, mask: Tensor) -> Any:
    """Return the bytes of the states at visible positions."""
    return states[mask.bool()].contiguous().view(torch.uint8).numpy()


@EVERY
def test_cold_is_the_model_and_warm_is_what_was_stored_bit_for_bit(name: str, store: Path) -> None:
    one, (ids, mask) = model(name), rows(9, 5, 3, 9, 1)
    expected = states(one, ids, mask)
    with LLMCache.open(store, one, config=CacheConfig(layers="all")) as cache, cache.attached():
        cold = states(one, ids, mask)
        assert entered(cache) == [0] * 5
        warm = states(one, ids, mask)
        assert entered(cache) == [4] * 5
    np.testing.assert_array_equal(bits(cold, mask), bits(expected, mask))
    np.testing.assert_array_equal(bits(warm, mask), bits(cold, mask))
    assert difference(cold, alone(one, ids, mask)) <= tolerance(one, ids, mask)


@EVERY
def test_rows_of_one_batch_enter_where_each_is_known(name: str, store: Path) -> None:
    one, (ids, mask) = model(name), rows(9, 5, 7, 3, 9, seed=1)
    expected, allowed = alone(one, ids, mask), tolerance(one, ids, mask)
    with LLMCache.open(store, one, config=CacheConfig(layers=(1,))) as cache, cache.attached():
        states(one, ids[1:3], mask[1:3])
        middle = states(one, ids[1:3], mask[1:3])
        assert entered(cache) == [2, 2]  # both rows from the bank of a middle layer
        assert difference(middle, expected[1:3]) <= allowed
    again = model(name)
    with LLMCache.open(store, again, config=CacheConfig(layers=(1, 3))) as cache, cache.attached():
        states(again, ids[:1], mask[:1])
        order = [0, 1, 3, 2, 4, 0, 3]
        mixed = states(again, ids[order], mask[order])
        assert entered(cache) == [4, 2, 0, 2, 0, 4, 0]
        assert difference(mixed, [expected[i] for i in order]) <= allowed
        assert mixed.isfinite().all()  # hidden positions are undefined, but finite
        shorter = states(again, ids[[3, 1], :5], mask[[3, 1], :5])
        assert entered(cache) == [4, 4]
        np.testing.assert_array_equal(bits(shorter, mask[[3, 1], :5]), bits(mixed[[2, 1], :5], mask[[3, 1], :5]))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_without_loss(name: str, dtype: torch.dtype, store: Path) -> None:
    one, (ids, mask) = model(name).to(dtype), rows(9, 5, 3, seed=2)
    expected = states(one, ids, mask)
    with LLMCache.open(store, one, config=CacheConfig(layers=(1, 3))) as cache, cache.attached():
        cold, warm = states(one, ids, mask), states(one, ids, mask)
        assert entered(cache) == [4] * 3
    assert warm.dtype == expected.dtype
    np.testing.assert_array_equal(bits(cold, mask), bits(expected, mask))
    np.testing.assert_array_equal(bits(warm, mask), bits(cold, mask))


@EVERY
def test_eager_and_sdpa_attention_share_nothing(name: str, store: Path) -> None:
    one, (ids, mask) = model(name), rows(6, 4, seed=3)
    if not hasattr(one, "set_attn_implementation"):
        pytest.skip("it has one way to compute attention")
    other = model(name)
    other.set_attn_implementation("eager")
    with LLMCache.open(store, one, config=CacheConfig(layers=(1, 3))) as cache, cache.attached():
        first = one.config._attn_implementation
        states(one, ids, mask)
        one.set_attn_implementation("eager")
        expected = alone(other, ids, mask)
        eager = states(one, ids, mask)
        assert entered(cache) == ([4, 4] if first == "eager" else [0, 0])
        assert difference(eager, expected) <= tolerance(one, ids, mask)


def test_images_are_rows_as_well(store: Path) -> None:
    one, images = vit(), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = one(pixel_values=images)
        with LLMCache.open(store, one, config=CacheConfig(layers="all")) as cache, cache.attached():
            one(pixel_values=images[:2])
            mixed = one(pixel_values=images)
            assert entered(cache) == [4, 4, 0]
    torch.testing.assert_close(mixed.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(mixed.pooler_output, expected.pooler_output)


def test_xlnet_is_refused_because_its_states_are_not_rows_first(store: Path) -> None:
    one: Any = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64)
    )
    with (
        LLMCache.open(store, one.eval()) as cache,
        pytest.raises(ConfigError, match=r"\[7, 2, 32\] for 2 rows, not \[rows, tokens, width\]"),
        cache.attached(),
    ):
        pass
    assert "forward" not in one.__dict__
    assert all("forward" not in block.__dict__ for block in one.layer)


# -- finding the layers -------------------------------------------------------------------------------------


class Named(nn.Module):
    """A model whose layers are not in the list of modules with most parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.embedding(input_ids)
        for step in self.steps:
            states = step(states)
        return states


class UNet(Named):
    """A model whose later layers also read outputs of earlier layers."""

    def forward(self, input_ids: Tensor) -> Tensor:
        states = [self.embedding(input_ids)]
        for step in self.steps:
            states.append(step(states[-1]) + states[0])
        found: Tensor = step(states[1] + states[3])
        return found


def test_the_list_of_layers_can_be_named(store: Path) -> None:
    one, (ids, _) = Named().eval(), rows(4, 4)
    config = CacheConfig(layers="all")
    with LLMCache.open(store, one, config=config) as cache:
        with pytest.raises(ConfigError, match=r"does not run the layers .* stack="), cache.attached():
            pass
        with torch.no_grad():
            expected = one(ids)
            with cache.attached(stack="steps") as attachment:
                cold, warm = one(ids), one(ids)
        assert attachment.entered.tolist() == [3, 3]
    torch.testing.assert_close(cold, expected, rtol=0, atol=0)
    torch.testing.assert_close(warm, expected, rtol=0, atol=0)


@pytest.mark.parametrize("stack", ["nowhere", "embedding", "steps.0", ""])
def test_a_wrong_name_of_the_layers_is_answered_with_those_there_are(stack: str) -> None:
    with pytest.raises(ConfigError, match=r"'steps' \(3 x Linear\), 'experts' \(3 x Linear\).*stack="):
        find_trunk(Named(), stack)


def test_a_stack_inside_a_transformers_model_can_be_named_from_outside(store: Path) -> None:
    one: Any = transformers.BertForSequenceClassification(model("bert").config)
    found, named = find_trunk(one), find_trunk(one, "bert.encoder.layer")
    assert (found.module, found.name, found.stack) == (one.bert, "bert", "bert.encoder.layer")
    assert named == found


def test_a_model_without_layers_says_what_it_has() -> None:
    single = nn.Sequential()
    single.add_module("embedding", nn.Embedding(9, 4))
    single.add_module("out", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"no list of layers; .*embedding, out"):
        find_trunk(single)
    with pytest.raises(ConfigError, match="no list of layers"):
        find_trunk(nn.Linear(2, 2))


def test_a_model_whose_later_layers_see_more_than_the_state_is_refused(store: Path) -> None:
    torch.manual_seed(0)
    one = UNet().eval()
    with (
        LLMCache.open(store, one, config=CacheConfig(layers="all")) as cache,
        pytest.raises(ConfigError, match=r"more than the state of its layer \d \(of 4\)"),
        cache.attached(stack="steps"),
    ):
        pass


class Mean(Plain):
    """A model whose vector depends on hidden tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask).mean(dim=1)


def test_a_model_that_reads_what_the_mask_hides_is_refused(store: Path) -> None:
    one = Mean().eval()
    with (
        LLMCache.open(store, one) as cache,
        pytest.raises(ConfigError, match="depends on tokens that its attention_mask hides"),
        cache.attached(),
    ):
        pass


class Scores(Plain):
    """A model with one number per token, [rows, tokens]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask).sum(dim=2)


def test_an_output_of_one_number_per_token_is_put_together_by_tokens(store: Path) -> None:
    torch.manual_seed(0)
    one, (ids, mask) = Scores().eval(), rows(9, 4, 6)
    expected = states(one, ids, mask)
    with LLMCache.open(store, one) as cache, cache.attached():
        states(one, ids[1:2], mask[1:2])
        mixed, short = states(one, ids, mask), states(one, ids[1:], mask[1:])
    assert short.shape == (2, 9)
    torch.testing.assert_close(mixed * mask, expected * mask)
    torch.testing.assert_close(short * mask[1:], expected[1:] * mask[1:])


def test_modules_that_differ_only_in_settings_share_nothing(store: Path) -> None:
    torch.manual_seed(0)
    four = Plain(heads=4).eval()
    eight = Plain(heads=8).eval()
    first = Plain(heads=4, norm_first=True).eval()
    for other in (eight, first):
        other.load_state_dict(four.state_dict())
    ids, mask = rows(5, 3)
    with LLMCache.open(store, four) as cache:
        with cache.attached():
            states(four, ids, mask)
        for other in (eight, first):
            expected = alone(other, ids, mask)
            with cache.attached(other) as attachment:
                found = states(other, ids, mask)
            assert attachment.entered.tolist() == [0, 0]
            assert difference(found, expected) < 1e-5

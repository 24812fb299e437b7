"""Trials of models: lengths at which results change, no traces in the model, errors as reasons of a refusal."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.model.restoring import WritesToWeights, preserved, without_trace
from llmcache.model.trial import length_marks, reach_of_positions, unlike
from tests.architectures import model, rows

t: Any = transformers
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# -- no trace -----------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """A module whose forward changes one thing in itself or in the process."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change, self.mode, self.calls, self.seen = change, "sparse", 0, ["none"]
        self.table: dict[str, Any] = {"inner": {"tokens": 0}}
        self.plain = torch.zeros(2)
        self.inner = nn.Linear(2, 2)
        self.register_buffer("counts", torch.zeros(3))
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.config = t.BertConfig(**_SIZES)

    def forward(self, fails: bool = False) -> None:
        changes: dict[str, Callable[[], Any]] = {
            "attribute": lambda: setattr(self, "mode", "full"),
            "new attribute": lambda: setattr(self, "fresh", 1),
            "deleted attribute": lambda: delattr(self, "calls"),
            "list": lambda: self.seen.append("one"),
            "nested dictionary": lambda: self.table["inner"].update(tokens=7),
            "tensor attribute": lambda: self.plain.add_(1),
            "buffer in place": lambda: self.get_buffer("counts").add_(1),
            "buffer replaced": lambda: self.register_buffer("frequencies", torch.zeros(5), persistent=False),
            "buffer of a child": lambda: self.inner.register_buffer("late", torch.zeros(1)),
            "child": lambda: setattr(self, "inner", nn.Identity()),
            "training": lambda: self.train(),
            "configuration": lambda: setattr(self.config, "hidden_act", "relu"),
            "configuration in depth": lambda: self.config.id2label.update({0: "other"}),
            "torch's seed": lambda: torch.rand(3),
            "numpy's seed": lambda: np.random.seed(5),  # noqa: NPY002
            "Python's seed": lambda: random.random(),
        }
        changes[self.change]()
        if fails:
            raise RuntimeError("after the change")


CHANGES = (
    "attribute", "new attribute", "deleted attribute", "list", "nested dictionary", "tensor attribute",
    "buffer in place", "buffer replaced", "buffer of a child", "child", "training", "configuration",
    "configuration in depth", "torch's seed", "numpy's seed", "Python's seed",
)  # fmt: skip


def snapshot(module: Restless) -> dict[str, Any]:
    """Return everything that a forward may change, by value and where needed by identity."""
    simple = {key: copy.deepcopy(value) for key, value in vars(module).items() if not key.startswith("_")}
    simple.pop("config")
    buffers = {name: (id(one), one.clone().tolist(), one._version) for name, one in module.named_buffers()}
    return {
        "attributes": {key: value.tolist() if isinstance(value, Tensor) else value for key, value in simple.items()},
        "identities": {key: id(value) for key, value in vars(module).items()},
        "buffers": buffers,
        "children": [id(one) for one in module.modules()],
        "modes": [one.training for one in module.modules()],
        "config": module.config.to_dict(),
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),  # noqa: NPY002
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_forward_changes_is_put_back(change: str, fails: bool) -> None:
    module = Restless(change).eval()
    module(False)  # check that the forward changes the module, also the second time
    module = Restless(change).eval()
    before = snapshot(module)
    error = pytest.raises(RuntimeError, match="after the change") if fails else nullcontext()
    with error, preserved(module, CPU):
        module(fails)
    assert snapshot(module) == before


def test_a_forward_that_writes_to_weights_is_run_again_and_refused_if_it_always_does() -> None:
    once = [True]

    def writing(always: bool) -> Callable[[], str]:
        def trial() -> str:
            if always or once.pop():
                module.weight.div_(2)
            once.append(False)
            return "done"

        return trial

    module = nn.Linear(2, 2)
    assert without_trace(module, CPU, writing(False)) == "done"
    with pytest.raises(WritesToWeights, match="its own weights"):
        without_trace(module, CPU, writing(True))


BIG_BIRD = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "rope_theta": 1e4,
    "original_max_position_embeddings": 20,
}  # fmt: skip
CHANGING: dict[str, Callable[[], Any]] = {
    "block-sparse": lambda: t.BigBirdModel(t.BigBirdConfig(**_SIZES, **BIG_BIRD)),
    "long factors": lambda: t.Phi3Model(
        t.Phi3Config(**_SIZES, original_max_position_embeddings=20, rope_parameters=LONG)
    ),
    "dynamic": lambda: t.LlamaModel(
        t.LlamaConfig(
            **{**_SIZES, "max_position_embeddings": 20},
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        )
    ),
    "windows": lambda: t.MistralModel(t.MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=8)),
    "local and global": lambda: t.ModernBertModel(
        t.ModernBertConfig(**_SIZES, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
    "chunks": lambda: t.Gemma3TextModel(
        t.Gemma3TextConfig(**_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=7)
    ),
}


def seeded(name: str) -> Any:
    torch.manual_seed(0)
    made = CHANGING[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize("layers", ["output", "all"])
@pytest.mark.parametrize("name", list(CHANGING))
def test_rows_on_both_sides_of_a_length_where_a_model_changes_are_the_models_own(
    name: str, layers: Any, store: Path
) -> None:
    one, twin = seeded(name), seeded(name)  # the twin gets the same calls, since some models change for good
    ids, _ = rows(100, seed=3)
    with LLMCache.open(store, one, config=CacheConfig(layers=layers)) as cache, cache.attached(), torch.no_grad():
        assert simple_attributes(one) == simple_attributes(twin)
        for length in (100, 48, 30, 21, 20, 19, 9, 8, 7, 5, 7, 8, 9, 19, 20, 21, 30, 48):
            mask = torch.ones((2, length), dtype=torch.long)
            mask[1, length // 2 :] = 0
            for some, visible in ((ids[:, :length], mask[:1]), (ids[:, :length].repeat(2, 1), mask)):
                expected = twin(input_ids=some, attention_mask=visible).last_hidden_state[visible.bool()]
                found = one(input_ids=some, attention_mask=visible).last_hidden_state[visible.bool()]
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def simple_attributes(module: nn.Module) -> list[dict[str, Any]]:
    """Return numbers, flags and names among the attributes of modules."""
    return [
        {key: value for key, value in vars(one).items() if isinstance(value, (str, int, float))}
        for one in module.modules()
    ]


# -- what is found ------------------------------------------------------------------------------------------


def test_lengths_are_named_by_numbers_anywhere_in_a_configuration() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {
                "hidden_size": 32, "attention_window": [16, 16], "text": {"local_attention": 128, "rope_theta": 1e4},
                "block_size": 4, "use_window": True, "sliding_window": None, "num_chunks": 1,
                "rope": {"full": {"original_max_position_embeddings": 4096}}, "chunk_length": 1 << 20,
            }  # fmt: skip

    marks = length_marks(Config())
    assert [(mark.name, mark.number) for mark in marks] == [
        ("block_size", 4), ("attention_window", 16), ("text.local_attention", 128),
        ("rope.full.original_max_position_embeddings", 4096),
    ]  # fmt: skip
    assert all(mark.tokens > mark.number for mark in marks)
    assert marks[0].tokens > 10 * 4, "beyond many blocks: how many there are may decide how they are computed"
    assert length_marks(None) == []


@pytest.mark.parametrize(
    ("name", "tokens"), [("long factors", 19), ("dynamic", 19), ("windows", None), ("block-sparse", None)]
)
def test_rotary_positions_that_depend_on_the_length_end_a_reach(name: str, tokens: int | None) -> None:
    assert reach_of_positions(CHANGING[name]().config).tokens == tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_difference_and_a_wrong_row_is_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn((4, 9, 32), generator=generator, dtype=torch.float64)
    rounded = exact.to(dtype)
    nudged = (exact * (1 + torch.finfo(dtype).eps * torch.randn(exact.shape, generator=generator))).to(dtype)
    assert unlike(nudged, rounded) is None
    wrong = rounded.clone()
    wrong[2, 3:5] = 0
    assert "apart" in str(unlike(wrong, rounded))
    assert "not" in str(unlike(rounded[:, :8], rounded))
    assert "not" in str(unlike(rounded.double() if dtype != torch.float64 else rounded.float(), rounded))
    hidden = rounded.clone()
    hidden[0, 0, 0] = torch.nan
    assert unlike(hidden, hidden.clone()) is None
    assert "not finite" in str(unlike(hidden, rounded))


class Odd(nn.Module):
    """Layers that compute differently beyond seven tokens."""

    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.oddity = oddity
        self.embedding = nn.Embedding(100, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states: Tensor = self.embedding(input_ids)
        columns = input_ids.shape[1]
        if self.oddity == "fails":
            raise RuntimeError("no such kernel")
        if self.oddity == "batch" and len(input_ids) > 2:
            states = states + states.mean(0, keepdim=True)
        if self.oddity == "width":
            states = states * columns
        if self.oddity == "length" and columns > 16:
            states = states * 2 + states.mean(1, keepdim=True)
        if self.oddity == "hidden":
            states = states + states.mean(1, keepdim=True)
        if self.oddity == "mask" and attention_mask is None:
            states = states * 2
        if self.oddity == "pads":
            states = nn.functional.pad(states, (0, 0, 0, -columns % 8))
        for layer in self.layers:
            states = layer(states)
        return states[:, :columns]


@pytest.mark.parametrize("oddity", ["fails", "batch", "width", "length", "hidden", "mask", "pads"])
@pytest.mark.parametrize("layers", ["output", "all", (0,)])
def test_what_cannot_be_proved_is_refused_with_a_reason_and_leaves_the_model_alone(
    oddity: str, layers: Any, store: Path
) -> None:
    torch.manual_seed(0)
    one = Odd(oddity).eval()
    own = dict(vars(one))
    refused = pytest.raises(ConfigError, match="Odd cannot be cached by layers: ")
    with LLMCache.open(store, one, config=CacheConfig(layers=layers)) as cache, refused, cache.attached():
        pass
    assert vars(one) == own


def test_an_ordinary_module_of_the_same_make_is_served(store: Path) -> None:
    one, (ids, mask) = Odd("none").eval(), rows(40, 9, seed=5)
    with LLMCache.open(store, one) as cache, cache.attached() as attachment, torch.no_grad():
        expected = one(ids, mask).clone()
        found = one(ids, mask)
        assert attachment.entered.tolist() == [3, 3]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=0)


@pytest.mark.parametrize("layers", ["output", "all"])
def test_a_trial_that_fails_later_is_a_reason_and_no_error_in_a_forward(
    layers: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, (ids, mask) = Odd("none").eval(), rows(6, 4)
    with LLMCache.open(store, one, config=CacheConfig(layers=layers)) as cache, cache.attached(), torch.no_grad():
        one(ids, mask)
        one.oddity = "mask"
        one.get_submodule("layers.0").get_parameter("weight").add_(0.1)
        expected = Odd("mask").eval()
        expected.load_state_dict(one.state_dict())
        found = one(ids, mask)
        torch.testing.assert_close(found, expected(ids, mask))
    assert any("past the cache: Odd cannot be cached" in record.getMessage() for record in caplog.records)


def test_float64_is_refused_unless_rounding_is_asked_for(store: Path, tmp_path: Path) -> None:
    one, (ids, mask) = model("bert").double(), rows(6, 4)
    with LLMCache.open(store, one) as cache, pytest.raises(ConfigError, match=r"float64.*float32"), cache.attached():
        pass
    with LLMCache.open(tmp_path / "rounded", one, config=CacheConfig(dtype="float32")) as cache, torch.no_grad():
        expected = one(input_ids=ids, attention_mask=mask).last_hidden_state
        with cache.attached():
            for _ in range(2):
                found = one(input_ids=ids, attention_mask=mask).last_hidden_state
        assert found.dtype == torch.float64
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)

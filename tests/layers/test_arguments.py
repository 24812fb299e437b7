"""Arguments of an attached model's calls: False, 0, empty and tensor values have the same effect as without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmcache import CacheConfig, LLMCache
from tests.architectures import rows

t: Any = transformers
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
MAKERS: dict[str, Any] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_GROUPED, sliding_window=8)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=2)),
    "bert": lambda: t.BertForTokenClassification(t.BertConfig(**_SIZES, num_labels=3)),
    "modernbert": lambda: t.ModernBertForMaskedLM(
        t.ModernBertConfig(**_SIZES, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
}
DECODERS = {"llama", "gpt2", "mistral", "mixtral"}
LENGTHS = (11, 11, 6)


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def padded_left(mask: Tensor) -> Tensor:
    return mask.flip(1)


def arguments(name: str) -> dict[str, dict[str, Any]]:
    """Return arguments besides ids and mask, by their name in a test id."""
    ids, mask = rows(*LENGTHS)
    causal = torch.full((3, 1, 11, 11), torch.finfo(torch.float32).min).triu(1)
    offered: dict[str, dict[str, Any]] = {
        "return_dict=False": {"return_dict": False},
        "output_hidden_states=True": {"output_hidden_states": True},
        "output_hidden_states=False": {"output_hidden_states": False},
        "position_ids [1, n]": {"position_ids": torch.arange(11)[None]},
        "position_ids shifted": {"position_ids": torch.arange(3, 14)[None].expand(3, -1)},
        "labels": {"labels": ids},
        "labels of what is visible": {"labels": torch.where(mask.bool(), ids, -100)},
        "padding on the left": {"attention_mask": padded_left(mask)},
        "labels under padding on the left": {
            "attention_mask": padded_left(mask), "labels": torch.where(padded_left(mask).bool(), ids, -100),
        },
        "a hole": {"attention_mask": torch.tensor([[1, 1, 0] + [1] * 8] * 3)},
        "a mask of floats": {"attention_mask": mask.float()},
        "a mask of flags": {"attention_mask": mask.bool()},
        "no mask": {"attention_mask": None},
    }  # fmt: skip
    if name == "bert":
        offered["labels"] = {"labels": ids % 3}
        offered["labels of what is visible"] = {"labels": torch.where(mask.bool(), ids % 3, -100)}
        del offered["labels under padding on the left"]
        offered["token_type_ids"] = {"token_type_ids": ids % 2}
        offered["a mask [rows, n, n]"] = {"attention_mask": mask[:, None].expand(-1, 11, -1)}
    if name in DECODERS:
        offered |= {
            "is_causal=False": {"is_causal": False},
            "is_causal=True": {"is_causal": True},
            "use_cache=False": {"use_cache": False},
            "use_cache=True": {"use_cache": True},
            "use_cache=0": {"use_cache": 0},
            "logits_to_keep=1": {"logits_to_keep": 1},
            "logits_to_keep=0": {"logits_to_keep": 0},
            "logits_to_keep of a tensor": {"logits_to_keep": torch.tensor([0, 3])},
            "an additive mask": {"attention_mask": causal},
            "an empty cache": {"past_key_values": t.DynamicCache(), "use_cache": True},
            "an empty cache, use_cache=False": {"past_key_values": t.DynamicCache(), "use_cache": False},
        }
    if name == "gpt2":
        offered["token_type_ids"] = {"token_type_ids": ids % 2}
        offered["token_type_ids of zeros"] = {"token_type_ids": ids * 0}
    if name == "mixtral":
        offered["output_router_logits=True"] = {"output_router_logits": True}
    return offered


CASES = [(name, argument) for name in MAKERS for argument in arguments(name)]


def result(model: Any, call: dict[str, Any]) -> Any:
    fresh = {key: t.DynamicCache() if isinstance(value, t.DynamicCache) else value for key, value in call.items()}
    with torch.no_grad():
        return model(**fresh)


def compare(found: Any, expected: Any, visible: Tensor) -> None:
    """Return all tensors of an output at visible positions; lengths first."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape
        if expected.shape[:2] == visible.shape:
            found, expected = found[visible], expected[visible]
        elif expected.ndim == 3 and expected.shape[1] < visible.shape[1]:  # a part of the columns, which may be hidden
            return
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    elif hasattr(expected, "get_seq_length"):
        assert found.get_seq_length() == expected.get_seq_length()
        for mine, theirs in zip(found.layers, expected.layers, strict=True):
            assert type(mine) is type(theirs)
            for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                shown = visible[:, visible.shape[1] - other.shape[2] :]
                compare(one.transpose(1, 2)[shown], other.transpose(1, 2)[shown], visible[:0])
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            compare(found[key], expected[key], visible)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other, visible)
    else:
        assert found == expected


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}, {argument}" for name, argument in CASES])
def test_a_call_with_an_argument_gives_what_the_model_gives_cold_and_warm(
    name: str, argument: str, store: Path
) -> None:
    model, more = made(name), arguments(name)[argument]
    ids, mask = rows(*LENGTHS)
    plain = {"input_ids": ids, "attention_mask": mask}
    call = {key: value for key, value in {**plain, **more}.items() if value is not None}
    given = call.get("attention_mask")
    visible = given.bool() if given is not None and given.shape == ids.shape else torch.ones_like(ids).bool()
    try:
        expected = result(model, call)
    except Exception as error:
        pytest.skip(f"the model itself has no use for it: {type(error).__name__}")
    before = result(model, plain)
    layers: Any = "all" if len(argument) % 2 else "output"
    with LLMCache.open(store, model, config=CacheConfig(layers=layers)) as cache, cache.attached():
        for _ in range(2):
            compare(result(model, call), expected, visible)
            compare(result(model, plain), before, mask.bool())
        other = {**call, "input_ids": ids.flip(0)}
        compare(result(model, other), result(made(name), other), visible)


@pytest.mark.parametrize("name", sorted(DECODERS))
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_keys_and_values_are_returned_when_they_are_asked_for(
    name: str, configured: bool, asked: bool | None, store: Path
) -> None:
    model = made(name)
    model.config.use_cache = configured
    ids, mask = rows(*LENGTHS)
    call = {"input_ids": ids, "attention_mask": mask} | ({} if asked is None else {"use_cache": asked})
    expected = result(model, call)
    with LLMCache.open(store, model) as cache, cache.attached():
        for _ in range(2):
            compare(result(model, call), expected, mask.bool())


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bert", "modernbert"])
def test_a_loss_is_the_models_whatever_the_padding_and_the_labels(name: str, left: bool, store: Path) -> None:
    model = made(name)
    ids, mask = rows(13, 7, 4)
    mask = padded_left(mask) if left else mask
    every = ids % 3 if name == "bert" else ids
    with LLMCache.open(store, model) as cache, cache.attached():
        for labels in (every, torch.where(mask.bool(), every, -100)):
            for some in (slice(None), slice(0, 1)):
                call = {"input_ids": ids[some], "attention_mask": mask[some], "labels": labels[some]}
                expected = float(result(made(name), call).loss)
                for _ in range(2):
                    assert float(result(model, call).loss) == pytest.approx(expected, rel=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())

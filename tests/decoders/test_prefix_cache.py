"""Prefix cache: results with restored and shared prefixes equal the model's own, with less computation."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from llmcache.decoders.kv_buffer import shape_of
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from tests.conftest import ROOT

MODELS = Path(os.environ.get("LLMCACHE_MODELS", ROOT.parent / "shared" / "models"))
EXACT = NearChoice(index="flat", projection="none")
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "opt": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32, "pad_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128}),
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**LLAMA_LIKE, "sliding_window": 12}),
    "gemma2": ("Gemma2Config", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 12}),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
}


def seeded(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **others: Any) -> Any:
    """Return a small model of this architecture, with weights large enough that every token matters."""
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**{**settings, **others})
    torch.manual_seed(0)
    attention = "eager" if name in ("bloom", "gemma2") else attention  # the only implementation they have
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=attention
    )
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in model.parameters():
            if one.dim() > 1:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.3)
    return model


@dataclass
class Tier:
    """A model with a prefix cache, and its store."""

    model: Any
    prefixes: PrefixCache
    store: Store
    bank: Bank

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the trunk's forward by that of the prefix cache."""
        trunk = self.model.get_decoder()
        original = trunk.forward
        names = tuple(signature(original).parameters)

        def forward(*args: Any, **call: Any) -> Any:
            return self.prefixes.forward(original, {**dict(zip(names, args, strict=False)), **call})

        trunk.forward = forward
        try:
            yield
        finally:
            del trunk.forward

    def __call__(self, **call: Any) -> Any:
        with self.attached(), torch.no_grad():
            return self.model(**call)

    def restored(self) -> int:
        return self.prefixes.counters.restored

    def computed(self) -> int:
        return self.prefixes.counters.computed


Opener = Callable[..., Tier]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run with one thread: small models gain nothing from a second one, and are slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Opener]:
    """Return a function that puts a prefix cache on a model, with a store in the folder of the test."""
    stores: list[Store] = []

    def opened(model: Any, **settings: Any) -> Tier:
        for one in stores:
            one.close()
        store = Store.open(tmp_path / "store", create=True)
        stores.append(store)
        if store.namespace("models") is None:
            store.declare("models", {}, {}, "")
        bank = store.bank("models", "prefix", lambda: shape_of(model.get_decoder()).facts, EXACT)
        settings = {"forward_cost": 1, "block": 4, **settings}
        return Tier(model, PrefixCache(model.get_decoder(), bank, b"model", Bank.put, **settings), store, bank)

    yield opened
    for one in stores:
        one.close()


def batch(rows: Sequence[Sequence[int]], side: str = "left", *, positions: bool = True) -> dict[str, Tensor]:
    """Return padded ids, mask, and positions as `generate` makes them."""
    columns = max(map(len, rows))
    pads = [[0] * (columns - len(row)) for row in rows]
    left = side == "left"
    ids = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)])
    ones = [[1] * len(row) for row in rows]
    mask = torch.tensor([[*pad, *one] if left else [*one, *pad] for one, pad in zip(ones, pads, strict=True)])
    given = {"input_ids": ids, "attention_mask": mask}
    if positions:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


def texts(seed: int, shape: Sequence[tuple[int, int, int]], vocabulary: int = 97) -> list[list[int]]:
    """Return rows of ids from (number of the stem, tokens of the stem, tokens of its own)."""
    random = np.random.default_rng(seed)
    stems = random.integers(2, vocabulary, (8, 100)).tolist()
    return [stems[stem][:length] + random.integers(2, vocabulary, own).tolist() for stem, length, own in shape]


MIXED = texts(0, [(0, 13, 5), (1, 20, 3), (0, 13, 9), (0, 30, 1), (2, 1, 0), (1, 20, 3), (1, 22, 0), (1, 20, 0)])


def assert_same(found: Any, expected: Any, mask: Tensor, tolerance: float = 1e-4) -> None:
    """Assert that logits agree at visible positions, relative to the largest."""
    here = mask.bool()
    difference = (found.logits.float() - expected.logits.float())[here].abs().max()
    assert difference <= tolerance * expected.logits.float()[here].abs().max()


def assert_same_cache(found: Any, expected: Any, mask: Tensor) -> None:
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        here = mask.bool()[:, None, -one.keys.shape[2] :, None]
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            assert x.shape == y.shape
            assert ((x - y) * here).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_says_the_same_cold_warm_and_after_reopening(tier: Opener, name: str, side: str) -> None:
    model = seeded(name)
    call = batch(MIXED, side, positions=name != "bloom")
    with torch.no_grad():
        expected = model(**call)
    one = tier(model)
    cold = one(**call)
    assert one.restored() == 0
    tokens = sum(map(len, MIXED))
    assert one.computed() < tokens - 40  # rows share prefixes with each other
    before = one.computed()
    warm = one(**call)
    assert one.computed() == before  # nothing is computed again
    one.store.commit()
    one = tier(model)
    reopened = one(**call)
    assert one.computed() == 0
    for found in (cold, warm, reopened):
        assert_same(found, expected, call["attention_mask"])
        assert_same_cache(found, expected, call["attention_mask"])
    counters = one.prefixes.counters
    assert counters.tokens == counters.restored + counters.shared + counters.computed == tokens


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cost", [1, 1000])
def test_half_precision_and_both_attentions(
    tier: Opener, name: str, dtype: torch.dtype, attention: str, cost: int
) -> None:
    """Compare many small forwards with a single padded forward."""
    model = seeded(name, dtype=dtype, attention=attention)
    call = batch(MIXED)
    with torch.no_grad():
        expected = model(**call)
    one = tier(model, forward_cost=cost)
    cold = one(**call)
    one.store.commit()
    one = tier(model, forward_cost=cost)
    warm = one(**call)
    assert one.computed() == 0
    assert warm.logits.dtype == dtype
    mask = call["attention_mask"]
    assert_same(warm, cold, mask, 1e-6 if dtype == torch.float32 else 0.01)  # the head reads another memory layout
    assert_same(cold, expected, mask, 1e-4 if dtype == torch.float32 else 0.06)


def test_a_stored_prefix_is_restored_and_only_the_rest_computed(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model)
    first, second = texts(3, [(0, 40, 6), (0, 40, 9)])
    one(**batch([first]))
    one(**batch([second]))
    assert one.restored() == 40
    assert one.computed() == len(first) + len(second) - 40
    one(**batch([second[:41]]))  # stored blocks have all of it but one token, where no entry ends
    assert one.computed() == len(first) + len(second) - 40 + 1


def test_where_rows_of_a_call_part_is_remembered(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model, block=16)
    rows = texts(4, [(0, 25, 9), (0, 25, 12), (0, 25, 8)])
    one(**batch(rows[:2]))
    before = one.computed()
    found = one(**batch(rows[2:]))
    assert one.computed() == before + 8  # 25 is no multiple of 16
    assert_same(found, model(**batch(rows[2:])), torch.ones(1, 33))


def test_equal_ids_at_other_positions_are_another_prefix(tier: Opener) -> None:
    model = seeded("gpt2")
    one = tier(model)
    (row,) = texts(5, [(0, 20, 4)])
    call = batch([row, row[:10]], positions=False)  # the second starts at position 14
    with torch.no_grad():
        expected = model(**call)
    assert_same(one(**call), expected, call["attention_mask"])
    shifted = {**batch([row]), "position_ids": torch.arange(3, 27)[None]}
    with torch.no_grad():
        expected = model(**shifted)
    before = one.restored()
    assert_same(one(**shifted), expected, torch.ones(1, 24))
    assert one.restored() == before


def test_a_model_that_counts_positions_by_the_mask_is_one_whatever_the_padding(tier: Opener) -> None:
    model = seeded("opt")
    assert shape_of(model.get_decoder()).positions_skip_padding
    one = tier(model)
    call = batch(MIXED, positions=False)
    with torch.no_grad():
        expected = model(**call)
    assert_same(one(**call), expected, call["attention_mask"])
    right = batch(MIXED, "right", positions=False)
    before = one.computed()
    with torch.no_grad():
        expected = model(**right)
    assert_same(one(**right), expected, right["attention_mask"])
    assert one.computed() == before


def test_states_and_keys_beside_the_tokens_are_zeros(tier: Opener) -> None:
    model = seeded("llama")
    call = batch(MIXED, "right")
    found = tier(model)(**call, output_hidden_states=False)
    pads = ~call["attention_mask"].bool()
    assert not found.logits[pads].any()
    assert not found.past_key_values.layers[0].keys.transpose(1, 2)[pads].any()


def test_a_cache_the_caller_brings_is_filled(tier: Opener) -> None:
    model = seeded("mistral")  # its cache layers keep a window only
    one = tier(model)
    call = batch(MIXED)
    for settings in ({}, {"config": model.config}):
        mine, theirs = DynamicCache(**settings), DynamicCache(**settings)
        found = one(**call, past_key_values=mine)
        assert found.past_key_values is mine
        with torch.no_grad():
            expected = model(**call, past_key_values=theirs)
        assert_same_cache(found, expected, call["attention_mask"])
    assert one(**call, use_cache=False).past_key_values is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attention_mask": torch.zeros(2, 6, dtype=torch.long)}, "no tokens"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6])}, "next to each other"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "one number per token"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}, "count up by one"),
        ({"input_ids": torch.zeros(0, 6, dtype=torch.long)}, "no token ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 32)}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_cannot_be_answered_goes_to_the_model(tier: Opener, more: dict[str, Any], said: str) -> None:
    model = seeded("llama", attention="eager")
    one = tier(model)
    call = {"input_ids": torch.arange(2, 14).reshape(2, 6), **more}
    with torch.no_grad():
        assert said in str(one.prefixes.refuses(call))
    if call["input_ids"] is not None and not call["input_ids"].numel():
        return  # the model itself may fail for an empty batch
    found = one(**call)
    with torch.no_grad():
        expected = model(**call)
    assert torch.equal(found[0], expected[0])
    assert one.prefixes.counters.bypassed == one.prefixes.counters.calls == 1
    assert len(one.bank) == 0


def test_a_call_that_wants_gradients_goes_to_the_model(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model)
    ids = torch.arange(2, 14).reshape(2, 6)
    assert "gradients" in str(one.prefixes.refuses({"input_ids": ids}))
    with one.attached():
        model(ids, labels=ids).loss.backward()
    assert model.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    assert one.prefixes.refuses({"input_ids": ids}) is None


@torch.no_grad()
def test_a_step_of_decoding_a_static_cache_training_and_autocast_go_to_the_model(tier: Opener) -> None:
    model = seeded("llama")
    prefixes = tier(model).prefixes
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        past = model(ids).past_key_values
    assert "goes on" in str(prefixes.refuses({"input_ids": ids[:, :1], "past_key_values": past}))
    static = StaticCache(config=model.config, max_cache_len=16)
    assert "StaticCache" in str(prefixes.refuses({"input_ids": ids, "past_key_values": static}))
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True
    assert "cannot be filled" in str(prefixes.refuses({"input_ids": ids, "past_key_values": offloading}))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(prefixes.refuses({"input_ids": ids}))
    model.train()
    assert "training" in str(prefixes.refuses({"input_ids": ids}))
    model.eval()
    assert "32 bits" in str(prefixes.refuses({"input_ids": ids + 2**32}))
    assert prefixes.refuses({"input_ids": ids}) is None
    model.to(torch.bfloat16)
    assert "bfloat16 by now" in str(prefixes.refuses({"input_ids": ids}))


def test_ids_beyond_the_vocabulary_give_the_models_own_error_and_store_nothing(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model)
    with pytest.raises(IndexError), torch.no_grad():
        model(torch.tensor([[5, 97]]))
    with pytest.raises(IndexError):
        one(input_ids=torch.tensor([[5, 97]]))
    assert len(one.bank) == 0


def test_a_damaged_entry_is_computed_again_and_stored_anew(tier: Opener, tmp_path: Path) -> None:
    model = seeded("llama")
    one = tier(model)
    call = batch(texts(6, [(0, 30, 3)]))
    expected = one(**call)
    one.store.commit()
    (file,) = (tmp_path / "store").glob("seg/*.seg")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    one = tier(model)
    found = one(**call)
    assert_same(found, expected, call["attention_mask"])
    assert 0 < one.computed() < 33
    assert one.bank.damaged == 1
    before = one.computed()
    one(**call)
    assert one.computed() == before


def test_other_models_and_other_secrets_find_nothing(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model)
    call = batch(MIXED)
    one(**call)
    for digest, secret in ((b"another", b""), (b"model", b"s" * 32)):
        other = PrefixCache(model.get_decoder(), one.bank, digest, Bank.put, block=4, secret=secret)
        with torch.no_grad():
            other.forward(model.get_decoder().forward, call)
        assert other.counters.restored == 0


def test_a_bank_of_another_width_is_refused(tier: Opener) -> None:
    one = tier(seeded("llama"))
    wider = seeded("qwen3", num_hidden_layers=4).get_decoder()
    with pytest.raises(ConfigError, match="fresh namespace"):
        PrefixCache(wider, one.bank, b"model", Bank.put)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
            "keys",
        ),
        (transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4), "type"),
    ],
)
def test_a_model_without_prefixes_to_restore_is_refused(config: Any, said: str) -> None:
    trunk = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=said):
        shape_of(trunk)


def test_results_do_not_alias_what_is_stored(tier: Opener) -> None:
    model = seeded("llama")
    one = tier(model)
    call = batch(texts(7, [(0, 20, 4)]))
    first = one(**call)
    expected = copy.deepcopy(first)
    for layer in first.past_key_values.layers:
        layer.keys.zero_()
        layer.values.zero_()
    again = one(**call)
    assert_same(again, expected, call["attention_mask"])
    assert_same_cache(again, expected, call["attention_mask"])


def test_looking_at_a_model_changes_nothing_in_it() -> None:
    trunk = seeded("llama").get_decoder().train()
    trunk.layers[1].eval()
    before = [one.training for one in trunk.modules()]
    trunk.config.use_cache = False
    shape = shape_of(trunk)
    assert [one.training for one in trunk.modules()] == before
    assert shape.record == 3 * 2 * 2 * 8 + 32
    assert shape.facts.dtype == "float32"


def test_final_states_beside_the_tokens_are_zeros_also_on_the_left(tier: Opener) -> None:
    one = tier(seeded("gpt2"), forward_cost=1000)  # one forward, in the layout of the call
    call = batch(MIXED)
    forward = one.model.transformer.forward
    with torch.no_grad():
        states = [one.prefixes.forward(forward, call).last_hidden_state for _ in range(2)]
    assert one.prefixes.counters.forwards == 1
    for found in states:
        assert not found[call["attention_mask"] == 0].any()
        assert found[call["attention_mask"] == 1].any(-1).all()

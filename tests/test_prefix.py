"""Decoders: with restored and shared beginnings a model says what it says without, and computes less."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from llmcache.blocks import shape_of
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.manifest import BankFacts
from llmcache.indexes.neighbours import NearChoice
from llmcache.indexes.store import Store
from llmcache.prefix import Prefixes
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
    """A small model of this architecture, with weights large enough that every token matters."""
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**{**settings, **others})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in model.parameters():
            if one.dim() > 1:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.3)
    return model


@dataclass
class Tier:
    """A model with a prefix tier on it, and its store."""

    model: Any
    prefixes: Prefixes
    store: Store
    bank: Bank

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the trunk's forward be the tier's."""
        trunk = self.model.get_decoder()
        original = trunk.forward
        names = tuple(transformers.utils.generic.inspect.signature(original).parameters)

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


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Opener]:
    """Puts a prefix tier on a model, with a store in the folder of the test; everything is closed at the end."""
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
        return Tier(model, Prefixes(model.get_decoder(), bank, b"model", Bank.put, **settings), store, bank)

    yield opened
    for one in stores:
        one.close()


def batch(rows: Sequence[Sequence[int]], side: str = "left", *, positions: bool = True) -> dict[str, Tensor]:
    """Padded ids, mask, and positions as `generate` makes them."""
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
    """Rows of ids: (which stem, tokens of the stem, tokens of its own) each."""
    random = np.random.default_rng(seed)
    stems = random.integers(2, vocabulary, (8, 100)).tolist()
    return [stems[stem][:length] + random.integers(2, vocabulary, own).tolist() for stem, length, own in shape]


MIXED = texts(0, [(0, 13, 5), (1, 20, 3), (0, 13, 9), (0, 30, 1), (2, 1, 0), (1, 20, 3), (1, 22, 0), (1, 20, 0)])


def assert_same(found: Any, expected: Any, mask: Tensor, tolerance: float = 1e-4) -> None:
    """Logits agree where there are tokens, relative to the largest."""
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
    assert one.computed() < tokens - 40  # rows share beginnings with each other
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

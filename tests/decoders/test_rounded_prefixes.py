"""Rounded KV blocks: restored as stored, up to the rounding of each head, and never taken for exact ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmcache import CacheConfig, LLMCache
from llmcache.arrays import Floats32
from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.decoders.kv_buffer import KVBuffer, KVLayout, shape_of
from llmcache.decoders.kv_encoding import KVEncoding, bytes_per_token
from llmcache.decoders.prefix_cache import PrefixCache, restore
from llmcache.errors import ConfigError, ModelMismatch
from llmcache.indexes.bank import Bank
from llmcache.indexes.eviction.garbage import disk_bytes
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.store import Store
from llmcache.planning.purging import purge_documents
from tests.cache.test_purge_decoders import OTHER, SECRET, holding
from tests.cache.test_purge_decoders import model as small_llama
from tests.decoders.test_generation import prompts_of, real
from tests.decoders.test_prefix_cache import EXACT, assert_same, batch, one_thread, seeded, texts
from tests.threads import tiny_tokenizer

__all__ = ["one_thread"]  # fixture

DTYPES = ["float16", "bfloat16", "int8"]
MIXED = KVLayout(
    ((2, 8), (2, 8), (3, 4), (1, 16), (2, 8), (2, 8)), 20, torch.float32, True, True, BaseModelOutputWithPast
)
"""Layout with planes of three sizes."""


def records_of(layout: KVLayout, tokens: int, seed: int = 0) -> Floats32:
    """Return records with heads of very different sizes, zeros, and outliers."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((tokens, layout.record)).astype(np.float32)
    values *= 10.0 ** random.integers(-3, 4, values.shape[1])
    values[tokens // 2, :16] = 0
    values[1] *= 0
    return values


def through_a_store(folder: Path, encoding: KVEncoding, blocks: list[Floats32]) -> list[Floats32]:
    """Write records of KV blocks to a store, and read them after it was opened again; only those that it has."""
    keys = np.arange(2 * len(blocks), dtype=np.uint64).reshape(-1, 2)
    with closing(Store.open(folder, create=True)) as store:
        store.declare("models", {}, {}, "")
        bank = store.bank("models", encoding.bank, lambda: encoding.facts, EXACT)
        bank.put(
            keys, [encoding.encode(block) for block in blocks],
            tokens=[np.arange(len(block), dtype=np.int32) for block in blocks],
            sources=[""] * len(blocks), features=np.zeros((len(blocks), 0), np.float32),
            cost=np.ones(len(blocks), np.float32),
        )  # fmt: skip
        store.commit()
    with closing(Store.open(folder)) as store:
        bank = store.bank("models", encoding.bank, lambda: encoding.facts, EXACT)
        rows = bank.find(keys)
        reading = bank.read(rows[rows >= 0])
        assert reading.intact.all()
        return [encoding.decode(np.asarray(value)) for value in reading.values]


def heads_of(layout: KVLayout, records: Floats32) -> Iterator[Floats32]:
    """Yield the numbers of each head, then those of the state, [tokens, numbers]."""
    at = 0
    for planes in layout.kinds.values():
        for plane in planes:
            heads, dim = layout.planes[plane]
            for _ in range(heads):
                yield records[:, at : at + dim]
                at += dim
    yield records[:, at:]


def test_each_head_of_a_token_is_rounded_by_its_own_scale(tmp_path: Path) -> None:
    encoding = KVEncoding.of(MIXED, "int8")
    blocks = [records_of(MIXED, 16), records_of(MIXED, 5, seed=1)]
    for block, restored in zip(blocks, through_a_store(tmp_path / "store", encoding, blocks), strict=True):
        parts = list(zip(heads_of(MIXED, block), heads_of(MIXED, restored), strict=True))
        for numbers, found in parts[:-1]:
            peak = np.abs(numbers).max(axis=1, keepdims=True)
            assert (np.abs(found - numbers) <= peak / 127 * 0.502).all()  # a scale is at most 1/256 too large
            assert (np.abs(found).max(axis=1) >= peak[:, 0] * 0.99).all()
        state, found = parts[-1]
        assert (np.abs(found - state) <= np.abs(state).max(axis=1, keepdims=True) / 32_512).all()
        assert (np.abs(restored - block) <= encoding.errors(encoding.encode(block))).all()
        assert np.array_equal(restored, encoding.rounded(block))
        assert np.array_equal(encoding.rounded(restored), restored)  # stored again, it is not rounded again


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shorter_floats_are_rounded_to_nearest(tmp_path: Path, dtype: str) -> None:
    encoding, block = KVEncoding.of(MIXED, dtype), records_of(MIXED, 16)
    (restored,) = through_a_store(tmp_path / "store", encoding, [block])
    assert np.array_equal(restored, torch.from_numpy(block).to(getattr(torch, dtype)).float().numpy())
    assert (np.abs(restored - block) <= encoding.errors(restored)).all()
    assert np.array_equal(restored, encoding.rounded(block))


@pytest.mark.parametrize("peak", [1e-30, 1e-20, 3e38])
def test_the_range_of_float32_is_covered(tmp_path: Path, peak: float) -> None:
    encoding, block = KVEncoding.of(MIXED, "int8"), np.full((2, MIXED.record), peak, np.float32)
    block[:, ::2] *= -1
    (restored,) = through_a_store(tmp_path / "store", encoding, [block])
    assert np.allclose(restored, block, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_number_that_is_not_finite_is_not_stored(tmp_path: Path, dtype: str, number: float) -> None:
    blocks = [records_of(MIXED, 4), records_of(MIXED, 4, seed=1)]
    blocks[0][2, 7] = number
    (restored,) = through_a_store(tmp_path / "store", KVEncoding.of(MIXED, dtype), blocks)
    assert np.array_equal(restored, KVEncoding.of(MIXED, dtype).rounded(blocks[1]))


def test_numbers_beyond_float16_are_not_stored_as_float16(tmp_path: Path) -> None:
    block = np.full((4, MIXED.record), 70_000, np.float32)
    assert through_a_store(tmp_path / "store", KVEncoding.of(MIXED, "float16"), [block]) == []


@pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("on", ["array", "tensor", "both"])
def test_a_row_is_restored_from_several_blocks(own: torch.dtype, on: str) -> None:
    """Compare with decoded records that are cut into planes one by one."""
    layout = KVLayout(MIXED.planes, MIXED.width, own, True, True, BaseModelOutputWithPast)
    encoding, whole = KVEncoding.of(layout, "int8"), records_of(layout, 13)
    stored: list[Any] = [encoding.encode(whole[:8]), encoding.encode(whole[8:])]
    if on != "array":
        stored[0] = torch.from_numpy(stored[0])
    if on == "tensor":
        stored[1] = torch.from_numpy(stored[1])
    buffer = KVBuffer.empty(layout, [3, 11], [10, 2], 13, torch.device("cpu"))
    restore(buffer, 1, stored, 11, encoding)
    expected = torch.from_numpy(encoding.rounded(whole)[:11]).to(own)
    order, at = [plane for planes in layout.kinds.values() for plane in planes], 0
    for number in order:
        heads, dim = layout.planes[number]
        part = expected[:, at : at + heads * dim].view(11, heads, dim).transpose(0, 1)
        assert torch.equal(buffer.plane(number)[1, :, 2:], part)
        at += heads * dim
    assert torch.equal(buffer.states[1, 2:], expected[:, at:])


@pytest.mark.parametrize(("own", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_type_that_saves_nothing_is_refused(tmp_path: Path, own: str, dtype: Any) -> None:
    model = small_llama().to(getattr(torch, own))
    with (
        LLMCache.open(
            tmp_path / "store", model, tokenizer=tiny_tokenizer(), config=CacheConfig(prefix_dtype=dtype)
        ) as cache,
        pytest.raises(ConfigError, match=f"prefix_dtype='{dtype}' takes as many bytes"),
    ):
        cache.generate([OTHER], max_new_tokens=2)


def test_an_unknown_type_is_refused() -> None:
    unknown: Any = "int4"
    with pytest.raises(ConfigError, match="prefix_dtype is one of auto, float16, bfloat16, int8, got 'int4'"):
        CacheConfig(prefix_dtype=unknown)


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_bytes_per_token_are_those_of_a_store(tmp_path: Path, dtype: Any) -> None:
    model, tokenizer = small_llama(), tiny_tokenizer()
    rows = texts(1, [(i, 100, 12) for i in range(8)])
    store, config = tmp_path / "store", CacheConfig(prefix_dtype=dtype)
    with LLMCache.open(store, model, tokenizer=tokenizer, config=config) as cache, cache.attached(), torch.no_grad():
        model(**batch(rows))
    name = KVEncoding.of(shape_of(model.get_decoder()), dtype).bank
    with closing(Store.open(store)) as opened:
        (space,) = opened.manifest.namespaces.values()
        files = [file for segment in space.banks[name].segments for file in segment.files]
        size = sum((store / file.name).stat().st_size for file in files)
        assert size < disk_bytes(opened.folder)
        lengths = [Segment.open(opened.folder, segment).rows["tokens"] for segment in space.banks[name].segments]
    assert set(np.concatenate(lengths).tolist()) == {16}
    expected = bytes_per_token(shape_of(model.get_decoder()), dtype)
    assert size / np.concatenate(lengths).sum() == pytest.approx(expected, rel=0.01)


def rounded_like_int8(plane: torch.Tensor) -> torch.Tensor:
    """Round keys or values [1, heads, tokens, dim] to 255 steps a head and token; a step has nine bits, rounded up."""
    mantissa, exponent = torch.frexp(plane.abs().amax(-1, keepdim=True) / 127)
    steps = torch.ldexp((mantissa * 512).ceil() / 512, exponent)
    return (plane / steps).round() * steps


ROUNDED: dict[str, Any] = {
    "float16": lambda plane: plane.half().float(),
    "bfloat16": lambda plane: plane.bfloat16().float(),
    "int8": rounded_like_int8,
}
# of the largest logit: at most, and half of all; stories260k has heads of 8 numbers and large products of keys
BOUNDS = {
    ("stories260k-llama", "float16"): (0.004, 2e-4),
    ("stories260k-llama", "bfloat16"): (0.03, 2e-3),
    ("stories260k-llama", "int8"): (0.15, 6e-3),
    ("babyllama105-llama", "float16"): (0.001, 1e-4),
    ("babyllama105-llama", "bfloat16"): (0.005, 1e-3),
    ("babyllama105-llama", "int8"): (0.02, 1.5e-3),
}


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
@pytest.mark.parametrize("name", ["stories260k-llama", "babyllama105-llama"])
def test_logits_after_rounded_prefixes(tmp_path: Path, name: str, dtype: Any) -> None:
    """Compare with the model, and with its own keys and values rounded by other code."""
    model, tokenizer = real(name)
    ids = [tokenizer(text)["input_ids"] for text in prompts_of(name, tokenizer, 60, 600)]
    rows = [list(row) for row in {tuple(row[:112]) for row in ids if len(row) >= 112}]
    assert len(rows) >= 8
    config = CacheConfig(prefix_dtype=dtype, prefix_block=16, stand_aside=False)
    store, differences = tmp_path / "store", []
    for opening in range(2):
        with (
            LLMCache.open(store, model, tokenizer=tokenizer, config=config) as cache,
            cache.attached(),
            torch.no_grad(),
        ):
            for row in rows:
                call = batch([row if opening else row[:96]], positions=False)
                found = model(**call, use_cache=True)
                if not opening:
                    continue
                with without(cache):
                    plain = model(**call, use_cache=True)
                    past = DynamicCache()
                    model(input_ids=torch.tensor([row[:96]]), past_key_values=past)
                    if dtype != "auto":
                        for layer in past.layers:
                            assert isinstance(layer, DynamicLayer)
                            layer.keys, layer.values = ROUNDED[dtype](layer.keys), ROUNDED[dtype](layer.values)
                    expected = model(input_ids=torch.tensor([row[96:]]), past_key_values=past)
                largest = plain.logits.abs().max()
                assert (found.logits[:, 96:] - expected.logits).abs().max() <= 2e-5 * largest
                differences += ((found.logits - plain.logits).abs().amax(-1) / largest)[0, 96:].tolist()
            if opening:
                assert cache.stats().counters.prefix.restored >= 96 * len(rows)
    most, half = BOUNDS.get((name, dtype), (1e-5, 1e-5))
    assert max(differences) <= most
    assert np.median(differences) <= half
    if dtype != "auto":
        assert np.median(differences) > half / 30  # it was rounded


def without(cache: LLMCache) -> Any:
    """Return a context in which the model of a cache computes without it, as in an audit."""
    return cache._exact_audits.recompute()


@pytest.mark.parametrize("name", ["stories260k-llama", "babyllama105-llama"])
def test_greedy_texts_after_float16_prefixes_are_the_models(tmp_path: Path, name: str) -> None:
    model, tokenizer = real(name)
    prompts = list(dict.fromkeys(prompts_of(name, tokenizer, 30, 120)))
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    exact = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        exact.append(model.generate(ids, **settings)[0, ids.shape[1] :].tolist())
    config = CacheConfig(prefix_dtype="float16", prefix_block=8, stand_aside=False, answers=False)
    for _ in range(2):
        with LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache:
            for prompt, expected in zip(prompts, exact, strict=True):
                assert cache.generate([prompt], **settings).ids[0].tolist()[: len(expected)] == expected
            restored = cache.stats().counters.prefix.restored
    assert restored > 8 * len(prompts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_and_rounded_prefixes_live_beside_each_other(tmp_path: Path, dtype: Any) -> None:
    """A bank of each type in one namespace; what one stored is never restored by the other."""
    model, tokenizer, row = small_llama(), tiny_tokenizer(), texts(2, [(0, 60, 4)])[0]
    call = batch([row])
    with torch.no_grad():
        expected = model(**call)

    def run(setting: Any) -> tuple[Any, int]:
        config = CacheConfig(prefix_dtype=setting, stand_aside=False)
        with (
            LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache,
            cache.attached(),
            torch.no_grad(),
        ):
            return model(**call), cache.stats().counters.prefix.restored

    rounds = [run(setting) for setting in (dtype, "auto", dtype, "auto")]
    assert [restored for _, restored in rounds] == [0, 0, 64, 64]
    for found, _ in (rounds[0], rounds[1], rounds[3]):
        assert_same(found, expected, call["attention_mask"], 1e-6)
    assert not torch.equal(rounds[2][0].logits, expected.logits)
    assert_same(rounds[2][0], expected, call["attention_mask"], 0.02)
    with closing(Store.open(tmp_path / "store")) as store:
        (space,) = store.manifest.namespaces.values()
        assert {name for name in space.banks if name.startswith("prefix")} == {"prefix", f"prefix-{dtype}"}


def test_a_bank_of_another_type_is_refused(tmp_path: Path) -> None:
    trunk = small_llama().get_decoder()
    with closing(Store.open(tmp_path / "store", create=True)) as store:
        store.declare("models", {}, {}, "")
        bank = store.bank("models", "prefix", lambda: shape_of(trunk).facts, EXACT)
        with pytest.raises(ConfigError, match=r"the bank holds float32 \[tokens, 160\], and the model gives int8"):
            PrefixCache(trunk, bank, b"model", Bank.put, dtype="int8")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom"])
def test_the_trial_judges_the_model_without_the_rounding(tmp_path: Path, name: str) -> None:
    """A sharp model, whose answers after rounded prefixes differ by far more than the trial allows."""
    trunk = seeded(name).get_decoder()
    with closing(Store.open(tmp_path / "store", create=True)) as store:
        store.declare("models", {}, {}, "")
        reaches = []
        for dtype in ("auto", "int8"):
            encoding = KVEncoding.of(shape_of(trunk), dtype)
            bank = store.bank("models", encoding.bank, lambda facts=encoding.facts: facts, EXACT)  # type: ignore[misc]
            reaches.append(PrefixCache(trunk, bank, b"model", Bank.put, dtype=dtype)._reach)
        assert reaches[0] == reaches[1]


def grown(cache: LLMCache, model: Any, rows: list[list[int]], lengths: list[int]) -> None:
    """Compute rows up to these lengths, one after the other, so that each step restores the one before."""
    with cache.attached(), torch.no_grad():
        for length in lengths:
            for row in rows:
                model(**batch([row[:length]], positions=False), use_cache=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["stories260k-llama", "babyllama105-llama"])
def test_audits_accept_prefixes_that_were_continued_after_restored_ones(tmp_path: Path, name: str, dtype: Any) -> None:
    model, tokenizer = real(name)
    ids = [tokenizer(text)["input_ids"] for text in prompts_of(name, tokenizer, 60, 900)]
    rows = [list(row) for row in {tuple(row[:200]) for row in ids if len(row) >= 200}]
    config = CacheConfig(prefix_dtype=dtype, stand_aside=False, exact_audits=1000)
    store = tmp_path / "store"
    ends = ([29], [40, 71, 100], [133, 150, 155], [200]) if name == "babyllama105-llama" else ([32], [80, 112], [192])
    for lengths in ends:
        with LLMCache.open(store, model, tokenizer=tokenizer, config=config) as cache:
            grown(cache, model, rows, lengths)
            counters = cache.stats().counters
    assert counters.exact_audits >= len(rows) >= 5
    assert counters.exact_mismatches == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.self_attn.k_proj", "layers.3.mlp.down_proj", "norm"])
def test_audits_catch_a_changed_model(tmp_path: Path, place: str, continued: bool, dtype: str) -> None:
    """Weights change by a twentieth under one identity, as with code that the identity cannot describe."""
    model, tokenizer = real("babyllama105-llama")
    trunk = model.get_decoder()
    ids = [tokenizer(text)["input_ids"] for text in prompts_of("babyllama105-llama", tokenizer, 40, 600)]
    rows = [list(row) for row in {tuple(row[:128]) for row in ids if len(row) >= 128}][:4]

    def run(lengths: list[int]) -> Counters:
        with closing(Store.open(tmp_path / "store", create=True)) as store:
            if store.namespace("models") is None:
                store.declare("models", {}, {}, "")
            encoding, counters = KVEncoding.of(shape_of(trunk), dtype), Counters()
            bank = store.bank("models", encoding.bank, lambda: encoding.facts, EXACT)
            evidence = ExactAudits(CacheConfig(), counters).evidence(bank, encoding.bank, trunk, b"model")
            prefixes = PrefixCache(trunk, bank, b"model", Bank.put, evidence=evidence, dtype=dtype)
            for length in lengths:
                for row in rows:
                    call = {**batch([row[:length]], positions=False), "use_cache": True}
                    with torch.no_grad():
                        prefixes.forward(trunk.forward, call)
            store.commit()
            return counters

    for lengths in ([32], [64], [128]) if continued else ([128],):
        run(lengths)
    assert run([128]).exact_audits >= 3
    with torch.no_grad():
        trunk.get_submodule(place).weight *= 1.05
    with pytest.raises(ModelMismatch):
        run([128])


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_after_rounded_prefixes_are_no_exact_answers(tmp_path: Path, dtype: Any) -> None:
    model, tokenizer = small_llama(), tiny_tokenizer()
    prompts, choices = [OTHER, SECRET], [" w100", " w101 w102"]

    def run(setting: Any) -> tuple[int, int]:
        config = CacheConfig(prefix_dtype=setting, answers=True, stand_aside=False, prefix_block=4)
        with LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache:
            cache.generate(prompts, max_new_tokens=4, do_sample=False)
            generated = cache.stats().counters.answers_stored
            cache.score(prompts, choices)
            counters = cache.stats().counters
            assert counters.exact_mismatches == 0
            return generated, counters.answers_stored - generated

    nothing, first = run(dtype), run("auto")
    assert nothing == first == (0, 0)
    for setting in (dtype, "auto"):  # each finds its own, and the audits of an opening accept them
        generated, scored = run(setting)
        assert generated == 2
        assert scored > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_purge_by_text_removes_rounded_prefixes(tmp_path: Path, dtype: Any) -> None:
    causal, store, tokenizer = small_llama(), tmp_path / "store", tiny_tokenizer()
    for setting in (dtype, "auto"):
        config = CacheConfig(prefix_dtype=setting, prefix_block=4)
        with LLMCache.open(store, causal, tokenizer=tokenizer, config=config) as cache:
            for text in (SECRET, OTHER, f"{OTHER} w150 w151 w152 w153 w154", f"w90 w91 {SECRET} w92"):
                cache.generate([text], max_new_tokens=4, do_sample=False)
    assert holding(store, SECRET)
    purge_documents(store, texts=[SECRET], reader=tokenizer)
    assert holding(store, SECRET) == []
    assert holding(store, OTHER)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [0, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_memory_and_models_of_16_bits(tmp_path: Path, dtype: Any, memory: int, own: torch.dtype) -> None:
    """Blocks come from files or from a device cache, and go to tensors of the model's dtype; audits accept them."""
    if own != torch.float32 and dtype != "int8" and dtype != str(own).removeprefix("torch."):
        pytest.skip("this combination is refused")
    model, tokenizer, rows = small_llama().to(own), tiny_tokenizer(), texts(5, [(0, 70, 9), (1, 50, 20), (2, 33, 3)])
    call = batch(rows)
    with torch.no_grad():
        expected = model(**call)
    config = CacheConfig(prefix_dtype=dtype, device_bytes=memory, stand_aside=False)
    for opening in range(3):
        with (
            LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache,
            cache.attached(),
            torch.no_grad(),
        ):
            for _ in range(2):
                found = model(**call)
                assert found.logits.dtype == own
                assert_same(found, expected, call["attention_mask"], 0.02 if own == torch.float32 else 0.06)
            counters = cache.stats().counters
            assert counters.prefix.restored >= 150
            assert counters.exact_mismatches == 0
            assert bool(counters.exact_audits) is bool(opening)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["stories260k-llama", "babyllama105-llama"])
def test_audits_accept_results_that_were_computed_after_rounded_prefixes(tmp_path: Path, name: str, dtype: Any) -> None:
    model, tokenizer = real(name)
    prompts = list(dict.fromkeys(prompts_of(name, tokenizer, 20, 150)))
    config = CacheConfig(prefix_dtype=dtype, answers=True, prefix_block=8, stand_aside=False, exact_audits=100)
    for first in ([" a"], [" the cat", " she said"], [" the cat", " she said"]):
        with LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache:
            cache.score(prompts, first)
            if len(first) > 1:
                cache.generate(prompts, max_new_tokens=8, do_sample=False)
            counters = cache.stats().counters
    assert counters.exact_audits > 20
    assert counters.exact_mismatches == 0

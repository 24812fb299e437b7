"""The hit rate of documents, rows of attached models and prompts, in statistics, reports and totals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmcache import CacheConfig, LLMCache
from llmcache.report.totals import TIERS, RunTotals
from tests import kinds
from tests.architectures import model, rows, states
from tests.small_sentences import sentences, tiny_folder

hf: Any = transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def totals(cache: LLMCache) -> RunTotals:
    """Return the totals of the opening, checked against the statistics."""
    stats = cache.stats()
    found = RunTotals.of(stats.counters.as_dict())
    assert sum(found.tiers) == pytest.approx(found.documents) == stats.counters.requests
    assert found.hit_rate == pytest.approx(stats.hit_rate)
    return found


@pytest.mark.parametrize("kind", sorted(kinds.MAKERS))
def test_every_kind_of_model_counts(folder: str, tmp_path: Path, kind: str) -> None:
    texts: list[Any] = sentences(6)
    if kind == "CrossEncoder":
        texts = list(zip(texts, texts[::-1], strict=True))
    with LLMCache.open(tmp_path / "store", kinds.MAKERS[kind](folder)) as cache:
        assert cache.stats().hit_rate == 0
        for expected in (0, 1 / 2, 2 / 3):
            list(cache.run(texts))
            assert cache.stats().hit_rate == pytest.approx(expected)
        totals(cache)


def test_rows_of_attached_models_count_by_the_layers_that_were_skipped(tmp_path: Path) -> None:
    one, (ids, mask) = model("bert"), rows(9, 5, 7, 3)
    with LLMCache.open(tmp_path / "store", one, config=CacheConfig(layers=(1,))) as cache, cache.attached():
        states(one, ids, mask)
        assert cache.stats().hit_rate == 0
        states(one, ids, mask)  # enters after two of four layers
        assert cache.stats().hit_rate == pytest.approx(1 / 4)
        assert cache.stats().counters.attached_rows == 8
        found = totals(cache)
    assert dict(zip(TIERS, found.tiers, strict=True))["from states"] == pytest.approx(2)
    assert "8 rows of attached models" in repr(cache.stats())


def test_prompts_count_by_the_tokens_that_were_reused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, intermediate_size=64,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor(np.random.default_rng(0).integers(2, 99, (2, 40)))
    config = CacheConfig(prefix_block=8)
    with LLMCache.open(tmp_path / "store", decoder, config=config) as cache, cache.attached(), torch.inference_mode():
        for _ in range(2):
            decoder(input_ids=ids, use_cache=True)
        prefix = cache.stats().counters.prefix
        assert prefix.prompts == 4
        assert prefix.restored > 0
        assert cache.stats().hit_rate == pytest.approx(1 - prefix.computed / prefix.tokens)
        totals(cache)


def test_documents_of_a_cache_with_layer_banks_are_counted_once(folder: str, tmp_path: Path) -> None:
    texts = sentences(6)
    with LLMCache.open(
        tmp_path / "store", kinds.sentence_transformer(folder), config=CacheConfig(layers=(0,))
    ) as cache:
        cache.encode(texts)
        cache.encode(texts)
        assert cache.stats().counters.attached_rows == 0
        assert cache.stats().hit_rate == pytest.approx(1 / 2)

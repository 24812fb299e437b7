"""Prompts with one beginning under a byte budget: their ends are evicted, the beginning stays."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcache import CacheConfig, LLMCache
from llmcache.indexes.eviction.budget import candidates, current
from llmcache.indexes.eviction.policies import POLICIES
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from tests.cache.test_purge_decoders import model as small_llama
from tests.decoders.test_prefix_cache import batch, one_thread
from tests.threads import tiny_tokenizer

__all__ = ["one_thread"]  # fixture

SHARED = np.random.default_rng(0).integers(4, 300, 48).tolist()


def end(number: int) -> list[int]:
    return np.random.default_rng(1000 + number).integers(4, 300, 64).tolist()  # type: ignore[no-any-return]


def kept_blocks(folder: Path, rows: list[list[int]]) -> list[int]:
    """Return how many of the first blocks of each row the store has in a chain from the start on."""
    counts, stored = [], set[bytes]()
    with closing(Store.open(folder)) as store:
        ((namespace, space),) = store.manifest.namespaces.items()
        for name, facts in space.banks.items():
            if name.startswith("prefix"):
                bank = store.bank(namespace, name, lambda facts=facts: facts, NearChoice(index="flat"))  # type: ignore[misc]
                stored |= {ids.tobytes() for ids in bank.tokens_of(bank.near.live())}
    for row in rows:
        blocks = [np.array(row[at : at + 16], np.int32).tobytes() in stored for at in range(0, len(row) - 15, 16)]
        counts.append(blocks.index(False) if False in blocks else len(blocks))
    return counts


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_beginning_of_many_prompts_stays_under_a_budget(tmp_path: Path, policy: Any, dtype: Any) -> None:
    model, tokenizer = small_llama(), tiny_tokenizer()
    config = CacheConfig(max_bytes=1 << 20, policy=policy, prefix_dtype=dtype, stand_aside=False, commit_seconds=1e-9)
    rows = [SHARED + end(number) for number in range(60 if dtype == "auto" else 160)]
    with (
        LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache,
        cache.attached(),
        torch.no_grad(),
    ):
        for start in range(0, len(rows), 4):
            model(**batch(rows[start : start + 4], positions=False), use_cache=True)
    kept = kept_blocks(tmp_path / "store", rows)
    assert min(kept) >= 3  # the blocks of the beginning
    assert sum(count == 3 for count in kept) > len(rows) / 4  # whose ends were evicted
    assert sum(count == 7 for count in kept) > 4  # and the others are whole


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_evicted_from_the_ends_of_prompts(tmp_path: Path, policy: str) -> None:
    model, tokenizer = small_llama(), tiny_tokenizer()
    config = CacheConfig(stand_aside=False, commit_seconds=1e-9)
    rows = [SHARED + end(number) for number in range(24)]
    with (
        LLMCache.open(tmp_path / "store", model, tokenizer=tokenizer, config=config) as cache,
        cache.attached(),
        torch.no_grad(),
    ):
        for start in (0, 12):
            model(**batch(rows[start : start + 12], positions=False), use_cache=True)
    with closing(Store.open(tmp_path / "store")) as store:
        before = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
        assert evict(store, before // 2, policy=policy).rows > 20
    kept = kept_blocks(tmp_path / "store", rows)
    assert min(kept) >= 3
    assert sum(kept) < 24 * 7 * 0.75
    with closing(Store.open(tmp_path / "store")) as store:  # no block is left without the one before it
        usage = candidates(store.folder, current(store.folder)).usage
        assert usage.previous is not None
        assert (usage.previous < 0).sum() == 1

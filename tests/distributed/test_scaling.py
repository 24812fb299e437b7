"""Shards, and the size calculations of very large stores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from llmcache.bench.scale import (
    INDEX,
    LOOK_UP,
    Job,
    arithmetic,
    manifest_bytes_per_segment,
)
from llmcache.distributed.sharding import shard_of
from llmcache.errors import ConfigError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from tests.conftest import Command

BENCH = Path(__file__).parents[2] / "data" / "bench"


def test_equal_texts_meet_in_one_shard_and_shards_are_equally_full() -> None:
    texts = [f"document {i % 5000}" for i in range(10_000)]
    found = shard_of(texts, 8)
    assert (found[:5000] == found[5000:]).all()
    counts = np.bincount(found[:5000], minlength=8)
    assert counts.sum() == 5000
    assert (np.abs(counts - 625) < 5 * np.sqrt(625)).all()
    by_hand = int.from_bytes(hashlib.sha256(b"document 7").digest()[:8], "big") % 8
    assert found[7] == by_hand
    assert shard_of([], 3).tolist() == []
    assert set(shard_of(["a", "\ud800"], 1).tolist()) == {0}
    with pytest.raises(ConfigError, match="at least one shard, got 0"):
        shard_of(["a"], 0)


def test_a_segment_takes_in_a_manifest_what_the_arithmetic_says(store: Path) -> None:
    with_segments, opened = [], Store.open(store, create=True)
    opened.declare("default", {"model": "m"}, {})
    bank = opened.bank("default", "output", lambda: BankFacts("float32", 384, 1, 384), NearChoice())
    for start in range(0, 4000, 1000):
        numbers = np.arange(start, start + 1000, dtype=np.uint64)
        keys = np.stack([numbers, numbers], 1)
        bank.put(
            keys, np.ones((1000, 384), np.float32), tokens=[np.zeros(20, np.int32)] * 1000, sources=[""] * 1000,
            features=np.ones((1000, 384), np.float32), cost=np.ones(1000, np.float32),
        )  # fmt: skip
        opened.commit()
        with_segments.append(max(store.glob("m-*")).stat().st_size)
    opened.close()
    assert np.diff(with_segments).mean() == pytest.approx(manifest_bytes_per_segment(), rel=0.05)


def test_the_constants_are_those_that_were_recorded() -> None:
    index = {row["index"]: row for row in json.loads((BENCH / "index-100000.json").read_text())["rows"]}
    for kind in INDEX:
        assert INDEX[kind] == pytest.approx(index[kind]["bytes_per_vector"], rel=0.2)
        assert LOOK_UP[kind] == pytest.approx(index[kind]["ms_per_query"] / 1000, rel=1)


def test_the_arithmetic_adds_up_over_the_shards(llmcache: Command) -> None:
    rows = {row["quantity"]: row for row in arithmetic(Job(documents=1e6, shards=4))}
    assert rows["entries"]["in all"] == 4 * rows["entries"]["a shard"] == 1e6
    assert rows["disk, bytes"]["in all"] == pytest.approx(1e6 * (6 * 384 + 600 + 118.8))
    done = llmcache("bench", "scale", "--documents", "1e6", "--shards", "4", "--json")
    assert json.loads(done.out)["rows"] == list(rows.values())
    assert "memory of keys" in llmcache("bench", "scale").out
    for wrong in (["--index", "flatt"], ["--rate", "0"], ["--memory", "lots"]):
        assert llmcache("bench", "scale", *wrong).code == 2

"""Payoff: banks whose reuse costs more than the model are bypassed, one by one, with a warning."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.banks.break_even import LEAST, PROBED, Profile
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.payoff import (
    PROFILED_ROWS,
    Payoff,
    profiled,
    sample,
)
from llmcache.banks.reader import BankReader
from llmcache.indexes.bank import Bank
from tests.conftest import Command

TEXTS = [f"document {i}" for i in range(LEAST + 200)]


@pytest.fixture(scope="module")
def filled(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("worth") / "store"
    with LLMCache.open(store, model) as cache:
        cache.encode(TEXTS)
    return store


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Delay every read of entries, as on a slow disk."""
    read = Bank.read

    def slow(self: Bank, rows: Any, *, count: bool = True) -> Any:
        time.sleep(seconds)
        return read(self, rows, count=count)

    monkeypatch.setattr(Bank, "read", slow)


def test_entries_are_reused_where_loading_them_is_quicker_than_the_model(
    filled: Path, model: SentenceTransformer
) -> None:
    with LLMCache.open(filled, model) as cache:
        tiers = {one.tier for one in cache.run(TEXTS)}
        (decision,) = cache.stats().worth
    assert tiers == {"exact"}
    assert (decision.bank, decision.state) == ("output", "on")
    assert decision.profile is not None
    assert not decision.profile.measured, "it is clear from what was recorded"
    assert decision.profile.compute > decision.profile.load > 0
    assert decision.profile.bytes == 384 * 4
    assert decision.saved > decision.spent > 0


def test_on_a_disk_slower_than_the_model_the_cache_stands_aside_and_says_so(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = model.encode(TEXTS)
    slowed(monkeypatch, 5.0)
    with LLMCache.open(filled, model) as cache, caplog.at_level(logging.WARNING, "llmcache"):
        before = len(cache)
        found = list(cache.run(TEXTS))
        counters, (decision,) = cache.stats().counters, cache.stats().worth
        assert len(cache) == before, "nothing is stored twice"
    hits = sum(one.tier == "exact" for one in found)
    assert hits / len(TEXTS) == pytest.approx(PROBED, abs=0.04), "a few are still looked up"
    assert counters.left_alone == len(TEXTS) - hits
    np.testing.assert_allclose(np.stack([one.output for one in found]), expected, atol=2e-6)
    assert decision.state == "aside"
    assert any("costs more than it saves" in one.message for one in caplog.records)


def test_what_is_stored_is_always_reused_where_that_is_asked_for(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 0.5)
    with LLMCache.open(filled, model, config=CacheConfig(stand_aside=False)) as cache:
        assert {one.tier for one in cache.run(TEXTS)} == {"exact"}
        assert [one.state for one in cache.stats().worth] == ["always on"]


def test_a_small_bank_is_not_profiled(model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(TEXTS[:100])
        slowed(monkeypatch, 0.2)
        assert {one.tier for one in cache.run(TEXTS[:100])} == {"exact"}
        assert cache.stats().worth[0].profile is None


def test_a_layer_that_is_slower_to_load_than_to_compute_is_neither_loaded_nor_kept(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk: Any = model.transformers_model
    with LLMCache.open(store, model, config=CacheConfig(layers=(2,), commit_seconds=1e6)) as cache:
        tokenizer: Any = model.tokenizer
        inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
        with cache.attached(), torch.no_grad():
            trunk(**inputs)
        cache.commit()
        slowed(monkeypatch, 2.0)
        rows = {name: part[:512] for name, part in inputs.items()}
        with cache.attached(), torch.no_grad():
            found = trunk(**rows).last_hidden_state
        other = tokenizer([f"another one, {i}" for i in range(64)], return_tensors="pt", padding=True)
        before = cache._layers.attachment(model).banks.banks[2]
        count = len(before)
        with cache.attached(), torch.no_grad():
            trunk(**other)
        assert len(before) == count, "states that are not worth loading are not kept either"
        layer = cache.stats().counters.layer("layer-2")
        states = {one.bank: one.state for one in cache.stats().worth}
    assert states["layer-2"] == "aside"
    assert layer.hits < 0.2 * 512
    with torch.no_grad():
        seen = rows["attention_mask"].bool()
        np.testing.assert_allclose(found[seen], trunk(**rows).last_hidden_state[seen], atol=2e-5)


def test_a_profile_is_of_few_entries_and_of_what_they_hold(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLMCache.open(filled, model) as cache:
        bank = cache._bank
        rows = sample(bank)
        assert len(rows) <= PROFILED_ROWS
        recorded = profiled(bank)
        assert not recorded.measured
        assert recorded.compute == pytest.approx(bank.cost(rows) / len(rows))
        assert recorded.bytes == 384 * 4
        monkeypatch.setattr(Bank, "cost", lambda self, rows: 1e-4 * len(rows))
        slowed(monkeypatch, 0.01)
        tried = profiled(bank, lambda few: 0.25 * len(few))
        assert tried.measured, "here it is in doubt"
        assert tried.compute == pytest.approx(0.25)


def test_a_profile_knows_when_nothing_is_known_of_the_model() -> None:
    assert Profile(10, 0.0, False, 1.0, 1.0, 8.0).pays
    assert Profile(10, 3.0, True, 1.0, 1.0, 8.0).pays
    assert not Profile(10, 1.0, True, 1.0, 1.0, 8.0).pays
    assert Profile(10, 3.0, True, 1.0, 2.0, 8.0).load_per_byte == 0.25


def test_reuse_that_turns_out_slower_than_the_profile_is_left_alone_later(
    filled: Path, model: SentenceTransformer
) -> None:
    with LLMCache.open(filled, model) as cache:
        worth = Payoff(cache._bank, "output", on=True)
        assert len(worth.select_for_lookup(10)) == 10
        rows = np.arange(LEAST)
        worth.served(rows, 10 * cache._bank.cost(rows))
        assert not worth.pays
        assert len(worth.select_for_lookup(1000)) < 200
        for _ in range(200):
            worth.served(rows[:256], 0.0)
        assert worth.pays


def test_stats_measures_banks_without_the_model_when_asked(filled: Path, llmcache: Command) -> None:
    found = json.loads(llmcache("stats", filled, "--profile", "--json").out)["profile"]["default output"]
    assert found["pays"]
    assert not found["measured"]
    assert found["compute"] > found["look_up"] + found["load"] > 0
    assert "profile" not in json.loads(llmcache("stats", filled, "--json").out)
    assert "pays" in llmcache("stats", filled, "--profile").out


# -- memory above the files -------------------------------------------------------------------------------------


def test_beside_a_slow_file_what_memory_holds_is_reused_and_nothing_is_read_for_it(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = model.encode(TEXTS, convert_to_tensor=True)
    slowed(monkeypatch, 0.25)
    read, plain = set[int](), Bank.read

    def noted(self: Bank, rows: Any, *, count: bool = True) -> Any:
        read.update(rows.tolist())
        return plain(self, rows, count=count)

    monkeypatch.setattr(Bank, "read", noted)
    config = CacheConfig(device_bytes=1 << 22)
    with LLMCache.open(filled, model, config=config) as cache, caplog.at_level(logging.WARNING, "llmcache"):
        cache.encode(TEXTS, convert_to_tensor=True)
        levels, counters = cache.levels, cache.stats().counters
        assert levels is not None
        assert levels.on_device is not None
        for _ in range(3):
            held = set(np.flatnonzero(levels.holds(np.arange(len(TEXTS)))).tolist())
            read.clear()
            device, alone = levels.counters.device, counters.left_alone
            found = cache.encode(TEXTS, convert_to_tensor=True)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
            assert held
            assert not held & read, "what memory holds is not read"
            assert levels.counters.device - device == len(held), "and all of it is given"
            assert counters.left_alone - alone == len(TEXTS) - len(held) - len(read)
            assert len(levels.on_device) == len(held) + len(read), "the few that are looked up fill it"
        (decision,) = cache.stats().worth
        assert decision.state == "memory"
        assert decision.held == levels.counters.device
        assert decision.held_saved > decision.held_spent > 0
        assert any("but for a few documents and entries in memory" in one.message for one in caplog.records)
        before = counters.left_alone
        cache.encode(TEXTS)  # uses no entry of that bank
        assert (counters.left_alone - before) / len(TEXTS) > 1 - PROBED - 0.04


def test_what_memory_saves_speaks_for_loading_until_more_is_spent_than_saved(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLMCache.open(filled, model) as cache:
        bank, rows = cache._bank, np.arange(LEAST)
        worth, levels = Payoff(bank, "output", on=True), DeviceCache(bank, "cpu", device_bytes=1 << 22)
        cost, none = bank.cost(rows), np.zeros(LEAST, np.bool_)
        reader, keys = BankReader(bank, worth, levels), bank.keys(rows)
        assert len(reader.select(10, keys[:10])[0]) == 10
        worth.gathered(rows, none, 3 * cost, 3 * cost)
        assert worth.decision().state == "memory"
        monkeypatch.setattr(worth._balance, "select_for_lookup", lambda n: np.array([3, 900]))
        assert [chosen.tolist() for chosen in reader.select(LEAST, keys)] == [[3, 900], []]
        levels.gather(rows[:200])
        held = [row for row in range(200) if row != 3]
        assert [chosen.tolist() for chosen in reader.select(LEAST, keys)] == [[3, 900], held]
        worth.gathered(rows, ~none, 0.01 * cost, 0.0)
        assert worth.decision().state == "memory", "3 were spent and 2 saved"
        for _ in range(4):
            worth.gathered(rows, ~none, 0.01 * cost, 0.0)
        decision = worth.decision()
        assert (decision.state, decision.held) == ("on", 5 * LEAST)
        assert decision.held_spent == pytest.approx(0.01 * decision.held_saved, rel=0.1)
        worth.gathered(rows, none, 30 * cost, 30 * cost)
        assert worth.decision().state == "memory"


def test_memory_that_takes_longer_than_the_model_is_left_alone_too(
    filled: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(self: Bank, keys: Any) -> Any:
        raise AssertionError("no key is looked up")

    with LLMCache.open(filled, model) as cache:
        bank, rows = cache._bank, np.arange(LEAST)
        worth, levels = Payoff(bank, "output", on=True), DeviceCache(bank, "cpu", device_bytes=1 << 22)
        worth.gathered(rows, np.ones(LEAST, np.bool_), 3 * bank.cost(rows), 0.0)
        assert worth.decision().state == "aside"
        levels.gather(rows)
        keys = bank.keys(rows)
        reader = BankReader(bank, worth, levels)
        reader.select(1)  # the profile, which looks up keys, is made before the first look-up
        monkeypatch.setattr(worth._balance, "select_for_lookup", lambda n: np.array([3]))
        monkeypatch.setattr(Bank, "find", asked)
        assert [chosen.tolist() for chosen in reader.select(LEAST, keys)] == [[3], []]

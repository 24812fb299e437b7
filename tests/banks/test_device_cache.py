"""Device cache: rows in device and host memory, compared with plain reads of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaModel

from llmcache import CacheConfig, LLMCache
from llmcache.banks.device_cache import ClockTable, DeviceCache
from llmcache.encoding import executor as execution
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.model.async_batch import one_ahead
from llmcache.planning.purging import keys_of_texts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WIDTH = 24
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def values_of(numbers: NDArray[np.int64], dtype: str = "float32") -> NDArray[np.float32]:
    """Values stored under each row number, exact in every dtype except int8."""
    random = np.random.default_rng(5).integers(-64, 64, (10_000, WIDTH)) / 32
    return np.asarray(random[numbers], np.float32)


def put(bank: Bank, numbers: NDArray[np.int64]) -> None:
    keys = np.stack([numbers.astype(np.uint64) + 1, np.full(len(numbers), 7, np.uint64)], axis=1)
    bank.put(
        keys, values_of(numbers), tokens=[np.array([n], np.int32) for n in numbers], sources=[""] * len(numbers),
        features=np.zeros((len(numbers), 2), np.float32), cost=np.zeros(len(numbers), np.float32),
    )  # fmt: skip


def opened(folder: Path, count: int = 0, dtype: str = "float32") -> tuple[Store, Bank]:
    """Store with rows 0 to count - 1, half of them sealed in segments."""
    store = Store.open(folder, create=True)
    if store.namespace("n") is None:
        store.declare("n", {}, {}, "")
    bank = store.bank("n", "output", lambda: BankFacts(dtype, WIDTH, 1, 2), NearChoice(index="flat", projection="none"))
    for start in range(0, count, 500):
        put(bank, np.arange(start, min(start + 500, count)))
        if start < count // 2:
            store.commit()
    return store, bank


@pytest.mark.parametrize("slots", [1, 7, 50])
def test_a_table_holds_what_was_placed_last_and_never_two_rows_in_one_slot(slots: int) -> None:
    table, random = ClockTable(slots, 1, torch.float32, torch.device("cpu")), np.random.default_rng(slots)
    for _ in range(300):
        rows = random.permutation(200)[: random.integers(1, slots + 1)]
        fresh = rows[table.find(rows) < 0]
        slots_ = table.place(fresh)
        assert len(set(slots_.tolist())) == len(fresh)
        table.values[torch.from_numpy(slots_), 0] = torch.from_numpy(fresh).float()
        assert (table.find(fresh) == slots_).all()
        everything = table.find(np.arange(200))
        held = np.flatnonzero(everything >= 0)
        assert len(set(everything[held].tolist())) == len(held) == len(table) <= slots
        np.testing.assert_array_equal(table.values[torch.from_numpy(everything[held]), 0].numpy(), held)


def test_rows_that_are_asked_for_again_and_again_stay() -> None:
    table = ClockTable(100, 1, torch.float32, torch.device("cpu"))
    loved = np.arange(30)
    table.place(loved)
    for start in range(1000, 3000, 20):
        table.find(loved)
        table.place(np.arange(start, start + 20))
    assert (table.find(loved) >= 0).all()


def test_asking_whether_rows_are_held_is_no_use_of_them(tmp_path: Path) -> None:
    store, bank = opened(tmp_path / "s", 1000)
    levels = DeviceCache(bank, "cpu", device_bytes=50 * 4 * WIDTH, pinned_bytes=100 * 4 * WIDTH)
    assert not levels.holds(np.arange(-1, 1000)).any()
    levels.gather(np.arange(40))
    levels.gather(np.arange(100, 140))
    held = levels.holds(np.array([-1, 0, 39, 100, 139, 140, 10**6]))
    assert held.tolist() == [False, True, True, True, True, False, False]
    assert levels.on_device is not None
    assert levels.on_host is not None
    recent = [table._recent.copy() for table in (levels.on_device, levels.on_host)]
    levels.holds(np.arange(1000))
    assert [table._recent.tolist() for table in (levels.on_device, levels.on_host)] == [one.tolist() for one in recent]
    assert levels.counters.seconds > 0
    before = levels.counters.seconds
    levels.gather(np.arange(100, 140))
    assert levels.counters.seconds == before, "no file was read"
    bank.renumberings += 1  # as after `reload`
    assert not levels.holds(np.arange(1000)).any()
    store.close()


def test_rows_that_are_dropped_leave_nothing_in_memory() -> None:
    table = ClockTable(10, 1, torch.float32, torch.device("cpu"))
    slots = table.place(np.arange(5))
    table.values[torch.from_numpy(slots), 0] = 9.0
    table.drop(np.array([1, 3, 77]))
    assert (table.find(np.arange(5)) >= 0).tolist() == [True, False, True, False, True]
    assert int((table.values == 9).sum()) == len(table) == 3
    table.clear()
    assert not table.values.any()
    assert (table.find(np.arange(5)) == -1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(("on_device", "pinned"), [(0, 0), (300, 0), (0, 400), (100, 600), (5000, 5000)])
def test_rows_are_those_of_a_plain_read_wherever_they_lie(
    tmp_path: Path, device: str, dtype: str, on_device: int, pinned: int
) -> None:
    store, bank = opened(tmp_path / "s", 2000, dtype)
    row = WIDTH * {"float32": 4, "int8": 4}.get(dtype, 2)
    levels = DeviceCache(bank, device, device_bytes=on_device * row, pinned_bytes=pinned * row)
    random = np.random.default_rng(1)
    for size in (1, 40, 700, 40, 700, 2000, 300):
        rows = random.choice(2000, size)  # with repeats
        found, intact = levels.gather(rows)
        assert intact.all()
        assert found.device.type == device
        np.testing.assert_array_equal(found.float().cpu().numpy(), np.asarray(bank.read(rows).values))
    rows = np.arange(50, 250)
    for _ in range(2):
        found, _ = levels.gather(rows)
        np.testing.assert_array_equal(found.float().cpu().numpy(), np.asarray(bank.read(rows).values))
    counted = levels.counters
    assert counted.device + counted.pinned + counted.files == 3781 + 400
    assert (counted.device > 0, counted.pinned > 0) == (on_device > 0, pinned > 0 and on_device < 2000)
    if on_device == 5000:
        before = counted.files
        levels.gather(np.arange(2000))
        assert counted.files - before <= 2000
        before = counted.files
        levels.gather(np.arange(2000))
        assert counted.files == before
    store.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_damaged_row_is_told_and_never_kept(tmp_path: Path, device: str) -> None:
    store, bank = opened(tmp_path / "s", 1000)
    store.commit()
    store.close()
    file = sorted((tmp_path / "s" / "seg").glob("*.seg"))[0]
    raw = bytearray(file.read_bytes())
    raw[70] ^= 1
    file.chmod(0o600)
    file.write_bytes(raw)
    store, bank = opened(tmp_path / "s")
    levels = DeviceCache(bank, device, device_bytes=1 << 20, pinned_bytes=1 << 20)
    for _ in range(2):
        found, intact = levels.gather(np.arange(1000))
        assert (~intact).sum() == 1
        good = np.flatnonzero(intact)
        np.testing.assert_array_equal(found.cpu().numpy()[good], np.asarray(bank.read(np.arange(1000)).values)[good])
    assert levels.on_device is not None
    assert levels.on_host is not None
    assert len(levels.on_device) == len(levels.on_host) == 999
    store.close()


def test_what_a_bank_gives_up_is_given_up(tmp_path: Path) -> None:
    store, bank = opened(tmp_path / "s", 1000)
    levels = DeviceCache(bank, "cpu", device_bytes=1 << 20, pinned_bytes=1 << 20)
    assert levels.on_device is not None
    levels.gather(np.arange(1000))
    waiting = sum(len(one) for one in bank.pieces.pending)
    assert bank.drop_pending() == waiting > 0
    levels.gather(np.arange(3))
    assert len(levels.on_device) == 1000 - waiting
    assert (levels.on_device.find(np.arange(1000 - waiting, 1000)) == -1).all()
    other, _ = opened(tmp_path / "s")
    put(other.bank("n", "output", lambda: bank.facts, NearChoice()), np.arange(5000, 5100))
    other.commit()
    other.close()
    store.reload()  # may renumber rows
    levels.gather(np.arange(3))
    assert len(levels.on_device) == 3
    store.close()


def test_memory_that_cannot_be_had_is_an_error_that_says_so(tmp_path: Path) -> None:
    store, bank = opened(tmp_path / "s")
    with pytest.raises(ConfigError, match="give device_bytes and pinned_bytes that fit"):
        DeviceCache(bank, "cpu", device_bytes=1 << 60)
    with pytest.raises(ConfigError, match="pinned_bytes is a whole number"):
        CacheConfig(pinned_bytes=-1)
    store.close()


@pytest.mark.parametrize("device", DEVICES)
def test_encode_gives_tensors_with_hits_and_misses_mixed(
    fresh_model: SentenceTransformer, queries: list[str], tmp_path: Path, device: str
) -> None:
    model = fresh_model.to(device)
    config: Any = CacheConfig(device_bytes=60 * 1536, pinned_bytes=100 * 1536)
    expected = model.encode(queries[:60], convert_to_tensor=True, normalize_embeddings=True)
    with LLMCache.open(tmp_path / "s", model, config=config) as cache:
        cache.encode(queries[:40])
        for _ in range(2):
            mixed = [*queries[:60], *queries[20:50]]
            found = cache.encode(mixed, convert_to_tensor=True, normalize_embeddings=True)
            assert (found.device, found.dtype) == (expected.device, expected.dtype)
            torch.testing.assert_close(found[:60], expected, atol=2e-5, rtol=0)
            assert torch.equal(found[60:], found[20:50])
        assert cache.levels is not None
        assert cache.levels.counters.device > 0
        stored = cache.encode(queries[:60])
        assert np.array_equal(cache.encode(queries[:60], convert_to_tensor=True).cpu().numpy(), stored)
        assert cache.encode([], convert_to_tensor=True).shape == model.encode([], convert_to_tensor=True).shape
        assert cache.stats().counters.misses == 60


def test_a_purged_document_is_not_answered_from_memory(
    model: SentenceTransformer, queries: list[str], tmp_path: Path
) -> None:
    with LLMCache.open(tmp_path / "s", model, config=CacheConfig(device_bytes=1 << 20)) as cache:
        cache.encode(queries[:20])
        cache.commit()
        cache.encode(queries[:20], convert_to_tensor=True)
        other = Store.open(tmp_path / "s")
        assert purge(other, Doomed(keys=keys_of_texts(other, "default", queries[:5]))).rows == 5
        other.close()
        cache.reload()
        before = cache.stats().counters.misses
        cache.encode(queries[5:20], convert_to_tensor=True)
        assert cache.levels is not None
        assert cache.levels.on_device is not None
        assert len(cache.levels.on_device) == 15
        cache.encode(queries[:20], convert_to_tensor=True)
        assert cache.stats().counters.misses == before + 5


@pytest.mark.parametrize("device", DEVICES)
def test_beginnings_are_restored_from_memory_as_from_files(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    config_of: Any = LlamaConfig
    model_of: Any = LlamaModel
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: Any = model_of(config_of(vocab_size=100, num_key_value_heads=2, **sizes)).eval().to(device)
    begin = torch.randint(100, (1, 77))
    asked = [torch.cat([begin, torch.randint(100, (1, 9))], 1).to(device) for _ in range(4)]
    with torch.no_grad():
        expected = [model(ids).last_hidden_state for ids in asked]
    found = {}
    for name, config in {
        "files": CacheConfig(),
        "memory": CacheConfig(device_bytes=1 << 20, pinned_bytes=1 << 20),
        "too little": CacheConfig(device_bytes=30_000),  # two blocks
    }.items():
        with LLMCache.open(tmp_path / name, model, config=config) as cache, torch.no_grad():
            with cache.attached():
                found[name] = [model(ids).last_hidden_state for ids in asked]
            counters = cache.stats().counters.prefix
        assert counters.restored >= 3 * 64
    for name, states in found.items():
        for one, other, wanted in zip(states, found["files"], expected, strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-5, rtol=0)
            assert torch.equal(one, other), name


def test_beginnings_in_memory_are_restored_while_the_files_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config_of: Any = LlamaConfig
    model_of: Any = LlamaModel
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = model_of(config_of(vocab_size=100, num_key_value_heads=2, **sizes)).eval()
    known, other = torch.randint(100, (1, 64)), torch.randint(100, (1, 64))
    read, plain = [], Bank.read

    def noted(self: Bank, rows: Any, *, count: bool = True) -> Any:
        read.extend(rows.tolist())
        return plain(self, rows, count=count)

    def asked(begin: torch.Tensor) -> int:
        """Return the number of tokens restored for a prompt with this prefix, after checking the output."""
        ids = torch.cat([begin, torch.randint(100, (1, 9))], 1)
        before = counters.restored
        with torch.no_grad():
            with cache.attached():
                found = model(ids).last_hidden_state
            torch.testing.assert_close(found, model(ids).last_hidden_state, atol=1e-5, rtol=0)
        return counters.restored - before

    with LLMCache.open(tmp_path / "s", model, config=CacheConfig(device_bytes=1 << 20)) as cache:
        counters = cache.stats().counters.prefix
        asked(known), asked(other)
        cache.commit()
        assert asked(known) == 64, "its blocks are in memory from now on"
        worth = cache._storing.worths["prefix"]
        worth.served(np.zeros(2048, np.int64), 1e6)  # a very slow disk
        assert not worth.pays
        monkeypatch.setattr(worth._balance, "_random", Never())
        monkeypatch.setattr(Bank, "read", noted)
        assert asked(known) == 64
        assert asked(torch.cat([known[:, :32], other[:, 32:]], 1)) == 32
        assert asked(other) == 0, "these would have to be read"
        assert not read
        (decision,) = (one for one in cache.stats().worth if one.bank == "prefix")
        assert (decision.state, decision.held) == ("memory", 4 + 2)


class Never:
    """Random generator that selects no document for the look-ups made while the bank is bypassed."""

    def random(self, n: int) -> NDArray[np.float64]:
        return np.ones(n)


def test_a_cache_whose_memory_cannot_be_had_says_so_once_and_serves_from_files(
    model: SentenceTransformer, queries: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LLMCache.open(tmp_path / "s", model, config=CacheConfig(device_bytes=1 << 60)) as cache:
        expected = cache.encode(queries[:5])
        for _ in range(2):
            assert np.array_equal(cache.encode(queries[:5], convert_to_tensor=True).cpu().numpy(), expected)
        assert cache.levels is None
    assert len([one for one in caplog.records if "Going on with the files alone" in one.message]) == 1


def test_what_is_tokenised_ahead_is_answered_alike(
    model: SentenceTransformer, queries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*queries[:30], *queries[10:45]]
    found = {}
    for name, ahead in (("plain", ()), ("ahead", ("cpu",))):
        monkeypatch.setattr(execution, "_AHEAD", ahead)
        with LLMCache.open(tmp_path / name, model) as cache:
            cache.encode(queries[5:10])
            found[name] = list(cache.run(asked, batch_size=2))
    for one, other in zip(*found.values(), strict=True):
        assert (one.id, one.tier) == (other.id, other.tier)
        np.testing.assert_allclose(one.output, other.output, atol=1e-6)


def test_what_is_made_ahead_comes_in_order_and_errors_in_their_turn() -> None:
    assert list(one_ahead(lambda n: 10 * n, [])) == []
    assert list(one_ahead(lambda n: 10 * n, [3, 1, 2])) == [30, 10, 20]
    results = one_ahead(lambda n: 1 // n, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)

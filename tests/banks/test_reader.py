"""Bank reader: look-ups and loads, compared with the arrays that were stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.break_even import LEAST
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.payoff import Payoff
from llmcache.banks.reader import BankReader
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

COUNT, WIDTH = 40, 6
VALUES = np.random.default_rng(3).standard_normal((COUNT, WIDTH)).astype(np.float32)
STATES = [np.random.default_rng(i).standard_normal((i % 4 + 1, WIDTH)).astype(np.float32) for i in range(COUNT)]
SECONDS = 0.25


def keys_of(numbers: NDArray[np.int64], kind: int = 0) -> Keys:
    return np.stack([numbers, np.full(len(numbers), kind)], axis=1).astype(np.uint64)


def tokens_of(numbers: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    return [np.arange(number, number + number % 3 + 1, dtype=np.int32) for number in numbers.tolist()]


def opened(folder: Path, rank: int = 1) -> tuple[Store, Bank]:
    """Open a store with one bank, named "output" for vectors and "states" for states."""
    store = Store.open(folder, create=True)
    if store.namespace("n") is None:
        store.declare("n", {}, {}, "")
    facts = BankFacts("float32", WIDTH, rank, 0)
    choice = NearChoice(index="flat", projection="none")
    return store, store.bank("n", "output" if rank == 1 else "states", lambda: facts, choice)


def filled(folder: Path, rank: int = 1) -> tuple[Store, Bank]:
    """Open a store whose bank has rows 0 to COUNT - 1: the first half in a segment, the others pending."""
    store, bank = opened(folder, rank)
    for half in np.array_split(np.arange(COUNT), 2):
        bank.put(
            keys_of(half), VALUES[half] if rank == 1 else [STATES[i] for i in half], tokens=tokens_of(half),
            sources=[""] * len(half), features=np.zeros((len(half), 0), np.float32),
            cost=np.full(len(half), SECONDS, np.float32),
        )  # fmt: skip
        bank.alias(keys_of(half, kind=1), keys_of(half))
        if not half[0]:
            store.commit()
    return store, bank


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    store, bank = filled(tmp_path / "s")
    yield bank
    store.close()


def bypassed(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Payoff:
    """Return the payoff of a bank that is slower to load than to compute; it selects no request but the first."""
    payoff = Payoff(bank, "output", on=True)
    payoff.served(np.zeros(LEAST, np.int64), 1e6)
    assert not payoff.pays
    monkeypatch.setattr(payoff._balance, "select_for_lookup", lambda n: np.arange(min(n, 1)))
    return payoff


# -- look-up ----------------------------------------------------------------------------------------------------


def test_a_row_is_found_by_its_key_if_its_token_ids_are_the_requested_ones(bank: Bank) -> None:
    asked = np.array([39, 0, 17, 17, 500, 21])
    assert BankReader(bank).lookup(keys_of(asked), tokens_of(asked)).tolist() == [39, 0, 17, 17, -1, 21]
    others = tokens_of(asked)
    others[0] = others[0] + 1
    others[2] = others[2][:-1]
    others[5] = np.append(others[5], np.int32(0))
    assert BankReader(bank).lookup(keys_of(asked), others).tolist() == [-1, 0, -1, 17, -1, -1]


def test_no_requests_find_no_rows(bank: Bank) -> None:
    reader, none = BankReader(bank), np.zeros(0, np.int64)
    assert reader.lookup(keys_of(none), []).tolist() == []
    values, intact = reader.load(none)
    assert (len(values), len(intact)) == (0, 0)


def test_a_look_up_in_memory_finds_what_the_device_cache_holds(bank: Bank) -> None:
    reader, asked = BankReader(bank, levels=DeviceCache(bank, "cpu", device_bytes=1 << 16)), np.arange(COUNT)
    assert set(reader.lookup(keys_of(asked), tokens_of(asked), in_memory=True).tolist()) == {-1}
    reader.load(np.array([4, 30]), on_device=True)
    found = reader.lookup(keys_of(asked), tokens_of(asked), in_memory=True)
    assert found[found >= 0].tolist() == [4, 30]
    assert np.flatnonzero(found >= 0).tolist() == [4, 30]
    assert set(BankReader(bank).lookup(keys_of(asked), tokens_of(asked), in_memory=True).tolist()) == {-1}


# -- load -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
def test_vectors_are_those_that_were_stored_in_the_order_of_the_rows(bank: Bank, on_device: bool) -> None:
    rows = np.array([39, 0, 17, 17, 21])
    for levels in (None, DeviceCache(bank, "cpu", device_bytes=1 << 16)):
        values, intact = BankReader(bank, levels=levels).load(rows, on_device=on_device)
        assert intact.all()
        assert isinstance(values, Tensor) == (on_device and levels is not None)
        np.testing.assert_array_equal(np.asarray(values), VALUES[rows])


def test_states_are_those_that_were_stored_one_array_for_each_row(tmp_path: Path) -> None:
    store, bank = filled(tmp_path / "s", rank=2)
    rows = np.array([39, 0, 18])
    states, intact = BankReader(bank).load(rows)
    assert intact.all()
    for state, row in zip(states, rows, strict=True):
        np.testing.assert_array_equal(state, STATES[row])
    store.close()


@pytest.mark.parametrize("device", [False, True])
def test_a_damaged_row_is_not_intact_and_is_a_miss_from_then_on(tmp_path: Path, device: bool) -> None:
    filled(tmp_path / "s")[0].close()  # `close` leaves out the pending half
    (file,) = (tmp_path / "s" / "seg").glob("*.seg")
    content = bytearray(file.read_bytes())
    place = content.index(VALUES[7].tobytes())
    content[place] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)
    store, bank = opened(tmp_path / "s")
    levels = DeviceCache(bank, "cpu", device_bytes=1 << 16) if device else None
    reader, rows = BankReader(bank, levels=levels), np.array([6, 7, 8])
    assert reader.lookup(keys_of(rows), tokens_of(rows)).tolist() == [6, 7, 8]
    values, intact = reader.load(rows, on_device=True)
    assert intact.tolist() == [True, False, True]
    np.testing.assert_array_equal(np.asarray(values)[intact], VALUES[[6, 8]])
    assert reader.lookup(keys_of(rows), tokens_of(rows)).tolist() == [6, -1, 8]
    assert reader.lookup(keys_of(rows), tokens_of(rows), in_memory=True).tolist() == (
        [6, -1, 8] if device else [-1] * 3
    )
    store.close()


def test_every_load_counts_one_use_of_each_row(bank: Bank) -> None:
    reader = BankReader(bank, levels=DeviceCache(bank, "cpu", device_bytes=1 << 16))
    for on_device in (False, True, True):
        before = {str(record["key"]): int(record["uses"]) for record in bank.use_records()}
        reader.load(np.array([3, 5]), on_device=on_device)
        after = {str(record["key"]): int(record["uses"]) for record in bank.use_records()}
        assert sum(after.values()) - sum(before.values()) == 2
        assert len(after) == 2


# -- payoff -----------------------------------------------------------------------------------------------------


def test_without_a_payoff_every_request_is_looked_up(bank: Bank) -> None:
    reader = BankReader(bank)
    assert reader.pays
    for keys in (None, keys_of(np.arange(5))):
        assert [chosen.tolist() for chosen in reader.select(5, keys)] == [[0, 1, 2, 3, 4], []]


def test_the_payoff_learns_what_a_load_saved_unless_it_is_left_out(bank: Bank) -> None:
    payoff = Payoff(bank, "output", on=True)
    reader = BankReader(bank, payoff, DeviceCache(bank, "cpu", device_bytes=1 << 16))
    reader.load(np.arange(8), counted=False)
    reader.load(np.arange(8), on_device=True, counted=False)
    assert (payoff.decision().saved, payoff.decision().spent) == (0, 0)
    reader.load(np.arange(8))
    assert payoff.decision().saved == pytest.approx(8 * SECONDS)
    assert payoff.decision().spent > 0
    assert payoff.decision().held == 0
    reader.load(np.arange(12), on_device=True)  # the first eight are in the device cache
    decision = payoff.decision()
    assert decision.saved == pytest.approx(20 * SECONDS, rel=0.01)
    assert decision.held == 8
    assert decision.held_saved == pytest.approx(8 * SECONDS)


@pytest.mark.parametrize("texts", [False, True])
def test_of_a_bypassed_bank_only_entries_in_the_device_cache_are_looked_up_beside_the_few_selected(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, texts: bool
) -> None:
    reader = BankReader(bank, bypassed(bank, monkeypatch), DeviceCache(bank, "cpu", device_bytes=1 << 16))
    assert not reader.pays
    asked = np.array([9, 500, 30, 2, 31])
    keys = keys_of(asked, kind=int(texts))
    assert [chosen.tolist() for chosen in reader.select(5, keys, texts=texts)] == [[0], []]
    reader.load(np.array([31, 9, 2]), on_device=True, counted=False)
    assert [chosen.tolist() for chosen in reader.select(5, keys, texts=texts)] == [[0], [3, 4]]
    assert [chosen.tolist() for chosen in reader.select(5, keys, texts=not texts)] == [[0], []]
    assert [chosen.tolist() for chosen in reader.select(5)] == [[0], []], "these requests use no device cache"
    without = BankReader(bank, bypassed(bank, monkeypatch))
    assert [chosen.tolist() for chosen in without.select(5, keys, texts=texts)] == [[0], []]


def test_values_of_the_device_cache_are_on_its_device_in_the_stored_dtype(bank: Bank) -> None:
    values, _ = BankReader(bank, levels=DeviceCache(bank, "cpu", device_bytes=1 << 16)).load(
        np.arange(3), on_device=True
    )
    assert isinstance(values, Tensor)
    assert (values.dtype, values.device.type, tuple(values.shape)) == (torch.float32, "cpu", (3, WIDTH))

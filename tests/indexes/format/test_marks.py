"""Tests of marks and of search within a scope: every operation keeps marks, and every index kind respects scopes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache import snapshot
from llmcache.indexes.bank import Bank
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.marks import (
    Marks,
    joined,
    kinds_in,
    kinds_of,
    mark_type,
    scoped,
    unmarked,
)
from llmcache.indexes.format.rows import HEADER, Keys
from llmcache.indexes.format.segment import records_of
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.maintenance.repair import repair
from llmcache.indexes.maintenance.sign import sign
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

FEATURES, WIDTH = 24, 8
PLAIN = NearChoice("flat", "none", 8)
SCOPES = (5, 6, 1 << 63)


def keys_of(numbers: NDArray[np.int64]) -> Keys:
    keys = np.zeros((len(numbers), 2), np.uint64)
    keys[:, 0], keys[:, 1] = numbers, 77
    return keys


def marks_for(numbers: NDArray[np.int64], kinds: int) -> Marks:
    """Return marks that contain their number."""
    marks = unmarked(len(numbers), kinds)
    marks["scope"] = np.array(SCOPES, np.uint64)[numbers % 3]
    marks["rules"], marks["pattern"] = 3, numbers % 2
    marks["fields"] = 1000 * numbers[:, None] + np.arange(kinds)
    return marks


def features_of(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.array([np.random.default_rng([3, n]).standard_normal(FEATURES) for n in numbers.tolist()], np.float32)


def bank_of(store: Store, choice: NearChoice = PLAIN) -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {}, {})
    return store.bank("default", "output", lambda: BankFacts("float32", WIDTH, 1, FEATURES), choice)


def put(bank: Bank, numbers: NDArray[np.int64], marks: Marks | None) -> None:
    values = np.ones((len(numbers), WIDTH), np.float32) * numbers[:, None]
    bank.put(
        keys_of(numbers), values, tokens=[np.array([7, number], np.int32) for number in numbers],
        sources=[str(n) for n in numbers.tolist()], features=features_of(numbers),
        cost=np.ones(len(numbers), np.float32), marks=marks,
    )  # fmt: skip


def filled(path: Path) -> None:
    """Store three segments: with marks of six kinds, with marks of no kind, and without marks, in several batches."""
    store = Store.open(path, create=True)
    bank = bank_of(store)
    for begin, kinds in ((0, 6), (100, 0), (200, None)):
        for first in range(begin, begin + 60, 20):
            numbers = np.arange(first, first + 20)
            put(bank, numbers, None if kinds is None or first == 140 else marks_for(numbers, kinds))
        store.commit()
    store.close()


def expected(number: int, kinds: int) -> Marks:
    if number >= 200 or 140 <= number < 160:
        return unmarked(1, kinds)
    known = marks_for(np.array([number]), 6 if number < 100 else 0)
    whole = unmarked(1, kinds)
    for name in ("scope", "rules", "pattern"):
        whole[name] = known[name]
    whole["fields"][:, : kinds_of(known)] = known["fields"]
    return whole


def check(path: Path, least: int) -> set[int]:
    """Check that every row of a store has its own mark. Returns the numbers of the rows."""
    assert verify(path).whole
    store = Store.open(path)
    bank = bank_of(store)
    rows = bank.near.live()
    numbers = [int(one) for one in bank.sources(rows)]
    marks = bank.marks(rows)
    for number, mark in zip(numbers, marks, strict=True):
        assert mark == expected(number, kinds_of(marks))[0], number
    for scope in SCOPES:
        found = {int(one) for one in bank.sources(bank.in_scope(scope))}
        assert found == {n for n in numbers if expected(n, 6)["scope"][0] == scope}
    assert len(numbers) >= least
    store.close()
    return set(numbers)


def reopened(path: Path, other: Path) -> Path:
    return path


def after_eviction(path: Path, other: Path) -> Path:
    store = Store.open(path)
    evict(store, int(0.8 * sum(one.stat().st_size for one in path.rglob("*") if one.is_file())))
    store.close()
    return path


def after_compaction(path: Path, other: Path) -> Path:
    store = Store.open(after_eviction(path, other))
    compact(store, small=True)
    store.close()
    return path


def after_merging(path: Path, other: Path) -> Path:
    store = Store.open(other / "one", create=True)
    put(bank_of(store), np.arange(10, 30), marks_for(np.arange(10, 30), 6))
    put(bank_of(store), np.arange(300, 310), None)
    store.commit()
    store.close()
    snapshot.merge([other / "one", path], other / "both")
    return other / "both"


def after_a_purge(path: Path, other: Path) -> Path:
    store = Store.open(path)
    purge(store, Doomed(keys=keys_of(np.array([3, 105, 205]))))
    store.close()
    return path


def after_a_copy(path: Path, other: Path) -> Path:
    snapshot.save(path, other / "saved", copy=True)
    snapshot.load(other / "saved", other / "loaded")
    return other / "loaded"


def after_repair(path: Path, other: Path) -> Path:
    for file in path.glob("seg/*.seg"):
        data = bytearray(file.read_bytes())
        data[70] ^= 255  # in the second row
        file.chmod(0o600)
        file.write_bytes(data)
    repair(path)
    return path


def after_adoption(path: Path, other: Path) -> Path:
    """Repair with a damaged newest manifest, so that its segment is adopted from its files alone."""
    newest = max(path.glob("m-*.json"))
    newest.chmod(0o600)
    newest.write_bytes(b"damaged")
    repair(path, grace=0)
    return path


def after_signing(path: Path, other: Path) -> Path:
    store = Store.open(path, trust="own", key=bytes(range(32)))
    sign(store)
    store.close()
    return path


FATES: tuple[tuple[Callable[[Path, Path], Path], int], ...] = (
    (reopened, 180), (after_eviction, 100), (after_compaction, 100), (after_merging, 190), (after_a_purge, 177),
    (after_a_copy, 180), (after_repair, 177), (after_adoption, 180), (after_signing, 180),
)  # fmt: skip


@pytest.mark.parametrize(("fate", "least"), FATES, ids=[fate.__name__ for fate, _ in FATES])
def test_a_row_keeps_its_mark(tmp_path: Path, fate: Callable[[Path, Path], Path], least: int) -> None:
    filled(tmp_path / "s")
    (tmp_path / "other").mkdir()
    check(fate(tmp_path / "s", tmp_path / "other"), least)


def test_rows_that_were_purged_leave_no_mark_behind(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    gone = marks_for(np.array([3]), 6).tobytes()[16:]
    assert any(gone in one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())
    after_a_purge(tmp_path / "s", tmp_path)
    assert not any(gone in one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())


KINDS_OF_INDEX = [
    ("flat", "none", 8), ("flat", "pca", 12), ("ivf-flat", "pca", 12), ("ivf-pq", "pca", 12), ("hnsw", "pca", 12),
    ("torch", "pca", 12), ("auto", "none", 8),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "projection", "dim"), KINDS_OF_INDEX)
@pytest.mark.parametrize("shares", [(1, 0, 0), (0.6, 0.38, 0.02), (0.02, 0.97, 0.01)])
def test_the_nearest_rows_of_a_scope_are_those_that_a_search_one_by_one_finds(
    tmp_path: Path, kind: str, projection: str, dim: int, shares: tuple[float, ...]
) -> None:
    """The reference multiplies the fingerprints of all rows of the scope, before and after sealing and eviction."""
    random = np.random.default_rng(len(kind) + dim)
    n, choice = 1500, NearChoice(kind, projection, dim)
    scopes = random.choice(np.array(SCOPES, np.uint64), n, p=shares)
    store = Store.open(tmp_path / "s", create=True)
    bank = bank_of(store, choice)
    for first in range(0, n, 250):
        numbers = np.arange(first, first + 250)
        marks = scoped(250, 0)
        marks["scope"] = scopes[numbers]
        put(bank, numbers, marks)
        if first == 500:
            store.commit()
    asked = random.standard_normal((30, FEATURES)).astype(np.float32)
    for fate in ("pending", "sealed", "reopened", "evicted"):
        if fate == "sealed":
            store.commit()
        elif fate == "reopened":
            store.close()
            store = Store.open(tmp_path / "s")
            bank = bank_of(store, choice)
        elif fate == "evicted":
            evict(store, int(0.8 * sum(one.stat().st_size for one in (tmp_path / "s").rglob("*") if one.is_file())))
        live = bank.near.live()
        numbers = np.array([int(one) for one in bank.sources(live)])
        fitted = bank.near.projection
        assert fitted is not None
        rounded = [fitted.apply(one.astype(np.float16).astype(np.float32)) for one in (features_of(numbers), asked)]
        for scope in SCOPES:
            rows, similarity = bank.nearest(asked, 2, scope=scope)
            mine = np.flatnonzero(scopes[numbers] == np.uint64(scope))
            if len(mine) < 2:
                continue
            assert np.isin(rows, live[mine]).all()
            best = np.sort(rounded[1] @ rounded[0][mine].T, axis=1)[:, ::-1][:, :2]
            near = np.isclose(similarity, best, atol=0.02 if kind == "ivf-pq" else 2e-3)
            assert near.mean() > (0.9 if "ivf" in kind or kind == "hnsw" else 0.999), (fate, scope)
        for strange in (0, 99):
            assert (bank.nearest(asked, 2, scope=strange)[0] == -1).all()
    store.close()


def test_no_row_below_the_least_similarity_is_missed_above_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s", create=True)
    bank, numbers = bank_of(store), np.arange(900)
    put(bank, numbers, marks_for(numbers, 0))
    asked = features_of(np.arange(2000, 2100))
    for scope in SCOPES:
        rows, similarity = bank.nearest(asked, 1, scope=scope)
        some, found = bank.nearest(asked, 1, scope=scope, least=0.5)
        above = similarity >= 0.5
        np.testing.assert_array_equal(some[above], rows[above])
        np.testing.assert_array_equal(found[above], similarity[above])
        assert 0 < above.sum() < len(above)
    store.close()


@pytest.mark.parametrize("nbytes", [1, 15, 17, 23, 16 + 8 * 65, 1 << 31])
def test_marks_of_an_impossible_size_are_damage(nbytes: int) -> None:
    with pytest.raises(SnapshotDamaged, match="marks"):
        kinds_in(nbytes, "a file")


@pytest.mark.parametrize("mark", [1, 8, 24, 64, 1 << 20, (1 << 32) - 1])
def test_a_header_with_another_size_of_marks_is_damage_and_nothing_else(tmp_path: Path, mark: int) -> None:
    filled(tmp_path / "s")
    store = Store.open(tmp_path / "s")
    facts = bank_of(store).facts.segments[1]
    file = tmp_path / "s" / facts.file("row").name
    data = bytearray(file.read_bytes())
    header = np.frombuffer(data[: HEADER.itemsize], HEADER).copy()
    header["mark"] = mark
    data[: HEADER.itemsize] = header.tobytes()
    file.chmod(0o600)
    file.write_bytes(data)
    with pytest.raises(SnapshotDamaged):
        records_of(store.folder, facts)
    store.close()


def test_marks_of_parts_with_different_kinds_are_joined() -> None:
    assert joined([(3, None), (0, None)]) is None
    whole = joined([(2, None), (1, marks_for(np.array([7]), 6)), (1, scoped(1, 9))])
    assert whole is not None
    assert whole.dtype == mark_type(6)
    assert whole["scope"].tolist() == [0, 0, SCOPES[1], 9]
    assert whole["fields"][2].tolist() == [7000, 7001, 7002, 7003, 7004, 7005]
    assert not whole["fields"][[0, 1, 3]].any()

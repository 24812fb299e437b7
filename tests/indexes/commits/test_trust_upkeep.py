"""Tests of maintenance of a signed store: after every operation it is still signed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from llmcache import snapshot
from llmcache.errors import StoreFenced, UntrustedSnapshot
from llmcache.indexes.bank import Bank
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

KEY = bytes(range(32))
WIDTH = 8


def keys_of(numbers: list[int]) -> Keys:
    first = np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(5)], axis=1)


def bank_of(store: Store) -> Bank:
    return store.bank("default", "output", lambda: BankFacts("float32", WIDTH, 1, 4), NearChoice())


def put(store: Store, numbers: list[int]) -> None:
    bank_of(store).put(
        keys_of(numbers),
        np.repeat(np.array(numbers, np.float32)[:, None], WIDTH, axis=1),
        tokens=[np.array([one], np.int32) for one in numbers],
        sources=[str(one) for one in numbers],
        features=np.ones((len(numbers), 4), np.float32),
        cost=np.ones(len(numbers), np.float32),
    )
    store.commit()


def held(store: Store) -> set[int]:
    numbers = list(range(40))
    rows = bank_of(store).find(keys_of(numbers))
    present = np.flatnonzero(rows >= 0)
    reading = bank_of(store).read(rows[present])
    values = np.asarray(reading.values)
    return {int(i) for i, good, one in zip(present, reading.intact, values, strict=True) if good and (one == i).all()}


def bury(store: Store, numbers: list[int]) -> None:
    """Evict exactly these entries."""
    found = eviction.candidates(store.folder, store.manifest)
    keys = np.concatenate([bank_of(store).facts.segments and _keys(store, one[2].id) for one in found.places])
    chosen = np.flatnonzero([one.tobytes() in {key.tobytes() for key in keys_of(numbers)} for one in keys])
    store.forget(eviction.drop(store.folder, store.publish, found, chosen))


def _keys(store: Store, id: str) -> Keys:
    from llmcache.indexes.format.segment import Segment

    facts = next(one for one in store.manifest.namespaces["default"].banks["output"].segments if one.id == id)
    segment = Segment.open(store.folder, facts)
    return np.asarray(segment.rows["key"][segment.live()])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A signed store of two writers, with entries 0 to 9 and 10 to 19, 7 evicted of each."""
    for first in (0, 10):
        with closing(Store.open(tmp_path / "store", create=True, trust="own", key=KEY)) as store:
            if not first:
                store.declare("default", {"model": "m"}, {})
            put(store, list(range(first, first + 10)))
            bury(store, list(range(first, first + 7)))
    return tmp_path / "store"


KEPT = {7, 8, 9, 17, 18, 19}


def test_compaction_keeps_a_signed_store_signed_and_its_writers_apart(path: Path) -> None:
    with closing(Store.open(path, trust="own", key=KEY)) as store:
        before = {one.writer for one in store.manifest.namespaces["default"].banks["output"].segments}
        assert compact(store).rows == len(KEPT)
        gc(store, 0)
    with closing(Store.open(path, trust="signed", key=KEY)) as store:
        assert held(store) == KEPT
        segments = store.manifest.namespaces["default"].banks["output"].segments
        assert ({one.writer for one in segments}, sum(one.dead for one in segments)) == (before, 0)
    assert snapshot.verify(path).whole
    assert not list(path.glob("seg/*.alive"))


def test_a_purge_leaves_neither_evicted_rows_nor_bitmaps_nor_uses_behind(path: Path) -> None:
    with closing(Store.open(path, key=KEY)) as store:
        assert held(store) == KEPT
        assert purge(store, Doomed(keys=keys_of([2, 8]))).rows == 2
    assert len(list(path.glob("seg/*.alive"))) == 1  # of the segment that nothing was purged from
    assert not list(path.glob("stat/*.use"))
    data = b"".join(one.read_bytes() for one in path.rglob("*") if one.is_file())
    assert not any(key.tobytes() in data for key in keys_of([0, 2, 8]))
    with closing(Store.open(path, key=KEY)) as store:
        assert held(store) == KEPT - {8}


def test_a_snapshot_of_a_signed_store_is_unsigned_and_holds_the_same(path: Path, tmp_path: Path) -> None:
    snapshot.save(path, tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.sig"))
    with pytest.raises(UntrustedSnapshot, match="signed with the key"):
        Store.open(tmp_path / "copy", key=KEY)
    with closing(Store.open(tmp_path / "copy")) as store:
        assert held(store) == KEPT
        put(store, [30])
    assert snapshot.verify(tmp_path / "copy").whole


def test_nothing_is_merged_into_a_signed_store_without_its_key(path: Path, tmp_path: Path) -> None:
    with closing(Store.open(tmp_path / "other", create=True)) as store:
        store.declare("default", {"model": "m"}, {})
        put(store, [30])
    before = sorted(path.rglob("*"))
    with pytest.raises(StoreFenced, match="is signed"):
        snapshot.merge([tmp_path / "other"], path)
    assert sorted(path.rglob("*")) == before


def test_a_reload_passes_over_what_is_not_signed_and_refuses_what_is_not_our_own(path: Path) -> None:
    with closing(Store.open(path, key=KEY)) as store, closing(Store.open(path)) as reader:
        assert held(store) == held(reader) == KEPT
        generation = store.manifest.generation
        newest = path / f"m-{generation:012d}.json"
        planted = path / f"m-{generation + 1:012d}.json"
        planted.write_bytes(newest.read_bytes())
        assert store.reload().generation == generation
        planted.unlink()
        planted.write_bytes(b"x")
        planted.chmod(0o666)
        with pytest.raises(UntrustedSnapshot, match="may be written"):
            reader.reload()
        assert held(reader) == KEPT


@pytest.mark.parametrize("key", [None, KEY])
def test_a_repair_signs_with_the_key_or_leaves_a_signed_store_alone(path: Path, key: bytes | None) -> None:
    damaged = sorted(path.glob("seg/*.fp"))[0]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    before = sorted(one for one in path.rglob("*"))
    if key is None:
        with pytest.raises(StoreFenced, match="is signed"):
            snapshot.repair(path)
        assert sorted(path.rglob("*")) == before
        return
    snapshot.repair(path, key=key)
    assert snapshot.verify(path).whole
    with closing(Store.open(path, key=key)) as store:
        assert held(store) == KEPT

"""Near reuse with fewer entries than a result needs: it is off, reports why, and no call fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.indexes.store import Store
from llmcache.near.neighbors.correction import NEIGHBOURS
from llmcache.near.neighbors.index import Entries, HostNeighborIndex
from llmcache.near.neighbors.index_torch import DeviceMemory
from tests.damage_calibrated import damaged, make, texts, tiny_model


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "store"
    make(path)
    return path


@pytest.fixture(scope="module")
def tiny(calibrated: Path) -> Any:
    return tiny_model(calibrated.with_name("model"))


def evict_all_but(path: Path, left: int, bank: str = "output") -> None:
    store = Store.open(path)
    found = eviction.candidates(store.folder, eviction.current(store.folder))
    mine = [i for i, number in enumerate(found.usage.segment.tolist()) if found.places[number][1] == bank]
    eviction.drop(store.folder, store.publish, found, np.array(mine[left:], np.int64))
    store.close()


def purge_all_but(path: Path, left: int) -> None:
    store = Store.open(path)
    found = eviction.candidates(store.folder, eviction.current(store.folder))
    mine = [i for i, number in enumerate(found.usage.segment.tolist()) if found.places[number][1] == "output"]
    purge(store, Doomed(keys=found.keys[mine[left:]]))
    store.close()


def remove_rows(path: Path, left: int) -> None:
    """Delete the records of every segment of the outputs. left: is 0."""
    store = Store.open(path)
    for segment in store.manifest.namespaces["default"].banks["output"].segments:
        (path / segment.file("row").name).unlink()
    store.close()


@pytest.mark.parametrize("left", [0, 1, 2, NEIGHBOURS - 1, NEIGHBOURS, 20])
@pytest.mark.parametrize("lose", [evict_all_but, purge_all_but, remove_rows], ids=lambda one: one.__name__)
def test_a_calibrated_store_that_lost_its_entries_computes_and_says_that_near_reuse_is_off(
    calibrated: Path, tiny: Any, store: Path, left: int, lose: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if lose is remove_rows and left:
        pytest.skip("damage takes whole segments")
    shutil.copytree(calibrated, store)
    lose(store, left)
    _, _, asked = texts()
    true = np.asarray(tiny.encode(asked, show_progress_bar=False))
    with LLMCache.open(store, tiny, config=CacheConfig(audit_share=0, recalibrate=False)) as cache:
        results = list(cache.run(asked))
        explained = cache.explain("entirely new words")
        cache.encode(["more new words"])
        assert cache.stats().counters.documents > len(asked)
        off, calibration = cache.near_is_off, cache.calibration
    near = [one.tier == "near" for one in results]
    for one, is_near, wanted in zip(results, near, true, strict=True):
        assert is_near or np.abs(one.output - wanted).max() < 2e-5
    if lose is purge_all_but:  # a purge also removes the models fitted to the documents
        assert calibration is None
        assert not any(near)
    elif left < NEIGHBOURS:
        assert not any(near)
        assert f"{left} entries are left" in off
        assert explained.tier == "miss"
        assert sum("entries are left" in record.getMessage() for record in caplog.records) == 1
    else:
        assert off == ""


@pytest.mark.parametrize("kind", ["flat", "torch", "torch-fp16"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9])
@pytest.mark.parametrize("k", [1, 3, 8, 50])
def test_an_index_with_fewer_vectors_than_asked_for_gives_those_and_then_none(kind: str, n: int, k: int) -> None:
    chance = np.random.default_rng(n)
    vectors = chance.standard_normal((n, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = VectorIndex.build(vectors, kind=kind) if n else VectorIndex.build(np.zeros((0, 16), np.float32), kind=kind)
    ids, similarity = index.nearest(chance.standard_normal((5, 16)).astype(np.float32), k)
    assert ids.shape == similarity.shape == (5, k)
    assert all(sorted(row[:n]) == list(range(n)) for row in ids.tolist()) or k < n
    assert (ids[:, n:] == -1).all()
    assert np.isneginf(similarity[:, n:]).all()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9])
def test_neighbours_of_few_entries_are_all_of_them_on_the_host_and_on_a_device(
    calibrated: Path, tiny: Any, n: int
) -> None:
    with LLMCache.open(calibrated, tiny, read_only=True) as cache:
        reuse = cache._execution.reuse
        assert reuse is not None
        chance = np.random.default_rng(n)
        width, out = cache._bank.facts.feature_width, cache.width
        tokens = [np.array([1, 2, i], np.int32) for i in range(n)]
        outputs = chance.standard_normal((n, out)).astype(np.float32)
        entries = Entries(chance.standard_normal((n, width)).astype(np.float16), outputs, tokens)
        asked = chance.standard_normal((4, width)).astype(np.float32)
        voting, predictor = reuse.calibration.voting, reuse.fitted.predictor
        host = HostNeighborIndex(entries, predictor, voting).match(asked, tokens[:1] * 4)
        device = DeviceMemory(entries, predictor, voting, "cpu").match(asked, tokens[:1] * 4)
        for found in (host, device):
            assert found.neighbours.shape == (4, min(n, NEIGHBOURS))
            assert np.isfinite(np.asarray(found.results)).all()
            assert np.isfinite(found.evidence).all()
        np.testing.assert_allclose(np.asarray(device.results), host.results, atol=1e-3)
        none = Entries(entries.features[:0], outputs[:0], [])
        for place in (HostNeighborIndex, lambda none, predictor, voting: DeviceMemory(none, predictor, voting, "cpu")):
            with pytest.raises(ConfigError, match="no entries"):
                place(none, predictor, voting)


def test_damaged_calibrated_stores_give_no_wrong_answer_and_no_foreign_exception(tmp_path: Path) -> None:
    tally = damaged(tmp_path, 3, 0, 60)
    assert not tally.failures, "\n".join(tally.failures[:20])
    assert sum(tally.counts.values()) == 60

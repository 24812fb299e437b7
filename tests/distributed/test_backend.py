"""A cache whose misses are computed and committed by workers, which run in this process instead of a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, Result
from llmcache.banks import writer
from llmcache.distributed.compute import RayCompute
from llmcache.distributed.workers import Worker, WorkerConfig, WorkResult
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.errors import ConfigError, ForkedStoreError
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.opening import open_parts
from tests import threads
from tests.cache.test_forks_and_pickles import in_child

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = threads.texts_of(40)
DOCUMENTS = [{"id": f"d{i}", "text": text} for i, text in enumerate([*TEXTS, *(f"{text} " for text in TEXTS[:9])])]


class Team:
    """Two workers in this process, which take turns."""

    def __init__(self, store: Path, model: str) -> None:
        self.count, self.closed = 2, 0
        self._workers = [Worker(WorkerConfig(str(store), model, 1, {}), 1) for _ in range(self.count)]

    def computed(self, parts: Iterable[Misses], call: EncodeCall) -> Iterator[WorkResult]:
        for number, part in enumerate(parts):
            sent = pickle.loads(pickle.dumps((part, call)))  # noqa: S301  # as to another process
            yield self._workers[number % self.count].compute(*sent)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def tiny(tmp_path: Path) -> SentenceTransformer:
    return threads.tiny_sentences(tmp_path / "model")


@pytest.fixture
def name(tmp_path: Path, tiny: SentenceTransformer) -> str:
    """Path from which the same model is loaded."""
    return str(tmp_path / "model" / "st")


def opened(store: Path, name: str, **settings: Any) -> tuple[LLMCache, Team]:
    parts = open_parts(store, name, **settings)
    team = Team(store, name)
    workers: Any = team
    return LLMCache(parts, RayCompute(workers)), team


def facts(results: Sequence[Result]) -> list[tuple[object, ...]]:
    return [(one.id, one.tier, one.layer, one.source, one.similarity, one.output.tobytes()) for one in results]


def committed(store: Path) -> tuple[list[bytes], dict[str, int]]:
    """Return the keys of the live rows on disk, and the number of text keys by writer."""
    with closing(Store.open(store)) as read:
        facts = read.manifest.namespaces["default"].banks["output"]
        bank = read.bank("default", "output", lambda: facts, NearChoice())
        segments = [piece for piece in bank.pieces if isinstance(piece, Segment)]
        keys = [key.tobytes() for segment in segments for key in segment.rows["key"][segment.live()]]
        aliases: dict[str, int] = {}
        for segment in segments:
            aliases[segment.facts.writer] = aliases.get(segment.facts.writer, 0) + len(segment.aliases)
    return keys, aliases


@pytest.mark.parametrize("remembered", [0, 64 << 20])
def test_results_and_counters_are_those_of_one_process(
    name: str, tmp_path: Path, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """remembered: bytes of the workers' entries in memory from which the next call reloads the store."""
    monkeypatch.setattr(writer, "_REMEMBERED_BYTES", remembered)
    with LLMCache.open(tmp_path / "one", name) as one:
        expected = facts(list(one.run(DOCUMENTS, batch_size=4, chunk=15)))
        counters = one.stats().counters
    cache, _ = opened(tmp_path / "two", name)
    with cache:
        assert facts(list(cache.run(DOCUMENTS, batch_size=4, chunk=15))) == expected
        found = cache.stats().counters
        for counter in ("documents", "misses", "exact_text", "exact_tokens", "repeats", "not_stored"):
            assert getattr(found, counter) == getattr(counters, counter), counter
        assert found.model_seconds > 0
    assert sorted(committed(tmp_path / "two")[0]) == sorted(committed(tmp_path / "one")[0])


def test_workers_commit_entries_and_the_cache_commits_further_text_keys(name: str, store: Path) -> None:
    cache, _ = opened(store, name)
    with cache:
        list(cache.run(DOCUMENTS, batch_size=4))
        own = cache.storing.store.writer
        keys, aliases = committed(store)
        assert len(keys) == len(set(keys)) == len(TEXTS)
        assert own not in aliases
        assert sum(aliases.values()) == len(TEXTS)
    keys, aliases = committed(store)
    assert len(keys) == len(TEXTS)
    assert aliases[own] == 9
    with LLMCache.open(store, name) as again:
        list(again.run(DOCUMENTS))
        assert again.stats().counters.exact_text == len(DOCUMENTS)


def test_a_reload_counts_every_entry_once(name: str, store: Path) -> None:
    cache, _ = opened(store, name)
    with cache:
        expected = cache.encode(TEXTS)
        assert len(cache) == len(TEXTS)
        cache.reload()
        assert len(cache) == len(TEXTS)
        np.testing.assert_array_equal(cache.encode(TEXTS), expected)
        assert cache.stats().counters.misses == len(TEXTS)


def test_a_head_that_commits_writes_no_entry_of_the_workers_again(
    name: str, tiny: SentenceTransformer, store: Path
) -> None:
    cache, _ = opened(store, name, config=CacheConfig(commit_seconds=1e-9))
    with cache:
        cache.encode(TEXTS)
        heads = list(cache.run_heads(TEXTS, {"same": tiny}))
        np.testing.assert_allclose([one["same"].output for one in heads], tiny.encode(TEXTS), atol=1e-5)
        assert {one.tier for one in cache.run(TEXTS)} == {"exact"}
    assert len(committed(store)[0]) == len(TEXTS)


def test_what_workers_could_not_store_is_counted_and_computed_again(name: str, store: Path) -> None:
    with LLMCache.open(store, name) as cache:
        expected = cache.encode(TEXTS[:3])
    cache, team = opened(store, name)
    for worker in team._workers:
        worker.opened().storing.store.only_read("this test says so")
    with cache:
        np.testing.assert_array_equal(cache.encode(TEXTS[:3]), expected)
        for _ in range(2):
            cache.encode(TEXTS[3:])
        counters = cache.stats().counters
    assert counters.misses == counters.not_stored == 2 * len(TEXTS[3:])
    assert len(committed(store)[0]) == 3


def test_settings_that_workers_do_not_share_are_refused_before_anything_is_looked_up(name: str, store: Path) -> None:
    cache, _ = opened(store, name)
    with cache:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="use one process"):
            cache.encode(TEXTS[:2])
        assert cache.stats().counters.documents == 0
        cache.encode(TEXTS[:2])


def test_a_cache_with_workers_is_not_pickled_and_not_used_by_a_child_and_closes_the_workers_once(
    name: str, store: Path
) -> None:
    cache, team = opened(store, name)
    cache.encode(TEXTS[:2])
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(cache)

    def child() -> None:
        with pytest.raises(ForkedStoreError, match="a child of the process that opened it"):
            cache.encode(TEXTS[:2])
        cache.close()
        assert team.closed == 0

    assert in_child(child) == 0
    cache.close()
    cache.close()
    assert team.closed == 1


def test_an_interrupted_call_leaves_no_layer_of_the_model_attached(tiny: SentenceTransformer, store: Path) -> None:
    def interrupt(_: int, computed: int) -> None:
        if computed:
            raise KeyboardInterrupt

    with LLMCache.open(store, tiny, config=CacheConfig(layers=(1,))) as cache:
        with pytest.raises(KeyboardInterrupt) as kept:  # the traceback keeps the frames of the call
            list(cache.run(TEXTS, batch_size=4, progress=interrupt))
        assert all("forward" not in vars(part) for part in tiny.modules())
        assert kept.traceback
        assert cache.stats().counters.misses == 4

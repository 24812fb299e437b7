"""Tests of reload: an open store moves to the newest generation only when told to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.errors import ModelMismatch
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, Manifest
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

WIDTH = 16
SPAWN = multiprocessing.get_context("spawn")
EXACT = NearChoice(index="flat", projection="none")


def keys_of(numbers: Sequence[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def values_of(numbers: Sequence[int]) -> NDArray[np.float32]:
    rows = [np.random.default_rng(number).standard_normal(WIDTH) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, WIDTH)


def bank_of(store: Store) -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {"model": "m"}, {})
    return store.bank("default", "layer", lambda: BankFacts("float32", WIDTH, 1, WIDTH), EXACT)


def put(store: Store, numbers: Sequence[int]) -> None:
    bank = bank_of(store)
    bank.put(
        keys_of(numbers),
        values_of(numbers),
        tokens=[np.array([number], np.int32) for number in numbers],
        sources=[str(number) for number in numbers],
        features=values_of(numbers),
        cost=np.ones(len(numbers), np.float32),
    )
    bank.alias(keys_of(numbers)[:, ::-1].copy(), keys_of(numbers))


def held(store: Store, numbers: Sequence[int]) -> set[int]:
    """Return which of these the store finds by key, by text and by fingerprint, after checking their bytes."""
    bank = bank_of(store)
    rows = bank.find(keys_of(numbers))
    assert rows.tolist() == bank.find_text(keys_of(numbers)[:, ::-1].copy()).tolist()
    present = np.asarray(numbers)[rows >= 0].tolist()
    rows = rows[rows >= 0]
    reading = bank.read(rows)
    assert reading.intact.all()
    assert np.asarray(reading.values).tobytes() == values_of(present).tobytes()
    assert [bank.source(int(row)) for row in rows] == [str(number) for number in present]
    if present:
        nearest, similarity = bank.nearest(values_of(present), 1)
        assert nearest[:, 0].tolist() == rows.tolist()
        assert similarity.min() > 0.999
    return set(present)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("searched", [False, True])
def test_what_others_committed_is_found_after_a_reload_and_not_before(path: Path, searched: bool) -> None:
    one, other = Store.open(path, create=True), Store.open(path)
    put(one, range(5))
    one.commit()
    other.reload()
    assert held(other, range(20)) == set(range(5))
    if searched:
        bank_of(one).nearest(values_of([1]), 1)
    put(other, range(5, 9))
    other.commit()
    assert held(one, range(20)) == set(range(5))
    put(one, [10, 11])
    assert one.reload().generation == other.manifest.generation
    assert held(one, range(20)) == {*range(9), 10, 11}
    put(one, [12])
    assert held(one, range(20)) == {*range(9), 10, 11, 12}
    one.commit()
    other.reload()
    assert held(other, range(20)) == held(one, range(20)) == {*range(9), 10, 11, 12}
    one.close()
    other.close()


def test_an_index_saved_after_reloads_between_waiting_rows_leads_to_the_right_rows(path: Path) -> None:
    one, other = Store.open(path, create=True), Store.open(path)
    put(one, range(4))
    one.commit()
    other.reload()
    for step in range(3):  # waiting rows, others' rows, waiting rows: sealed together in the end
        put(one, [100 + step])
        held(one, range(4))
        put(other, range(10 + 10 * step, 14 + 10 * step))
        other.commit()
        one.reload()
        held(one, range(200))
    one.commit()
    assert (path / "idx").exists()
    third = Store.open(path)
    assert third.manifest.namespaces["default"].banks["layer"].index is not None
    assert (
        held(third, range(200))
        == held(one, range(200))
        == {*range(4), 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33, 100, 101, 102}
    )
    for store in (one, other, third):
        store.close()


def test_rows_that_a_newer_generation_dropped_are_misses_and_others_keep_their_bytes(path: Path) -> None:
    one = Store.open(path, create=True)
    for part in (range(3), range(3, 6), range(6, 9)):
        put(one, part)
        one.commit()
    assert held(one, range(9)) == set(range(9))

    def without_middle(base: Manifest) -> Manifest:
        facts = base.namespaces["default"].banks["layer"]
        return base.with_bank("default", "layer", replace(facts, segments=(facts.segments[0], facts.segments[2])))

    publishing.commit(one.folder, "f" * 32, without_middle)
    put(one, [20])
    one.reload()
    assert held(one, range(30)) == {0, 1, 2, 6, 7, 8, 20}
    one.close()


def test_a_damaged_row_stays_a_miss_after_a_reload(path: Path) -> None:
    one, other = Store.open(path, create=True), Store.open(path)
    put(one, range(3))
    one.commit()
    seg = path / bank_of(one).facts.segments[0].file("seg").name
    data = bytearray(seg.read_bytes())
    data[64 + 3] ^= 1  # row 1
    seg.write_bytes(data)
    assert bank_of(one).read(np.arange(3)).intact.tolist() == [True, False, True]
    other.reload()
    put(other, range(5, 7))
    other.commit()
    one.reload()
    assert (bank_of(one).find(keys_of(range(7))) >= 0).tolist() == [True, False, True, False, False, True, True]
    one.close()
    other.close()


def test_a_namespace_made_anew_by_another_model_is_refused_and_nothing_moves(path: Path) -> None:
    one, other = Store.open(path, create=True), Store.open(path)
    put(one, range(3))
    one.commit()
    other.declare("default", {"model": "another"}, {})
    before = one.manifest
    with pytest.raises(ModelMismatch, match="replaced by one of another model"):
        one.reload()
    assert one.manifest is before
    assert held(one, range(5)) == {0, 1, 2}
    one.close()
    other.close()


def test_a_bank_whose_files_went_away_is_opened_from_the_newer_generation(path: Path) -> None:
    one = Store.open(path, create=True)
    put(one, range(4))
    one.commit()
    late = Store.open(path)  # has read the manifest, has not opened the bank yet
    old = bank_of(one).facts.segments[0]
    put(one, range(6))  # the same rows again, as a compaction would write them
    one.commit()

    def moved(base: Manifest) -> Manifest:
        facts = base.namespaces["default"].banks["layer"]
        return base.with_bank("default", "layer", replace(facts, segments=facts.segments[1:]))

    publishing.commit(one.folder, "f" * 32, moved)
    for file in old.files:
        one.folder.remove(file.name)
    assert held(late, range(9)) == set(range(6))
    late.close()
    one.close()


def test_a_listing_whose_manifests_go_before_they_are_read_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Store.open(path, create=True)
    put(one, range(3))
    one.commit()
    rounds: list[str] = []
    real = Folder.read

    def read(self: Folder, name: str, limit: int) -> bytes:
        if name.startswith("m-") and not rounds:
            rounds.append(name)
            put(one, [7])
            one.commit()
            for generation in generations(self)[1:]:
                self.remove(generation_name(generation))
            raise FileNotFoundError(2, "gone", name)
        return real(self, name, limit)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", read)
        late = Store.open(path)
    assert held(late, range(9)) == {0, 1, 2, 7}
    late.close()
    one.close()


# -- many processes -----------------------------------------------------------------------------------------


def _write(path: Path, first: int, rounds: int, say: Connection) -> None:
    store = Store.open(path)
    for number in range(first, first + rounds):
        put(store, [number])
        store.commit()
        if number % 3 == 0:
            store.reload()
    say.send(sorted(held(store, range(first, first + rounds))))
    store.close()


def _read(path: Path, everything: Sequence[int], say: Connection) -> None:
    store = Store.open(path)
    seen: set[int] = set()
    generation = 0
    while len(seen) < len(everything):
        manifest = store.reload()
        assert manifest.generation >= generation
        generation = manifest.generation
        now = held(store, everything)
        assert now >= seen  # a generation never takes back what an earlier one had
        bank = manifest.namespaces["default"].banks.get("layer")
        assert len(now) == sum(one.rows for one in (bank.segments if bank else ())) == len(bank_of(store))
        seen = now
    say.send(len(seen))
    store.close()


def test_many_readers_see_whole_generations_while_many_writers_commit(path: Path) -> None:
    store = Store.open(path, create=True)
    bank_of(store)
    store.close()
    rounds = 12
    everything = [number for writer in range(3) for number in range(1000 * writer, 1000 * writer + rounds)]
    hears: list[tuple[Connection, Any]] = []
    children = []
    jobs: list[tuple[Callable[..., None], tuple[Any, ...], Any]] = [
        *((_write, (1000 * w, rounds), list(range(1000 * w, 1000 * w + rounds))) for w in range(3)),
        *((_read, (everything,), len(everything)) for _ in range(3)),
    ]
    for target, arguments, expected in jobs:
        hear, say = SPAWN.Pipe(duplex=False)
        child: Any = SPAWN.Process(target=target, args=(path, *arguments, say))
        child.start()
        say.close()
        hears.append((hear, expected))
        children.append(child)
    for (hear, expected), child in zip(hears, children, strict=True):
        assert hear.poll(120)
        assert hear.recv() == expected
        hear.close()
        child.join(60)
        assert child.exitcode == 0
    late = Store.open(path)
    assert held(late, everything) == set(everything)
    late.close()


# -- through a cache ----------------------------------------------------------------------------------------


def test_a_cache_answers_what_another_computed_after_a_reload(model: SentenceTransformer, path: Path) -> None:
    with LLMCache.open(path, model, config=CacheConfig(reading="pread")) as one, LLMCache.open(path, model) as other:
        assert not one._store.folder.maps
        one.encode(["first"])
        theirs = other.encode(["second", "third"])
        other.commit()
        one.reload()
        found = list(one.run(["first", "second", "third"]))
        assert [result.tier for result in found] == ["exact"] * 3
        assert np.stack([result.output for result in found[1:]]).tobytes() == theirs.tobytes()
        assert len(one) == 3


def test_a_reload_in_the_middle_of_a_run_leaves_its_sources_right(model: SentenceTransformer, path: Path) -> None:
    with LLMCache.open(path, model) as one, LLMCache.open(path, model) as other:
        list(other.run([{"id": "x", "text": "from elsewhere"}, {"id": "y", "text": "and more"}]))
        other.commit()
        list(one.run([{"id": f"d{i}", "text": f"text {i}"} for i in range(4)]))  # not committed yet
        run = one.run([{"id": f"e{i}", "text": f"text {i}"} for i in range(4)])
        first = next(run)
        one.reload()
        assert [result.source for result in [first, *run]] == ["d0", "d1", "d2", "d3"]
        assert [result.source for result in one.run(["text 2", "and more"])] == ["d2", "y"]

"""Tests of eviction, compaction and garbage collection, with kills in between."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.errors import Busy, ConfigError, LLMCacheError, SnapshotDamaged
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.eviction.budget import Budget
from llmcache.indexes.eviction.policies import POLICIES, Terms
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.manifest_json import strict_json
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.stats.usage import USE
from llmcache.indexes.store import Store

WIDTH, FEATURES = 256, 8
SPAWN = multiprocessing.get_context("spawn")


def keys_of(numbers: Sequence[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def text_keys_of(numbers: Sequence[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: Sequence[int], width: int = WIDTH) -> NDArray[np.float32]:
    rows = [np.random.default_rng([width, number]).standard_normal(width) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, width)


def bank_of(store: Store) -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {"model": "m"}, {})
    choice = NearChoice(index="flat", projection="none")
    return store.bank("default", "layer", lambda: BankFacts("float32", WIDTH, 1, FEATURES), choice)


def put(store: Store, numbers: Sequence[int]) -> None:
    bank_of(store).put(
        keys_of(numbers),
        values_of(numbers),
        tokens=[np.array([number], np.int32) for number in numbers],
        sources=[f"document {number}" for number in numbers],
        features=values_of(numbers, FEATURES),
        cost=np.asarray(numbers, np.float32),
    )
    bank_of(store).alias(text_keys_of(numbers), keys_of(numbers))


def held(store: Store, numbers: Sequence[int]) -> set[int]:
    """Return which of these the store has, after checking their bytes by key and by text."""
    bank = bank_of(store)
    rows = bank.find(keys_of(numbers))
    found = rows >= 0
    present = np.asarray(numbers)[found].tolist()
    reading = bank.read(rows[found])
    assert reading.intact.all()
    assert np.asarray(reading.values).tobytes() == values_of(present).tobytes()
    assert bank.find_text(text_keys_of(numbers)).tolist() == rows.tolist()
    for number, row in zip(present, rows[found].tolist(), strict=True):
        assert bank.tokens(row).tolist() == [number]
        assert bank.source(row) == f"document {number}"
        assert bank.cost(np.array([row])) == number
    return set(present)


@contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[Store]:
    store = Store.open(path, create=create)
    try:
        yield store
    finally:
        store.close()


def on_disk(path: Path, numbers: Sequence[int]) -> set[int]:
    with opened(path) as store:
        return held(store, numbers)


def size_of(path: Path) -> int:
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)


def look(path: Path) -> dict[str, tuple[bytes, int]]:
    files = (one for one in path.rglob("*") if one.is_file() and one.name != "lock")
    return {str(one.relative_to(path)): (one.read_bytes(), one.stat().st_mtime_ns) for one in files}


class Clock:
    """Clock that tests set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        patch.setattr(Folder, "now", lambda folder: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


SEGMENTS, EACH = 6, 10
ALL = range(SEGMENTS * EACH)


@pytest.fixture
def path(tmp_path: Path, clock: Clock) -> Path:
    """A store with rows 0 to 59 in six segments, a minute apart, and an index file."""
    where = tmp_path / "store"
    with opened(where, create=True) as store:
        for start in range(0, len(ALL), EACH):
            put(store, range(start, start + EACH))
            clock.now += 60
            store.commit()
        bank_of(store).nearest(values_of([1], FEATURES), 1)
        store.commit()
    return where


def use(path: Path, clock: Clock, numbers: Sequence[int]) -> None:
    clock.now += 60
    with opened(path) as store:
        held(store, numbers)


# -- evicting -----------------------------------------------------------------------------------------------


def test_evicting_brings_the_files_down_to_what_was_asked_and_no_further_than_needed(path: Path) -> None:
    for share in (0.9, 0.7, 0.6):
        before = size_of(path)
        wanted = int(before * share)
        with opened(path) as store:
            done = evict(store, wanted)
        assert size_of(path) <= wanted
        assert done.bytes_after == size_of(path)
        assert 0 <= done.bytes_before - before < 100  # the lock file says who has it
        with opened(path) as store:
            assert len(bank_of(store)) > (wanted - 15_000) / (WIDTH * 4 + 200) - EACH
    with opened(path) as store:
        left = held(store, ALL)
        assert left == set(range(min(left), len(ALL)))  # the oldest went


def test_nothing_is_evicted_from_a_store_that_fits(path: Path) -> None:
    with opened(path) as store:
        done = evict(store, size_of(path))
    assert (done.rows, done.segments) == (0, 0)
    assert on_disk(path, ALL) == set(ALL)


def test_rows_in_use_stay_and_their_neighbours_in_the_segment_go(path: Path, clock: Clock) -> None:
    hot = [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 24]
    use(path, clock, hot)
    with opened(path) as store:
        evict(store, int(size_of(path) * 0.75))
    left = on_disk(path, ALL)
    assert set(hot[4:10]) <= left  # more than half of their segment was in use
    assert set(range(30, 60)) <= left
    assert len(left) < len(ALL)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_goes_is_what_the_policy_chooses(path: Path, clock: Clock, policy: str) -> None:
    use(path, clock, range(0, 60, 3))
    use(path, clock, range(0, 60, 4))
    with opened(path) as store:
        bank = bank_of(store)
        bank.audit(bank.find(keys_of([7, 31, 59])), np.array([0.5, 0.01, 0.9], np.float32))
    with opened(path) as store:
        found = eviction.candidates(store.folder, store.manifest)
        wanted = int(size_of(path) - 14 * found.usage.nbytes[0])
        planned = evict(store, wanted, policy=policy, dry_run=True)
        ranked = POLICIES[policy](found.usage, Terms()).tolist()
        beyond = np.nan_to_num(found.usage.drift) * (np.nan_to_num(found.usage.drift) > Terms().drift_limit)
        order = sorted(ranked, key=lambda place: -beyond[place])  # what drifts goes first under every policy
        done = evict(store, wanted, policy=policy)
    assert size_of(path) <= wanted
    assert done.rows >= planned.rows > 0
    numbers = [int(found.usage.cost[place]) for place in order]
    left = on_disk(path, ALL)
    last = max(place for place, number in enumerate(numbers) if number not in left)
    first_kept = [number for number in numbers[: last + 1] if number in left]
    went = set(ALL) - left
    for number in first_kept:  # kept although others behind it went: those went with a whole segment
        others = {n for n in went if numbers.index(n) > numbers.index(number)}
        assert all(not left & set(range(n // EACH * EACH, n // EACH * EACH + EACH)) for n in others)
    assert {7, 59} <= went


def test_a_dry_run_changes_nothing(path: Path, clock: Clock) -> None:
    with opened(path) as store:
        bank_of(store)
        _bury(store, [0, 1, 2, 3, 4, 5, 6])
    clock.now += 10**6
    before = look(path)
    with opened(path) as store:
        assert evict(store, size_of(path) // 2, dry_run=True).rows > 0
        assert compact(store, dry_run=True).segments == 1
        assert gc(store, 0, dry_run=True).files > 0
    assert look(path) == before
    assert not (path / "lock").exists()


@pytest.mark.parametrize(
    "wrong", [{"policy": "fifo"}, {"half_life": 0}, {"drift_limit": -1}, {"max_bytes": -1}], ids=str
)
def test_terms_that_cannot_be_are_refused(path: Path, wrong: dict[str, Any]) -> None:
    with opened(path) as store, pytest.raises(ConfigError):
        evict(store, **{"max_bytes": 10, **wrong})


def test_an_evicted_key_can_be_stored_again_and_the_new_row_serves(path: Path) -> None:
    with opened(path) as store:
        bank_of(store)
        _bury(store, [3, 14])
        put(store, [3])
        assert held(store, ALL) == set(ALL) - {14}
        store.commit()
        assert held(store, ALL) == set(ALL) - {14}
    assert on_disk(path, ALL) == set(ALL) - {14}
    with opened(path) as store:
        rows, similarity = bank_of(store).nearest(values_of([3], FEATURES), 1)
        assert bank_of(store).source(int(rows[0, 0])) == "document 3"
        assert similarity[0, 0] > 0.999


# -- dead rows ----------------------------------------------------------------------------------------------


def _bury(store: Store, numbers: Sequence[int]) -> None:
    """Evict exactly these entries."""
    found = eviction.candidates(store.folder, eviction.current(store.folder))
    every = {int(number): place for place, number in enumerate(found.usage.cost)}
    gone = eviction.drop(store.folder, store.publish, found, np.array([every[number] for number in numbers]))
    store.forget(gone)


@pytest.mark.parametrize("again", [False, True], ids=["in the open store", "after reopening"])
@pytest.mark.parametrize("dead", [[0], [5, 6, 7, 30], list(range(10, 20)), list(range(0, 60, 2)), list(range(59))])
def test_dead_rows_are_never_found_and_enough_live_neighbours_come_back(
    path: Path, dead: list[int], again: bool
) -> None:
    live = [number for number in ALL if number not in dead]
    with opened(path) as first:
        bank_of(first).nearest(values_of([1], FEATURES), 1)
        _bury(first, dead)
        with opened(path) as other:
            store = other if again else first
            bank = bank_of(store)
            assert len(bank) == len(live)
            assert held(store, ALL) == set(live)
            queries = values_of(ALL, FEATURES).astype(np.float16).astype(np.float32)
            unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            k = min(5, len(live))
            rows, similarity = bank.nearest(values_of(ALL, FEATURES), k)
            expected = np.sort(unit @ unit[live].T, axis=1)[:, ::-1][:, :k]
            np.testing.assert_allclose(similarity, expected, atol=1e-5)
            assert {bank.source(int(row)) for row in rows.ravel()} <= {f"document {number}" for number in live}


def test_an_index_is_built_again_once_too_many_of_its_rows_are_dead(path: Path) -> None:
    with opened(path) as store:
        bank = bank_of(store)
        bank.nearest(values_of([1], FEATURES), 1)
        assert bank.near._index is not None
        _bury(store, list(range(0, 18)))
        bank.nearest(values_of([1], FEATURES), 1)
        assert len(bank.near._index) == 60
        _bury(store, [20])
        bank.nearest(values_of([1], FEATURES), 1)
        assert len(bank.near._index) == 41
        store.commit()
    with opened(path) as store:  # the new index file stands for the live rows, and is used
        facts = store.manifest.namespaces["default"].banks["layer"]
        assert facts.index is not None
        assert facts.index.count == 41
        bank = bank_of(store)
        rows, _ = bank.nearest(values_of(range(21, 60), FEATURES), 1)
        assert [bank.source(int(row)) for row in rows[:, 0]] == [f"document {number}" for number in range(21, 60)]
        assert bank.near._built == 41


def test_a_damaged_bitmap_costs_its_segment_and_gives_no_dead_row_back(path: Path) -> None:
    with opened(path) as store:
        bank_of(store)
        _bury(store, [3, 14])
        name = next(name for name in store.folder.names("seg") if name.endswith(".alive"))
    (path / "seg" / name).write_bytes(b"\xff\xff")
    left = on_disk(path, ALL)
    assert left in ({*range(20, 60), *range(10, 20)} - {14}, {*range(20, 60), *range(10)} - {3})


# -- compacting ---------------------------------------------------------------------------------------------


def test_compacting_keeps_everything_about_the_rows_that_live(path: Path) -> None:
    dead = [*range(0, 6), *range(10, 17), *range(20, 24)]
    with opened(path) as store:
        bank_of(store)
        _bury(store, dead)
        created = {one: _created(store, one) for one in (7, 18, 25)}
    with opened(path) as store:
        done = compact(store)
        assert (done.segments, done.rows, done.damaged) == (2, 7, 0)
    with opened(path) as store:
        assert held(store, ALL) == set(ALL) - set(dead)
        assert {one: _created(store, one) for one in created} == created
        facts = store.manifest.namespaces["default"].banks["layer"]
        assert [(one.rows, one.dead) for one in facts.segments] == [(7, 0), (10, 4), (10, 0), (10, 0), (10, 0)]
        assert facts.segments[0].aliases == 7
        rows, _ = bank_of(store).nearest(values_of([18], FEATURES), 1)
        assert bank_of(store).source(int(rows[0, 0])) == "document 18"


def _created(store: Store, number: int) -> int:
    piece, local = bank_of(store).pieces.at(int(bank_of(store).find(keys_of([number]))[0]))
    assert isinstance(piece, Segment)
    return int(piece.rows["created"][local])


def test_compacting_leaves_damaged_rows_behind_and_says_so(path: Path) -> None:
    with opened(path) as store:
        bank_of(store)
        _bury(store, range(0, 6))
        first = store.manifest.namespaces["default"].banks["layer"].segments[0]
    with open(path / first.file("seg").name, "r+b") as file:
        file.seek(8 * WIDTH * 4 + 3)
        file.write(b"\x99\x99")
    with opened(path) as store:
        done = compact(store)
    assert (done.rows, done.damaged) == (3, 1)
    assert on_disk(path, ALL) == set(ALL) - set(range(6)) - {8}


def test_a_segment_that_cannot_be_read_is_left_as_it_is(path: Path) -> None:
    with opened(path) as store:
        bank_of(store)
        _bury(store, range(0, 6))
        first = store.manifest.namespaces["default"].banks["layer"].segments[0]
    os.truncate(path / first.file("row").name, 100)
    with opened(path) as store:
        assert compact(store).rows == 0
        evict(store, size_of(path) // 2)
        assert first.id in {one.id for one in store.manifest.namespaces["default"].banks["layer"].segments}


# -- collecting ---------------------------------------------------------------------------------------------


def test_collecting_removes_what_nobody_needs_and_only_what_is_ours(path: Path, clock: Clock) -> None:
    clock.now = time.time()
    orphan, temporary = f"seg/{'a' * 32}.seg", f"t-{'b' * 32}-7"
    theirs = ["notes.txt", "seg/readme", "seg/short.seg", "idx/x.faiss", "m-1.json", "stat/notes", "t-shirt"]
    for name in (orphan, temporary, f"stat/t-{'c' * 32}", *theirs):
        (path / name).write_bytes(b"x")
    newest = max(one.name for one in path.glob("m-0*"))
    with opened(path) as store:
        assert gc(store).files == 0
        clock.now += 7200
        done = gc(store)
    assert done.manifests == len(ALL) // EACH + 1 + 1 - 2
    assert done.files == done.manifests + 3
    assert sorted(one.name for one in path.glob("m-0*"))[-1] == newest
    assert len(list(path.glob("m-0*"))) == 2
    assert all((path / name).exists() for name in theirs)
    assert not (path / orphan).exists()
    assert on_disk(path, ALL) == set(ALL)
    with opened(path) as store:
        put(store, [100])
        store.commit()
    assert on_disk(path, [*ALL, 100]) == {*ALL, 100}


def test_what_was_dropped_goes_after_the_grace_and_what_is_needed_stays(path: Path, clock: Clock) -> None:
    clock.now = time.time()
    with opened(path) as store:
        bank_of(store)
        _bury(store, range(0, 8))
        compact(store)
        before = size_of(path)
        assert gc(store).files == 0
        done = gc(store, 0)
        assert done.bytes == before - size_of(path) > 0
        kept = {*store.manifest.files}
    assert {f"seg/{one.name}" for one in (path / "seg").iterdir()} <= kept
    assert on_disk(path, ALL) == set(range(8, 60))


def test_nothing_is_removed_or_evicted_while_a_manifest_is_damaged(path: Path, clock: Clock) -> None:
    newest = max(path.glob("m-*"))
    os.truncate(newest, 50)
    clock.now += 10**6
    before = look(path)
    with opened(path) as store:
        done = gc(store, 0)
        with pytest.raises(SnapshotDamaged, match=newest.name):
            evict(store, 10)
    assert done.blocked == (newest.name,)
    assert (done.files, look(path)) == (0, before)
    with opened(path) as store:
        store.budget = Budget(size_of(path))
        put(store, [100])
        store.commit()
        assert store.not_stored == 1
    assert on_disk(path, ALL) == set(ALL)


def test_a_writer_that_slept_through_a_collection_does_not_take_a_used_number(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    real = Folder.link
    slept: list[str] = []

    def link(self: Folder, name: str, new: str) -> None:
        if not slept and new.startswith("m-"):
            slept.append(new)
            with opened(path) as rival:
                for number in range(200, 205):
                    put(rival, [number])
                    rival.commit()
                gc(rival, 0)
            assert new not in os.listdir(path)  # the number is free again
        real(self, name, new)

    with opened(path) as store:
        put(store, [100])
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "link", link)
            # a real writer's files are younger than the grace; here they are not, which the writer notices
            kept = [one.name for one in (path / "seg").iterdir()]
            patch.setattr(Folder, "remove", _unless_new(Folder.remove, kept))
            made = store.commit()
        assert made.generation > 1 + int(slept[0][2:14])
    assert on_disk(path, [*ALL, 100, *range(200, 205)]) == {*ALL, 100, *range(200, 205)}
    with opened(path) as store:
        ids = [one.id for one in store.manifest.namespaces["default"].banks["layer"].segments]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("collected", [True, False])
def test_a_commit_that_lost_with_a_used_number_is_written_anew_since_its_files_may_be_collected(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, collected: bool
) -> None:
    clock.now = time.time()
    real = Folder.link
    slept: list[str] = []
    before: set[str] = set()

    def link(self: Folder, name: str, new: str) -> None:
        if slept or not new.startswith("m-"):
            real(self, name, new)
            return
        slept.append(new)
        with opened(path) as rival:
            for number in range(200, 205):
                put(rival, [number])
                rival.commit()
            eviction.tidy(rival.folder)
            assert new not in os.listdir(path)  # the number is free again
            real(self, name, new)
            before.update(os.listdir(path / "seg"))
            if collected:
                eviction.tidy(rival.folder)
                assert new not in os.listdir(path)
                assert before <= set(os.listdir(path / "seg")), "its writer lives, so what only it names stays"

    with opened(path) as store:
        put(store, [100])
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "link", link)
            store.commit()
        (last,) = (one for one in store.manifest.namespaces["default"].banks["layer"].segments[-1:])
        assert last.writer == store.writer
        assert not {Path(file.name).name for file in last.files} & before, "also when nobody has collected them yet"
        assert held(store, [100]) == {100}
    assert on_disk(path, [*ALL, 100, *range(200, 205)]) == {*ALL, 100, *range(200, 205)}


def test_a_commit_whose_listed_manifests_are_all_collected_before_it_reads_them_looks_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    clock.now = time.time()
    real = generations
    looked: list[list[int]] = []

    def late(folder: Folder) -> list[int]:
        found = real(folder)
        if not looked:
            looked.append(found)
            with opened(path) as rival:
                for number in range(200, 203):
                    put(rival, [number])
                    rival.commit()
                eviction.tidy(rival.folder)
            assert not set(found) & set(real(folder))
        return found

    with opened(path) as store:
        put(store, [100])
        with monkeypatch.context() as patch:
            patch.setattr(publishing, "generations", late)
            store.commit()
    assert on_disk(path, [*ALL, 100, 200, 201, 202]) == {*ALL, 100, 200, 201, 202}


def test_a_store_in_which_nothing_was_committed_can_be_maintained(tmp_path: Path) -> None:
    with opened(tmp_path / "empty", create=True) as store:
        size = size_of(tmp_path / "empty")
        assert evict(store, 0).rows == 0
        assert compact(store).segments == 0
        assert gc(store, 0).files == 0
        assert size_of(tmp_path / "empty") - size < 128  # the lock says whose it was


def _unless_new(real: Callable[[Folder, str], None], kept: list[str]) -> Callable[[Folder, str], None]:
    def remove(self: Folder, name: str) -> None:
        if not name.startswith(("seg/", "t-")) or name.removeprefix("seg/") in kept:
            real(self, name)

    return remove


def test_a_commit_that_others_built_upon_before_it_was_looked_at_is_not_made_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Folder.link
    seen: list[str] = []

    def link(self: Folder, name: str, new: str) -> None:
        real(self, name, new)
        if not seen:
            seen.append(new)
            with opened(path) as rival:
                put(rival, [200])
                rival.commit()

    with opened(path) as store:
        put(store, [100])
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "link", link)
            store.commit()
        assert held(store, [100]) == {100}
    with opened(path) as store:
        assert sum(one.rows for one in store.manifest.namespaces["default"].banks["layer"].segments) == len(ALL) + 2
        assert store.manifest.generation == int(seen[0][2:14]) + 1


def test_a_clock_that_jumps_while_a_commit_is_under_way_costs_it_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    real = publishing.commit
    jumps = iter((7200, -7200, 10**9))

    def late(*arguments: Any, **asked: Any) -> Any:
        clock.now = time.time() + next(jumps)
        with opened(path) as rival:
            gc(rival)
            gc(rival, 0)
        return real(*arguments, **asked)

    for number in (100, 101, 102):
        with opened(path) as store:
            put(store, [number])
            bank_of(store)
            with monkeypatch.context() as patch:
                patch.setattr(publishing, "commit", late)
                store.commit()
    assert on_disk(path, [100, 101, 102]) == {100, 101, 102}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["seg", "row", "key", "var", "fp"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_commit_of_which_a_file_is_removed_by_force_is_written_again_or_fails_and_keeps_its_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, when: str, kind: str, times: int
) -> None:
    real, left = publishing.commit, list(range(times))

    def destructive(*arguments: Any, **asked: Any) -> Any:
        made = None if when == "before" else real(*arguments, **asked)
        if left:
            left.pop()
            newest = max((path / "seg").glob(f"*.{kind}"), key=lambda file: file.stat().st_ctime_ns)
            newest.unlink()
        return made or real(*arguments, **asked)

    with opened(path) as store:
        bank_of(store)
        put(store, [100])
        with monkeypatch.context() as patch:
            patch.setattr(publishing, "commit", destructive)
            if times == 3:
                with pytest.raises(LLMCacheError, match="commit again"):
                    store._commit_rows(("default", "layer"), bank_of(store))
            else:
                store.commit()
        assert held(store, [100]) == {100}
        assert verify(path).whole, "no manifest names what is missing"
        store.commit()
    assert on_disk(path, [*ALL, 100]) == {*ALL, 100}


# -- uses ---------------------------------------------------------------------------------------------------


def test_uses_of_all_writers_add_up_and_garbage_is_passed_over(path: Path, clock: Clock) -> None:
    use(path, clock, range(10))
    use(path, clock, range(5))
    for name, content in (("a" * 32, b"x" * 27), ("b" * 32, b""), ("c" * 32, np.full(28, 255, np.uint8).tobytes() * 3)):
        (path / "stat" / f"{name}.use").write_bytes(content)
    (path / "stat" / f"{'d' * 32}.use").symlink_to(path / "FORMAT")
    with opened(path) as store:
        found = eviction.candidates(store.folder, store.manifest).usage
    assert found.uses.tolist() == [2] * 5 + [1] * 5 + [0] * 50
    assert found.last_use[:5].tolist() == [int(clock.now)] * 5
    assert found.last_use[5:10].tolist() == [int(clock.now) - 60] * 5


def test_a_record_of_use_has_28_bytes(path: Path, clock: Clock) -> None:
    use(path, clock, [4])
    (file,) = (path / "stat").glob("*.use")
    (record,) = np.frombuffer(file.read_bytes(), USE)
    assert record.nbytes == 28
    assert record["key"].tolist() == keys_of([4])[0].tolist()
    assert (int(record["last"]), int(record["uses"])) == (int(clock.now), 1)
    assert np.isnan(record["drift"])


def test_an_audit_of_an_earlier_copy_does_not_condemn_the_new_one(path: Path, clock: Clock) -> None:
    with opened(path) as store:
        bank_of(store).audit(bank_of(store).find(keys_of([3])), np.array([0.9], np.float32))
    with opened(path) as store:
        _bury(store, [3])
        clock.now += 60
        put(store, [3])
        store.commit()
        found = eviction.candidates(store.folder, store.manifest).usage
    assert np.isnan(found.drift).all()


def test_a_clock_set_back_does_not_make_new_rows_old(path: Path, clock: Clock) -> None:
    clock.now -= 10**7
    with opened(path) as store:
        put(store, range(60, 70))
        store.commit()
        evict(store, size_of(path) // 3)
    assert set(range(60, 70)) <= on_disk(path, range(70))


def test_the_files_of_writers_that_are_gone_become_one_and_count_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    for start in (0, 5, 7):
        use(path, clock, range(start, 10))
        with opened(path) as store:
            store.write_counters({"hits": start + 1, "seconds": 0.5})
    clock.now = time.time() + 7200

    def counted() -> tuple[dict[str, float], list[int]]:
        with opened(path) as store:
            return store.counters(), eviction.candidates(store.folder, store.manifest).usage.uses.tolist()

    before = counted()
    for at in range(4):  # cut short on the way, nothing counts twice; then done
        with monkeypatch.context() as patch, opened(_copy(path, f"copy {at}")) as store:
            calls = iter(range(100))
            real = Folder.remove

            def remove(self: Folder, name: str, at: int = at, calls: Iterator[int] = calls, real: Any = real) -> None:
                if next(calls) >= 2 + at:
                    raise OSError(errno.EIO, "no")
                real(self, name)

            patch.setattr(Folder, "remove", remove)
            gc(store, 0)
        with opened(path.parent / f"copy {at}") as store:
            assert store.counters() == before[0]
    with opened(path) as store:
        assert gc(store).folded == 6
        assert gc(store).folded == 0
    assert counted() == before
    assert len(list((path / "stat").iterdir())) == 2


def _copy(path: Path, name: str) -> Path:
    shutil.copytree(path, path.parent / name)
    return path.parent / name


# -- one maintainer, many others ----------------------------------------------------------------------------


def test_a_second_maintainer_is_told_who_is_at_it(path: Path) -> None:
    with opened(path) as store, opened(path) as other, store.folder.lock():
        for work in (lambda: evict(other, 10), lambda: compact(other), lambda: gc(other)):
            with pytest.raises(Busy, match=rf"process {os.getpid()} on \S"):
                work()
        assert evict(other, 10, dry_run=True).rows == len(ALL)
    with opened(path) as store:
        compact(store)


def test_a_store_that_is_open_goes_on_reading_while_it_is_evicted_compacted_and_collected(path: Path) -> None:
    with opened(path) as reader:
        assert held(reader, ALL) == set(ALL)
        with opened(path) as store:
            bank_of(store)
            _bury(store, [*range(0, 8), *range(13, 19)])
            compact(store)
            evict(store, size_of(path) // 2)
            gc(store, 0)
        rows = bank_of(reader).find(keys_of(ALL))
        assert (rows >= 0).all()
        reading = bank_of(reader).read(rows)
        assert reading.intact.all()
        assert np.asarray(reading.values).tobytes() == values_of(ALL).tobytes()
    assert len(on_disk(path, ALL)) > 0


def _write(path: Path, first: int, count: int) -> None:
    with opened(path) as store:
        for number in range(first, first + count, 2):
            put(store, [number, number + 1])
            store.commit()


def test_writers_beside_a_maintainer_lose_nothing(path: Path, clock: Clock) -> None:
    clock.now = time.time()
    writers = [SPAWN.Process(target=_write, args=(path, 1000 * n, 40)) for n in (1, 2)]
    for one in writers:
        one.start()
    gone = set(ALL)
    with opened(path) as store:
        bank_of(store)
        for dead in ([*range(0, 7)], [*range(10, 18)], [*range(20, 30)]):
            found = eviction.candidates(store.folder, eviction.current(store.folder))
            old = [i for i in range(len(found.rows)) if found.places[int(found.usage.segment[i])][2].rows == EACH]
            chosen = [i for i in old if int(found.rows[i]) < 7][: len(dead)]
            eviction.drop(store.folder, store.publish, found, np.array(chosen, np.int64))
            compact(store)
            gc(store)
    while any(one.is_alive() for one in writers):
        with opened(path) as store:
            compact(store)
            gc(store)
    for one in writers:
        one.join(60)
    assert [one.exitcode for one in writers] == [0, 0]
    new = [*range(1000, 1040), *range(2000, 2040)]
    assert on_disk(path, new) == set(new)
    assert on_disk(path, ALL) < gone


CALLS = ("create", "write", "sync", "link", "sync_folder", "remove", "read", "map", "names", "listing", "replace")


# -- the budget ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_budget_is_exceeded_at_no_commit(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    path, most = tmp_path / "store", 300_000
    chance = random.Random(policy)
    sizes: list[int] = []
    real = Folder.link

    def link(self: Folder, name: str, new: str) -> None:
        real(self, name, new)
        sizes.append(size_of(path))

    monkeypatch.setattr(Folder, "link", link)
    number, asked = 0, 0
    store = Store.open(path, create=True)
    for step in range(60):
        store.budget = Budget(most, policy)
        count = chance.choice([1, 3, 10, 20])
        put(store, range(number, number + count))
        number += count
        store.commit()
        sizes.append(size_of(path))
        recent = range(max(0, number - 30), number)
        asked += len(held(store, recent))
        clock.now += chance.randrange(100)
        if chance.random() < 0.3:
            bank_of(store).nearest(values_of([number], FEATURES), 2)
        if chance.random() < 0.2:
            store.close()
            store = Store.open(path)
        if step % 10 == 0:
            assert {number - 1} <= on_disk(path, recent)
    store.close()
    sizes.append(size_of(path))
    assert max(sizes) <= most
    assert max(sizes) > most * 0.7
    assert number * WIDTH * 4 > 1.4 * most
    assert asked > 0
    assert store.not_stored == 0
    assert held_share(path, number) > 0.3


def held_share(path: Path, number: int) -> float:
    return len(on_disk(path, range(number))) * WIDTH * 4 / 300_000


def test_what_cannot_fit_is_counted_as_not_stored_and_nothing_is_evicted_for_it(path: Path) -> None:
    with opened(path) as store:
        store.budget = Budget(size_of(path) + 20_000)
        put(store, range(100, 400))
        store.commit()
        assert store.not_stored == 300
        assert store.writable
        assert held(store, range(400)) == set(ALL)
    assert on_disk(path, range(400)) == set(ALL)


def test_an_evicted_segment_is_not_kept_mapped_by_the_store_that_evicted_it(path: Path) -> None:
    with opened(path) as store:
        bank = bank_of(store)
        rows = bank.find(keys_of(ALL))
        store.budget = Budget(size_of(path))
        put(store, range(100, 120))
        store.commit()
        left = held(store, range(120))
        assert set(range(100, 120)) <= left
        assert not left & set(range(10))
        mapped = Path("/proc/self/maps").read_text()
        assert f"{path}/seg/" in mapped
        assert not [line for line in mapped.splitlines() if f"{path}/seg/" in line and "deleted" in line]
        # numbers that somebody still has in hand lead nowhere, and are no error
        assert not bank.read(rows[:1]).intact[0]
        assert (bank.source(int(rows[0])), bank.key(int(rows[0])), bank.cost(rows[:1])) == ("", "", 0.0)
        assert bank.tokens(int(rows[0])).tolist() == []
        assert bank.sources(rows[:1]) == [""]
        assert [one.tolist() for one in bank.tokens_of(rows[:1])] == [[]]


def test_while_somebody_maintains_the_store_entries_wait_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_PATIENCE", 0.05)
    with opened(path) as store, opened(path) as other:
        store.budget = Budget(10**9)
        put(store, [100])
        with other.folder.lock():
            store.commit()
            assert on_disk(path, [100]) == set()
            assert held(store, [100]) == {100}
        store.commit()
    assert on_disk(path, [100]) == {100}


def test_a_store_from_before_evictions_opens(path: Path) -> None:
    newest = max(path.glob("m-*"))
    document = newest.read_bytes()[:-73]
    raw = strict_json(document)
    for one in raw["namespaces"]["default"]["banks"]["layer"]["segments"]:
        del one["dead"], one["alive"]
    body = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    newest.write_bytes(body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    assert on_disk(path, ALL) == set(ALL)
    assert generation_name(raw["generation"]) == newest.name

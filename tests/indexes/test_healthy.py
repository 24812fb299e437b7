"""Random operations on an undamaged store: `verify` never reports damage."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.eviction.budget import Budget
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.maintenance.repair import repair
from llmcache.indexes.maintenance.snapshot import save
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.store import Store
from tests.operations import FEATURES, bank_of, found_in, keys_of, put, values_of

UNIVERSE = range(1500)


class Healthy:
    """A store, and the numbers that its writers have put. No step may make `verify` report damage."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance = path, chance
        self.next = 0
        self.write()

    def opened(self, act: Callable[[Store], object]) -> None:
        store = Store.open(self.path, create=True, reading=self.chance.choice(("auto", "pread")))
        try:
            act(store)
        finally:
            store.close()

    def numbers(self) -> range:
        first = self.next
        self.next += self.chance.choice((1, 3, 20, 60))
        return range(first, self.next)

    def write(self) -> None:
        """Write one or more segments, in the background or not."""

        def act(store: Store) -> None:
            for _ in range(self.chance.randint(1, 3)):
                put(store, self.numbers())
                (store.commit_behind if self.chance.random() < 0.3 else store.commit)()
            store.commit()

        self.opened(act)

    def write_within_a_budget(self) -> None:
        def act(store: Store) -> None:
            size = sum(one.stat().st_size for one in self.path.rglob("*") if one.is_file())
            store.budget = Budget(size + self.chance.choice((-4000, 8000, 40_000)))
            put(store, self.numbers())
            store.commit()

        self.opened(act)

    def write_again(self) -> None:
        """Write existing entries by a writer that does not know them."""

        def again(store: Store) -> None:
            put(store, range(min(20, self.next)))
            store.commit()

        self.opened(again)

    def look_for_neighbours(self) -> None:
        """Search, which builds an index that a commit saves."""

        def act(store: Store) -> None:
            bank_of(store).nearest(values_of([1])[:, :FEATURES], 3)
            store.commit()

        self.opened(act)

    def evict_rows(self) -> None:
        """Evict some rows of any segments."""

        def act(store: Store) -> None:
            found = eviction.candidates(store.folder, eviction.current(store.folder))
            share = self.chance.choice((0.02, 0.2, 0.6))
            dead = [i for i in range(len(found.rows)) if self.chance.random() < share]
            eviction.drop(store.folder, store.publish, found, np.array(dead, np.int64))

        self.opened(act)

    def evict_bytes(self) -> None:
        share = self.chance.choice((0.5, 0.8, 0.95))
        size = sum(one.stat().st_size for one in self.path.rglob("*") if one.is_file())
        self.opened(lambda store: evict(store, int(share * size)))

    def compact(self) -> None:
        duplicates, small = (self.chance.random() < 0.5 for _ in range(2))
        self.opened(lambda store: compact(store, duplicates=duplicates, small=small))

    def collect(self) -> None:
        self.opened(lambda store: gc(store, self.chance.choice((0, 3600))))

    def purge(self) -> None:
        numbers = sorted(self.chance.sample(range(self.next), min(3, self.next)))
        self.opened(lambda store: purge(store, Doomed(keys=keys_of(numbers))))

    def merge(self) -> None:
        other = self.path.with_name("other")
        store = Store.open(other, create=True)
        put(store, [*self.numbers(), *range(min(5, self.next))])
        store.commit()
        store.close()
        merge([other], self.path, copy=self.chance.random() < 0.5)
        shutil.rmtree(other)

    def repair(self) -> None:
        """Repair the undamaged store, which loses no entry."""
        assert repair(self.path, grace=self.chance.choice((0, 3600))).lost == 0

    def snapshot(self) -> None:
        """Continue with a snapshot in place of the store."""
        copy = self.path.with_name("copy")
        save(self.path, copy, copy=self.chance.random() < 0.5)
        shutil.rmtree(self.path)
        copy.rename(self.path)


STEPS: tuple[Callable[[Healthy], None], ...] = (
    Healthy.write, Healthy.write_within_a_budget, Healthy.write_again, Healthy.look_for_neighbours,
    Healthy.look_for_neighbours, Healthy.evict_rows, Healthy.evict_bytes, Healthy.compact, Healthy.collect,
    Healthy.purge, Healthy.merge, Healthy.repair, Healthy.snapshot,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_no_sequence_of_maintenance_makes_a_healthy_store_look_damaged(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    healthy = Healthy(tmp_path / "store", chance)
    done: list[str] = []
    for _ in range(12):
        step = chance.choice(STEPS)
        step(healthy)
        done.append(step.__name__)
        damage = [one for one in verify(healthy.path).findings if one.damage]
        assert not damage, f"after {done}: {damage}"
    store = Store.open(healthy.path)
    assert found_in(store, UNIVERSE) <= set(range(healthy.next)), "and what is there is right"
    store.close()


@pytest.mark.parametrize("first", STEPS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("second", STEPS[3:], ids=lambda one: one.__name__)
def test_no_pair_of_steps_beside_an_index_makes_a_healthy_store_look_damaged(
    tmp_path: Path, first: Callable[[Healthy], None], second: Callable[[Healthy], None]
) -> None:
    healthy = Healthy(tmp_path / "store", random.Random(f"{first.__name__} {second.__name__}"))
    for step in (Healthy.look_for_neighbours, first, Healthy.look_for_neighbours, second, Healthy.look_for_neighbours):
        step(healthy)
        assert verify(healthy.path).whole

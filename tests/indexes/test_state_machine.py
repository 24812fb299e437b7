"""Random sequences of store operations, checked against two sets: entries written, and entries acknowledged."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmcache.indexes.errors import ForkedStoreError, LLMCacheError, SnapshotDamaged, StoreFenced, StoreFull
from llmcache.indexes.store import Store
from tests.operations import (
    FEATURES,
    IDENTITY,
    MAINTENANCE,
    Ledger,
    MemoryDisk,
    Operation,
    Violation,
    bank_of,
    check,
    commit,
    found_in,
    key_of,
    open_in,
    put,
    values_of,
)
from tests.simulated_disk.disk import Fault, PowerLoss
from tests.simulated_disk.folder import MemoryFolder

STEPS = {"taken": 0}


class StoreMachine(RuleBasedStateMachine):
    """A store in memory, a process that has it open, and other processes that open and close it."""

    @initialize()
    def make(self) -> None:
        self.memory = MemoryFolder()
        self.ledger = Ledger()
        self.waiting: set[int] = set()
        self.next = 0
        self.store = open_in(MemoryDisk(self.memory), [], create=True)
        bank_of(self.store)
        self.seen: set[int] = set()  # acknowledged when the store was opened, or by itself since
        self.flipped = False  # a byte of a file: what needs the whole store may then refuse
        self.others = 0  # stores that were made beside this one

    def _fresh(self, count: int) -> range:
        self.next += count
        return range(self.next - count, self.next)

    def _open(self) -> None:
        self.memory.fault = None
        self.store = open_in(MemoryDisk(self.memory), [], create=True)
        self.waiting = set()
        self.seen = set(self.ledger.acknowledged)

    @property
    def universe(self) -> range:
        return range(self.next + 12)

    # -- one process ----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 12))
    def put(self, count: int) -> None:
        numbers = self._fresh(count)
        put(self.store, numbers)
        self.waiting |= set(numbers)

    @rule()
    def put_again(self) -> None:
        numbers = sorted(self.ledger.acknowledged)[:3]
        if numbers:
            put(self.store, numbers)

    @rule(near=st.booleans())
    def commit(self, near: bool) -> None:
        self.ledger.begun |= self.waiting
        if not self.store.writable:
            with pytest.raises(StoreFenced):
                self.store.commit()
            return
        if near and self.waiting:
            bank_of(self.store).nearest(values_of(sorted(self.waiting)[:2])[:, :FEATURES], 1)
        self.store.commit()
        self.ledger.acknowledged |= self.waiting
        self.seen |= self.waiting
        self.waiting = set()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self._open()

    @rule(count=st.integers(1, 5))
    def another_writer(self, count: int) -> None:
        other = open_in(MemoryDisk(self.memory), [])
        numbers = self._fresh(count)
        put(other, numbers)
        self.ledger.begun |= set(numbers)
        other.commit()
        self.ledger.acknowledged |= set(numbers)

    @rule(hits=st.integers(0, 9))
    def counters(self, hits: int) -> None:
        self.store.write_counters({"hits": hits})
        assert self.store.counters()["hits"] >= hits

    @rule()
    def wrong_model(self) -> None:
        found_in(self.store, self.universe)  # asks with the keys of another model too
        assert self.store.namespace("somebody else's") is None

    @rule(seconds=st.integers(1, 10**9))
    def clock_back(self, seconds: int) -> None:
        self.memory.time = max(0.0, self.memory.time - seconds)

    @rule()
    def fork(self) -> None:
        self.memory.process += 1
        for use in (self.store.commit, lambda: bank_of(self.store)):
            with pytest.raises(ForkedStoreError):
                use()
        self.memory.process -= 1

    # -- what goes wrong ------------------------------------------------------------------------------------

    @precondition(lambda self: self.store.writable)
    @rule(after=st.integers(0, 30), code=st.sampled_from([errno.ENOSPC, errno.EIO]), forever=st.booleans())
    def full_disk(self, after: int, code: int, forever: bool) -> None:
        self.ledger.begun |= self.waiting
        self.memory.fault = Fault(len(self.memory.calls) + after, code, forever)
        try:
            self.store.commit()
        except StoreFenced as error:
            if isinstance(error, StoreFull) != (code == errno.ENOSPC) or self.store.writable:
                raise Violation("not the documented error") from error
        else:
            self.ledger.acknowledged |= self.waiting
            self.seen |= self.waiting
            self.waiting = set()
        self.memory.fault = None

    @rule(after=st.integers(0, 60), seed=st.integers(0, 1000), state=st.integers(-1, 9))
    def crash(self, after: int, seed: int, state: int) -> None:
        """Crash in a commit, by kill -9 (state -1) or a power loss."""
        self.ledger.begun |= self.waiting
        self.memory.fault = Fault(len(self.memory.calls) + after)
        try:
            if self.store.writable:
                self.store.commit()
                self.ledger.acknowledged |= self.waiting
        except PowerLoss:
            pass
        self.memory = self._after(seed, state)
        self._open()

    def _after(self, seed: int, state: int) -> MemoryFolder:
        return self.memory.killed() if state < 0 else [*self.memory.crash_states(seed, state + 1)][state]

    @rule(which=st.integers(0, 100), place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
    def flip_a_bit(self, which: int, place: int, bit: int) -> None:
        """Flip a bit in a segment or index file: entries may be misses, but never wrong. The process starts again."""
        # not sorted: names are random, the order in which they came is not
        names = [f"{sub}/{name}" for sub in ("seg", "idx") for name in self.memory.names(sub)]
        names = [name for name in names if self.memory.size(name)]
        if not names:
            return
        name = names[which % len(names)]
        self.flipped = True
        if name.endswith((".seg", ".row", ".key", ".alive")):
            self.ledger.doubtful |= self._entries_of(name[4:36])
        data = bytearray(self.memory.read(name, 1 << 20))
        data[place % len(data)] ^= 1 << bit
        descriptor = self.memory.reopen(name)
        self.memory.write(descriptor, bytes(data), 0)
        self.memory.sync(descriptor)
        self.memory.close_file(descriptor)
        self._open()

    def _entries_of(self, segment: str) -> set[int]:
        """Return the numbers whose keys are in this segment's records."""
        if f"{segment}.row" not in self.memory.names("seg"):  # left by a crash before its manifest
            return set()
        records = self.memory.read(f"seg/{segment}.row", 1 << 20)
        return {number for number in self.universe if key_of(number, "tokens", IDENTITY) in records}

    # -- maintenance ----------------------------------------------------------------------------------------

    @rule(operation=st.sampled_from(MAINTENANCE), hours=st.integers(0, 2))
    def maintain(self, operation: Operation, hours: int) -> None:
        """Evict, compact and collect; the open store keeps what it has open."""
        self.memory.time += 3600 * hours
        operation.run(MemoryDisk(self.memory), self.ledger, [])

    @rule(
        operation=st.sampled_from(MAINTENANCE),
        after=st.integers(0, 120),
        code=st.sampled_from([0, errno.ENOSPC, errno.EIO]),
        forever=st.booleans(),
        seed=st.integers(0, 1000),
        state=st.integers(-1, 9),
    )
    def maintain_until_it_fails(
        self, operation: Operation, after: int, code: int, forever: bool, seed: int, state: int
    ) -> None:
        """Maintain with a full or failing disk, or (code 0) a kill or a power loss at one of the calls."""
        self.memory.fault = Fault(len(self.memory.calls) + after, code, forever)
        try:
            operation.run(MemoryDisk(self.memory), self.ledger, [])
        except LLMCacheError as error:
            if not code:
                raise Violation("nothing has failed") from error
        except PowerLoss:
            pass
        self.memory.fault = None
        if not code:
            self.memory = self._after(seed, state)
            self._open()

    @rule(count=st.integers(1, 8), copy=st.booleans(), shared=st.integers(0, 2))
    def merge(self, count: int, copy: bool, shared: int) -> None:
        """Merge another worker's store, some of whose entries exist already."""
        self.others += 1
        name, numbers = f"other{self.others}", [*sorted(self.ledger.acknowledged)[:shared], *self._fresh(count)]
        other = open_in(MemoryDisk(self.memory), [], create=True, name=name)
        commit(other, Ledger(), numbers)
        self.ledger.begun |= set(numbers)
        try:
            MemoryDisk(self.memory).merge([name], "", copy=copy)
        except SnapshotDamaged:  # of a store with damage nobody can say what is in it already
            if not self.flipped:
                raise
        else:
            self.ledger.acknowledged |= set(numbers)
            # a shared one may only be damaged here in segments that are doubtful, or is there

    @rule()
    def reload(self) -> None:
        self.store.reload()
        self.seen = set(self.ledger.acknowledged)

    @rule()
    def repair(self) -> None:
        """Repair, which removes exactly the damaged entries."""
        MemoryDisk(self.memory).repair()
        self._open()
        self.flipped = False

    # -- what is always true --------------------------------------------------------------------------------

    @invariant()
    def open_store_serves_what_it_promised(self) -> None:
        STEPS["taken"] += 1
        ledger = Ledger(self.ledger.begun | self.waiting, self.seen | self.waiting, self.ledger.doubtful)
        check(self.store, ledger, self.universe)

    @invariant()
    def reader_who_comes_now_is_served(self) -> None:
        check(Store.at(self.memory), self.ledger, self.universe)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


CI = settings(
    max_examples=200,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_whatever_happens_in_whatever_order_the_store_keeps_its_promises(
    record_property: Callable[[str, object], None],
) -> None:
    before = STEPS["taken"]
    run_state_machine_as_test(StoreMachine, settings=CI)
    assert STEPS["taken"] - before > 2000
    record_property("counts", {"state-machine steps": STEPS["taken"] - before})

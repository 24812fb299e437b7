"""Every call of every operation fails, or is the last one before a power loss; what is then wrong is reported."""

from __future__ import annotations

import errno
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

from llmcache.indexes.errors import LLMCacheError, StoreFenced, StoreFull
from llmcache.indexes.store import Store
from tests.operations import UNIVERSE, Ledger, MemoryDisk, Operation, check, commit, keep_up, open_in, recover
from tests.simulated_disk.disk import Fault, PowerLoss
from tests.simulated_disk.folder import MemoryFolder

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
MORE_CODES = (*CODES, errno.EDQUOT, errno.EACCES, errno.ESTALE, errno.EINTR)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_RECOVERY = 120  # calls of a recovery in which the second crash falls


@dataclass(slots=True)
class Tally:
    """Counts by what was tried, and a line for each failure that says how to have it again."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, kind: str, replay: str) -> Iterator[None]:
        """Count one; an error of any class inside is a failure."""
        self.counts[kind] += 1
        try:
            yield
        except (Exception, PowerLoss) as error:
            self.failures.append(f"{kind}: {replay}: {type(error).__name__}: {error}")

    def __iadd__(self, other: Tally) -> Tally:
        self.counts += other.counts
        self.failures += other.failures
        return self


@contextmanager
def same_names(seed: str) -> Iterator[None]:
    """Inside the block new files get the same names in every run, so that runs can be compared."""
    real, chance = uuid.uuid4, random.Random(seed)
    uuid.uuid4 = lambda: uuid.UUID(int=chance.getrandbits(128), version=4)  # what every part of the store calls
    try:
        yield
    finally:
        uuid.uuid4 = real


@cache
def _prepared(operation: Operation) -> tuple[MemoryFolder, Ledger]:
    memory = MemoryFolder()
    with same_names(f"before {operation.name}"):
        return memory, operation.prepare(MemoryDisk(memory))


def start(operation: Operation, fault: Fault | None = None) -> tuple[MemoryFolder, Ledger]:
    """The folder in which the operation begins, with its own account of what is in it."""
    memory, ledger = _prepared(operation)
    memory = memory.killed()
    memory.fault = fault
    return memory, ledger.copy()


def attempt(operation: Operation, memory: MemoryFolder, ledger: Ledger, stores: list[Store]) -> None:
    with same_names(operation.name):
        operation.run(MemoryDisk(memory), ledger, stores)


def calls_of(operation: Operation) -> list[str]:
    """Names of the calls the operation makes when nothing goes wrong."""
    memory, ledger = start(operation)
    attempt(operation, memory, ledger, [])
    return [name for name, _ in memory.calls]


class Recovery:
    """Recovers what an operation left, each state once: many calls only look, and what is synced is in every state."""

    def __init__(self, operation: Operation, tally: Tally) -> None:
        self.operation, self.tally, self._seen = operation, tally, set[int]()

    def try_from(self, memory: MemoryFolder, ledger: Ledger, kind: str, replay: str) -> None:
        shown = [name for name in memory.folders() if not name.startswith(".")]  # the others nobody looks into
        files = [(name, frozenset(memory.beside(name).contents().items())) for name in shown]
        state = hash((frozenset(files), ledger.state()))
        if state in self._seen:
            return
        self._seen.add(state)
        with self.tally.trial(kind, f"{self.operation.name}, {replay}"):
            disk, ledger = MemoryDisk(memory), ledger.copy()
            recover(disk, ledger)
            # upkeep looks at little that differs from state to state, and takes as long as the recovery
            if self.operation.after and (self.operation.after is not keep_up or len(self._seen) % 3 == 1):
                self.operation.after(disk, ledger)


# -- faults -------------------------------------------------------------------------------------------------


def faults(operation: Operation, codes: Sequence[int] = CODES, states: int = 2) -> Tally:
    """Each call fails with each code, and each write is short; once, and from then on."""
    tally = Tally()
    recovery = Recovery(operation, tally)
    for at, call in enumerate(calls_of(operation)):
        for forever in (False, True):
            tried = [Fault(at, code, forever) for code in codes]
            if call == "write_some":
                tried.append(Fault(at, errno.ENOSPC, forever, short=True))
            for fault in tried:
                with tally.trial("faults", f"{operation.name}, {fault}"):
                    _one_fault(operation, fault, states, recovery)
    return tally


def _one_fault(operation: Operation, fault: Fault, states: int, recovery: Recovery) -> None:
    memory, ledger = start(operation, fault)
    stores: list[Store] = []
    try:
        attempt(operation, memory, ledger, stores)
    except LLMCacheError as error:
        if isinstance(error, StoreFenced) and isinstance(error, StoreFull) != (fault.code in _FULL):
            raise AssertionError(f"not the documented error: {error!r}") from error
    memory.before = None
    _check_surroundings(operation, memory, fault)
    looks = fault.code in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # of these faults reading is free
    before = start(operation)[1]
    for store in stores:  # as the fault goes on, if it does
        alone = ledger if len(stores) == 1 else before  # a store does not know what others commit
        kept = Ledger(set(UNIVERSE), alone.acknowledged, set(ledger.doubtful))
        check(store, kept, UNIVERSE, complete=looks)
    memory.fault = None
    recovery.try_from(memory.killed(), ledger, "recoveries", str(fault))
    for i, state in enumerate(memory.crash_states(fault.at, states)):
        recovery.tally.counts["crash states"] += 1
        recovery.try_from(state, ledger, "crash states that differ", f"{fault}, then power loss {i}")


def _check_surroundings(operation: Operation, memory: MemoryFolder, fault: Fault) -> None:
    """What was only read is as it was, and what failed left no folder behind, where it could be removed."""
    before = start(operation)[0]
    if "other" in before.folders():
        assert memory.beside("other").contents() == before.beside("other").contents(), "the source was changed"
    left = [name for name in memory.folders() if name.startswith(".")]
    assert fault.forever or not left, f"{left} is left"


# -- power loss ---------------------------------------------------------------------------------------------


def power_losses(operation: Operation, states: int = 25, seed: int = 0, second: int = 1) -> Tally:
    """The power goes at each call: kill -9 and `states` crash states, and in some of them it goes again in recovery."""
    tally = Tally()
    recovery = Recovery(operation, tally)
    for at in range(len(calls_of(operation)) + 1):
        memory, ledger = start(operation, Fault(at))
        try:
            attempt(operation, memory, ledger, [])
        except PowerLoss:
            tally.counts["calls"] += 1
        left = [memory.killed(), *memory.crash_states(seed * 1_000_003 + at, states)]
        chance = random.Random(f"{seed} {operation.name} {at}")
        tally.counts["crash states"] += len(left)
        again = set(chance.sample(range(len(left)), min(second, len(left))))
        for i, state in enumerate(left):
            replay = f"call {at}, state {i}, seed {seed}"
            if i in again:
                with tally.trial("second crashes", f"{operation.name}, {replay}"):
                    _second_crash(operation, state.killed(), ledger.copy(), chance.randrange(_RECOVERY), seed)
            recovery.try_from(state, ledger, "crash states that differ", replay)
    return tally


def _second_crash(operation: Operation, memory: MemoryFolder, ledger: Ledger, at: int, seed: int) -> None:
    memory.fault = Fault(at)
    try:
        recover(MemoryDisk(memory), ledger)
        if operation.after:
            operation.after(MemoryDisk(memory), ledger)
    except PowerLoss:
        for state in [memory.killed(), *memory.crash_states(seed + at, 3)]:
            recover(MemoryDisk(state), ledger.copy(), range(66, 70))


# -- other writers ------------------------------------------------------------------------------------------


def interleavings(operation: Operation) -> Tally:
    """Before each call of the operation another writer makes a commit of its own, from opening to closing."""
    tally = Tally()
    for at in range(len(calls_of(operation))):
        with tally.trial("interleavings", f"{operation.name}, another writer before call {at}"):
            memory, ledger = start(operation)
            memory.before = _other_writer(memory, ledger, at)
            attempt(operation, memory, ledger, [])
            memory = memory.killed()
            recover(MemoryDisk(memory), ledger)
            if operation.after:
                operation.after(MemoryDisk(memory), ledger)
    return tally


def _other_writer(memory: MemoryFolder, ledger: Ledger, at: int) -> Callable[[int, str], None]:
    def step_in(number: int, call: str) -> None:
        if number == at:
            memory.before = None
            stores: list[Store] = []
            commit(open_in(MemoryDisk(memory), stores, create=True), ledger, range(50, 53))

    return step_in

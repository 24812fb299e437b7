"""What is done to a store under faults, crashes and kills, and what has to be true of it afterwards.

An entry is a number: its document, keys and values follow from it in every process, so that the expected state is
two sets of numbers and is kept outside the store. A new operation is one line in `OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmcache import keys
from llmcache.indexes.bank import Bank
from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import BankFacts
from llmcache.indexes.memory import MemoryFolder
from llmcache.indexes.neighbours import NearChoice
from llmcache.indexes.segment import Keys
from llmcache.indexes.store import Store

WIDTH = 64
FEATURES = 8
IDENTITY, STRANGER = b"i" * 32, b"j" * 32
ROLES = (None, "query", "document")


class Violation(AssertionError):
    """The store broke a promise."""


# -- entries ------------------------------------------------------------------------------------------------


def document(number: int) -> tuple[str | None, str, str]:
    """Role, prompt and text. Twelve numbers in a row differ in nothing but role and where the prompt ends."""
    word = f"{number // 12:08d}"
    cut = 1 + number % 12 // 3
    return ROLES[number % 3], word[:cut], word[cut:]


@lru_cache(1 << 16)
def key_of(number: int, kind: str, identity: bytes) -> bytes:
    role, prompt, text = document(number)
    seed = keys.key_seed(identity, kind, role, prompt)
    if kind == "text":
        return bytes(keys.text_keys(seed, [text]).tobytes())
    return bytes(keys.token_keys(seed, [text.encode()]).tobytes())


def keys_of(numbers: Sequence[int], kind: str = "tokens", identity: bytes = IDENTITY) -> Keys:
    """uint64 [n, 2]."""
    return np.frombuffer(b"".join(key_of(n, kind, identity) for n in numbers), np.uint64).reshape(-1, 2)


@lru_cache(1 << 14)
def _value(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).standard_normal(WIDTH).astype(np.float32)


def values_of(numbers: Sequence[int]) -> NDArray[np.float32]:
    """float32 [n, WIDTH]."""
    return np.array([_value(number) for number in numbers], np.float32).reshape(-1, WIDTH)


@dataclass(slots=True)
class Ledger:
    """The expected state. Those in `doubtful` (evicted, or in a segment that was damaged) need not be there."""

    begun: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    doubtful: set[int] = field(default_factory=set)

    def copy(self) -> Ledger:
        return Ledger(set(self.begun), set(self.acknowledged), set(self.doubtful))


def bank_of(store: Store) -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {"model": "m"}, {"tau": None})
    return store.bank("default", "layer", lambda: BankFacts("float32", WIDTH, 1, FEATURES), NearChoice())


def put(store: Store, numbers: Sequence[int]) -> None:
    bank, values = bank_of(store), values_of(numbers)
    kept = bank.put(
        keys_of(numbers),
        values,
        tokens=[np.array([number, number + 1], np.int32) for number in numbers],
        sources=[f"document {number}" for number in numbers],
        features=values[:, :FEATURES],
        cost=np.ones(len(numbers), np.float32),
    )
    assert kept.all()
    bank.alias(keys_of(numbers, "text"), keys_of(numbers))


def commit(store: Store, ledger: Ledger, numbers: Sequence[int]) -> None:
    """Put these and commit them, and keep account of it."""
    put(store, numbers)
    ledger.begun |= set(numbers)
    store.commit()
    ledger.acknowledged |= set(numbers)


# -- checking -----------------------------------------------------------------------------------------------


def found_in(store: Store, numbers: Sequence[int], *, tokens: bool = True) -> set[int]:
    """Which of these the store serves; Violation when what it serves is not theirs, bit for bit.

    tokens: False leaves the token ids out, which only the sha256 of their file protects.
    """
    served: set[int] = set()
    if store.namespace("default") is None:
        return served
    bank = bank_of(store)
    for kind, find in (("tokens", bank.find), ("text", bank.find_text)):
        rows = find(keys_of(numbers, kind))
        present = np.asarray(numbers)[rows >= 0]
        reading = bank.read(rows[rows >= 0])
        wanted = values_of(present.tolist())
        pairs = zip(present.tolist(), reading.values, wanted, reading.intact, strict=True)
        wrong = [number for number, value, one, intact in pairs if intact and value.tobytes() != one.tobytes()]
        if wrong:
            raise Violation(f"by {kind}: {wrong} are served with wrong values")
        served |= set(present[reading.intact].tolist())
        kept = zip(present[reading.intact].tolist(), rows[rows >= 0][reading.intact].tolist(), strict=True)
        ids = [(number, bank.tokens(row).tolist()) for number, row in kept]
        wrong = [number for number, found in ids if found not in ([number, number + 1], [])]
        if wrong and tokens:
            raise Violation(f"by {kind}: {wrong} have the token ids of others")
    strangers = bank.find(keys_of(numbers, "tokens", STRANGER)), bank.find_text(keys_of(numbers, "text", STRANGER))
    if max(rows.max(initial=-1) for rows in strangers) >= 0:
        raise Violation("entries are served to another model")
    return served


def check(store: Store, ledger: Ledger, universe: Sequence[int], *, complete: bool = True) -> None:
    """Violation unless the store serves what was acknowledged, and nothing that was not begun.

    complete: False lets entries be missing, while the disk fails to give them.
    """
    served = found_in(store, universe)
    lost = ledger.acknowledged - ledger.doubtful - served
    if complete and lost:
        raise Violation(f"acknowledged and lost: {sorted(lost)}")
    if served - ledger.begun:
        raise Violation(f"served and never begun: {sorted(served - ledger.begun)}")


def check_near(store: Store, numbers: Sequence[int]) -> None:
    """Violation unless the nearest row of each entry's features is the entry itself; all of these must be there."""
    if not numbers:
        return
    bank = bank_of(store)
    rows, similarity = bank.nearest(values_of(numbers)[:, :FEATURES], 1)
    if not (rows[:, 0] == bank.find(keys_of(numbers))).all() or not (similarity > 0.999).all():
        raise Violation(f"of {list(numbers)} the nearest are {rows[:, 0].tolist()}")


# -- operations ---------------------------------------------------------------------------------------------


class Disk(Protocol):
    """Where a store is: in memory or in a real folder."""

    def folder(self, *, create: bool = False) -> Folder: ...


class MemoryDisk:
    """A folder in memory, the same for all who open it."""

    def __init__(self, memory: MemoryFolder) -> None:
        self.memory = memory

    def folder(self, *, create: bool = False) -> Folder:
        if create:
            try:
                self.memory.make()
            except OSError as error:  # as `Store.open` says it
                raise LLMCacheError("the store cannot be opened") from error
        return self.memory


Run = Callable[[Disk, Ledger, "list[Store]"], None]


@dataclass(frozen=True, slots=True)
class Operation:
    """run: does it, appending each store it opens to the list. fresh: begins with no store, not with a filled one."""

    name: str
    run: Run
    fresh: bool = False


def open_in(disk: Disk, stores: list[Store], *, create: bool = False) -> Store:
    store = Store.at(disk.folder(create=create))
    stores.append(store)
    return store


def _create(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    bank_of(open_in(disk, stores, create=True))


def _put_and_commit(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    commit(store, ledger, range(24, 44))
    commit(store, ledger, [44])


def _two_writers(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    one, other = open_in(disk, stores), open_in(disk, stores)
    commit(one, ledger, range(24, 27))
    commit(other, ledger, range(27, 30))
    commit(one, ledger, range(30, 33))


def _reopen(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    found_in(open_in(disk, stores), range(48))


def _index(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    commit(store, ledger, range(24, 44))
    bank_of(store).nearest(values_of([1])[:, :FEATURES], 1)
    store.commit()


def _counters(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    for hits in (1, 2):
        store.write_counters({"hits": hits})
        store.counters()


OPERATIONS = (
    Operation("create", _create, fresh=True),
    Operation("put and commit", _put_and_commit),
    Operation("two writers", _two_writers),
    Operation("reopen and read", _reopen),
    Operation("index", _index),
    Operation("counters", _counters),
)
"""All of them run under every kind of fault, crash and kill."""

MAINTENANCE: tuple[Operation, ...] = ()
"""Those that a maintainer runs again and again beside writers and readers; entries they may drop become doubtful."""

UNIVERSE = range(72)
"""Numbers asked for after an operation: more than any of them puts."""


def fill(disk: Disk) -> Ledger:
    """A store with entries 0 to 19 in two segments, an index over them, and counters."""
    ledger, stores = Ledger(), list[Store]()
    store = open_in(disk, stores, create=True)
    commit(store, ledger, range(5))
    commit(store, ledger, range(5, 20))
    bank_of(store).nearest(values_of([1])[:, :FEATURES], 1)
    store.commit()
    store.write_counters({"hits": 1})
    close(stores)
    return ledger


def recover(disk: Disk, ledger: Ledger, extra: Sequence[int] = range(60, 66)) -> None:
    """What the next process does: open, read all, commit some more, and open again. Violation when it cannot."""
    for numbers in (extra, ()):
        stores = list[Store]()
        try:
            store = open_in(disk, stores, create=True)
            check(store, ledger, UNIVERSE)
            if numbers:
                commit(store, ledger, numbers)
                check(store, ledger, UNIVERSE)
        finally:
            close(stores)


def close(stores: Iterable[Store]) -> None:
    for store in stores:
        store.close()

"""What is done to a store under faults, crashes and kills, and what has to be true of it afterwards.

An entry is a number: its document, keys and values follow from it in every process, so that the expected state is
sets of numbers and is kept outside the store. A new operation is one line in `OPERATIONS` or `MAINTENANCE`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.generations import generation_name
from llmcache.indexes.commits.publish import Publish
from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.eviction.budget import Budget, Candidates
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.files.new_folder import filled
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import HEADER, ROW, Keys
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.merge import join
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.maintenance.repair import repaired
from llmcache.indexes.maintenance.snapshot import failing, transfer
from llmcache.indexes.maintenance.verify import verification
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.model import keys
from tests.simulated_disk.folder import MemoryFolder

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
    """The expected state. Those in `doubtful` (evicted, or in a segment that was damaged) need not be there.

    gone: must not be there any more. purged: and no byte of them. expected: what other stores beside this one hold,
    by name, where they are there at all; copied: those that must be.
    """

    begun: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    doubtful: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    purged: set[int] = field(default_factory=set)
    expected: dict[str, frozenset[int]] = field(default_factory=dict)
    copied: set[str] = field(default_factory=set)

    def copy(self) -> Ledger:
        return Ledger(
            set(self.begun), set(self.acknowledged), set(self.doubtful), set(self.gone), set(self.purged),
            dict(self.expected), set(self.copied),
        )  # fmt: skip

    def expect(self, name: str, numbers: Iterable[int]) -> None:
        """A store of this name may be there from now on, and is then whole."""
        self.expected[name] = frozenset(numbers)

    @property
    def there(self) -> set[int]:
        """Numbers that a reader must find."""
        return self.acknowledged - self.doubtful

    def state(self) -> tuple[object, ...]:
        """Equal for ledgers that expect the same."""
        numbers = [self.begun, self.acknowledged, self.doubtful, self.gone, self.purged]
        return (*map(frozenset[int], numbers), frozenset(self.copied), frozenset(self.expected.items()))


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
    bank, read = bank_of(store), set[int]()
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
        ids = [(number, bank.tokens(row).tolist()) for number, row in kept if row not in read]
        read |= set(rows.tolist())
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
    if served & ledger.gone:
        raise Violation(f"served and removed for good: {sorted(served & ledger.gone)}")


def check_copies(disk: Disk, ledger: Ledger) -> None:
    """Violation unless every other store is whole, or not there at all where nobody was told that it is."""
    there = disk.others()
    if strangers := {name for name in there if not name.startswith(".")} - set(ledger.expected):
        raise Violation(f"nobody made the stores {strangers}")
    for name, wanted in ledger.expected.items():
        if name in there:
            stores: list[Store] = []
            try:
                check(open_in(disk, stores, name=name), Ledger(ledger.begun | wanted, set(wanted)), UNIVERSE)
            finally:
                close(stores)
        elif name in ledger.copied:
            raise Violation(f"the store {name!r} was there and is not")


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
    """Where stores are: in memory or in real folders. The one under test has the name "", others are beside it."""

    def folder(self, name: str = "", *, create: bool = False) -> Folder: ...

    def others(self) -> list[str]:
        """Names of the other stores."""

    def contents(self) -> dict[str, bytes]:
        """Every file of the store by name; no call of an operation."""

    def age(self, seconds: float) -> None:
        """Let time pass."""

    def watch(self, most: int) -> None:
        """Violation at the first call before which the store is larger than this."""

    def snapshot(self, source: str, target: str, *, copy: bool, check: bool = False) -> None:
        """`save`, or with `check` `load`."""

    def merge(self, sources: Sequence[str], target: str, *, copy: bool) -> None: ...

    def repair(self) -> None: ...


class MemoryDisk:
    """A disk in memory, the same for all who open a store on it."""

    def __init__(self, memory: MemoryFolder) -> None:
        self.memory = memory

    def _there(self, name: str) -> MemoryFolder:
        return self.memory.beside(name) if name else self.memory

    def folder(self, name: str = "", *, create: bool = False) -> Folder:
        if create:
            try:
                if name:
                    return self.memory.beside(name, create=True)
                self.memory.make()
            except OSError as error:  # as `Store.open` says it
                raise LLMCacheError("the store cannot be opened") from error
        return self._there(name)

    def others(self) -> list[str]:
        return [name for name in self.memory.folders() if name != self.memory.path.name]

    def contents(self) -> dict[str, bytes]:
        return self.memory.contents()

    def age(self, seconds: float) -> None:
        self.memory.time += seconds

    def watch(self, most: int) -> None:
        if self.memory.before:  # others write too, without a budget
            return

        def look(number: int, call: str) -> None:
            if (size := self.memory.total_bytes()) > most:
                raise Violation(f"before call {number}, {call}, the store has {size:,} bytes, allowed are {most:,}")

        self.memory.before = look

    def snapshot(self, source: str, target: str, *, copy: bool, check: bool = False) -> None:
        with closing(Store.at(self._there(source))) as store:
            transfer(store, self._place(target), lambda: self._new(target), copy=copy, check=check)

    def merge(self, sources: Sequence[str], target: str, *, copy: bool) -> None:
        with ExitStack() as stack, failing(self._place(target)):
            base = None if target else stack.enter_context(closing(Store.at(self.memory)))
            stores = [stack.enter_context(closing(Store.at(self._there(name)))) for name in sources]
            join(base, stores, lambda: self._new(target), copy=copy)

    def repair(self) -> None:
        repaired(self.memory)

    def _place(self, name: str) -> Path:
        return self.memory.path.with_name(name or self.memory.path.name)

    @contextmanager
    def _new(self, name: str) -> Iterator[Folder]:
        partial_name = f".{name}-{uuid.uuid4().hex}.partial"
        try:
            built = self.memory.beside(partial_name, create=True)
        except BaseException:  # as `new_folder` does
            if partial_name in self.memory.folders():
                self.memory.beside(partial_name).discard()
            raise
        with filled(built, self._place(name)) as folder:
            yield folder


Run = Callable[[Disk, Ledger, "list[Store]"], None]
Setup = Callable[[Disk], Ledger]


@dataclass(frozen=True, slots=True)
class Operation:
    """run: does it, appending each store it opens to the list. fresh: begins with no store, not with a filled one.

    setup: makes what it begins with. after: what has to be possible once a store has recovered from its end.
    """

    name: str
    run: Run
    fresh: bool = False
    setup: Setup | None = None
    after: Callable[[Disk, Ledger], None] | None = None

    def prepare(self, disk: Disk) -> Ledger:
        return Ledger() if self.fresh else (self.setup or fill)(disk)


def open_in(disk: Disk, stores: list[Store], *, create: bool = False, name: str = "") -> Store:
    store = Store.at(disk.folder(name, create=create))
    stores.append(store)
    return store


def _create(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    bank_of(open_in(disk, stores, create=True))


def _put_and_commit(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    commit(store, ledger, range(24, 44))
    commit(store, ledger, [44])


def _commit_behind(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    for numbers in (range(24, 34), range(34, 44)):
        put(store, numbers)
        ledger.begun |= {*numbers, numbers[0] + 20}
        store.commit_behind()
        put(store, [numbers[0] + 20])
        store.finish_commit()  # only now this thread touches the disk again: the order of calls is always the same
        ledger.acknowledged |= set(numbers)
    store.commit()
    ledger.acknowledged |= {44, 54}


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


def _save(disk: Disk, ledger: Ledger, stores: list[Store], *, copy: bool) -> None:
    ledger.expect("snapshot", ledger.there)
    disk.snapshot("", "snapshot", copy=copy)
    ledger.copied |= {"snapshot"}


def _load(disk: Disk, ledger: Ledger, stores: list[Store], *, copy: bool) -> None:
    ledger.expect("loaded", ledger.expected["other"])
    disk.snapshot("other", "loaded", copy=copy, check=True)
    ledger.copied |= {"loaded"}


def _merge_into(disk: Disk, ledger: Ledger, stores: list[Store], *, copy: bool) -> None:
    numbers = set(ledger.expected["other"])
    ledger.begun |= numbers
    disk.merge(["other"], "", copy=copy)
    ledger.acknowledged |= numbers


def _merge_new(disk: Disk, ledger: Ledger, stores: list[Store], *, copy: bool) -> None:
    ledger.expect("joined", ledger.there | ledger.expected["other"])
    disk.merge(["", "other"], "joined", copy=copy)
    ledger.copied |= {"joined"}


def _evict(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    with told(disk, ledger):
        evict(store, _needed(disk, store) * 8 // 10)


def _needed(disk: Disk, store: Store) -> int:
    """Bytes of the store when all is collected that nobody needs."""
    last = {generation_name(store.manifest.generation), generation_name(store.manifest.parent), "FORMAT"}
    named = store.manifest.files | last
    return sum(len(data) for name, data in disk.contents().items() if name in named or name.startswith("stat/"))


def _compact(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    compact(open_in(disk, stores))


def _collect(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    gc(open_in(disk, stores))


def _repair(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    disk.repair()
    ledger.acknowledged |= ADOPTED


def _purge(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    numbers = {3, 16, 17}
    ledger.doubtful |= numbers
    purge(open_in(disk, stores), Doomed(keys=keys_of(sorted(numbers))))
    ledger.gone |= numbers
    ledger.purged |= numbers


def _commit_in_budget(disk: Disk, ledger: Ledger, stores: list[Store]) -> None:
    store = open_in(disk, stores)
    most = sum(map(len, disk.contents().values())) + 14_000
    store.budget = Budget(most)
    disk.watch(most)
    with told(disk, ledger):
        for start in (24, 34):
            put(store, numbers := range(start, start + 6))
            ledger.begun |= set(numbers)
            store.commit()
            if not store.not_stored:
                ledger.acknowledged |= set(numbers)


@contextmanager
def told(disk: Disk, ledger: Ledger) -> Iterator[None]:
    """What is evicted inside the block is doubtful before it is."""
    real = eviction.drop

    def drop(folder: Folder, publish: Publish, found: Candidates, chosen: NDArray[np.int64]) -> set[str]:
        contents = disk.contents()
        ledger.doubtful |= {
            _numbers_in(contents, found.places[found.usage.segment[one]][2].id)[found.rows[one]]
            for one in chosen.tolist()
        }
        return real(folder, publish, found, chosen)

    eviction.drop = drop
    try:
        yield
    finally:
        eviction.drop = real


def _numbers_in(contents: dict[str, bytes], segment: str) -> list[int]:
    """Number of each row of a segment, by its key, or, of a number no operation knows, by its token ids."""
    rows = np.frombuffer(contents[f"seg/{segment}.row"][HEADER.itemsize :], ROW)
    variable = contents[f"seg/{segment}.var"]
    return [_known().get(row["key"].tobytes(), int.from_bytes(variable[row["var"] :][:4], "little")) for row in rows]


@cache
def _known() -> dict[bytes, int]:
    return {key_of(number, "tokens", IDENTITY): number for number in range(1000)}


def _copies(run: Callable[..., None]) -> tuple[Run, Run]:
    return partial(run, copy=False), partial(run, copy=True)


UNIVERSE = range(72)
"""Numbers asked for after an operation: more than any of them puts."""
ADOPTED = set(range(30, 36))
"""Entries of the damaged generation that a repair takes in again."""


# -- what operations begin with ------------------------------------------------------------------------------


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


def worn(disk: Disk) -> Ledger:
    """A store that was used for long: rows that were evicted, old generations, and what killed writers left."""
    ledger, stores = fill(disk), list[Store]()
    store = open_in(disk, stores)
    commit(store, ledger, range(20, 24))
    evicted = set(range(5, 14))
    found = eviction.candidates(store.folder, store.manifest)
    rows = [_numbers_in(disk.contents(), found.places[number][2].id) for number in range(len(found.places))]
    numbers = [rows[i][row] for i, row in zip(found.usage.segment.tolist(), found.rows.tolist(), strict=True)]
    eviction.drop(store.folder, store.publish, found, np.flatnonzero(np.isin(numbers, sorted(evicted))))
    ledger.acknowledged -= evicted
    ledger.gone |= evicted
    for name in (f"t-{'a' * 32}-7", f"seg/{'b' * 32}.seg", f"idx/{'c' * 32}.faiss", f"stat/t-{'d' * 32}"):
        write_whole(store.folder, name, [bytes(600)])
    store.write_counters({"hits": 2})
    for sub in ("", *SUBFOLDERS):
        store.folder.sync_folder(sub)
    close(stores)
    disk.age(7200)
    found_in(open_in(disk, stores), [0, 1, 2, *range(15, 20), 21, 22, 23])  # these are used, and are evicted last
    close(stores)
    return ledger


def beside_another(disk: Disk) -> Ledger:
    """Two stores; what is in the other one is partly here already. One of its segments is new as a whole."""
    ledger, stores = fill(disk), list[Store]()
    other = open_in(disk, stores, create=True, name="other")
    commit(other, Ledger(), range(15, 22))
    commit(other, Ledger(), range(24, 30))
    close(stores)
    ledger.expect("other", {*range(15, 22), *range(24, 30)})
    ledger.copied |= {"other"}
    return ledger


def damaged(disk: Disk) -> Ledger:
    """A store with a damaged row, a damaged index and a damaged newest manifest, whose entries are `ADOPTED`."""
    ledger, stores = fill(disk), list[Store]()
    store = open_in(disk, stores)
    commit(store, Ledger(), sorted(ADOPTED))
    close(stores)
    first = next(iter(store.manifest.namespaces["default"].banks.values()))
    assert first.index
    newest = generation_name(store.manifest.generation)
    for name, at in ((first.segments[1].file("seg").name, 3 * WIDTH * 4), (first.index.file.name, 50), (newest, -9)):
        flip(disk.folder(), name, at)
    disk.age(7200)
    ledger.begun |= ADOPTED
    ledger.doubtful |= {8}
    return ledger


def flip(folder: Folder, name: str, at: int) -> None:
    """Change one byte of a file, durably: the file is written anew, as a new one."""
    data = bytearray(folder.read(name, 1 << 20))
    data[at] ^= 1
    folder.remove(name)
    write_whole(folder, name, [bytes(data)])
    folder.sync_folder(name.rpartition("/")[0])


# -- what has to be possible afterwards -----------------------------------------------------------------------


def recover(disk: Disk, ledger: Ledger, extra: Sequence[int] = range(60, 66)) -> None:
    """What the next process does: open, read all, commit some more, and open again. Violation when it cannot."""
    check_copies(disk, ledger)
    if ledger.purged:
        check_purged(disk, ledger)
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


def check_purged(disk: Disk, ledger: Ledger) -> None:
    """Violation when a file still has the activations of what was purged."""
    files = disk.contents()
    for number in ledger.purged:
        if left := [name for name, data in files.items() if _value(number).tobytes() in data]:
            raise Violation(f"{number} was purged, and is in {left}")


def keep_up(disk: Disk, ledger: Ledger) -> None:
    """Compact and collect hours later: nothing is lost, what is left is what is needed, and sizes are exact."""
    disk.age(7200)
    stores: list[Store] = []
    try:
        store = open_in(disk, stores)
        compact(store)
        gc(store)
        found = evict(store, 1 << 40)
        size = sum(map(len, disk.contents().values()))
        check(open_in(disk, stores), ledger, UNIVERSE)
        manifest = store.latest()
    finally:
        close(stores)
    contents = disk.contents()
    if found.bytes_after != size:
        raise Violation(f"the store has {size:,} bytes, and was said to have {found.bytes_after:,}")
    needed = {*manifest.files, "FORMAT", "lock", *map(generation_name, (manifest.generation, manifest.parent))}
    left = {name for name in contents if name not in needed and not name.startswith("stat/")}
    left |= {name for name in contents if name.startswith("stat/t-")}
    if left:
        raise Violation(f"nobody needs {sorted(left)}")


def repair_again(disk: Disk, ledger: Ledger) -> None:
    """A repair at last takes everything in again that was whole, and leaves no damage."""
    disk.repair()
    ledger.acknowledged |= ADOPTED
    stores: list[Store] = []
    try:
        check(open_in(disk, stores), ledger, UNIVERSE)
    finally:
        close(stores)
    with closing(disk.folder()) as folder:
        found = verification(folder)
    if not found.whole:
        raise Violation(f"after a repair there still is damage: {found.findings}")


def close(stores: Iterable[Store]) -> None:
    for store in stores:
        store.close()


# -- the tables -----------------------------------------------------------------------------------------------

_save_linked, _save_copied = _copies(_save)
_load_linked, _load_copied = _copies(_load)
_merge_linked, _merge_copied = _copies(_merge_into)
_join_linked, _join_copied = _copies(_merge_new)

MAINTENANCE = (
    Operation("evict", _evict, setup=worn, after=keep_up),
    Operation("compact", _compact, setup=worn, after=keep_up),
    Operation("gc", _collect, setup=worn, after=keep_up),
)
"""Those that a maintainer runs again and again beside writers and readers; entries they may drop become doubtful."""

OPERATIONS = (
    Operation("create", _create, fresh=True),
    Operation("put and commit", _put_and_commit, after=keep_up),
    Operation("commit behind", _commit_behind, after=keep_up),
    Operation("two writers", _two_writers),
    Operation("reopen and read", _reopen),
    Operation("index", _index, after=keep_up),
    Operation("counters", _counters),
    Operation("commit in a budget", _commit_in_budget, after=keep_up),
    *MAINTENANCE,
    Operation("purge", _purge, after=keep_up),
    Operation("save, linked", _save_linked),
    Operation("save, copied", _save_copied),
    Operation("load, linked", _load_linked, setup=beside_another),
    Operation("load, copied", _load_copied, setup=beside_another),
    Operation("merge into a store, linked", _merge_linked, setup=beside_another, after=keep_up),
    Operation("merge into a store, copied", _merge_copied, setup=beside_another, after=keep_up),
    Operation("merge into a new store, linked", _join_linked, setup=beside_another),
    Operation("merge into a new store, copied", _join_copied, setup=beside_another),
    Operation("repair", _repair, setup=damaged, after=repair_again),
)
"""All of them run under every kind of fault, crash and kill."""

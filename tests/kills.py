"""Real processes on a real file system, killed by SIGKILL: at every call, or at a random time.

One process, without threads, forks all the others: a fork takes 10 ms, a fresh Python with FAISS half a second.
What is expected is written to files outside the store, a line before each commit and one after it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llmcache.indexes.files import folder as io
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.repair import repair
from llmcache.indexes.maintenance.snapshot import load, save
from llmcache.indexes.store import Store
from tests.faults import Tally, calls_of
from tests.operations import (
    FEATURES,
    MAINTENANCE,
    OPERATIONS,
    UNIVERSE,
    Ledger,
    Operation,
    bank_of,
    check,
    close,
    found_in,
    open_in,
    put,
    recover,
    values_of,
)

ROOT = Path(__file__).parent.parent
_PER_WRITER = 100_000  # numbers from which a writer takes its own


def _in_process(*arguments: object) -> Tally:
    """Run this module's `main` in a process of its own, with one thread."""
    command = [sys.executable, "-m", "tests.kills", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Tally(failures=[f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"])
    counts, failures = json.loads(done.stdout.splitlines()[-1])
    tally = Tally(failures=failures)
    tally.counts.update(counts)
    return tally


def sigkills(where: Path, operations: Sequence[Operation] = OPERATIONS) -> Tally:
    """SIGKILL at each change that each operation makes to the disk, in the middle of each write; then recovery.

    A kill at a call that only looks leaves what one at the next change does. `where` is an empty folder.
    """
    names = [one.name for one in operations]
    tally = Tally()
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(lambda part: _in_process("each", where, *part), (names[::2], names[1::2])):
            tally += one
    return tally


def random_kills(where: Path, trials: int, seed: int) -> Tally:
    """Trials with 4 writers, 2 readers and a maintainer on one store, all killed at a random time, twice."""
    return _in_process("random", where, trials, seed)


# -- at every call ------------------------------------------------------------------------------------------


_CHANGES = (
    "_make_parts", "create", "create_locked", "sync", "close_file", "sync_folder", "link", "link_from", "replace",
    "remove", "set_aside", "rename", "sync_above", "discard", "lock",
)  # fmt: skip


def arm(left: int) -> None:
    """Kill this process at its n-th change of the disk. Only for a process that is to die: it is for all folders."""
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    count = iter(range(left, -1, -1))

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(count, None) == 0:
                kill()
            return real(*arguments)

        return call

    def write_some(self: Folder, descriptor: int, data: memoryview, offset: int) -> int:
        if next(count, None) == 0:
            real_write(self, descriptor, data[: len(data) // 2], offset)
            kill()
        return real_write(self, descriptor, data, offset)

    real_write = Folder.write_some
    Folder.write_some = write_some  # type: ignore[method-assign]
    for name in _CHANGES:
        setattr(Folder, name, deadly(getattr(Folder, name)))


class RealDisk:
    """Real folders: the store's own, and others of which the names begin with its."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _place(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}-{name}") if name else self.path

    def folder(self, name: str = "", *, create: bool = False) -> Folder:
        return Folder(self._place(name), create=create)

    def others(self) -> list[str]:
        mine = f"{self.path.name}-"
        return [name.removeprefix(mine) for name in os.listdir(self.path.parent) if name.startswith(mine)]

    def contents(self) -> dict[str, bytes]:
        found = {}
        for one in self.path.rglob("*"):
            with suppress(FileNotFoundError, IsADirectoryError):  # others may be at work
                found[str(one.relative_to(self.path))] = one.read_bytes()
        return found

    def age(self, seconds: float) -> None:
        """Put the files' mtime back; their ctime, which nobody can put back, does not count in this process then."""
        vars(io)["changed"] = lambda facts: facts.st_mtime
        for one in self.path.rglob("*"):
            if one.is_file():
                changed = one.stat().st_mtime - seconds
                os.utime(one, (changed, changed))

    def watch(self, most: int) -> None:
        """Nobody looks."""

    def snapshot(self, source: str, target: str, *, copy: bool, check: bool = False) -> None:
        (load if check else save)(self._place(source), self._place(target), copy=copy)

    def merge(self, sources: Sequence[str], target: str, *, copy: bool) -> None:
        merge([self._place(name) for name in sources], self._place(target), copy=copy)

    def repair(self) -> None:
        repair(self.path)


_WORDS = {"BEGIN": "begun", "ACK": "acknowledged", "DROP": "doubtful", "GONE": "gone", "PURGED": "purged"}


class Diary(Ledger):
    """A ledger whose entries a killed process has already written down."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        super().__init__(expected=dict(ledger.expected))
        self.path = path
        for word, name in (*_WORDS.items(), ("COPIED", "copied")):
            setattr(self, name, written := _Written(path, word))
            set.update(written, getattr(ledger, name))

    def expect(self, name: str, numbers: Iterable[int]) -> None:
        note(self.path, f"EXPECT {name}", numbers)
        super().expect(name, numbers)


class _Written(set[Any]):
    """A set that appends what is added to a file, in one write."""

    def __init__(self, path: Path, word: str) -> None:
        super().__init__()
        self.path, self.word = path, word

    def __ior__(self, members: object) -> _Written:
        assert isinstance(members, set)
        note(self.path, self.word, members)
        set.update(self, members)
        return self


def note(path: Path, word: str, numbers: Iterable[object]) -> None:
    """Append one line, whole, whatever happens to this process next."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{word} {' '.join(map(str, numbers))}\n".encode())
    finally:
        os.close(descriptor)


def ledger_of(path: Path) -> Ledger:
    """What was written down."""
    ledger = Ledger()
    for line in path.read_text().splitlines() if path.exists() else ():
        word, *members = line.split()
        if word in _WORDS:
            getattr(ledger, _WORDS[word]).update(map(int, members))
        elif word == "COPIED":
            ledger.copied.update(members)
        else:
            ledger.expect(members[0], map(int, members[1:]))
    return ledger


def note_all(path: Path, ledger: Ledger) -> None:
    """Write down a whole ledger."""
    for word, name in _WORDS.items():
        note(path, word, getattr(ledger, name))
    note(path, "COPIED", ledger.copied)
    for name, numbers in ledger.expected.items():
        note(path, f"EXPECT {name}", numbers)


def forked(work: Callable[[], None]) -> int:
    """Pid of a child that does this, and ends with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _each(where: Path, name: str) -> Tally:
    (operation,) = (one for one in OPERATIONS if one.name == name)
    tally = Tally()
    os.fsync = lambda fd: None  # a kill loses nothing that was not synced: waiting would show nothing
    place = where / name.replace(" ", "-")
    first = RealDisk(place / "first" / "store")
    first.path.parent.mkdir(parents=True)
    ledger = operation.prepare(first)
    for at in range(4 * len(calls_of(operation))):
        disk, diary = RealDisk(place / str(at) / "store"), place / f"diary {at}"
        shutil.copytree(first.path.parent, disk.path.parent)
        note_all(diary, ledger)

        def work(disk: RealDisk = disk, diary: Path = diary, at: int = at) -> None:
            told = Diary(diary, ledger)
            arm(at)
            operation.run(disk, told, [])

        _, status = os.waitpid(forked(work), 0)
        code = os.waitstatus_to_exitcode(status)
        with tally.trial("kills at a call", f"{name}, call {at}"):
            assert code in (0, -signal.SIGKILL), f"the operation ended with {code}"
            after = ledger_of(diary)
            recover(disk, after)
            if operation.after:
                operation.after(disk, after)
        shutil.rmtree(disk.path.parent)
        if code == 0:
            return tally
    raise AssertionError(f"{name} never ended")


# -- at a random time ---------------------------------------------------------------------------------------


def _write(path: Path, diary: Path, writer: int, seed: str) -> None:
    chance, number = random.Random(seed), writer * _PER_WRITER
    stores: list[Store] = []
    store = open_in(RealDisk(path), stores)
    bank_of(store)
    while True:
        numbers = range(number, number + chance.randint(1, 8))
        note(diary, "BEGIN", set(numbers))
        put(store, numbers)
        if chance.random() < 0.2:
            bank_of(store).nearest(values_of(numbers)[:, :FEATURES], 1)
        store.commit()
        note(diary, "ACK", set(numbers))
        number = numbers.stop
        if chance.random() < 0.1:
            close(stores)
            stores = []
            store = open_in(RealDisk(path), stores)


def _read(path: Path, diaries: list[Path]) -> None:
    """Open and read for ever. What was acknowledged before opening must be there."""
    while True:
        before = [ledger_of(diary) for diary in diaries]
        stores: list[Store] = []
        store = open_in(RealDisk(path), stores)
        wanted = set[int]().union(*(ledger.acknowledged for ledger in before))
        lost = wanted - found_in(store, sorted(wanted))
        lost -= set[int]().union(*(ledger_of(diary).doubtful for diary in diaries))
        if lost:
            raise AssertionError(f"a reader misses {sorted(lost)}")
        close(stores)


def _maintain(path: Path, diary: Path) -> None:
    """Each operation in turn, for ever. One that drops entries adds them to `doubtful` before it does."""
    while True:
        for operation in MAINTENANCE:
            stores: list[Store] = []
            operation.run(RealDisk(path), Diary(diary, Ledger()), stores)
            close(stores)


def _random(where: Path, trials: int, seed: int) -> Tally:
    tally = Tally()
    chance = random.Random(seed)
    for trial in range(trials):
        path = where / f"store {trial}"
        close([Store.open(path, create=True)])
        ledger = Ledger()
        for half in range(2):
            replay = f"seed {seed}, trial {trial}, half {half}"
            with tally.trial("random kills", replay):
                ledger = _one_round(path, f"{replay}", 10 * trial + half, chance.uniform(0.02, 0.3), tally)
                RealDisk(path).age(7200)  # what the killed have left is garbage to the next maintainer
        tally.counts["acknowledged entries"] += len(ledger.acknowledged)
    return tally


def _one_round(path: Path, seed: str, turn: int, delay: float, tally: Tally) -> Ledger:
    writers = [f"{10 * turn + i}" for i in range(4)]
    diaries = [path.parent / f"diary {path.name} {writer}" for writer in writers]
    everyone = sorted(path.parent.glob(f"diary {path.name} *"))
    works: list[Callable[[], None]] = [
        partial(_write, path, diary, 10 * turn + i, f"{seed} {i}") for i, diary in enumerate(diaries)
    ]
    drops = path.parent / f"diary {path.name} drops"
    works += [lambda: _read(path, [*everyone, *diaries, drops])] * 2
    works += [lambda: _maintain(path, drops)]
    children = [forked(work) for work in works]
    awaited = "ACK" if turn % 2 else ""  # in every other round the first commit is done, in the others it may not be
    while not any(diary.exists() and awaited in diary.read_text() for diary in diaries):
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            break  # one ended by itself: reported below
        time.sleep(0.005)
    time.sleep(delay)
    for child in children:
        os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    tally.counts["kills"] += codes.count(-signal.SIGKILL)
    assert set(codes) == {-signal.SIGKILL}, f"a process ended by itself: {codes}"
    total = Ledger()
    for diary in path.parent.glob(f"diary {path.name} *"):
        one = ledger_of(diary)
        total.begun |= one.begun
        total.acknowledged |= one.acknowledged
        total.doubtful |= one.doubtful
        tally.counts["acknowledged commits"] += diary.read_text().count("ACK")
    stores: list[Store] = []
    try:
        check(open_in(RealDisk(path), stores), total, sorted({*total.begun, *UNIVERSE}))
    finally:
        close(stores)
    return total


def main(kind: str, where: str, *arguments: str) -> None:
    logging.disable(logging.CRITICAL)
    if kind == "each":
        tally = Tally()
        for name in arguments:
            tally += _each(Path(where), name)
    else:
        tally = _random(Path(where), int(arguments[0]), int(arguments[1]))
    sys.stdout.write(json.dumps([tally.counts, tally.failures]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

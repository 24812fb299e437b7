"""Real processes on a real file system, killed by SIGKILL: at every call, or at a random time.

One process, without threads, forks all the others: a fork takes 10 ms, a fresh Python with FAISS half a second.
What is expected is written to files outside the store, a line before each commit and one after it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmcache.indexes.io import Folder
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
    fill,
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


def sigkills(operation: Operation, where: Path) -> Tally:
    """SIGKILL at each call of the operation, in the middle of each write; then recovery. `where` is an empty folder."""
    return _in_process("each", where, operation.name)


def random_kills(where: Path, trials: int, seed: int) -> Tally:
    """Trials with 4 writers, 2 readers and a maintainer on one store, all killed at a random time, twice."""
    return _in_process("random", where, trials, seed)


# -- at every call ------------------------------------------------------------------------------------------


class DeadlyFolder(Folder):
    """Kills its process at the n-th of the calls that change a disk."""

    left = -1
    """Calls until then; -1 is never. One count for all folders of a process."""

    def _count(self) -> bool:
        DeadlyFolder.left -= 1
        return DeadlyFolder.left == -1

    def _die_if_due(self) -> None:
        if self._count():
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, name: str) -> int:
        self._die_if_due()
        return super().create(name)

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self._count():
            super().write_some(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_some(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._die_if_due()
        super().sync(descriptor)

    def close_file(self, descriptor: int) -> None:
        self._die_if_due()
        super().close_file(descriptor)

    def sync_folder(self, sub: str) -> None:
        self._die_if_due()
        super().sync_folder(sub)

    def link(self, name: str, new: str) -> None:
        self._die_if_due()
        super().link(name, new)

    def replace(self, name: str, new: str) -> None:
        self._die_if_due()
        super().replace(name, new)

    def remove(self, name: str) -> None:
        self._die_if_due()
        super().remove(name)

    def names(self, sub: str = "") -> list[str]:
        self._die_if_due()
        return super().names(sub)

    def read(self, name: str, limit: int) -> bytes:
        self._die_if_due()
        return super().read(name, limit)


class RealDisk:
    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, *, create: bool = False) -> Folder:
        return DeadlyFolder(self.path, create=create)


class Diary(Ledger):
    """A ledger whose entries a killed process has already written down."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        super().__init__(_Written(path, "BEGIN"), _Written(path, "ACK"), _Written(path, "DROP"))
        set.update(self.begun, ledger.begun)
        set.update(self.acknowledged, ledger.acknowledged)


class _Written(set[int]):
    """A set that appends what is added to a file, in one write."""

    def __init__(self, path: Path, word: str) -> None:
        super().__init__()
        self.path, self.word = path, word

    def __ior__(self, numbers: object) -> _Written:  # type: ignore[override]  # only sets of int are added
        assert isinstance(numbers, set)
        note(self.path, self.word, numbers)
        set.update(self, numbers)
        return self


def note(path: Path, word: str, numbers: set[int]) -> None:
    """Append one line, whole, whatever happens to this process next."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{word} {' '.join(map(str, sorted(numbers)))}\n".encode())
    finally:
        os.close(descriptor)


def ledger_of(path: Path) -> Ledger:
    """What was written down."""
    ledger = Ledger()
    for line in path.read_text().splitlines() if path.exists() else ():
        word, *numbers = line.split()
        {"BEGIN": ledger.begun, "ACK": ledger.acknowledged, "DROP": ledger.doubtful}[word].update(map(int, numbers))
    return ledger


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
    (operation,) = (one for one in (*OPERATIONS, *MAINTENANCE) if one.name == name)
    tally = Tally()
    for at in range(4 * len(calls_of(operation))):
        path, diary = where / f"store {at}", where / f"diary {at}"
        ledger = Ledger() if operation.fresh else fill(RealDisk(path))
        for word, numbers in (("BEGIN", ledger.begun), ("ACK", ledger.acknowledged)):
            note(diary, word, numbers)

        def work(path: Path = path, diary: Path = diary, at: int = at, ledger: Ledger = ledger) -> None:
            DeadlyFolder.left = at
            operation.run(RealDisk(path), Diary(diary, ledger), [])

        _, status = os.waitpid(forked(work), 0)
        code = os.waitstatus_to_exitcode(status)
        with tally.trial("kills at a call", f"{name}, call {at}"):
            assert code in (0, -signal.SIGKILL), f"the operation ended with {code}"
            recover(RealDisk(path), ledger_of(diary))
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
    works += [lambda: _maintain(path, drops)] if MAINTENANCE else []
    children = [forked(work) for work in works]
    patience = time.monotonic() + 5  # a busy machine may take long to start them
    while time.monotonic() < patience and not any(diary.exists() for diary in diaries):
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
        tally = _each(Path(where), arguments[0])
    else:
        tally = _random(Path(where), int(arguments[0]), int(arguments[1]))
    sys.stdout.write(json.dumps([tally.counts, tally.failures]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

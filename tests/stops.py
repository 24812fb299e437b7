"""Writers, mergers, a collector and snapshots beside each other, stopped, continued and killed at random times.

    python -m tests.stops --trials 300 [--seed N] [--grace 0.05]

Every process is real, and so is the file system. What writers and mergers were told is committed has to be there in
the end, and every snapshot has to be made, whole, with all that was acknowledged before it was begun. The collector's
grace is far shorter than what the others sleep, and merged files are hours old: nothing but the leases of living
processes tells their files from garbage.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmcache.indexes.errors import Busy
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.snapshot import save
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.store import Store
from tests.faults import Tally
from tests.kills import RealDisk, forked, ledger_of, note
from tests.operations import UNIVERSE, Ledger, bank_of, check, close, open_in, put

log = logging.getLogger("tests.stops")

_PER_PROCESS = 100_000  # numbers from which a process takes its own
_SOURCES = 6  # stores that one merger merges


def _write(path: Path, diary: Path, first: int, seed: str) -> None:
    """Commit for ever, at once or in the background, sometimes long after the files were written."""
    chance, number = random.Random(seed), first
    stores: list[Store] = []
    store = open_in(RealDisk(path), stores)
    bank_of(store)
    while True:
        numbers = range(number, number + chance.randint(1, 8))
        note(diary, "BEGIN", set(numbers))
        put(store, numbers)
        if chance.random() < 0.5:
            store.commit_behind()
            time.sleep(chance.choice((0, 0.02, 0.12)))  # idle: longer than the grace, or not
            store.finish_commit()
        else:
            store.commit()
        note(diary, "ACK", set(numbers))
        number = numbers.stop


def _merge(path: Path, diary: Path, sources: list[tuple[Path, range]], seed: str) -> None:
    """Merge stores whose files are two hours old, by links or by copies."""
    chance = random.Random(seed)
    for source, numbers in sources:
        note(diary, "BEGIN", set(numbers))
        merge([source], path, copy=chance.random() < 0.3)
        note(diary, "ACK", set(numbers))
    while True:  # a process that ends by itself is a failure
        time.sleep(1)


def _collect(path: Path, grace: float, seed: str) -> None:
    chance = random.Random(seed)
    while True:
        stores: list[Store] = []
        store = open_in(RealDisk(path), stores)
        try:
            if chance.random() < 0.2:
                compact(store, small=True)
            gc(store, grace)
        except Busy:  # a snapshot keeps collectors off
            time.sleep(0.01)
        close(stores)


def _snapshot(path: Path, diaries: list[Path], made: Path) -> None:
    """Take snapshots for ever; each has to be whole, with everything that was acknowledged before."""
    number = 0
    while True:
        before = [ledger_of(diary) for diary in diaries]
        acknowledged = set[int]().union(*(ledger.acknowledged for ledger in before))
        target = path.parent / f"{path.name}-{made.name}-{number}"
        save(path, target)
        stores: list[Store] = []
        check(open_in(RealDisk(target), stores), Ledger(_Anything(), acknowledged), sorted(acknowledged))
        close(stores)
        shutil.rmtree(target)
        note(made, "ACK", {number})
        number += 1


class _Anything(set[int]):
    """Everything was begun: a snapshot may have what was not acknowledged yet."""

    def __rsub__(self, other: object) -> set[int]:
        return set()


def stops(where: Path, trials: int, seed: int, grace: float = 0.05, seconds: float = 0.6) -> Tally:
    """Run so many trials in an empty folder; each has up to `seconds` of stops, and then ends in SIGKILLs."""
    tally = Tally()
    for trial in range(trials):
        place = where / f"trial-{trial}"
        place.mkdir()
        with tally.trial("trials of stops and kills", f"seed {seed}, trial {trial}"):
            _trial(place / "store", f"{seed} {trial}", grace, seconds, tally)
        shutil.rmtree(place)
        log.info("%d trials, %d failures", trial + 1, len(tally.failures))
    return tally


def _trial(path: Path, seed: str, grace: float, seconds: float, tally: Tally) -> None:
    chance = random.Random(seed)
    close([Store.open(path, create=True)])
    writers = [path.parent / f"diary-{i}" for i in range(2)]
    mergers = [path.parent / f"diary-merge-{i}" for i in range(2)]
    diaries, made = [*writers, *mergers], path.parent / "snapshots"
    works: list[Callable[[], None]] = [
        partial(_write, path, diary, i * _PER_PROCESS, f"{seed} {i}") for i, diary in enumerate(writers)
    ]
    for i, diary in enumerate(mergers):
        sources = _sources(path, (10 + i) * _PER_PROCESS)
        works.append(partial(_merge, path, diary, sources, f"{seed} merge {i}"))
    works.append(partial(_collect, path, grace, f"{seed} gc"))
    works.append(partial(_snapshot, path, diaries, made))
    children = [forked(work) for work in works]
    try:
        _disturb(children, chance, seconds, tally)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) == {-signal.SIGKILL}, f"a process ended by itself: {codes}"
    _check(path, diaries, tally)
    tally.counts["kills"] += len(children)
    tally.counts["snapshots"] += len(ledger_of(made).acknowledged)


def _sources(path: Path, first: int) -> list[tuple[Path, range]]:
    found = []
    for i in range(_SOURCES):
        source, numbers = path.parent / f"source-{first}-{i}", range(first + 10 * i, first + 10 * i + 10)
        store = Store.open(source, create=True)
        put(store, numbers)
        store.commit()
        store.close()
        RealDisk(source).age(7200)
        found.append((source, numbers))
    return found


def _disturb(children: list[int], chance: random.Random, seconds: float, tally: Tally) -> None:
    """Stop one process after the other, some at the same time, each for a while."""
    until = time.monotonic() + seconds
    stopped: list[int] = []
    while time.monotonic() < until:
        time.sleep(chance.uniform(0, 0.02))
        child = chance.choice(children)
        if child in stopped:
            os.kill(child, signal.SIGCONT)
            stopped.remove(child)
        elif len(stopped) < 3:
            os.kill(child, signal.SIGSTOP)
            stopped.append(child)
            tally.counts["stops"] += 1
    for child in stopped[1:]:  # one of them is killed while it is stopped
        os.kill(child, signal.SIGCONT)


def _check(path: Path, diaries: list[Path], tally: Tally) -> None:
    total = Ledger()
    for diary in diaries:
        one = ledger_of(diary)
        total.begun |= one.begun
        total.acknowledged |= one.acknowledged
    universe = sorted({*total.begun, *UNIVERSE})
    for collected in (False, True):
        stores: list[Store] = []
        store = open_in(RealDisk(path), stores)
        check(store, total, universe)
        if not collected:
            gc(store, 0)
        close(stores)
        damage = [one for one in verify(path).findings if one.damage]
        assert not damage, f"damaged: {damage[:3]}"
    target = path.parent / "last-snapshot"
    save(path, target)
    stores = []
    check(open_in(RealDisk(target), stores), total, universe)
    close(stores)
    tally.counts["acknowledged entries"] += len(total.acknowledged)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grace", type=float, default=0.05)
    options = parser.parse_args()
    logging.getLogger("llmcache").disabled = True
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    where = Path(tempfile.mkdtemp(prefix="stops-"))
    try:
        tally = stops(where, options.trials, options.seed, options.grace)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    for failure in tally.failures:
        sys.stdout.write(f"FAILED {failure}\n")
    for name, count in sorted(tally.counts.items()):
        sys.stdout.write(f"{count:,} {name}\n")
    sys.stdout.write(f"{len(tally.failures)} failures\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())

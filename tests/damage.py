"""Damaged files, thousands of them: each kind, in each way, with and without the checksums over them put right.

They are read in a process of its own, with little memory and an alarm, so that a signal, a hang or a large allocation
is a failure of one case and not the end of the test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.store import Store
from tests.faults import Tally
from tests.operations import FEATURES, Ledger, Violation, bank_of, commit, found_in, values_of

ROOT = Path(__file__).parent.parent
KINDS = ("manifest", "FORMAT", "row", "seg", "key", "var", "fp", "proj", "faiss", "stat")
SEGMENTS = (range(600), range(600, 620), range(620, 640))
"""Entries of each segment, in the order of their commits. Enough for a PCA, so that there is a projection."""
_SPARE = 64 << 20  # bytes a reader may take beside twice the file
_ADDRESSES = 1 << 30  # bytes of address space beside what Python and its libraries have
_SECONDS = 20


def make(path: Path) -> None:
    """A store with all kinds of files."""
    store = Store.open(path, create=True)
    for numbers in SEGMENTS:
        commit(store, Ledger(), numbers)
        bank_of(store).nearest(values_of([1])[:, :FEATURES], 1)
        store.commit()
    store.write_counters({"hits": 3, "seconds": 0.5})
    store.close()


# -- ways to damage -----------------------------------------------------------------------------------------

Change = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
"""From a file's bytes and those of the other files to what it is after the damage."""


def truncated(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: chance.choice((0, 1, 63, 64, len(data) - 1, chance.randrange(len(data) + 1)))]


def extended(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    return data + chance.randbytes(chance.choice((1, 72, 4096)))


def flipped(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    new = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 8))):
        new[chance.randrange(len(new))] ^= 1 << chance.randrange(8)
    return bytes(new)


_EXTREME = (0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 53) - 1, (1 << 63) - 1, (1 << 64) - 1)


def extreme(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """A number that is far too large or small: a decimal one in JSON, else 4 or 8 bytes, mostly near the beginning."""
    value = chance.choice(_EXTREME)
    places = [match.span() for match in re.finditer(rb"\d+", data)] if data[:1] == b"{" else []
    if places:
        start, end = chance.choice(places)
        return data[:start] + str(chance.choice((value, -value, 10 * value))).encode() + data[end:]
    size = chance.choice((4, 8))
    reach = chance.choice((64, 256, len(data)))
    at = chance.randrange(max(1, min(reach, len(data)) // 4)) * 4
    return (data[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + data[at + size :])[: len(data)]


def zeroed(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    size = chance.choice((512, 4096))
    at = chance.randrange(len(data) // size + 1) * size
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


def swapped(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Another file's bytes: of the same kind, so an older one among them, or of any."""
    return chance.choice(others)


CHANGES: tuple[Change, ...] = (truncated, extended, flipped, flipped, extreme, extreme, zeroed, swapped)


# -- putting checksums right --------------------------------------------------------------------------------


def signed(body: bytes) -> bytes:
    """A manifest's bytes with the checksum line that fits them."""
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def with_checksum_of(manifest: bytes, name: str, data: bytes) -> bytes:
    """The manifest as if this file had always had these bytes."""

    def put_right(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("name") == name:
                value["size"] = len(data)
                value["sha256"] = value["sha256"] and hashlib.sha256(data).hexdigest()
            value = list(value.values())
        for one in value if isinstance(value, list) else ():
            put_right(one)

    facts = json.loads(manifest[:-73])
    put_right(facts)
    return signed(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())


# -- cases --------------------------------------------------------------------------------------------------


class Case:
    """One damaged file, made from a seed and a number. fixed: the checksums over it are put right."""

    def __init__(self, files: dict[str, bytes], seed: int, number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        self.kind = KINDS[number % len(KINDS)]
        names = [name for name in sorted(files) if _kind(name) == self.kind]
        newest = max(name for name in files if name.startswith("m-"))
        named = files[newest].decode()
        live = [name for name in names if name in named] or names
        self.name = newest if self.kind == "manifest" and chance.random() < 0.8 else chance.choice(live)
        change = chance.choice(CHANGES)
        same = [files[name] for name in names if name != self.name]
        others = same if same and chance.random() < 0.7 else [*files.values()]
        self.fixed = chance.random() < 0.5 and self.kind not in {"FORMAT", "stat"}
        data = files[self.name]
        if self.kind == "manifest" and self.fixed:
            body = change(data[:-73], chance, [one[:-73] for one in same] or [b"{}"])
            self.new = {self.name: signed(body)}
        else:
            self.new = {self.name: change(data, chance, others)}
            if self.fixed:
                self.new[newest] = with_checksum_of(files[newest], self.name, self.new[self.name])
        self.changed = any(files[name] != data for name, data in self.new.items())
        self.writes = chance.random() < 0.2
        self.title = f"{self.kind}, {change.__name__}, {'fixed' if self.fixed else 'plain'}, seed {seed}, case {number}"

    def survivors(self, files: dict[str, bytes]) -> set[int]:
        """Entries that must be served all the same."""
        everything = set[int]().union(*SEGMENTS)
        if self.kind in {"proj", "faiss", "stat"}:
            return everything
        if self.kind in {"FORMAT", "manifest"}:
            plain = self.kind == "manifest" and not self.fixed  # then the generation before it opens
            return set(range(620)) if plain else set()
        if self.kind in {"row", "key"} and self.fixed:
            return set()  # its rows may now claim the keys of others, whose older copies they hide
        newest = json.loads(files[max(name for name in files if name.startswith("m-"))][:-73])
        segments = newest["namespaces"]["default"]["banks"]["layer"]["segments"]
        (place,) = (i for i, one in enumerate(segments) if one["id"] in self.name)
        if self.kind in {"fp", "var"} and not self.fixed:
            return everything  # of these only near matches, or token ids, are lost
        return everything - set(SEGMENTS[place])


def _kind(name: str) -> str:
    if name.startswith("m-"):
        return "manifest"
    return "stat" if name.startswith("stat/") else name.rpartition(".")[2]


def files_of(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def damaged(where: Path, seed: int, first: int, last: int) -> Tally:
    """Read a store with each of these cases in it, in child processes; `where` is an empty folder."""
    make(where / "store")
    return in_children("tests.damage", where / "store", seed, first, last)


def in_children(module: str, store: Path, seed: int, first: int, last: int) -> Tally:
    """Run `main` of a module over these cases of a store; one that ends or hangs a process is one failure."""
    tally = Tally()
    while first < last and len(tally.failures) < 50:
        command = [sys.executable, "-m", module, str(store), str(seed), str(first), str(last)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            number, kind, failure = json.loads(line)
            tally.counts[f"damaged: {kind}"] += 1
            tally.failures += [failure] if failure else []
            first = number + 1
        if done.returncode:
            what = f"ended with {done.returncode}" if done.returncode != -signal.SIGALRM else "hung"
            tally.failures.append(f"seed {seed}, case {first} {what}: {done.stderr[-1000:]}")
            first += 1
    return tally


# -- in the child -------------------------------------------------------------------------------------------


def main(store: str, seed: str, first: str, last: str) -> None:
    """One line for each case: its number, kind, and failure or null."""
    logging.disable(logging.CRITICAL)
    path = Path(store)
    files = files_of(path)
    restore(path, files)
    _use(path, set[int]().union(*SEGMENTS), tokens=True, writes=True)  # loads all libraries before memory is limited
    restore(path, files)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ADDRESSES,) * 2)
    for number in range(int(first), int(last)):
        signal.alarm(_SECONDS)
        case = Case(files, int(seed), number)
        failure = _failure(path, files, case)
        sys.stdout.write(json.dumps([number, case.kind, failure]) + "\n")
        sys.stdout.flush()


def _failure(path: Path, files: dict[str, bytes], case: Case) -> str | None:
    for name, data in case.new.items():
        (path / name).write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _memory("VmRSS")
    largest = max(map(len, case.new.values()))
    may_refuse = case.kind == "FORMAT" or (case.kind == "manifest" and case.fixed)
    try:
        _use(path, case.survivors(files), tokens=not case.fixed, writes=case.writes)
    except LLMCacheError as error:
        if not may_refuse:
            return f"{case.title}: refused: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{case.title}: {type(error).__name__}: {error}"
    finally:
        grown = _memory("VmHWM") - before
        restore(path, files)
    if grown > 2 * largest + _SPARE:
        return f"{case.title}: took {grown:,} bytes for a file of {largest:,}"
    return None


def _use(path: Path, survivors: set[int], *, tokens: bool, writes: bool) -> None:
    """Everything a reader does, and a writer after it. What must be served is in `survivors`."""
    store = Store.open(path)
    try:
        numbers = range(660)
        served = found_in(store, numbers, tokens=tokens)
        if survivors - served:
            raise Violation(f"of whole segments are missing: {sorted(survivors - served)[:10]}")
        if store.namespace("default") is not None:
            bank = bank_of(store)
            queries = values_of(range(0, 640, 40))
            rows, similarity = bank.nearest(queries[:, : bank.facts.feature_width], 3)
            if rows.max(initial=-1) >= len(bank) or not ((rows >= 0) == (similarity > -np.inf)).all():
                raise Violation("near matches that are not there")
            for row in rows[rows >= 0].tolist()[:5]:
                bank.source(row), bank.key(row)
        store.counters()
        if writes:
            commit(store, Ledger(), range(640, 645))
            store.commit()
    finally:
        store.close()


def restore(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if not (path / name).exists() or (path / name).read_bytes() != data:
            (path / name).write_bytes(data)
    for one in path.rglob("*"):
        if one.is_file() and str(one.relative_to(path)) not in files:
            one.unlink()


def _memory(field: str) -> int:
    """Bytes, from what the kernel says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


if __name__ == "__main__":
    main(*sys.argv[1:])

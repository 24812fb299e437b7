"""Measurement of rows written and read per second, against the bare system calls on the same bytes.

All calls take the public path: `Bank.put` and `Store.commit`; `Bank.find` and `Bank.read` with every checksum compared.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmcache.bench.harness.page_cache import drop, warm
from llmcache.bench.harness.turns import Measurement, Row, Turn, in_turn
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

FEATURES = 384
"""Width of the features, as in all-MiniLM-L6-v2."""
TOKENS = 12
_COMMIT = 64 << 20
_PUT = 8 << 20
_BATCH = 16 << 20
_PIECE = 8 << 20
_BANK = ("default", "output")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows to store: float32 values [n, width], keys and text keys uint64 [n, 2], features float32 [n, 384]."""

    values: NDArray[np.float32]
    keys: Keys
    texts: Keys
    features: NDArray[np.float32]
    tokens: list[NDArray[np.int32]]
    sources: list[str]

    @classmethod
    def drawn(cls, row_bytes: int, payload: int, seed: int = 0) -> StoredRows:
        """Draw random rows of `row_bytes`, about `payload` bytes in all."""
        random = np.random.default_rng(seed)
        count = max(1, payload // row_bytes)
        return cls(
            random.random((count, row_bytes // 4), np.float32),
            random.integers(0, 2**63, (count, 2), np.uint64),
            random.integers(0, 2**63, (count, 2), np.uint64),
            random.random((count, FEATURES), np.float32),
            list(random.integers(0, 30_000, (count, TOKENS), np.int32)),
            [f"document {i}" for i in range(count)],
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def row_bytes(self) -> int:
        return int(self.values.shape[1]) * 4

    def blocks(self, nbytes: int) -> Iterator[slice]:
        """Return slices of about `nbytes` of values."""
        step = max(1, nbytes // self.row_bytes)
        return (slice(start, min(start + step, len(self))) for start in range(0, len(self), step))

    def part(self, chosen: slice) -> StoredRows:
        return StoredRows(*(getattr(self, field.name)[chosen] for field in fields(self)))


# -- the store ----------------------------------------------------------------------------------------------


def bank_of(store: Store, row_bytes: int) -> Bank:
    """Open the only bank, without an index, which is not measured here."""
    return store.bank(
        *_BANK, lambda: BankFacts("float32", row_bytes // 4, 1, FEATURES), NearChoice(projection="none", index="flat")
    )


def fill(folder: Path, rows: StoredRows) -> None:
    """Put all rows, about 8 MiB at a time, and commit them, about 64 MiB at a time."""
    with closing(Store.open(folder, create=True)) as store:
        store.declare("default", {"name": "bench"}, {})
        bank = bank_of(store, rows.row_bytes)
        pending = 0
        for some in map(rows.part, rows.blocks(_PUT)):
            bank.put(
                some.keys, some.values, tokens=some.tokens, sources=some.sources, features=some.features,
                cost=np.full(len(some), 0.002, np.float32),
            )  # fmt: skip
            bank.alias(some.texts, some.keys)
            pending += some.values.nbytes
            if pending >= _COMMIT:
                store.commit()
                pending = 0
        store.commit()


# -- writing ------------------------------------------------------------------------------------------------


def writing(rows: StoredRows, folder: Path, repeats: int) -> list[Row]:
    """Measure writing by the store, and `pwrite` of the same values into as many files, with fsync of each."""
    bare = "pwrite + fsync"
    turns = [
        Turn(name, len(rows), partial(removed, folder, partial(action, folder, rows)), base, facts={
            "operation": "write", "cache": "", "order": "stored", "contender": name, "base": base,
            "resident_before": None,
        })
        for name, base, action in ((bare, "", _raw_written), ("put + commit", bare, fill))
    ]  # fmt: skip
    return [_rate(one, rows) for one in in_turn(turns, repeats).values()]


@contextmanager
def removed(folder: Path, action: Callable[[], object], _: int) -> Iterator[Callable[[], object]]:
    """Context of a round whose action writes a new folder: the folder is removed after the round."""
    os.sync()  # dirty pages of others do not count
    yield action
    shutil.rmtree(folder)


def _rate(found: Measurement, rows: StoredRows) -> Row:
    return {
        "row_bytes": rows.row_bytes, **found.facts, "rows": len(rows), "rows_per_second": found.rate,
        "mib_per_second": found.rate * rows.row_bytes / 2**20, **found.row("seconds", "ratio", "ratio_of_best"),
    }  # fmt: skip


def _raw_written(folder: Path, rows: StoredRows) -> None:
    folder.mkdir()
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for number, block in enumerate(rows.blocks(_COMMIT)):
        data = rows.values[block].data.cast("B")
        descriptor = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done : done + _PIECE], done)
        os.fsync(descriptor)
        os.close(descriptor)
        os.fsync(above)
    os.close(above)


# -- reading ------------------------------------------------------------------------------------------------


def reading(rows: StoredRows, folder: Path, repeats: int) -> list[Row]:
    """Measure reading a store, mapped and with `preadv`, against bare copies and calls into new arrays of 16 MiB.

    Cold is the first read after the files were dropped from the page cache, warm a second read in a row. Rows are read
    in the stored order and in a random one. resident_before: most of the files in the page cache before a cold read.
    """
    fill(folder, rows)
    contenders: list[tuple[str, str, Callable[..., AbstractContextManager[Callable[[], None]]]]] = [
        ("preadv", "", _raw_preadv),
        ("memcpy", "", _raw_memcpy),
        ("store, mmap", "memcpy", partial(_stored, how="mmap")),
        ("store, preadv", "preadv", partial(_stored, how="pread")),
    ]
    orders = {"stored": np.arange(len(rows)), "shuffled": np.random.default_rng(1).permutation(len(rows))}
    found = []
    for order, numbers in orders.items():
        turns = []
        for cache in ("cold", "warm"):
            for name, base, opened in contenders:
                best = "preadv" if cache == "cold" and base else base  # the best a disk can do
                facts = {
                    "operation": "read", "cache": cache, "order": order, "contender": name, "base": best,
                    "resident_before": None,
                }  # fmt: skip
                prepared = partial(_prepared, folder, partial(opened, folder, rows, numbers), facts)
                turns.append(Turn(f"{name} {cache}", len(rows), prepared, best and f"{best} {cache}", facts=facts))
        found += [_rate(one, rows) for one in in_turn(turns, repeats, warm=0).values()]
    shutil.rmtree(folder)
    return found


@contextmanager
def _prepared(
    folder: Path, opened: Callable[[], AbstractContextManager[Callable[[], None]]], facts: Row, _: int
) -> Iterator[Callable[[], None]]:
    files = sorted((folder / "seg").glob("*.seg"))
    with opened() as read:
        if facts["cache"] == "cold":
            facts["resident_before"] = max(facts["resident_before"] or 0.0, drop(files))
        else:
            warm(files)
            read()
        yield read


def _batches(rows: StoredRows, numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [numbers[block] for block in rows.blocks(_BATCH)]


@contextmanager
def _stored(
    folder: Path, rows: StoredRows, numbers: NDArray[np.int64], how: Literal["mmap", "pread"]
) -> Iterator[Callable[[], None]]:
    with closing(Store.open(folder, reading=how, uses=False)) as store:
        bank = bank_of(store, rows.row_bytes)
        asked = [rows.keys[batch] for batch in _batches(rows, numbers)]

        def read() -> None:
            for keys in asked:
                if not bank.read(bank.find(keys)).intact.all():
                    raise AssertionError("a row that was just stored does not agree with its checksum")

        yield read


def _places(
    folder: Path, rows: StoredRows, numbers: NDArray[np.int64]
) -> tuple[list[Path], list[list[tuple[int, int]]]]:
    """Return the files in the order of the manifest, and for each batch the file number and offset of each row."""
    with closing(Store.open(folder, uses=False)) as store:
        segments = store.manifest.namespaces[_BANK[0]].banks[_BANK[1]].segments
    starts = np.cumsum([0, *(one.rows for one in segments)])
    found = []
    for batch in _batches(rows, numbers):
        file = np.searchsorted(starts, batch, "right") - 1
        pitch = -(-rows.row_bytes // 64) * 64
        found.append(list(zip(file.tolist(), ((batch - starts[file]) * pitch).tolist(), strict=True)))
    return [folder / one.file("seg").name for one in segments], found


@contextmanager
def _raw_preadv(folder: Path, rows: StoredRows, numbers: NDArray[np.int64]) -> Iterator[Callable[[], None]]:
    files, batches = _places(folder, rows, numbers)
    descriptors = [os.open(one, os.O_RDONLY) for one in files]

    def read() -> None:
        for batch in batches:
            given = np.empty((len(batch), rows.row_bytes), np.uint8)
            for i, (file, offset) in enumerate(batch):
                os.preadv(descriptors[file], [given[i].data], offset)

    yield read
    for descriptor in descriptors:
        os.close(descriptor)


@contextmanager
def _raw_memcpy(folder: Path, rows: StoredRows, numbers: NDArray[np.int64]) -> Iterator[Callable[[], None]]:
    files, batches = _places(folder, rows, numbers)
    maps = []
    for path in files:
        with open(path, "rb") as file:
            maps.append(np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8))

    def read() -> None:
        for batch in batches:
            given = np.empty((len(batch), rows.row_bytes), np.uint8)
            for i, (file, offset) in enumerate(batch):
                given[i] = maps[file][offset : offset + rows.row_bytes]

    yield read
    maps.clear()

"""Measurement of rows written and read per second, against the bare system calls on the same bytes.

All calls take the public path: `Bank.put` and `Store.commit`; `Bank.find` and `Bank.read` with every checksum compared.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.bench.harness.page_cache import drop, warm
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


@dataclass(slots=True)
class Rate:
    """Rate of one contender. base: contender to compare with, "" for bare system calls. seconds: of every repeat."""

    row_bytes: int
    operation: str
    cache: str
    order: str
    contender: str
    base: str
    rows: int
    seconds: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)  # share of the bytes in the page cache at the start

    @property
    def per_second(self) -> float:
        """Rows per second, from the median."""
        return self.rows / statistics.median(self.seconds)

    def as_dict(self, others: list[Rate]) -> dict[str, Any]:
        """Return a row. ratio: rows per second over the base, median of the repeats, each against its own base.

        ratio_of_best: the same for the quickest repeats, which say more on a busy machine.
        """
        place = (self.row_bytes, self.operation, self.cache, self.order)
        bases = [
            other
            for other in others
            if (other.row_bytes, other.operation, other.cache, other.order) == place
            and other.contender == (self.base or None)
        ]
        ratios = [raw / mine for other in bases for raw, mine in zip(other.seconds, self.seconds, strict=True)]
        return {
            "row_bytes": self.row_bytes,
            "operation": self.operation,
            "cache": self.cache,
            "order": self.order,
            "contender": self.contender,
            "base": self.base,
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": self.per_second,
            "mib_per_second": self.per_second * self.row_bytes / 2**20,
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_of_best": min(bases[0].seconds) / min(self.seconds) if bases else None,
            "resident_before": max(self.resident, default=None),
        }


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
        return StoredRows(
            self.values[chosen],
            self.keys[chosen],
            self.texts[chosen],
            self.features[chosen],
            self.tokens[chosen],
            self.sources[chosen],
        )


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
        for block in rows.blocks(_PUT):
            bank.put(
                rows.keys[block],
                rows.values[block],
                tokens=rows.tokens[block],
                sources=rows.sources[block],
                features=rows.features[block],
                cost=np.full(len(rows.keys[block]), 0.002, np.float32),
            )
            bank.alias(rows.texts[block], rows.keys[block])
            pending += rows.values[block].nbytes
            if pending >= _COMMIT:
                store.commit()
                pending = 0
        store.commit()


# -- writing ------------------------------------------------------------------------------------------------


def writing(rows: StoredRows, folder: Path, repeats: int) -> list[Rate]:
    """Measure writing by the store, and `pwrite` of the same values into as many files, with fsync of each."""
    raw = Rate(rows.row_bytes, "write", "", "stored", "pwrite + fsync", "", len(rows))
    mine = Rate(rows.row_bytes, "write", "", "stored", "put + commit", raw.contender, len(rows))
    for round_ in range(repeats + 1):
        for rate, action in ((raw, _raw_written), (mine, fill)):
            place = folder / uuid.uuid4().hex
            os.sync()  # dirty pages of others do not count
            began = time.perf_counter()
            action(place, rows)
            if round_:  # the first round warms up: the kernel hands out new memory slowly
                rate.seconds.append(time.perf_counter() - began)
            shutil.rmtree(place)
    return [raw, mine]


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


_Opened: TypeAlias = tuple[Callable[[], None], Callable[[], None]]  # functions that read all rows, and close


def reading(rows: StoredRows, folder: Path, repeats: int) -> list[Rate]:
    """Measure reading a store, mapped and with `preadv`, against bare copies and calls into new arrays of 16 MiB.

    Cold is the first read after the files were dropped from the page cache, warm the second in a row. Rows are read in
    the stored order and in a random one.
    """
    fill(folder, rows)
    files = sorted((folder / "seg").glob("*.seg"))
    rates: dict[tuple[str, str, str], Rate] = {}
    shuffled = np.random.default_rng(1).permutation(len(rows))
    for round_ in range(repeats):
        for order, numbers in (("stored", np.arange(len(rows))), ("shuffled", shuffled)):
            contenders: list[tuple[str, str, Callable[[Path, StoredRows, NDArray[np.int64]], _Opened]]] = [
                ("preadv", "", _raw_preadv),
                ("memcpy", "", _raw_memcpy),
                ("store, mmap", "memcpy", partial(_stored, how="mmap")),
                ("store, preadv", "preadv", partial(_stored, how="pread")),
            ]
            for name, base, open_ in contenders[round_ % 4 :] + contenders[: round_ % 4]:
                read, end = open_(folder, rows, numbers)
                for cache in ("cold", "warm"):
                    chosen = "preadv" if cache == "cold" and base else base  # the best a disk can do
                    rate = rates.setdefault(
                        (cache, order, name), Rate(rows.row_bytes, "read", cache, order, name, chosen, len(rows))
                    )
                    if cache == "cold":
                        rate.resident.append(drop(files))
                    else:
                        warm(files)
                    began = time.perf_counter()
                    read()
                    rate.seconds.append(time.perf_counter() - began)
                end()
    shutil.rmtree(folder)
    return list(rates.values())


def _batches(rows: StoredRows, numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [numbers[block] for block in rows.blocks(_BATCH)]


def _stored(folder: Path, rows: StoredRows, numbers: NDArray[np.int64], how: Literal["mmap", "pread"]) -> _Opened:
    store = Store.open(folder, reading=how, uses=False)
    bank = bank_of(store, rows.row_bytes)
    asked = [rows.keys[batch] for batch in _batches(rows, numbers)]

    def read() -> None:
        for keys in asked:
            if not bank.read(bank.find(keys)).intact.all():
                raise AssertionError("a row that was just stored does not agree with its checksum")

    return read, store.close


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


def _raw_preadv(folder: Path, rows: StoredRows, numbers: NDArray[np.int64]) -> _Opened:
    files, batches = _places(folder, rows, numbers)
    descriptors = [os.open(one, os.O_RDONLY) for one in files]

    def read() -> None:
        for batch in batches:
            given = np.empty((len(batch), rows.row_bytes), np.uint8)
            for i, (file, offset) in enumerate(batch):
                os.preadv(descriptors[file], [given[i].data], offset)

    def end() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return read, end


def _raw_memcpy(folder: Path, rows: StoredRows, numbers: NDArray[np.int64]) -> _Opened:
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

    return read, maps.clear

"""Measurement of the store without a model: rows per second, merges against `cp -r`, bytes of overhead."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from llmcache.bench.harness.conditions import load
from llmcache.bench.harness.files import folder_bytes
from llmcache.bench.harness.turns import Row, Turn, in_turn
from llmcache.bench.store_rows import FEATURES, TOKENS, StoredRows, fill, reading, removed, writing
from llmcache.errors import ConfigError
from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.eviction.garbage import disk_bytes
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.linux import file_system
from llmcache.indexes.format.manifest_json import from_bytes
from llmcache.indexes.maintenance.merge import merge

LEAST_ROWS = 16


def measured(sizes: Sequence[int], payload: int, where: str | None, repeats: int) -> Row:
    """Measure stores of about `payload` bytes of activations, for each row size in bytes.

    where: existing folder for the stores, which are removed afterwards; None for the temporary folder. Returns rates,
    merges and overhead; load: load average of the minute before, and of the last minute. ConfigError when a size is not
    a multiple of 4 bytes, or so large that fewer than 16 rows fit.
    """
    for size in sizes:
        if size < 4 or size % 4 or payload < LEAST_ROWS * size:
            raise ConfigError(
                f"rows of {size:,} bytes in a store of {payload:,} cannot be measured: rows are float32, so multiples "
                f"of 4 bytes, and {LEAST_ROWS} of them must fit; give other --rows or a larger --payload"
            )
    if where is not None and not Path(where).is_dir():
        raise ConfigError(f"{where} is no folder; create it, or leave --folder out")
    before = load()
    rates: list[Row] = []
    merges: list[Row] = []
    added: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-", dir=where) as name:
        folder = Path(name)
        for size in sizes:
            rows = StoredRows.drawn(size, payload)
            rates += writing(rows, folder / "written", repeats) + reading(rows, folder / "read", repeats)
            merges += merging(size, payload // 2, folder / "merge", repeats)
            added.append(overhead(size, payload, folder / "overhead"))
        kind = _file_system(folder)
    left = max(one["resident_before"] or 0.0 for one in rates)
    cold = (
        "Cold: the files were dropped from the page cache (fsync, POSIX_FADV_DONTNEED) before each reading; "
        f"mincore then found at most {left:.1%} of their pages in it."
    )
    if left > 0.01:
        cold += " That is not cold: this file system keeps its pages. Give a --folder on a disk."
    return {
        "file_system": kind, "load": [before, load()], "cold": cold, "rates": rates, "merges": merges,
        "overhead": added,
    }  # fmt: skip


def _file_system(folder: Path) -> str:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return file_system(descriptor)
    finally:
        os.close(descriptor)


def merging(row_bytes: int, payload: int, folder: Path, repeats: int) -> list[Row]:
    """Measure merges of two stores into a new one: linked, copied, and copied with an eighth of the rows in both.

    The base is `cp -r` of the two folders, with and without waiting for the disk (syncfs): a merge waits, and reads
    every copied byte twice, for its checksums. The sources are in the page cache.
    """
    folder.mkdir(parents=True)
    rows = StoredRows.drawn(row_bytes, payload)
    half, part = len(rows) // 2, len(rows) // 8
    stores = {"a": slice(0, half), "b": slice(half, None), "c": slice(half - part, None)}
    for name, block in stores.items():
        fill(folder / name, rows.part(block))
    a, b, c = (folder / name for name in stores)
    target = folder / "target"
    waiting = "cp -r + syncfs"
    contenders: list[tuple[str, str, Callable[[], object], tuple[Path, Path]]] = [
        ("cp -r", "", lambda: _copied([a, b], target, wait=False), (a, b)),
        (waiting, "", lambda: _copied([a, b], target, wait=True), (a, b)),
        ("merge, linked", waiting, lambda: merge([a, b], target), (a, b)),
        ("merge, copied", waiting, lambda: merge([a, b], target, copy=True), (a, b)),
        ("merge, copied, 1/8 in both", waiting, lambda: merge([a, c], target, copy=True), (a, c)),
    ]
    turns = [
        Turn(name, sum(map(folder_bytes, sources)), partial(removed, target, action), base)
        for name, base, action, sources in contenders
    ]
    found: list[Row] = [
        {"row_bytes": row_bytes, "contender": one.name, "bytes": one.documents, "mib_per_second": one.rate / 2**20,
         **one.row("base", "seconds", "ratio", "ratio_of_best")}
        for one in in_turn(turns, repeats).values()
    ]  # fmt: skip
    shutil.rmtree(folder)
    return found


def _copied(sources: list[Path], target: Path, *, wait: bool) -> None:
    target.mkdir()
    subprocess.run(["cp", "-r", *map(str, sources), str(target)], check=True)
    if wait:
        subprocess.run(["sync", "-f", str(target)], check=True)


def overhead(row_bytes: int, payload: int, folder: Path) -> Row:
    """Measure the bytes of a store beside activations, features and token ids: records, keys, source ids, manifests.

    Every entry has one text key and a source id such as "document 12345". There is no index, since it is derived.
    """
    rows = StoredRows.drawn(row_bytes, payload)
    fill(folder, rows)
    with closing(Folder(folder)) as opened:
        total = disk_bytes(opened)
        newest = generation_name(generations(opened)[0])
        manifest = from_bytes(opened.read(newest, 1 << 24), newest)
    segments = [
        segment for space in manifest.namespaces.values() for bank in space.banks.values() for segment in bank.segments
    ]
    count, content = sum(segment.rows for segment in segments), sum(segment.payload for segment in segments)
    features, tokens = count * FEATURES * 2, count * TOKENS * 4
    rest = total - content - features - tokens
    shutil.rmtree(folder)
    return {
        "row_bytes": row_bytes, "entries": count, "disk_bytes": total, "payload_bytes": content,
        "feature_bytes": features, "token_bytes": tokens, "overhead_bytes_per_entry": rest / count,
        "overhead_share": rest / (content + features + tokens),
    }  # fmt: skip

"""How fast stores are merged, against `cp -r` of the same bytes; and what a store takes up beside its content."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcache.indexes.collection import disk_bytes
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import from_bytes, generation_name, generations
from llmcache.indexes.merge import merge
from llmcache.throughput import FEATURES, TOKENS, Rows, fill


def merging(row_bytes: int, payload: int, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Two stores into a new one: linked, copied, and copied where an eighth of the rows are in both.

    Against `cp -r` of the two folders with and without waiting for the disk (syncfs): a merge waits, and reads every
    byte it copies twice over (its checksums). What is copied was in the page cache.
    """
    folder.mkdir(parents=True)
    rows = Rows.drawn(row_bytes, payload)
    half, part = len(rows) // 2, len(rows) // 8
    stores = {"a": slice(0, half), "b": slice(half, None), "c": slice(half - part, None)}
    for name, block in stores.items():
        fill(folder / name, rows.part(block))
    a, b, c = (folder / name for name in stores)
    contenders: list[tuple[str, str, Callable[[Path], object], tuple[Path, Path]]] = [
        ("cp -r", "", lambda to: _copied([a, b], to, wait=False), (a, b)),
        ("cp -r + syncfs", "", lambda to: _copied([a, b], to, wait=True), (a, b)),
        ("merge, linked", "cp -r + syncfs", lambda to: merge([a, b], to), (a, b)),
        ("merge, copied", "cp -r + syncfs", lambda to: merge([a, b], to, copy=True), (a, b)),
        ("merge, copied, 1/8 in both", "cp -r + syncfs", lambda to: merge([a, c], to, copy=True), (a, c)),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, *_ in contenders}
    for _ in range(repeats):
        for name, _, action, _ in contenders:
            place = folder / uuid.uuid4().hex
            os.sync()
            began = time.perf_counter()
            action(place)
            seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(place)
    found = []
    for name, base, _, sources in contenders:
        nbytes = sum(_bytes(one) for one in sources)
        rates = [nbytes / one for one in seconds[name]]
        base_bytes = _bytes(a) + _bytes(b)
        ratios = [rate / (base_bytes / one) for rate, one in zip(rates, seconds.get(base, []), strict=False)]
        found.append(
            {
                "row_bytes": row_bytes,
                "contender": name,
                "base": base,
                "bytes": nbytes,
                "seconds": seconds[name],
                "mib_per_second": statistics.median(rates) / 2**20,
                "ratio": statistics.median(ratios) if ratios else None,
            }
        )
    shutil.rmtree(folder)
    return found


def _copied(sources: list[Path], target: Path, *, wait: bool) -> None:
    target.mkdir()
    subprocess.run(["cp", "-r", *map(str, sources), str(target)], check=True)
    if wait:
        subprocess.run(["sync", "-f", str(target)], check=True)


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def overhead(row_bytes: int, payload: int, folder: Path) -> dict[str, Any]:
    """What a store takes up beside activations, fingerprints and token ids: records, names, source ids, manifests.

    Every entry has one name (its text) and a source id such as "document 12345". There is no index: it is derived.
    """
    rows = Rows.drawn(row_bytes, payload)
    fill(folder, rows)
    opened = Folder(folder)
    try:
        every = disk_bytes(opened)
        newest = generations(opened)[0]
        manifest = from_bytes(opened.read(generation_name(newest), 1 << 24), generation_name(newest))
    finally:
        opened.close()
    segments = [one for space in manifest.namespaces.values() for bank in space.banks.values() for one in bank.segments]
    count, content = sum(one.rows for one in segments), sum(one.payload for one in segments)
    features, tokens = count * FEATURES * 2, count * TOKENS * 4
    rest = every - content - features - tokens
    shutil.rmtree(folder)
    return {
        "row_bytes": row_bytes,
        "entries": count,
        "disk_bytes": every,
        "payload_bytes": content,
        "feature_bytes": features,
        "token_bytes": tokens,
        "overhead_bytes_per_entry": rest / count,
        "overhead_share": rest / (content + features + tokens),
    }

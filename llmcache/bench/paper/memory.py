"""Memory against hit rate: what a store takes on the disk as it grows, by what it keeps of each document."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.bench.harness.rounds import Row
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise

TAU = 0.85
KEPT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("output, float32", {}),
    ("output, float16", {"dtype": "float16"}),
    ("output, int8", {"dtype": "int8"}),
    ("output and middle layer, float32", {"layers": (2,)}),
    ("all layers, float32", {"layers": "all"}),
    ("all layers, float16", {"layers": "all", "dtype": "float16"}),
)
SHARES = (0.125, 0.25, 0.5, 1.0)


def memory(model: SentenceTransformer, workload: Workload, folder: Path) -> list[Row]:
    """One row per kind of store and number of known documents, which are added in their order.

    bytes: of all files of its newest generation, as in a snapshot. hits: share of documents asked whose nearest entry
    is at similarity >= tau; how many documents are known decides it, what is kept of them does not. difference:
    largest, of stored outputs read back, to the model's.
    """
    counts = [max(1, int(len(workload.known) * share)) for share in SHARES]
    tokens = tokenise(model, workload.asked, None, None).ids
    asked = features(token_embedding(model), tokens, "mean")
    some = workload.known[:64]
    own = np.asarray(model.encode(some, batch_size=64), np.float32)
    rows = []
    for name, settings in KEPT:
        with LLMCache.open(folder / "store", model, config=CacheConfig(**settings, stand_aside=False)) as cache:
            for before, count in zip([0, *counts], counts, strict=False):
                cache.encode(workload.known[before:count], batch_size=64)
                cache.commit()
                bank = cache.storing.store.bank(cache.namespace, "output", _never, cache.config.near)
                nearest, similarity = bank.nearest(asked, 1)
                found = np.where(similarity[:, 0] >= TAU, nearest[:, 0], -1)
                cache.commit()  # the index, once it was asked for
                size = _size(folder)
                rows.append({
                    "data": workload.name, "model": "MiniLM", "weights": "real", "kept": name, "known": count,
                    "asked": len(asked), "tau": TAU, "hits": float((found >= 0).mean()),
                    "bytes": size, "bytes_per_document": size / count,
                })  # fmt: skip
            read = np.asarray(cache.encode(some[: counts[-1]], batch_size=64), np.float32)
        for row in rows[-len(counts) :]:
            row["difference"] = float(np.abs(read - own[: len(read)]).max())
        shutil.rmtree(folder / "store")
    return rows


def _size(folder: Path) -> int:
    """Bytes of the store without what is superseded, which the next `gc` takes away."""
    snapshot.save(folder / "store", folder / "newest")
    size = folder_bytes(folder / "newest")
    shutil.rmtree(folder / "newest")
    return size


def _never() -> Any:
    raise AssertionError("the output bank is there since the cache was opened")


def folder_bytes(folder: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_for(rows: Sequence[Row], hits: float) -> dict[str, float | None]:
    """Fewest bytes of each kind of store that reach this hit rate, None where none of them does."""
    kinds = dict.fromkeys(row["kept"] for row in rows)
    return {
        kind: min((row["bytes"] for row in rows if row["kept"] == kind and row["hits"] >= hits), default=None)
        for kind in kinds
    }

"""Memory experiment: bytes of a growing store against hit rate, by the activations stored per document."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.bench.harness.files import folder_bytes
from llmcache.bench.harness.turns import Row
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
    """Measure each kind of store at growing numbers of known documents. Returns one row each.

    bytes: all files of the newest generation, as in a snapshot. hits: share of queries whose nearest entry is at
    similarity >= tau, which depends on the number of known documents only. difference: the largest, of outputs read
    back, to the model's.
    """
    counts = [max(1, int(len(workload.known) * share)) for share in SHARES]
    tokens = tokenise(model, workload.asked, None, None).ids
    asked = features(token_embedding(model), tokens, "mean")
    sample = workload.known[:64]
    own = np.asarray(model.encode(sample, batch_size=64), np.float32)
    rows = []
    for name, settings in KEPT:
        with LLMCache.open(folder / "store", model, config=CacheConfig(**settings, stand_aside=False)) as cache:
            for before, count in zip([0, *counts], counts, strict=False):
                cache.encode(workload.known[before:count], batch_size=64)
                cache.commit()
                nearest, similarity = cache.bank.nearest(asked, 1)
                sources = np.where(similarity[:, 0] >= TAU, nearest[:, 0], -1)
                cache.commit()  # the index, which the look-up built
                size = _size(folder)
                rows.append({
                    "data": workload.name, "model": "MiniLM", "weights": "real", "kept": name, "known": count,
                    "asked": len(asked), "tau": TAU, "hits": float((sources >= 0).mean()),
                    "bytes": size, "bytes_per_document": size / count,
                })  # fmt: skip
            read = np.asarray(cache.encode(sample[: counts[-1]], batch_size=64), np.float32)
        for row in rows[-len(counts) :]:
            row["difference"] = float(np.abs(read - own[: len(read)]).max())
        shutil.rmtree(folder / "store")
    return rows


def _size(folder: Path) -> int:
    """Measure the bytes of a store without superseded files, which `gc` would remove."""
    snapshot.save(folder / "store", folder / "newest")
    size = folder_bytes(folder / "newest")
    shutil.rmtree(folder / "newest")
    return size


def _never() -> Any:
    raise AssertionError("the output bank exists since the cache was opened")

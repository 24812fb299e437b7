"""Measurements of `encode`, indexes, fingerprints and opening: medians, ratios, and differences to the model."""

from __future__ import annotations

import mmap
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.turns import Action, Row, Turn, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.document import Document
from llmcache.errors import ConfigError
from llmcache.indexes.search.projection import Projection, fit_pca, fit_simhash
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.indexes.store import Store
from llmcache.model.batching import token_embedding
from llmcache.model.encoders import Sentences
from llmcache.model.features import features
from llmcache.model.identity import identify
from llmcache.model.keys import key, key_seed, text_keys
from llmcache.model.tokens import tokenise
from llmcache.opening import fresh_bank

# -- encode -------------------------------------------------------------------------------------------------


def encode(model: SentenceTransformer, texts: Sequence[str], *, repeats: int = 3, batch_size: int = 32) -> list[Row]:
    """Measure the model alone and the cache with none, all and half of the texts stored. Returns one row each.

    Also measures every text three times in one call. Repeated texts are left out. difference: the largest, to the
    model's vectors. ConfigError for fewer than 2 texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        raise ConfigError(f"the corpus has {len(texts)} different texts; a measurement needs at least 2")
    vectors = model.encode(texts, batch_size=batch_size)  # warm-up, and the reference
    other, count = max(1, batch_size // 2 - 1), len(texts)
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        folder, stored = Path(name), {"full": texts, "half": texts[::2]}
        for kind, known in stored.items():
            with LLMCache.open(folder / kind, model) as cache:
                cache.encode(known, batch_size=batch_size)

        @contextmanager
        def cached(kind: str, asked: Sequence[str], _: int) -> Iterator[Action]:
            if kind in stored:
                shutil.copytree(folder / kind, folder / "work")
            with LLMCache.open(folder / "work", model) as cache:
                if kind in stored:  # maps the files, and audits the first hits
                    cache.encode(stored[kind], batch_size=batch_size)

                def encoded() -> Any:
                    outputs = cache.encode(asked, batch_size=batch_size)
                    if kind != "full":
                        cache.commit()
                    return outputs

                yield encoded
            shutil.rmtree(folder / "work")

        base = "model alone"
        made = in_turn(
            [
                Turn(base, count, steady(lambda: model.encode(texts, batch_size=batch_size)), base),
                Turn("other batch size", count, steady(lambda: model.encode(texts, batch_size=other)), base),
                Turn("all miss", count, partial(cached, "new", texts), base),
                Turn("all hit", count, partial(cached, "full", texts), base),
                Turn("half hit", count, partial(cached, "half", texts), base),
                Turn("each text 3 times", 3 * count, partial(cached, "new", [*texts] * 3), base),
            ],
            repeats,
            warm=0,
            keep=1,
        )
    for row in made.values():
        row.compare([np.concatenate([vectors] * (len(row.outputs[-1]) // count))])
    return [row.row("name", "documents", "seconds", "rate", "ratio", "difference") for row in made.values()]


# -- index --------------------------------------------------------------------------------------------------


def clustered(count: int, dim: int, seed: int, clusters: int = 2000) -> NDArray[np.float32]:
    """Draw unit vectors around random centres, like documents around topics; float32 [count, dim]."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, dim))
    points = centres[random.integers(0, clusters, count)] + 0.6 * random.standard_normal((count, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32)


def index(kinds: Sequence[str], *, count: int = 100_000, dim: int = 128, batch: int = 64) -> list[Row]:
    """Measure recall@1 against exact search, and milliseconds per query, of index kinds on clustered vectors.

    Queries are 1,024 stored vectors with a little noise, as if reworded, and 1,024 new ones of the same clusters.
    """
    every = clustered(count + 1024, dim, seed=0)
    vectors, fresh = every[:count], every[count:]
    random = np.random.default_rng(1)
    noisy = vectors[random.integers(0, count, 1024)] + 0.05 * random.standard_normal((1024, dim)).astype(np.float32)
    queries = np.concatenate([noisy / np.linalg.norm(noisy, axis=1, keepdims=True), fresh])
    best = np.concatenate([(block @ vectors.T).argmax(axis=1) for block in np.split(queries, 16)])
    rows = []
    for kind in kinds:
        began = time.perf_counter()
        built = VectorIndex.build(vectors, kind=kind)
        build_seconds = time.perf_counter() - began
        built.nearest(queries[:batch], 1)

        def searched(number: int, built: VectorIndex = built) -> AbstractContextManager[Action]:
            return nullcontext(lambda: built.nearest(queries[number * batch : (number + 1) * batch], 1)[0][:, 0])

        search = in_turn([Turn(kind, batch, searched)], -(-len(queries) // batch), warm=0)[kind]
        right = np.concatenate(search.outputs) == best
        rows.append({
            "index": kind, "vectors": count, "dim": dim, "build_seconds": build_seconds,
            "recall_noisy": float(right[:1024].mean()), "recall_fresh": float(right[1024:].mean()),
            "ms_per_query": 1e3 * search.median / batch, "bytes_per_vector": len(built.to_bytes()) / count,
        })  # fmt: skip
    return rows


# -- fingerprints -------------------------------------------------------------------------------------------


def fingerprints(
    model: SentenceTransformer, known: Sequence[Document], asked: Sequence[Document], dim: int = 128
) -> list[Row]:
    """Measure how often the nearest known document has the label of the query. Labels are in the ids of documents.

    Projections are fitted on `known` only. coverage: share of `asked` that can be served, nearest first, while at
    least 99 % (95 %) of these agree with their neighbour.
    """
    embedding = token_embedding(model)
    tokens = [tokenise(model, [one.text for one in part], None, None).ids for part in (known, asked)]
    labels, wanted = (np.array([one.id for one in part]) for part in (known, asked))
    rows = []
    for fingerprint in ("mean", "mean+attention"):
        stored, queries = (features(embedding, part, fingerprint) for part in tokens)
        projections = {
            "none": Projection.none(stored.shape[1]),
            f"pca {dim}": fit_pca(stored, dim),
            f"simhash {4 * dim}": fit_simhash(stored, 4 * dim),
        }
        for name, projection in projections.items():
            kind = "binary-flat" if projection.kind == "simhash" else "flat"
            searched = VectorIndex.build(projection.apply(stored), kind=kind)
            ids, similarity = searched.nearest(projection.apply(queries), 1)
            agrees = (labels[ids[:, 0]] == wanted)[np.argsort(-similarity[:, 0], kind="stable")]
            share = np.cumsum(agrees) / np.arange(1, len(agrees) + 1)
            reach = {at: np.flatnonzero(share >= at).max(initial=-1) + 1 for at in (0.99, 0.95)}
            rows.append({
                "fingerprint": fingerprint, "projection": name, "agreement": float(agrees.mean()),
                "coverage_at_99": float(reach[0.99] / len(agrees)), "coverage_at_95": float(reach[0.95] / len(agrees)),
            })  # fmt: skip
    return rows


# -- open ---------------------------------------------------------------------------------------------------


def reopen(model_name: str, *, count: int = 100_000, repeats: int = 3) -> Row:
    """Measure seconds from opening a store of `count` synthetic entries to its first exact and near hits, and memory.

    Every opening runs in a new process, which loads the model first; imports and loading are not in the time.
    """
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        _synthetic(model_name, Path(folder), count)
        runs = []
        for _ in range(repeats):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                runs.append(process.submit(opened, model_name, folder).result())
    return {"entries": count, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}}


def _synthetic(model_name: str, folder: Path, count: int) -> None:
    model = SentenceTransformer(model_name)
    identity = identify(model)
    store = Store.open(folder, create=True)
    store.declare("default", identity.to_json(), CacheConfig().to_json())
    bank = store.bank(
        "default", "output", lambda: fresh_bank(model, Sentences(model), CacheConfig()), CacheConfig().near
    )
    random = np.random.default_rng(0)
    seed = key_seed(identity.digest, "text", None, None)
    outputs = clustered(count, bank.facts.width, seed=0)
    raw_features = random.standard_normal((count, bank.facts.feature_width)).astype(np.float32)
    for start in range(0, count, 10_000):
        block = range(start, min(start + 10_000, count))
        raw = b"".join(key(identity.digest, "tokens", str(i).encode()) for i in block)
        keys = np.frombuffer(raw, np.uint64).reshape(-1, 2)
        bank.put(
            keys,
            outputs[block.start : block.stop],
            tokens=[np.arange(i, i + 12, dtype=np.int32) for i in block],
            sources=[f"document {i}" for i in block],
            features=raw_features[block.start : block.stop],
            cost=np.full(len(block), 0.002, np.float32),
        )
        bank.alias(text_keys(seed, [f"document {i}" for i in block]).view(np.uint64), keys)
    store.commit()
    bank.near.rebuild()
    store.commit()
    store.close()


def opened(model_name: str, folder: str) -> dict[str, float]:
    """Open a store in a new process and look up one exact and one near text. Returns seconds and bytes per entry."""
    model = SentenceTransformer(model_name)
    model.encode(["warm-up"])
    identify(model)  # reading the mapped weights makes them resident before the memory is measured
    before, began = _resident(), time.perf_counter()
    cache = LLMCache.open(folder, model, config=CacheConfig(tau=0.9))
    cache.encode(["document 7"])
    first_hit = time.perf_counter() - began
    if cache.stats().counters.exact_text != 1:
        raise AssertionError("the synthetic store missed a stored text")
    exact_bytes, began = _resident() - before, time.perf_counter()
    cache.encode(["something that no document says"])
    near_seconds = time.perf_counter() - began
    return {
        "seconds_to_first_hit": first_hit,
        "bytes_per_entry": exact_bytes / len(cache),
        "further_seconds_to_near_lookup": near_seconds,
        "bytes_per_entry_with_index": (_resident() - before) / len(cache),
    }


def _resident() -> int:
    """Return the resident bytes of this process, mapped files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE

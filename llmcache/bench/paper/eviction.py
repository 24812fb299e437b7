"""Eviction ablation: the policies of `llmcache.indexes.eviction.policies` under a byte budget, on a Zipf stream."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.files import folder_bytes
from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.layer_hits import projection
from llmcache.bench.paper.models import classifier
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.indexes.eviction.policies import POLICIES, Terms, Usage, choose
from llmcache.indexes.search.bank_index import half
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise

EXPONENT = 1.0
REQUESTS = 10_000
SECONDS = 60
"""Simulated seconds between two requests, as policies see them."""
HALF_LIFE = 86_400.0
AUDITED = 0.1
"""Share of near hits that are audited, so that policies know their drift."""
ROOM = (0.1, 0.25, 0.5)
"""Byte budgets, as shares of the bytes of all documents."""
TAU = 0.85
FREED = 0.02  # share of the budget freed per eviction


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Documents of a replay. nbytes: bytes in the store. cost: seconds of the model.

    similarity: float32 [n, n], of the fingerprints, 0 on the diagonal. wrong: bool [n, n], True where reusing the
    column's output changes the row's label. drift: float32 [n, n], 1 - cosine of the outputs.
    """

    nbytes: NDArray[np.int64]
    cost: NDArray[np.float64]
    similarity: NDArray[np.float32]
    wrong: NDArray[np.bool_]
    drift: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.nbytes)


def stream(n: int, requests: int, exponent: float = EXPONENT, seed: int = 0) -> NDArray[np.int64]:
    """Draw requests for n documents by Zipf's law; the popular documents change halfway. Returns int64 [requests]."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, n + 1) ** exponent
    ranks = random.choice(n, requests, p=shares / shares.sum())
    early, late = random.permutation(n), random.permutation(n)
    return np.where(np.arange(requests) < requests // 2, early[ranks], late[ranks])


def documents(model: SentenceTransformer, workload: Workload) -> Documents:
    """Prepare the known documents of a labelled workload: bytes as in a store, measured seconds shared by tokens."""
    tokens = tokenise(model, workload.known, None, None)
    began = time.perf_counter()
    outputs = np.asarray(model.encode(workload.known, batch_size=64), np.float32)
    seconds = time.perf_counter() - began
    decided = classifier(outputs, workload.known_labels).predict(outputs)
    raw = half(features(token_embedding(model), tokens.ids, "mean")).astype(np.float32)
    prints = projection(raw).apply(raw).astype(np.float32)
    similarity = prints @ prints.T
    np.fill_diagonal(similarity, 0)
    unit = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    # output, features in float16, token ids, and about the overhead of an entry
    nbytes = (4 * outputs.shape[1] + 2 * raw.shape[1] + 4 * tokens.lengths + 120).astype(np.int64)
    # the model's time is nearly linear in the tokens
    cost = (seconds / float(tokens.lengths.sum())) * tokens.lengths.astype(np.float64)
    return Documents(nbytes, cost, similarity, decided[:, None] != decided[None], (1 - unit @ unit.T).clip(0))


def replay(
    docs: Documents, requests: NDArray[np.int64], policy: str, budget: int, tau: float | None = None, seed: int = 0
) -> Row:
    """Replay requests in order against a store that evicts by a policy whenever it exceeds its byte budget.

    A stored document is a hit. With `tau`, a document whose nearest stored neighbour is at least that similar is a near
    hit: it reuses the neighbour's output, and is not stored. `choose` selects the evicted rows, with one row a segment.
    Returns a row.
    """
    random = np.random.default_rng(seed)
    here = np.zeros(len(docs), np.bool_)
    used, created, uses = (np.zeros(len(docs), np.int64) for _ in range(3))
    drift, stored, exact, near, wrong, saved, evicted = np.full(len(docs), np.nan), 0, 0, 0, 0, 0.0, 0
    for tick, document in enumerate(requests.tolist()):
        now = (tick + 1) * SECONDS
        source = document if here[document] else _neighbour(docs, here, document, tau)
        if source >= 0:
            used[source], uses[source] = now, uses[source] + 1
            saved += docs.cost[document]
            exact += source == document
            if source != document:
                near, wrong = near + 1, wrong + int(docs.wrong[document, source])
                if random.random() < AUDITED:
                    drift[source] = docs.drift[document, source]
            continue
        here[document], used[document], created[document], uses[document], drift[document] = True, 0, now, 0, np.nan
        stored += int(docs.nbytes[document])
        if stored > budget:
            rows = np.flatnonzero(here)
            usage = Usage(
                used[rows], uses[rows], created[rows], docs.nbytes[rows], docs.cost[rows], drift[rows],
                np.arange(len(rows)),
            )  # fmt: skip
            gone = rows[choose(usage, max(stored - budget, int(FREED * budget)), policy, Terms(half_life=HALF_LIFE))]
            here[gone] = False
            evicted += len(gone)
            stored -= int(docs.nbytes[gone].sum())
    n = len(requests)
    return {
        "policy": policy, "budget": budget, "requests": n, "hits": (exact + near) / n, "exact": exact / n,
        "near": near / n, "wrong": wrong / n, "wrong_of_near": wrong / near if near else None,
        "seconds_saved": float(saved) / float(docs.cost[requests].sum()), "evicted": evicted, "stored": stored,
    }  # fmt: skip


def _neighbour(docs: Documents, here: NDArray[np.bool_], document: int, tau: float | None) -> int:
    """Find the nearest stored document at similarity >= tau, -1 without one."""
    if tau is None:
        return -1
    similarity = np.where(here, docs.similarity[document], -1)
    best = int(similarity.argmax())
    return best if similarity[best] >= tau else -1


def best_possible(docs: Documents, requests: NDArray[np.int64], budget: int) -> float:
    """Compute the hit rate of evicting the document with the furthest next use (Belady), with documents of mean size.

    This is an upper bound for repeats alone, up to differences in size.
    """
    room = max(1, budget // int(docs.nbytes.mean()))
    later = np.full(len(requests), len(requests))
    last: dict[int, int] = {}
    for place in range(len(requests) - 1, -1, -1):
        later[place] = last.get(int(requests[place]), len(requests))
        last[int(requests[place])] = place
    next_use: dict[int, int] = {}
    hits = 0
    for place, document in enumerate(requests.tolist()):
        hits += document in next_use
        next_use[document] = int(later[place])
        if len(next_use) > room:
            del next_use[max(next_use, key=next_use.__getitem__)]
    return hits / len(requests)


def evictions(docs: Documents, requests: int = REQUESTS) -> list[Row]:
    """Replay every policy and budget, for repeats alone and with near hits. Returns one row each."""
    asked = stream(len(docs), requests)
    rows = []
    for share in ROOM:
        budget = int(docs.nbytes.sum() * share)
        bound = best_possible(docs, asked, budget)
        for tau in (None, TAU):
            for policy in POLICIES:
                row = replay(docs, asked, policy, budget, tau)
                rows.append(
                    {"kind": "replay", "documents": len(docs), "room": share, "tau": tau, "bound": bound, **row}
                )
    return rows


def in_a_store(
    model: SentenceTransformer, workload: Workload, folder: Path, requests: int, max_bytes: int, call: int = 256
) -> list[Row]:
    """Run such a stream through caches with a byte budget, whose policies drop whole segments. Returns one row each.

    largest: most bytes of the store's folder at any commit; the budget is never exceeded.
    """
    asked = stream(len(workload.known), requests)
    rows = []
    for policy in POLICIES:
        largest, misses = 0, 0
        place = folder / policy
        config = CacheConfig(max_bytes=max_bytes, policy=policy, stand_aside=False)  # type: ignore[arg-type]
        with LLMCache.open(place, model, config=config) as cache:
            for part in np.array_split(asked, max(1, len(asked) // call)):
                cache.encode([workload.known[i] for i in part], batch_size=64)
                cache.commit()
                largest = max(largest, folder_bytes(place))
            misses = cache.stats().counters.misses
        rows.append({
            "kind": "store", "documents": len(workload.known), "policy": policy, "budget": max_bytes,
            "requests": len(asked), "hits": 1 - misses / len(asked), "largest": largest,
        })  # fmt: skip
    return rows

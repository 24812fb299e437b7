"""Fingerprint ablation: PCA, SimHash, attention statistics, no projection, and predicted outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.turns import Row, Turn, in_turn, steady
from llmcache.bench.paper.layer_hits import LEAST, projection
from llmcache.bench.paper.models import classifier
from llmcache.bench.paper.texts import Workload
from llmcache.errors import ConfigError
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.search.projection import fit_simhash
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise
from llmcache.near.neighbors.predictor import fit

FLIPS = 0.005
BITS = 512

Vectors = NDArray[np.float32] | NDArray[np.uint8]
Way = Callable[[NDArray[np.float32]], Vectors]


def fingerprints(model: SentenceTransformer, workload: Workload, repeats: int = 3) -> list[Row]:
    """Measure all fingerprints, fitted on the known documents alone. Returns one row each.

    agreement: share of queries with the label of the nearest known document, both by a logistic head.
    hits, flips: plain reuse at a tau chosen on one half of the queries, so that at most 0.5 % of their labels change,
    and reported on the other half; mean of both directions.
    us: microseconds per document from features to the nearest entry, median of repeats.
    bytes: size of one fingerprint.
    ConfigError for too few known documents.
    """
    if len(workload.known) < LEAST:
        raise ConfigError(f"fingerprints are fitted on {LEAST} documents or more, there are {len(workload.known)}")
    tokens = [tokenise(model, texts, None, None).ids for texts in (workload.known, workload.asked)]
    outputs, own = (
        np.asarray(model.encode(texts, batch_size=64), np.float32) for texts in (workload.known, workload.asked)
    )
    head = classifier(outputs, workload.known_labels)
    answers, decided = head.predict(outputs), head.predict(own)
    embedding = token_embedding(model)
    rows = []
    for kind in ("mean", "mean+attention"):
        known, asked = (half(features(embedding, part, kind)).astype(np.float32) for part in tokens)
        for name, way in _ways(kind, known, outputs):
            stored = way(known)
            bits = stored.dtype == np.uint8
            index = VectorIndex.build(stored, kind="binary-flat" if bits else "flat")
            search = partial(lambda index, way, asked: index.nearest(way(asked), 1), index, way, asked)
            made = in_turn([Turn(name, len(asked), steady(search))], repeats)[name]
            places, similarity = made.outputs[-1]
            right = answers[places[:, 0]] == decided
            rows.append({
                "data": workload.name, "model": "MiniLM", "weights": "real", "fingerprint": name,
                "known": len(known), "asked": len(asked), "agreement": float(right.mean()),
                **held_out(similarity[:, 0], ~right), "us": 1e6 / made.rate,
                "bytes": int(stored[0].nbytes), "repeats": repeats,
            })  # fmt: skip
    return rows


def _ways(kind: str, known: NDArray[np.float32], outputs: NDArray[np.float32]) -> list[tuple[str, Way]]:
    """List the fingerprints of these features by name, with the function of each."""
    pca, simhash = projection(known), fit_simhash(known, BITS)
    ways: list[tuple[str, Way]] = [
        (f"PCA {pca.dim}, {kind}", pca.apply), (f"SimHash {BITS}, {kind}", simhash.apply),
    ]  # fmt: skip
    if kind == "mean":
        predictor = fit(known, outputs)
        none = projection(known[:1])
        ways += [
            (f"none, {kind}", none.apply),
            (f"distilled ({predictor.kind})", lambda raw: predictor.fingerprints(predictor(raw))),
        ]
    return ways


def held_out(similarity: NDArray[np.float32], wrong: NDArray[np.bool_], budget: float = FLIPS) -> Row:
    """Choose tau on every other document and count on the rest, both ways. hits, flips: shares of all."""
    hits, flips, taus = [], [], []
    halves = np.arange(len(wrong)) % 2 == 0
    for picked in (halves, ~halves):
        tau = lowest_tau(similarity[picked], wrong[picked], budget)
        hit = similarity[~picked] >= tau
        hits.append(float(hit.mean()))
        flips.append(float((hit & wrong[~picked]).mean()))
        taus.append(tau)
    finite = [tau_of_half for tau_of_half in taus if np.isfinite(tau_of_half)]
    return {
        "hits": float(np.mean(hits)),
        "flips": float(np.mean(flips)),
        "tau": float(np.mean(finite)) if finite else None,
    }


def lowest_tau(similarity: NDArray[np.float32], wrong: NDArray[np.bool_], budget: float) -> float:
    """Return the lowest similarity from which on at most `budget` of all documents is wrong; inf when there is none."""
    order = np.argsort(-similarity, kind="stable")
    within = np.flatnonzero(np.cumsum(wrong[order]) <= budget * len(wrong))
    # of equal similarities all are answered or none
    for last in within[::-1].tolist():
        if last + 1 == len(order) or similarity[order[last + 1]] < similarity[order[last]]:
            return float(similarity[order[last]])
    return float("inf")

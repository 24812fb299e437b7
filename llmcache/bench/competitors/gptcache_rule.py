"""Comparison of near reuse with GPTCache's rule (fixed similarity) and a cache of final outputs, on one fingerprint.

A hit is wrong when the judge finds its result to differ from the computed one. Rules are fitted and calibrated on the
known texts, or on a separate sample, and reported on the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats
from llmcache.bench.harness.datasets import QQP, labelled_texts, objects
from llmcache.bench.harness.turns import Row
from llmcache.bench.near import embedded, fitted_head, judges
from llmcache.near.calibration.crossfit import CrossFitResult, ask, cross_fit, held_out_voting
from llmcache.near.calibration.drift import DriftMeasure, beyond, label_drift
from llmcache.near.calibration.risk_control import choose
from llmcache.near.guard.rules import FieldGuard
from llmcache.near.neighbors.correction import eligible_sources
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex
from llmcache.near.neighbors.linear_head import LinearHead

FIXED = 0.8
"""GPTCache's default similarity threshold."""
PAIRS = 8000
LIMIT = 0.1
"""Least 1 - cosine of a wrong result on QQP, where there are no labels to decide."""


def rivals(model: SentenceTransformer, folder: Path, *, seed: int = 0, budget: float = 0.005) -> list[Row]:
    """Return one row per rule, for labelled texts, or for QQP where the folder holds qqp.jsonl.gz."""
    return list((questions if (folder / QQP.name).exists() else labelled)(model, folder, seed, budget))


def labelled(model: SentenceTransformer, folder: Path, seed: int, budget: float) -> Iterator[Row]:
    """Measure labelled texts: a changed label of a logistic head is wrong; calibrated by cross-fitting the known."""
    texts = labelled_texts(folder)
    known, asked = (embedded(model, pairs) for pairs in texts)
    head = fitted_head(known.entries.outputs, known.labels)
    voting = held_out_voting(known.entries, seed)
    held = cross_fit(known.entries, judges(known), seed=seed, voting=voting)
    memory = HostNeighborIndex.fit(known.entries, seed, voting)
    judge = DriftMeasure(label_drift(head), LinearHead.of(head))
    own, others = ([text for text, _ in part] for part in texts)
    for row in _rules(memory, held, asked.entries, judge, own, (own, others), budget):
        yield {name: value for name, value in row.items() if name != "hit"}


def questions(model: SentenceTransformer, folder: Path, seed: int, budget: float) -> Iterator[Row]:
    """Measure QQP: first questions are known; second questions of one half calibrate, of the other half are queries.

    labelled_hits: hits whose source is the other question of their pair. labelled_wrong: those of them whose pair
    annotators call different.
    """
    every = list(objects(folder / QQP.name))
    chosen = [every[place] for place in np.random.default_rng(0).permutation(len(every))[:PAIRS]]
    first, second = ([str(pair[place]) for pair in chosen] for place in (1, 2))
    half = PAIRS // 2
    known, sample, asked = (
        embedded(model, [(text, "") for text in texts]).entries for texts in (first, second[:half], second[half:])
    )
    voting = held_out_voting(known, seed)
    memory, judge = HostNeighborIndex.fit(known, seed, voting), DriftMeasure(beyond(LIMIT))
    held = ask(memory, sample, judge)
    same = np.array([pair[0] == 1 for pair in chosen[half:]])
    nearest = memory.look_up(asked).nearest
    own = nearest == np.arange(half, PAIRS)
    for row in _rules(memory, held, asked, judge, first, (second[:half], second[half:]), budget):
        hit = row.pop("hit")
        yield {**row, "labelled_hits": int((hit & own).sum()), "labelled_wrong": int((hit & own & ~same).sum())}


def _rules(
    memory: HostNeighborIndex,
    held: CrossFitResult,
    asked: Entries,
    judge: DriftMeasure,
    known_texts: list[str],
    texts: tuple[list[str], list[str]],
    budget: float,
) -> Iterator[Row]:
    neighbors = memory.look_up(asked, judge.scores)
    plain, score = memory.entries.outputs[neighbors.nearest], safety(neighbors.evidence)
    ours = _threshold(held.drift, held.score, budget)
    guard = FieldGuard()
    read, temperature = guard.digests(known_texts), memory.voting.temperature
    of_sample, of_asked = (
        guard.sharing(guard.digests(mine), read[one.neighbours], eligible_sources(one.similarities, temperature))[1]
        >= 0
        for mine, one in zip(texts, (held.found, neighbors), strict=True)
    )
    guarded = np.where(of_asked, -np.inf, score)
    with_guard = _threshold(held.drift, np.where(of_sample, -np.inf, held.score), budget)
    tau = _threshold(held.drift, held.found.similarity, budget)
    as_many = float(np.sort(neighbors.similarity)[::-1][max(0, int((score >= ours).sum()) - 1)])
    for name, results, hit in (
        ("ours: corrected, gate", neighbors.results, score >= ours),
        ("ours: corrected, gate, field guard", neighbors.results, guarded >= with_guard),
        (f"fixed {FIXED} on the same fingerprints (GPTCache's rule)", plain, neighbors.similarity >= FIXED),
        ("final outputs at the same fingerprint and tau", plain, neighbors.similarity >= tau),
        ("final outputs, as many hits as ours", plain, neighbors.similarity >= as_many),
    ):
        wrong = int((judge.drift(asked.outputs, results)[hit] > 0).sum())
        hits = int(hit.sum())
        yield {
            "method": name, "asked": len(hit), "hits": hits, "hit_rate": hits / len(hit), "wrong": wrong,
            "wrong_of_hits": wrong / max(1, hits), "wrong_of_all": wrong / len(hit), "budget": budget, "hit": hit,
        }  # fmt: skip


def _threshold(drift: Floats, score: Floats, budget: float) -> float:
    threshold = choose(drift, score, budget).threshold
    return np.inf if threshold is None else threshold

"""Measurement of near reuse on labelled documents: fitted and calibrated on the known, reported on the queries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression

from llmcache.bench.harness.datasets import Pairs, labelled_texts
from llmcache.bench.harness.turns import Row
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.search.projection import fit_pca
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise
from llmcache.near.calibration.crossfit import CrossFitResult, cross_fit, held_out_voting
from llmcache.near.calibration.drift import DriftMeasure, cosine_drift, label_drift
from llmcache.near.calibration.risk_control import Choice, choose
from llmcache.near.neighbors.correction import EVIDENCE, STRENGTH, Voting, units
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, Neighbors
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import Predictor, components, directions, fit, median_square, projected

BUDGETS = (0.001, 0.005, 0.02)
"""Budgets of the mean 1 - cosine over all results."""

_CONSENSUS = EVIDENCE.index("consensus")
_QUERIES = 1000

Labels = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Entries with the correct label of each."""

    entries: Entries = field(repr=False)
    labels: Labels = field(repr=False)


# -- documents ----------------------------------------------------------------------------------------------


def embedded(model: SentenceTransformer, pairs: Pairs) -> Labelled:
    """Compute the entries that a cache would have for these texts."""
    texts = [text for text, _ in pairs]
    tokens = tokenise(model, texts, None, None).ids
    raw = half(features(token_embedding(model), tokens, "mean"))
    outputs = np.asarray(model.encode(texts, batch_size=64), np.float32)
    return Labelled(Entries(raw, outputs, tokens), np.array([label for _, label in pairs]))


# -- the measurement ----------------------------------------------------------------------------------------


def near(model: SentenceTransformer, folder: Path, *, seeds: int = 5, budget: float = 0.005, exact: bool = True) -> Row:
    """Measure the labelled texts of a folder. Returns a record with the rows of `measure` and of `summary`."""
    known, asked = (embedded(model, pairs) for pairs in labelled_texts(folder))
    rows = list(measure(known, asked, seeds=seeds, budget=budget, exact=exact))
    return {"seeds": seeds, "summary": summary(rows), "rows": rows}


def measure(
    known: Labelled,
    asked: Labelled,
    *,
    seeds: int = 5,
    budget: float = 0.005,
    confidence: float = 0.95,
    exact: bool = True,
) -> Iterator[Row]:
    """Yield one row per seed, method and budget; `summary` averages them.

    The entries are `known`, which also calibrate (five-fold cross-fitting, with the head fitted in each fold). Nothing
    is fitted on `asked`, except for the method "paper", whose tau is chosen there. hits, drift and so on are those of
    `asked`. exact: also measure exact kernel ridge, which takes most of the time.
    """
    head = fitted_head(known.entries.outputs, known.labels)
    truth = _Truth(head, asked)
    yield _paper(known.entries, asked.entries, truth, budget)
    for seed in range(seeds):
        voting = held_out_voting(known.entries, seed)
        judge_of = judges(known)
        scores = LinearHead.of(head)
        memory = HostNeighborIndex.fit(known.entries, seed, voting)
        held = cross_fit(known.entries, judge_of, seed=seed, voting=voting, like=memory.predictor)
        found = memory.look_up(asked.entries, scores)
        facts = {"seed": seed, "temperature": voting.temperature, "strength": voting.strength}
        for method, cached, mine in _scorings(held, found):
            choice = choose(held.drift, cached, budget, confidence)
            yield {"method": method, **facts, **truth.row(choice, found.results, mine)}
        yield {"method": "corrected, accuracy drop", **facts, **_as_measured(known, held, found, truth)}
        yield from ({**row, **facts} for row in _embeddings(known, asked, held, found, truth, confidence))
        for name, made in (("plain, consensus", _plain), ("exact kernel ridge", _exact))[: 1 + exact]:
            choice, results, mine = made(known, asked.entries, judge_of, seed, budget, confidence)
            yield {"method": name, "seed": seed, **truth.row(choice, results, mine)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """Average the rows over the seeds, per method and budget, and add the largest drift of any seed."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["drift_is"], row["budget"]), []).append(row)
    summaries = []
    for (method, kind, budget), members in groups.items():
        names = [name for name, value in members[0].items() if isinstance(value, float) and name != "budget"]
        means = {name: float(np.mean([one[name] for one in members if one[name] is not None])) for name in names}
        worst = max(one["drift"] for one in members)
        summaries.append(
            {"method": method, "drift_is": kind, "budget": budget, "seeds": len(members), **means, "worst_drift": worst}
        )
    return summaries


class _Truth:
    """Outputs of the model and decisions of the head for the queries, and the measures of reuse against them."""

    def __init__(self, head: Any, asked: Labelled) -> None:
        self.head, self.outputs, self.right = head, asked.entries.outputs, asked.labels
        self.given = head.predict(self.outputs)

    def row(self, choice: Choice, results: NDArray[np.float32], score: NDArray[np.floating]) -> Row:
        hit = score >= (np.inf if choice.threshold is None else choice.threshold)
        return {
            "drift_is": "label", "budget": choice.budget, "confidence": choice.confidence,
            "calibrated_hits": choice.hits, "calibrated_drift": choice.drift, **self.reused(results, hit),
        }  # fmt: skip

    def reused(self, results: NDArray[np.float32], hit: NDArray[np.bool_]) -> Row:
        decided = self.head.predict(results)
        flips = (decided != self.given) & hit
        cosine = cosine_drift(self.outputs, results)[hit]
        served = np.where(hit, decided, self.given)
        drop = float((self.given == self.right).mean() - (served == self.right).mean())
        return {
            "hits": float(hit.mean()), "drift": float(flips.mean()),
            "drift_of_hits": float(flips.sum() / max(hit.sum(), 1)), "accuracy_drop": drop,
            "cosine_mean": float(cosine.mean()) if len(cosine) else 0.0,
            "cosine_p99": float(np.quantile(cosine, 0.99)) if len(cosine) else 0.0,
        }  # fmt: skip


def fitted_head(outputs: NDArray[np.float32], labels: Labels) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=10, max_iter=60).fit(outputs, labels)


def judges(known: Labelled) -> Callable[[NDArray[np.int64]], DriftMeasure]:
    """Return a function that fits a head to rows of the known documents and judges with it; each is fitted once."""
    made: dict[bytes, DriftMeasure] = {}

    def judge_of(rows: NDArray[np.int64]) -> DriftMeasure:
        if rows.tobytes() not in made:
            head = fitted_head(known.entries.outputs[rows], known.labels[rows])
            made[rows.tobytes()] = DriftMeasure(label_drift(head), LinearHead.of(head))
        return made[rows.tobytes()]

    return judge_of


def _scorings(
    held: CrossFitResult, found: Neighbors
) -> Iterator[tuple[str, NDArray[np.floating], NDArray[np.floating]]]:
    """Yield the name, the scores of the entries and of the queries, of each way to decide which hits to trust."""
    yield "corrected, similarity", held.found.similarity, found.similarity
    yield "corrected, consensus", held.found.evidence[:, _CONSENSUS], found.evidence[:, _CONSENSUS]
    yield "corrected, gate", held.score, safety(found.evidence)


def _as_measured(known: Labelled, held: CrossFitResult, found: Neighbors, truth: _Truth) -> Row:
    """Measure a claim as in the paper: accuracy at most 0.5 points lower on the known, plus one standard error."""
    lost = np.empty(len(known.labels))
    for number in np.unique(held.fold):
        apart = held.fold == number
        head = fitted_head(known.entries.outputs[~apart], known.labels[~apart])
        right = known.labels[apart]
        kept = head.predict(known.entries.outputs[apart]) == right
        lost[apart] = kept.astype(float) - (head.predict(held.found.results[apart]) == right)
    choice = choose(lost, held.score, 0.005, None, errors=1.0)
    return {**truth.row(choice, found.results, safety(found.evidence)), "drift_is": "accuracy"}


def _embeddings(
    known: Labelled, asked: Labelled, held: CrossFitResult, found: Neighbors, truth: _Truth, confidence: float
) -> Iterator[Row]:
    """Measure budgets of the mean 1 - cosine, for reused embeddings without a head."""
    drift = cosine_drift(known.entries.outputs, held.found.results)
    queries = known.entries.outputs[np.random.default_rng(0).permutation(len(known.labels))[:_QUERIES]]
    for budget in BUDGETS:
        choice = choose(drift, held.found.similarity, budget, confidence)
        hit = found.similarity >= (np.inf if choice.threshold is None else choice.threshold)
        served = np.where(hit[:, None], found.results, asked.entries.outputs)
        facts = truth.reused(found.results, hit)
        moved = float(np.where(hit, cosine_drift(asked.entries.outputs, found.results), 0).mean())
        yield {
            "method": "corrected, similarity", "drift_is": "cosine", "budget": budget, "confidence": confidence,
            "calibrated_hits": choice.hits, "calibrated_drift": choice.drift, **facts, "drift": moved,
            "flips": facts["drift"], "recall_at_10": recall(queries, served, asked.entries.outputs),
        }  # fmt: skip


def recall(queries: NDArray[np.float32], served: NDArray[np.float32], true: NDArray[np.float32], k: int = 10) -> float:
    """Return the share of the k nearest true vectors among the k nearest served ones, by cosine; arrays [n, out]."""
    best = [np.argpartition(-(units(queries) @ units(vectors).T), k, axis=1)[:, :k] for vectors in (served, true)]
    return float(np.mean([len(np.intersect1d(one, other)) / k for one, other in zip(*best, strict=True)]))


# -- methods to compare with ----------------------------------------------------------------------------


def _paper(known: Entries, asked: Entries, truth: _Truth, budget: float) -> Row:
    """Measure the paper's rule: the nearest output by the PCA fingerprint, at a tau chosen on the queries."""
    projection = fit_pca(known.features.astype(np.float32), 128)
    index = VectorIndex.build(projection.apply(known.features), kind="flat")
    rows, similarity = index.nearest(projection.apply(asked.features), 1)
    results, score = known.outputs[rows[:, 0]], similarity[:, 0]
    drift = label_drift(truth.head)(truth.outputs, results)
    choice = choose(drift, score, budget, None, candidates=score)
    return {"method": "paper: PCA, tau picked on test", "seed": -1, **truth.row(choice, results, score)}


def _compared(
    looked_up: Callable[[Entries, Entries], tuple[NDArray[np.float32], NDArray[np.float32]]],
    known: Labelled,
    asked: Entries,
    judge_of: Callable[[NDArray[np.int64]], DriftMeasure],
    seed: int,
    budget: float,
    confidence: float,
) -> tuple[Choice, NDArray[np.float32], NDArray[np.float32]]:
    """Cross-fit a look-up method (entries, queries -> results, score) and apply it to the queries."""
    fold = np.random.default_rng(seed).permutation(np.arange(len(known.labels)) % 5)
    drift, score = np.empty(len(fold)), np.empty(len(fold))
    for number in range(5):
        apart, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        results, score[apart] = looked_up(known.entries.take(rest), known.entries.take(apart))
        drift[apart] = judge_of(rest).drift(known.entries.outputs[apart], results)
    results, mine = looked_up(known.entries, asked)
    return choose(drift, score, budget, confidence), results, mine


def _plain(known: Labelled, asked: Entries, *rest: Any) -> tuple[Choice, NDArray[np.float32], NDArray[np.float32]]:
    """Measure plain reuse: the nearest output by the ridge fingerprint, trusted by similarity and consensus."""

    def looked_up(entries: Entries, others: Entries) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = HostNeighborIndex(entries, fit(entries.features, entries.outputs, landmarks=0), Voting()).look_up(
            others
        )
        return entries.outputs[found.nearest], found.similarity + found.evidence[:, _CONSENSUS]

    return _compared(looked_up, known, asked, *rest)


def _exact(known: Labelled, asked: Entries, *rest: Any) -> tuple[Choice, NDArray[np.float32], NDArray[np.float32]]:
    """Measure corrected reuse with scikit-learn's exact kernel ridge at fixed settings, trusted by similarity."""

    def looked_up(entries: Entries, others: Entries) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = HostNeighborIndex(entries, exact_kernel_ridge(entries), Voting(strength=STRENGTH)).look_up(others)
        return found.results, found.similarity

    return _compared(looked_up, known, asked, *rest)


def exact_kernel_ridge(entries: Entries, penalty: float = 0.05, width: float = 2.0) -> Predictor:
    """Fit scikit-learn's kernel ridge with every entry as a landmark: n^2 memory, n^3 time."""
    raw = entries.features.astype(np.float32)
    mean, matrix = components(raw)
    points = projected(raw, mean, matrix)
    gamma = width / median_square(points[np.random.default_rng(0).permutation(len(points))[:1024]])
    offset = entries.outputs.mean(axis=0)
    model = KernelRidge(alpha=penalty, kernel="rbf", gamma=gamma).fit(points, entries.outputs - offset)
    return Predictor(
        mean=mean, matrix=matrix, landmarks=points, weights=model.dual_coef_.astype(np.float32), offset=offset,
        basis=directions(entries.outputs),
        gamma=gamma, penalty=penalty, entries=len(entries), held_out=0.0,
    )  # fmt: skip

"""From a budget to a threshold: what near reuse may give is measured on documents that nothing was fitted to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.calibration.crossfit import CrossFitResult, ask, cross_fit, held_out_voting
from llmcache.near.calibration.drift import (
    Drift,
    DriftKind,
    DriftMeasure,
    judge,
    label_drift,
    labels,
)
from llmcache.near.calibration.risk_control import (
    Choice,
    Curve,
    choose,
    flip_bound,
)
from llmcache.near.guard import rules as guard
from llmcache.near.guard.fields import KINDS
from llmcache.near.monitoring.distribution_shift import LEAST as WATCHED
from llmcache.near.monitoring.distribution_shift import DistributionShift
from llmcache.near.neighbors.correction import Voting, decided, eligible_sources
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, Scores
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import LEAST, Predictor

OWN = "own"
"""The drift of a calibration by the user's own function."""
_CURVE = 60  # points of the curve that are kept
_FOLDS = 5
RULE = 2
"""The version of the scores that calibrations are made of: those of another one cannot be used."""
_STRICTER = (1.0, 0.5, 0.25)  # shares of the calibrated hits that audits may tighten to
_DECIDED = ("label", "accuracy")  # kinds of drift that a head is needed for
_MARGIN = 1.0  # standard errors that a drop of accuracy has to stay below its budget, where no confidence is asked

Digests: TypeAlias = NDArray[np.uint64]
"""Digests of the fields of documents, [n, kinds], see `marking.FieldDigests`."""
Truth: TypeAlias = NDArray[np.generic]
"""The right answers, one per document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold for near reuse, and the measurements behind it. Saved with the settings of a namespace.

    The bound is over distinct documents that are no exact hits: with the given confidence, at most the budget of them
    would differ, were documents drawn like those of the calibration and each asked once. A document that is asked again
    is computed (`CacheConfig.near_repeats`), so that the same bound holds for requests, however often each is repeated.

    budget: highest mean drift over all results. drift: "label", decisions of a head that change; "accuracy", decisions
    that were right, less those that become right; "cosine", 1 - cosine; "beyond", 1 - cosine above `limit`; "kl", of
    logits, as a share of `limit` nats; "own", of the user's function. threshold: lowest score of the gate
    that is reused, None where near reuse stays off. hits, expected, bound: share of documents reused, drift measured
    on held-out ones, and its upper bound at the confidence; bound_of_hits: the same among those reused.
    traffic: what the similarities of the sample were like, for `shift.Shift`.
    tolerated: highest mean drift over all results for the audits, which know no right answers: the budget; for
    "accuracy" an upper bound of the decisions that change at the threshold.
    entries: how many entries documents were looked up among; only these answer afterwards (`FittedModels.answering`).
    size: entries of the bank at the time, a sample that was given included; 0 where there was no bank.
    rule: `RULE` of the version that calibrated.
    scope: of the entries and of the documents that they answer, 16 hexadecimal digits (`marking.scope_of`); "" in
    calibrations from before there were scopes.
    guard: whether differing fields refuse a hit; guard_kinds, guard_pattern: which, see `guard.Rules`.
    curve: (threshold, hits, drift, bound), from strict to loose.
    """

    budget: float
    confidence: float | None
    drift: str
    limit: float | None
    threshold: float | None
    hits: float
    expected: float
    bound: float
    bound_of_hits: float
    samples: int
    needed: int
    entries: int
    reason: str
    temperature: float
    strength: float
    tolerated: float = 0.0
    size: int = 0
    rule: int = RULE
    scope: str = ""
    guard: bool = True
    guard_kinds: tuple[str, ...] = KINDS
    guard_pattern: str = ""
    traffic: Mapping[str, Any] = field(default_factory=dict, repr=False)
    curve: tuple[tuple[float, float, float, float], ...] = field(default=(), repr=False)

    @property
    def voting(self) -> Voting:
        return Voting(self.temperature, self.strength)

    def levels(self) -> list[tuple[float, float]]:
        """Thresholds and their share of hits: the one that was chosen, and stricter ones that audits may turn to."""
        if self.threshold is None:
            return []
        found = [(self.threshold, self.hits)]
        for share in _STRICTER[1:]:
            fewer = [(at, hits) for at, hits, *_ in self.curve if 0 < hits <= share * self.hits and at > found[-1][0]]
            if fewer:
                found.append(max(fewer, key=lambda one: one[1]))
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_json`. ConfigError: it is something else, or of an earlier version."""
        if raw.get("rule") != RULE:
            raise ConfigError(
                "it was calibrated by another version, which measured scores of another kind; run `llmcache calibrate`"
            )
        try:
            kinds = tuple(raw.get("guard_kinds", KINDS))
            tolerated = raw.get("tolerated", raw["budget"])
            curve = tuple(tuple(point) for point in raw["curve"])
            return cls(**{**raw, "curve": curve, "guard_kinds": kinds, "tolerated": tolerated})
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"the calibration saved with the store cannot be read: {error}; calibrate again"
            ) from None


_PIECES = 4  # of a 64-bit key: 16 bits each, which a float32 holds exactly


@dataclass(frozen=True, slots=True, eq=False)
class FittedModels:
    """The arrays of a calibration.

    boundary: of the head that decides what drift is; None without one. answering: uint64 [n], sorted, the first halves
    of the keys of the entries that the calibration looked documents up among; None for all entries of a bank.
    """

    predictor: Predictor
    boundary: LinearHead | None
    answering: NDArray[np.uint64] | None = field(default=None, repr=False)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """All arrays by name; each number is exact in float32."""
        arrays = {f"predictor.{name}": one for name, one in self.predictor.to_arrays().items()}
        if self.boundary is not None:
            arrays |= {"boundary.weights": self.boundary.weights, "boundary.offset": self.boundary.offset}
        if self.answering is not None:
            pieces = np.ascontiguousarray(self.answering).view(np.uint16).reshape(-1, _PIECES)
            arrays["answering.keys"] = pieces
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> FittedModels:
        """The inverse of `to_arrays`. ConfigError: arrays are missing or do not fit."""
        parts: dict[str, dict[str, NDArray[np.generic]]] = {}
        for name, one in arrays.items():
            part, _, short = name.partition(".")
            parts.setdefault(part, {})[short] = one
        edge, keys = parts.get("boundary"), parts.get("answering")
        boundary = answering = None
        if edge is not None:
            boundary = LinearHead(edge["weights"].astype(np.float32), edge["offset"].astype(np.float32))
        if keys is not None:
            if keys["keys"].shape[1:] != (_PIECES,):
                raise ConfigError(f"the keys of a calibration's entries have the shape {keys['keys'].shape}")
            answering = np.ascontiguousarray(keys["keys"].astype(np.uint16)).view(np.uint64).reshape(-1)
        return cls(Predictor.from_arrays(parts.get("predictor", {})), boundary, answering)


def judge_of(calibration: Calibration, fitted: FittedModels, own: Drift | None = None) -> DriftMeasure:
    """What measures drift while running, of a calibration that was saved. own: the user's function, where it has one.

    ConfigError: it has one, and it is not given.
    """
    if calibration.drift == OWN:
        if own is None:
            raise ConfigError(
                "it was calibrated by a function of yours, which is not stored; give it with drift= when opening"
            )
        return DriftMeasure(own)
    return judge(calibration.drift, calibration.limit, fitted.boundary)


def calibrated(
    entries: Entries,
    read: Digests | None,
    sample: Entries | None,
    sample_read: Digests | None,
    *,
    budget: float,
    drift: DriftKind | Drift | str = "label",
    head: Any = None,
    truth: Truth | None = None,
    limit: float | None = None,
    confidence: float | None = 0.95,
    guarded: bool = True,
    kinds: Collection[str] = KINDS,
    pattern: str = "",
    seed: int = 0,
    refit_head: bool = False,
) -> tuple[Calibration, FittedModels]:
    """The calibration for a cache's entries, and the numbers it needs.

    entries: those that answer afterwards. sample: documents that are not among them, and that the head has not seen;
    None takes the entries themselves, each against the other four fifths. read, sample_read: digests of the fields of
    both, uint64 [n, kinds], as live documents and their neighbours are compared by; needed for the guard only. head: a
    classifier of outputs, for "label" and "accuracy". truth: the right answers of the sample, or of the entries, for
    "accuracy".
    refit_head: also a head that could be used as it is is fitted again in every fold, to what it decides.
    ConfigError: settings that cannot work, or too few entries.
    """
    if len(entries) < 2 * LEAST:
        raise ConfigError(
            f"{len(entries)} entries are too few to learn from; warm the store with at least {2 * LEAST} documents"
        )
    rules = guard.FieldGuard(kinds, pattern) if guarded else None
    boundary = _boundary(head, entries) if drift in _DECIDED else None
    asked, mine = (entries, read) if sample is None else (sample, sample_read)
    if drift == "accuracy" and (truth is None or len(truth) != len(asked)):
        raise ConfigError('drift="accuracy" needs the right answers of the sample; give truth=, one for each document')
    judged = judge(drift, limit, boundary)
    if drift in _DECIDED:
        judged = DriftMeasure(label_drift(head), judged.scores)
    voting = held_out_voting(entries, seed)
    memory = HostNeighborIndex.fit(entries, seed, voting)
    if sample is not None:
        held = ask(memory, sample, judged)
    elif drift in _DECIDED and (refit_head or not isinstance(head, LinearHead)):
        judges = _judges(entries, head, judged, truth)
        held = cross_fit(entries, judges, folds=_FOLDS, seed=seed, voting=voting, like=memory.predictor)
    else:
        held = cross_fit(entries, lambda rows: judged, folds=_FOLDS, seed=seed, voting=voting, like=memory.predictor)
    score, similarity = held.score, held.found.similarity
    if rules:
        if read is None or mine is None:
            raise ConfigError("a guard needs the fields of entries and sample; give their digests, or guarded=False")
        found = held.found
        eligible = eligible_sources(found.similarities, voting.temperature)
        _, kind = rules.sharing(mine, read[found.neighbours], eligible)
        score = np.where(kind >= 0, -np.inf, score)
    moved, errors = held.drift, 0.0
    if drift == "accuracy" and truth is not None:
        moved, errors = _lost(asked, held, truth, head, sample is None), _MARGIN
        moved = moved if confidence is None else np.maximum(moved, 0)
    choice = choose(moved, score, budget, confidence, errors=errors)
    tolerated = _changing(held.drift, score, choice) if drift == "accuracy" else budget
    result = Calibration(
        budget=choice.budget, confidence=choice.confidence, drift=OWN if callable(drift) else drift, limit=limit,
        threshold=choice.threshold, hits=choice.hits, expected=choice.drift, bound=choice.bound,
        bound_of_hits=choice.bound_of_hits, samples=choice.samples, needed=choice.needed, entries=len(entries),
        reason=choice.reason, temperature=voting.temperature, strength=voting.strength, tolerated=tolerated,
        guard=guarded, guard_kinds=tuple(kinds), guard_pattern=pattern, curve=_points(choice.curve),
        traffic=DistributionShift.fitted(similarity).state() if len(similarity) >= WATCHED else {},
    )  # fmt: skip
    return result, FittedModels(memory.predictor, boundary)


def _changing(drift: NDArray[np.float64], score: NDArray[np.floating], choice: Choice) -> float:
    """Upper bound of the share of all results that change, whether for the better or not, at the threshold."""
    if choice.threshold is None:
        return choice.budget
    changed = drift[score >= choice.threshold].sum(keepdims=True)
    return float(flip_bound(changed, np.full(1, len(score)), choice.confidence or 0.95)[0])


def _points(curve: Curve) -> tuple[tuple[float, float, float, float], ...]:
    """As many points of a curve as are worth keeping."""
    kept: list[int] = np.unique(np.linspace(0, len(curve) - 1, _CURVE).astype(int)).tolist() if len(curve) else []
    return tuple(
        (float(curve.threshold[i]), float(curve.hits[i]), float(curve.drift[i]), float(curve.bound[i]))
        for i in kept
        if np.isfinite(curve.threshold[i])
    )


def _judges(
    entries: Entries, head: Any, measured: DriftMeasure, truth: Truth | None
) -> Callable[[NDArray[np.int64]], DriftMeasure]:
    """The judge for some of the entries. A head that has seen the others would judge them too kindly: its linear
    picture is fitted again to each of the parts, to the right answers where they are known, else to what it decides.
    """
    answers = labels(head, entries.outputs) if truth is None else truth

    def judge_of(rows: NDArray[np.int64]) -> DriftMeasure:
        edge = _again(None if truth is None else head, entries.outputs[rows], answers[rows])
        if edge is None:
            return measured
        if measured.scores is not None:
            edge = _as_clear_as(edge, measured.scores, entries.outputs[rows])
        return DriftMeasure(label_drift(edge), edge)

    return judge_of


def _again(head: Any, outputs: NDArray[np.float32], answers: NDArray[Any]) -> LinearHead | None:
    """A linear picture of a head that is fitted to these answers: a classifier of scikit-learn as it was fitted, with
    its own settings; of anything else, or of None, a logistic regression. None where there is but one answer.
    """
    from sklearn.base import BaseEstimator, clone
    from sklearn.exceptions import ConvergenceWarning

    if not isinstance(head, BaseEstimator) or len(np.unique(answers)) < 2:
        return LinearHead.fit(outputs, answers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        same = clone(head).fit(outputs, answers)
    return LinearHead.of(same) or LinearHead.fit(outputs, labels(same, outputs))


def _as_clear_as(edge: LinearHead, scores: Scores, outputs: NDArray[np.float32]) -> LinearHead:
    """Rescale a fitted head to the scores of the original head; its decisions stay the same.

    A hit's score goes by how clearly the head decides, and a fit to clean decisions, or with another penalty, decides
    more or less clearly than the head itself.
    """
    own, fitted = (float(np.median(decided(one(outputs)))) for one in (scores, edge))
    factor = np.float32(own / fitted if own > 0 and fitted > 0 else 1.0)
    return LinearHead(edge.weights * factor, edge.offset * factor)


def _lost(asked: Entries, held: CrossFitResult, truth: Truth, head: Any, refit: bool) -> NDArray[np.float64]:
    """1 where the computed output is decided rightly and the reused one is not, -1 the other way round, else 0."""
    lost = np.zeros(len(asked))
    if not refit:
        right = labels(head, asked.outputs) == truth
        if not right.any():
            raise ConfigError(
                f"the head is never right: it gives {labels(head, asked.outputs[:1])[0]!r} for the first document, "
                f"where {truth[0]!r} is right; give answers as the head does"
            )
        return np.asarray(right.astype(np.float64) - (labels(head, held.found.results) == truth))
    for number in np.unique(held.fold):
        apart = held.fold == number
        classes, place = np.unique(truth[~apart], return_inverse=True)
        edge = _again(head, asked.outputs[~apart], place)
        if edge is not None:
            was, becomes = (
                classes[labels(edge, one[apart])] == truth[apart] for one in (asked.outputs, held.found.results)
            )
            lost[apart] = was.astype(np.float64) - becomes
    return lost


def _boundary(head: Any, entries: Entries) -> LinearHead:
    if head is None:
        raise ConfigError('drift="label" needs a head that decides; give head=, a classifier of the outputs')
    if isinstance(head, LinearHead):
        return head
    boundary = LinearHead.of(head) or LinearHead.fit(entries.outputs, labels(head, entries.outputs))
    if boundary is None:
        raise ConfigError("the head gives one label to all entries; there is nothing that could change")
    return boundary

"""Calibrate near reuse: choose a threshold for a drift budget, measured on held-out documents."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats
from llmcache.errors import ConfigError
from llmcache.near.calibration.crossfit import ask, cross_fit, held_out_voting
from llmcache.near.calibration.drift import (
    Drift,
    DriftKind,
    DriftMeasure,
    judge,
    label_drift,
)
from llmcache.near.calibration.head_fitting import Truth, accuracy_loss, linear_head, refitted_measures
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
from llmcache.near.neighbors.correction import Voting, eligible_sources
from llmcache.near.neighbors.index import Entries, HostNeighborIndex
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import LEAST, Predictor
from llmcache.near.neighbors.sides import exchanged, token_bags

OWN = "own"
"""Name of the drift when the user gave a function."""
_CURVE = 60  # most points of the stored curve
_FOLDS = 5
RULE = 2
"""Version of the score formula. A calibration made with another version cannot be used."""
_STRICTER = (1.0, 0.5, 0.25)  # shares of the calibrated hits at the thresholds for audits
_DECIDED = ("label", "accuracy")  # kinds of drift that need a head
_MARGIN = 1.0  # standard errors added to a measured drop of accuracy when no confidence is asked

Digests: TypeAlias = NDArray[np.uint64]
"""Digests of the fields of documents, [n, kinds], see `marks.FieldDigests`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold for near reuse with its measurements, stored in the settings of a namespace.

    The bound covers distinct documents without an exact hit. At the given confidence the mean drift over them is at
    most the budget, if they are drawn like the calibration documents and each is asked once. Repeated documents are
    computed (`CacheConfig.near_repeats`), so the bound also covers requests with any number of repeats.

    budget: highest mean drift over all results.
    confidence: of the bound; None to use the drift as measured.
    drift: kind of drift.
        "label": share of head decisions that change.
        "accuracy": share of correct decisions that become wrong, minus wrong ones that become correct.
        "cosine": 1 - cosine. "beyond": share with 1 - cosine above `limit`.
        "kl": KL divergence of logits, as a share of `limit` nats. "own": the user's function.
    threshold: lowest score that is reused; None when near reuse stays off.
    hits: share of held-out documents that are reused. expected: their measured drift over all results.
    bound: upper bound of that drift at the confidence. bound_of_hits: the same among the reused results.
    samples: number of held-out documents. needed: further documents needed for a threshold to pass, else 0.
    entries: number of entries searched; only these answer later (`FittedModels.answering`).
    reason: explanation of the choice.
    temperature, strength: of the `Voting`.
    tolerated: highest mean drift over all results in audits, which have no correct labels. It is the budget; for
        "accuracy" an upper bound of the share of decisions that change at the threshold.
    size: entries of the bank at the calibration, including a given sample; 0 without a bank.
    rule: `RULE` of the version that calibrated.
    scope: of the entries and of the documents that they answer, 16 hexadecimal digits (`marks.scope_of`); "" in
        calibrations older than scopes.
    guard: refuse hits with differing fields. guard_kinds, guard_pattern: see `guard.rules.FieldGuard`.
    traffic: state of a `DistributionShift` fitted to the sample; empty when the sample is too small.
    curve: (threshold, hits, drift, bound) per point, from strict to loose.
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
        """Weights of the neighbours and strength of the correction."""
        return Voting(self.temperature, self.strength)

    def levels(self) -> list[tuple[float, float]]:
        """Return (threshold, share of hits): the chosen one first, then the stricter ones for audits."""
        if self.threshold is None:
            return []
        levels = [(self.threshold, self.hits)]
        for share in _STRICTER[1:]:
            stricter = [
                (threshold, hits)
                for threshold, hits, *_ in self.curve
                if 0 < hits <= share * self.hits and threshold > levels[-1][0]
            ]
            if stricter:
                levels.append(max(stricter, key=lambda level: level[1]))
        return levels

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        """Rebuild a calibration from `to_json`. ConfigError when it is unreadable or of another `RULE`."""
        if raw.get("rule") != RULE:
            raise ConfigError(
                "it was calibrated by another version, whose scores differ; run `llmcache calibrate` again"
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


_WORDS = 4  # a 64-bit key is stored as four 16-bit words, each exact in float32


@dataclass(frozen=True, slots=True, eq=False)
class FittedModels:
    """Fitted models of a calibration.

    boundary: linear approximation of the head that defines drift; None without a head.
    answering: first halves of the keys of the entries that the calibration searched, uint64 [n], sorted; None for all
        entries of a bank.
    """

    predictor: Predictor
    boundary: LinearHead | None
    answering: NDArray[np.uint64] | None = field(default=None, repr=False)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return all arrays by name. Every number is exact in float32."""
        arrays = {f"predictor.{name}": array for name, array in self.predictor.to_arrays().items()}
        if self.boundary is not None:
            arrays |= {"boundary.weights": self.boundary.weights, "boundary.offset": self.boundary.offset}
        if self.answering is not None:
            arrays["answering.keys"] = np.ascontiguousarray(self.answering).view(np.uint16).reshape(-1, _WORDS)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> FittedModels:
        """Rebuild the models from `to_arrays`. ConfigError when arrays are missing or do not fit."""
        models: dict[str, dict[str, NDArray[np.generic]]] = {}
        for name, array in arrays.items():
            model, _, short_name = name.partition(".")
            models.setdefault(model, {})[short_name] = array
        head, keys = models.get("boundary"), models.get("answering")
        boundary = answering = None
        if head is not None:
            boundary = LinearHead(head["weights"].astype(np.float32), head["offset"].astype(np.float32))
        if keys is not None:
            if keys["keys"].shape[1:] != (_WORDS,):
                raise ConfigError(
                    f"the keys of a calibration's entries have to be [n, {_WORDS}], got {keys['keys'].shape}; "
                    "calibrate again"
                )
            answering = np.ascontiguousarray(keys["keys"].astype(np.uint16)).view(np.uint64).reshape(-1)
        return cls(Predictor.from_arrays(models.get("predictor", {})), boundary, answering)


def judge_of(calibration: Calibration, fitted: FittedModels, own: Drift | None = None) -> DriftMeasure:
    """Return the drift measure of a saved calibration, for audits.

    own: the user's function. ConfigError when the calibration was made with one and it is None.
    """
    if calibration.drift == OWN:
        if own is None:
            raise ConfigError(
                "it was calibrated with your own drift function, which is not stored; give it with drift= when opening"
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
    pairs: bool = False,
) -> tuple[Calibration, FittedModels]:
    """Calibrate near reuse on the entries of a cache.

    entries: those that answer later.
    read: digests of their fields, uint64 [n, kinds]; needed with the guard only.
    sample: documents that are not among the entries and that the head has not seen; None for cross-fitting, in which
        each entry is looked up among the other four fifths.
    sample_read: digests of the fields of the sample, uint64 [m, kinds]; needed with the guard only.
    budget, confidence: see `risk_control.choose`. drift, limit: see `Calibration`.
    head: a classifier of outputs, for "label" and "accuracy".
    truth: correct labels of the sample, or of the entries without a sample, for "accuracy".
    guarded, kinds, pattern: see `guard.rules.FieldGuard`.
    refit_head: fit a linear head again in every fold, to the head's decisions, although it could be used as it is.
    pairs: True if the documents are pairs of texts. Matches whose sides are exchanged are then no hits, as in look-ups.
    Returns the calibration and the fitted models.
    ConfigError when settings cannot work or there are too few entries.
    """
    if len(entries) < 2 * LEAST:
        raise ConfigError(
            f"{len(entries)} entries are too few to learn from; warm the store with at least {2 * LEAST} documents"
        )
    rules = guard.FieldGuard(kinds, pattern) if guarded else None
    boundary = linear_head(head, entries) if drift in _DECIDED else None
    queries, query_digests = (entries, read) if sample is None else (sample, sample_read)
    if drift == "accuracy" and (truth is None or len(truth) != len(queries)):
        raise ConfigError('drift="accuracy" needs the right answers of the sample; give truth=, one for each document')
    measure = judge(drift, limit, boundary)
    if drift in _DECIDED:
        measure = DriftMeasure(label_drift(head), measure.scores)
    voting = held_out_voting(entries, seed)
    index = HostNeighborIndex.fit(entries, seed, voting)
    if sample is not None:
        held_out = ask(index, sample, measure)
    elif drift in _DECIDED and (refit_head or not isinstance(head, LinearHead)):
        measures = refitted_measures(entries, head, measure, truth)
        held_out = cross_fit(entries, measures, folds=_FOLDS, seed=seed, voting=voting, like=index.predictor)
    else:
        held_out = cross_fit(
            entries, lambda rows: measure, folds=_FOLDS, seed=seed, voting=voting, like=index.predictor
        )
    score, similarity = held_out.score, held_out.found.similarity
    if rules:
        if read is None or query_digests is None:
            raise ConfigError("a guard needs the fields of entries and sample; give their digests, or guarded=False")
        neighbors = held_out.found
        eligible = eligible_sources(neighbors.similarities, voting.temperature)
        _, kind = rules.sharing(query_digests, read[neighbors.neighbours], eligible)
        score = np.where(kind >= 0, -np.inf, score)
    if pairs:
        eligible = eligible_sources(held_out.found.similarities, voting.temperature)
        wrong = exchanged(
            queries.tokens, held_out.found.neighbours, eligible,
            lambda rows: [entries.tokens[row] for row in rows.tolist()],
        )  # fmt: skip
        bags, known = token_bags(queries.tokens), token_bags(entries.tokens)
        distinct, counts = np.unique(known, return_counts=True)
        wrong |= np.isin(bags, distinct[counts > 1] if sample is None else known)  # an entry has its own tokens too
        score = np.where(wrong, -np.inf, score)
    measured, errors = held_out.drift, 0.0
    if drift == "accuracy" and truth is not None:
        measured, errors = accuracy_loss(queries, held_out, truth, head, sample is None), _MARGIN
        measured = measured if confidence is None else np.maximum(measured, 0)
    choice = choose(measured, score, budget, confidence, errors=errors)
    tolerated = _changed_bound(held_out.drift, score, choice) if drift == "accuracy" else budget
    result = Calibration(
        budget=choice.budget, confidence=choice.confidence, drift=OWN if callable(drift) else drift, limit=limit,
        threshold=choice.threshold, hits=choice.hits, expected=choice.drift, bound=choice.bound,
        bound_of_hits=choice.bound_of_hits, samples=choice.samples, needed=choice.needed, entries=len(entries),
        reason=choice.reason, temperature=voting.temperature, strength=voting.strength, tolerated=tolerated,
        guard=guarded, guard_kinds=tuple(kinds), guard_pattern=pattern, curve=_points(choice.curve),
        traffic=DistributionShift.fitted(similarity).state() if len(similarity) >= WATCHED else {},
    )  # fmt: skip
    return result, FittedModels(index.predictor, boundary)


def _changed_bound(drift: NDArray[np.float64], score: Floats, choice: Choice) -> float:
    """Return an upper bound of the share of all decisions that change at the threshold, for better or worse."""
    if choice.threshold is None:
        return choice.budget
    changed = drift[score >= choice.threshold].sum(keepdims=True)
    return float(flip_bound(changed, np.full(1, len(score)), choice.confidence or 0.95)[0])


def _points(curve: Curve) -> tuple[tuple[float, float, float, float], ...]:
    """Return at most `_CURVE` points of a curve, evenly spaced."""
    places: list[int] = np.unique(np.linspace(0, len(curve) - 1, _CURVE).astype(int)).tolist() if len(curve) else []
    return tuple(
        (float(curve.threshold[i]), float(curve.hits[i]), float(curve.drift[i]), float(curve.bound[i]))
        for i in places
        if np.isfinite(curve.threshold[i])
    )

"""From a budget to a threshold: what near reuse may give is measured on documents that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmcache import guard
from llmcache.calibration import Choice, choose
from llmcache.correction import Voting
from llmcache.crossfit import Entries, Judge, Memory, ask, cross_fit, held_out_voting
from llmcache.drift import beyond, cosine_drift, kl_drift, label_drift, labels
from llmcache.errors import ConfigError
from llmcache.gate import Boundary, Gate
from llmcache.predictor import LEAST, Predictor
from llmcache.shift import LEAST as WATCHED
from llmcache.shift import Shift

DriftKind = Literal["label", "cosine", "beyond", "kl"]
DRIFTS = ("label", "cosine", "beyond", "kl")
_CURVE = 60  # points of the curve that are kept
_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was chosen, and what speaks for it. Saved with the settings of a namespace.

    budget: highest mean drift over all results. drift: "label", decisions of a head that change; "cosine", 1 - cosine;
    "beyond", 1 - cosine above `limit`; "kl", of logits, as a share of `limit` nats. threshold: lowest score of the gate
    that is reused, None where near reuse stays off. hits, expected, bound: share of documents reused, drift measured
    on held-out ones, and its upper bound at the confidence; bound_of_hits: the same among those reused.
    traffic: what the similarities of the sample were like, for `shift.Shift`.
    guard: whether differing fields refuse a hit. curve: (threshold, hits, drift, bound), from strict to loose.
    """

    budget: float
    confidence: float | None
    drift: DriftKind
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
    guard: bool = True
    traffic: Mapping[str, Any] = field(default_factory=dict, repr=False)
    curve: tuple[tuple[float, float, float, float], ...] = field(default=(), repr=False)

    @property
    def voting(self) -> Voting:
        return Voting(self.temperature, self.strength)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        """What `to_json` gave. ConfigError when it is something else."""
        try:
            return cls(**{**raw, "curve": tuple(tuple(point) for point in raw["curve"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"the calibration saved with the store cannot be read: {error}; calibrate again"
            ) from None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The numbers that a calibration fitted. boundary: of the head that decides what drift is; None without one."""

    predictor: Predictor
    gate: Gate
    boundary: Boundary | None

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        found = {f"predictor.{name}": one for name, one in self.predictor.to_arrays().items()}
        found |= {f"gate.{name}": one for name, one in self.gate.to_arrays().items()}
        if self.boundary is not None:
            found |= {"boundary.weights": self.boundary.weights, "boundary.offset": self.boundary.offset}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Fitted:
        """The inverse of `to_arrays`. ConfigError: arrays are missing or do not fit."""
        parts: dict[str, dict[str, NDArray[np.generic]]] = {}
        for name, one in arrays.items():
            part, _, short = name.partition(".")
            parts.setdefault(part, {})[short] = one
        edge = parts.get("boundary")
        boundary = None
        if edge is not None:
            boundary = Boundary(edge["weights"].astype(np.float32), edge["offset"].astype(np.float32))
        return cls(Predictor.from_arrays(parts.get("predictor", {})), Gate.from_arrays(parts.get("gate", {})), boundary)


def judge_of(calibration: Calibration, fitted: Fitted) -> Judge:
    """What measures drift while running, of a calibration that was saved."""
    return judge(calibration.drift, calibration.limit, fitted.boundary)


def judge(drift: str, limit: float | None, boundary: Boundary | None) -> Judge:
    if drift == "label":
        if boundary is None:
            raise ConfigError('drift="label" needs a head that decides; give head=, a classifier of the outputs')
        return Judge(label_drift(boundary), boundary)
    if drift == "beyond":
        return Judge(beyond(0.05 if limit is None else limit))
    if drift == "kl":
        return Judge(kl_drift(1.0 if limit is None else limit), lambda outputs: outputs)
    if drift == "cosine":
        return Judge(cosine_drift)
    raise ConfigError(f"drift is one of {', '.join(DRIFTS)}, got {drift!r}")


def calibrated(
    entries: Entries,
    texts: Sequence[str],
    sample: Entries | None,
    sample_texts: Sequence[str],
    *,
    budget: float,
    drift: DriftKind = "label",
    head: Any = None,
    limit: float | None = None,
    confidence: float | None = 0.95,
    guarded: bool = True,
    seed: int = 0,
) -> tuple[Calibration, Fitted]:
    """The calibration for a cache's entries, and the numbers it needs.

    sample: documents that are not among the entries, and that the head has not seen; None takes the entries themselves,
    each against the other four fifths. texts: of both, for the guard. head: a classifier of outputs, for "label".
    ConfigError: settings that cannot work, or too few entries.
    """
    if len(entries) < 2 * LEAST:
        raise ConfigError(
            f"{len(entries)} entries are too few to learn from; warm the store with at least {2 * LEAST} documents"
        )
    boundary = _boundary(head, entries) if drift == "label" else None
    measure = judge(drift, limit, boundary)
    measured = Judge(label_drift(head), measure.scores) if drift == "label" else measure
    voting = held_out_voting(entries, seed)
    if sample is None:
        held = cross_fit(entries, _judges(entries, head, measured, drift), folds=_FOLDS, seed=seed, voting=voting)
        mine, memory = texts, Memory.fit(entries, seed, voting)
    else:
        memory = Memory.fit(entries, seed, voting)
        held, mine = ask(memory, sample, measured, folds=_FOLDS, seed=seed), sample_texts
    score = held.score
    if guarded:
        differing = guard.refused(guard.digests(mine), guard.digests([texts[i] for i in held.nearest.tolist()]))
        score = np.where(differing >= 0, -np.inf, score)
    choice = choose(held.drift, score, budget, confidence)
    fitted = Fitted(memory.predictor, held.gate, boundary)
    traffic = Shift.fitted(held.similarity).state() if len(held.similarity) >= WATCHED else {}
    return _said(choice, drift, limit, len(entries), voting, guarded, traffic), fitted


def _judges(entries: Entries, head: Any, measured: Judge, drift: str) -> Callable[[NDArray[np.int64]], Judge]:
    """The judge for some of the entries. A head that has seen the others would judge them too kindly: of a head, its
    linear picture is fitted again to each of the parts.
    """
    if drift != "label" or isinstance(head, Boundary):
        return lambda rows: measured
    decided = labels(head, entries.outputs)

    def judge_of(rows: NDArray[np.int64]) -> Judge:
        edge = Boundary.fit(entries.outputs[rows], decided[rows])
        return measured if edge is None else Judge(label_drift(edge), edge)

    return judge_of


def _boundary(head: Any, entries: Entries) -> Boundary:
    if head is None:
        raise ConfigError('drift="label" needs a head that decides; give head=, a classifier of the outputs')
    if isinstance(head, Boundary):
        return head
    boundary = Boundary.of(head) or Boundary.fit(entries.outputs, labels(head, entries.outputs))
    if boundary is None:
        raise ConfigError("the head gives one label to all entries; there is nothing that could change")
    return boundary


def _said(
    choice: Choice,
    drift: DriftKind,
    limit: float | None,
    entries: int,
    voting: Voting,
    guarded: bool,
    traffic: Mapping[str, Any],
) -> Calibration:
    curve = choice.curve
    kept: list[int] = np.unique(np.linspace(0, len(curve) - 1, _CURVE).astype(int)).tolist() if len(curve) else []
    points = tuple(
        (float(curve.threshold[i]), float(curve.hits[i]), float(curve.drift[i]), float(curve.bound[i]))
        for i in kept
        if np.isfinite(curve.threshold[i])
    )
    return Calibration(
        budget=choice.budget, confidence=choice.confidence, drift=drift, limit=limit, threshold=choice.threshold,
        hits=choice.hits, expected=choice.drift, bound=choice.bound, bound_of_hits=choice.bound_of_hits,
        samples=choice.samples, needed=choice.needed, entries=entries, reason=choice.reason,
        temperature=voting.temperature, strength=voting.strength, guard=guarded, curve=points,
        traffic=dict(traffic),
    )  # fmt: skip

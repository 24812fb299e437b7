"""Which hits to trust: a logistic gate over the evidence, and a linear picture of a head's decisions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.correction import EVIDENCE
from llmcache.errors import ConfigError

_PENALTY = 1.0  # of standardised weights: keeps the gate finite when no hit, or every hit, drifted
_STEPS = 30
_LEAST_DRIFTED = 5  # fewer cannot teach weights to so many columns

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Evidence to a score, higher is safer: the negative log odds of drift.

    centre, scale, weights: float64 [columns]; offset: the score at the centre. Made by `fit_gate`.
    """

    centre: Floats = field(repr=False)
    scale: Floats = field(repr=False)
    weights: Floats
    offset: float

    def __post_init__(self) -> None:
        shapes = {self.centre.shape, self.scale.shape, self.weights.shape}
        finite = all(np.isfinite(one).all() for one in self.to_arrays().values())
        if len(shapes) != 1 or self.weights.ndim != 1 or not finite or not (self.scale > 0).all():
            raise ConfigError(f"the arrays of a gate do not fit each other: {shapes}; calibrate again")

    def __call__(self, evidence: NDArray[np.floating]) -> Floats:
        """Scores, float64 [n], of evidence [n, columns]; -inf where it is not finite (no neighbour)."""
        if evidence.ndim != 2 or evidence.shape[1] != len(self.weights):
            raise ConfigError(f"the gate was fitted to {len(self.weights)} columns, evidence is {evidence.shape}")
        usable = np.isfinite(evidence).all(axis=1)
        scores = np.full(len(evidence), -np.inf)
        scores[usable] = (evidence[usable] - self.centre) / self.scale @ self.weights + self.offset
        return scores

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything as plain arrays, for a file without pickle."""
        return {
            "centre": self.centre, "scale": self.scale, "weights": self.weights, "offset": np.array([self.offset]),
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Gate:
        """The inverse of `to_arrays`. ConfigError: arrays are missing or do not fit."""
        if missing := sorted({"centre", "scale", "weights", "offset"} - set(arrays)):
            raise ConfigError(f"these are not the arrays of a gate: {missing} missing; calibrate again")
        centre, scale, weights = (np.asarray(arrays[name], np.float64) for name in ("centre", "scale", "weights"))
        return cls(centre, scale, weights, float(np.asarray(arrays["offset"], np.float64).reshape(-1)[0]))


def fit_gate(evidence: NDArray[np.floating], drift: NDArray[np.floating] | NDArray[np.bool_]) -> Gate:
    """Ridge-penalised logistic regression of drift on evidence.

    evidence: [n, columns]. drift: [n] in [0, 1]; between the two ends it counts in part. With hardly any drift to learn
    from the score is the similarity's own column.
    """
    moved = np.asarray(drift, np.float64)
    if len(evidence) != len(moved) or not len(moved):
        raise ConfigError(f"a gate needs one drift per row of evidence, got {len(moved)} and {len(evidence)}")
    if not np.isfinite(evidence).all() or not np.isfinite(moved).all():
        raise ConfigError("evidence or drift hold numbers that are not finite; does the head give NaN?")
    centre, spread = evidence.mean(axis=0, dtype=np.float64), evidence.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 1e-9, spread, 1.0)
    columns = np.column_stack([(evidence - centre) / scale, np.ones(len(moved))])
    weights = np.zeros(columns.shape[1])
    if min(moved.sum(), (1 - moved).sum()) < _LEAST_DRIFTED:
        weights[EVIDENCE.index("dissimilarity")] = 1.0
        return Gate(centre, scale, -weights[:-1], 0.0)
    penalty = np.full(len(weights), _PENALTY)
    penalty[-1] = 1e-9
    for _ in range(_STEPS):  # Newton's method; the penalty keeps it convex and the steps are clipped
        odds = 1 / (1 + np.exp(-np.clip(columns @ weights, -30, 30)))
        slope = columns.T @ (odds - moved) + penalty * weights
        curvature = (columns * (odds * (1 - odds))[:, None]).T @ columns + np.diag(penalty)
        step = np.linalg.solve(curvature, slope)
        weights -= step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-6:
            break
    return Gate(centre, scale, -weights[:-1], -float(weights[-1]))


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """Where a head changes its mind, as a linear map: scores = outputs @ weights.T + offset.

    weights: float32 [classes, out]. offset: float32 [classes]. A head itself cannot be stored without pickle; this can,
    and how clearly it decides is the best evidence against a flip.
    """

    weights: NDArray[np.float32] = field(repr=False)
    offset: NDArray[np.float32] = field(repr=False)

    def __call__(self, outputs: NDArray[np.floating]) -> NDArray[np.float32]:
        """float32 [n, classes]."""
        return np.asarray(outputs @ self.weights.T + self.offset, np.float32)

    @classmethod
    def of(cls, head: Any) -> Boundary | None:
        """Of a linear scikit-learn classifier, by its own coefficients; None of anything else."""
        coefficients, intercept = getattr(head, "coef_", None), getattr(head, "intercept_", None)
        if not isinstance(coefficients, np.ndarray) or coefficients.ndim != 2 or not hasattr(head, "classes_"):
            return None
        offset = np.zeros(len(coefficients)) + (0.0 if intercept is None else intercept)
        if len(coefficients) == 1:  # two classes: one row of coefficients, the other class scores 0
            coefficients, offset = np.vstack([0 * coefficients, coefficients]), np.array([0.0, offset[0]])
        return cls(coefficients.astype(np.float32), np.asarray(offset, np.float32))

    @classmethod
    def fit(cls, outputs: NDArray[np.floating], labels: NDArray[np.generic]) -> Boundary | None:
        """Of any head, by the labels it gave to some outputs; None when it gave only one label."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(labels)) < 2:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return cls.of(LogisticRegression(C=10, max_iter=60).fit(outputs, labels))

"""Score near hits by a fixed formula over their evidence, and approximate a head by a linear map.

The score is a formula without fitted numbers. A gate that is fitted to the drift of the same documents that the bound
is computed on gives too low a bound: with few drifted documents it finds, among the many directions of the evidence,
one that is clean by luck in all of them, and cross-fitting does not remove that, since the luck is in every fold. A
formula has the same scale in every fold of a calibration and when it answers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.neighbors.correction import DECIDED, EVIDENCE

_DISSIMILARITY = EVIDENCE.index("dissimilarity")
_GAP = len(EVIDENCE) + DECIDED.index("gap")
_TINY = 1e-12  # a gap of nothing has a score, far below all others

Floats = NDArray[np.float64]


def safety(evidence: NDArray[np.floating]) -> Floats:
    """Scores of near hits, higher is safer, float64 [n]; -inf where the evidence is not finite (no neighbour).

    evidence: [n, columns] of `correction.evidence`. The expected error of a result grows as the square root of
    1 - similarity. With the columns of a head the score is log(gap / sqrt(1 - similarity)): by how many such errors the
    two best classes are apart. Without them it is -log(1 - similarity).
    ConfigError: the evidence has other columns.
    """
    if evidence.ndim != 2 or evidence.shape[1] not in {len(EVIDENCE), len(EVIDENCE) + len(DECIDED)}:
        raise ConfigError(
            f"evidence has {len(EVIDENCE)} columns, {len(DECIDED)} more with a head, got {evidence.shape}"
        )
    usable = np.isfinite(evidence).all(axis=1)
    columns = evidence[usable].astype(np.float64)
    scores = np.full(len(evidence), -np.inf)
    if evidence.shape[1] > _GAP:
        scores[usable] = np.log(np.maximum(columns[:, _GAP], _TINY)) - columns[:, _DISSIMILARITY] / 2
    else:
        scores[usable] = -columns[:, _DISSIMILARITY]
    return scores


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """Where a head changes its mind, as a linear map: scores = outputs @ weights.T + offset.

    weights: float32 [classes, out]. offset: float32 [classes]. A head itself cannot be stored without pickle; this can,
    and how clearly it decides is the best evidence against a flip.
    """

    weights: NDArray[np.float32] = field(repr=False)
    offset: NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.offset.shape != self.weights.shape[:1]:
            raise ConfigError(
                f"the weights of a head are [classes, numbers] and its offset [classes], got {self.weights.shape} and "
                f"{self.offset.shape}"
            )

    def __call__(self, outputs: NDArray[np.floating]) -> NDArray[np.float32]:
        """float32 [n, classes]."""
        return np.asarray(outputs @ self.weights.T + self.offset, np.float32)

    @classmethod
    def of(cls, head: Any) -> LinearHead | None:
        """Of a linear scikit-learn classifier, by its own coefficients; None of anything else."""
        coefficients, intercept = getattr(head, "coef_", None), getattr(head, "intercept_", None)
        if not isinstance(coefficients, np.ndarray) or coefficients.ndim != 2 or not hasattr(head, "classes_"):
            return None
        offset = np.zeros(len(coefficients)) + (0.0 if intercept is None else intercept)
        if len(coefficients) == 1:  # two classes: one row of coefficients, the other class scores 0
            coefficients, offset = np.vstack([0 * coefficients, coefficients]), np.array([0.0, offset[0]])
        return cls(coefficients.astype(np.float32), np.asarray(offset, np.float32))

    @classmethod
    def fit(cls, outputs: NDArray[np.floating], labels: NDArray[np.generic]) -> LinearHead | None:
        """Of any head, by the labels it gave to some outputs; None when it gave only one label."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(labels)) < 2:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return cls.of(LogisticRegression(C=10, max_iter=60).fit(outputs, labels))

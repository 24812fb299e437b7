"""Linear approximation of a classification head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError


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

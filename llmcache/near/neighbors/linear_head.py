"""Linear approximation of a classification head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats, Floats32
from llmcache.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A head as a linear map: scores = outputs @ weights.T + offset.

    A head of any kind cannot be stored without pickle; this approximation can. The margin between its two best classes
    is the best evidence against a label flip.

    weights: float32 [classes, out]. offset: float32 [classes].
    ConfigError when the shapes do not fit.
    """

    weights: Floats32 = field(repr=False)
    offset: Floats32 = field(repr=False)

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.offset.shape != self.weights.shape[:1]:
            raise ConfigError(
                f"the weights of a head are [classes, numbers] and its offset [classes], got {self.weights.shape} and "
                f"{self.offset.shape}"
            )

    def __call__(self, outputs: Floats) -> Floats32:
        """Return the scores of outputs [n, out], float32 [n, classes]."""
        return np.asarray(outputs @ self.weights.T + self.offset, np.float32)

    @classmethod
    def of(cls, head: Any) -> LinearHead | None:
        """Copy the coefficients of a linear scikit-learn classifier. Returns None for any other head."""
        coefficients, intercept = getattr(head, "coef_", None), getattr(head, "intercept_", None)
        if not isinstance(coefficients, np.ndarray) or coefficients.ndim != 2 or not hasattr(head, "classes_"):
            return None
        offset = np.zeros(len(coefficients)) + (0.0 if intercept is None else intercept)
        if len(coefficients) == 1:  # two classes: one row of coefficients, the other class scores 0
            coefficients, offset = np.vstack([0 * coefficients, coefficients]), np.array([0.0, offset[0]])
        return cls(coefficients.astype(np.float32), np.asarray(offset, np.float32))

    @classmethod
    def fit(cls, outputs: Floats, labels: NDArray[np.generic]) -> LinearHead | None:
        """Fit a logistic regression to the labels that a head gave to outputs. Returns None for a single label.

        outputs: [n, out]. labels: [n].
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(labels)) < 2:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return cls.of(LogisticRegression(C=10, max_iter=60).fit(outputs, labels))

"""Linear heads for calibration: approximate a head, fit it again in every fold, measure its accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Rows
from llmcache.near.calibration.crossfit import CrossFitResult
from llmcache.near.calibration.drift import DriftMeasure, label_drift, labels
from llmcache.near.neighbors.index import Entries
from llmcache.near.neighbors.linear_head import LinearHead

Truth: TypeAlias = NDArray[np.generic]
"""The correct labels, one per document."""


def refitted_measures(
    entries: Entries, head: Any, measure: DriftMeasure, truth: Truth | None
) -> Callable[[Rows], DriftMeasure]:
    """Return a function from entry rows to a drift measure that also has a head that is fitted to these rows only.

    A head that was trained on the held-out entries would underestimate their drift. The head is therefore fitted again
    in every fold: to the correct labels where they are known, else to the head's own decisions. A document drifts if
    the decision of either head changes. Scores come from the given head, as in live look-ups: margins of a head that
    is fitted to fewer documents have another scale, and a threshold on them would admit more documents than measured.
    """
    answers = labels(head, entries.outputs) if truth is None else truth

    def measure_of(rows: Rows) -> DriftMeasure:
        refitted = refit_linear(None if truth is None else head, entries.outputs[rows], answers[rows])
        if refitted is None:
            return measure
        again = label_drift(refitted)
        return DriftMeasure(
            lambda ours, given: np.maximum(measure.drift(ours, given), again(ours, given)), measure.scores
        )

    return measure_of


def refit_linear(head: Any, outputs: Floats32, answers: NDArray[Any]) -> LinearHead | None:
    """Fit a head again to these labels, as a linear head. Returns None when there is only one label.

    A scikit-learn classifier is refitted with its own settings; for any other head, or None, a logistic regression is
    fitted.
    """
    from sklearn.base import BaseEstimator, clone
    from sklearn.exceptions import ConvergenceWarning

    if not isinstance(head, BaseEstimator) or len(np.unique(answers)) < 2:
        return LinearHead.fit(outputs, answers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        refitted = clone(head).fit(outputs, answers)
    return LinearHead.of(refitted) or LinearHead.fit(outputs, labels(refitted, outputs))


def accuracy_loss(
    queries: Entries, held_out: CrossFitResult, truth: Truth, head: Any, refit: bool
) -> NDArray[np.float64]:
    """Compare decisions on computed and reused outputs with the correct labels, float64 [n].

    The result is 1 where only the computed output is decided correctly, -1 where only the reused one is, else 0.
    refit: fit the head again in every fold. ConfigError when the head is never correct.
    """
    loss = np.zeros(len(queries))
    if not refit:
        correct = labels(head, queries.outputs) == truth
        if not correct.any():
            raise ConfigError(
                f"the head is never right: it gives {labels(head, queries.outputs[:1])[0]!r} for the first document, "
                f"where {truth[0]!r} is right; give labels in the form that the head gives"
            )
        return np.asarray(correct.astype(np.float64) - (labels(head, held_out.found.results) == truth))
    for number in np.unique(held_out.fold):
        in_fold = held_out.fold == number
        classes, class_numbers = np.unique(truth[~in_fold], return_inverse=True)
        refitted = refit_linear(head, queries.outputs[~in_fold], class_numbers)
        if refitted is not None:
            before, after = (
                classes[labels(refitted, outputs[in_fold])] == truth[in_fold]
                for outputs in (queries.outputs, held_out.found.results)
            )
            loss[in_fold] = before.astype(np.float64) - after
    return loss


def linear_head(head: Any, entries: Entries) -> LinearHead:
    """Return the linear approximation of a head. ConfigError when there is no head or it gives one label only."""
    if head is None:
        raise ConfigError('drift="label" needs a head; give head=, a classifier of the outputs')
    if isinstance(head, LinearHead):
        return head
    boundary = LinearHead.of(head) or LinearHead.fit(entries.outputs, labels(head, entries.outputs))
    if boundary is None:
        raise ConfigError("the head gives one label to all entries, so no decision can change; give another head")
    return boundary

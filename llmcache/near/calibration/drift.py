"""Drift measures: functions from computed and reused outputs, [n, out] each, to the drift per document, float64 [n]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats
from llmcache.errors import ConfigError
from llmcache.near.neighbors.index import Scores
from llmcache.near.neighbors.linear_head import LinearHead

Drift = Callable[[Floats, Floats], NDArray[np.float64]]
"""Type of a drift measure: computed and reused outputs, [n, out] each, to float64 [n]."""
DriftKind = Literal["label", "accuracy", "cosine", "beyond", "kl"]
DRIFTS: tuple[DriftKind, ...] = get_args(DriftKind)


def label_drift(head: Any) -> Drift:
    """Return a measure that is 1 where the head decides differently, else 0.

    head: a scikit-learn classifier, or a callable from outputs [n, out] to labels [n] or logits [n, classes].
    """
    return lambda computed, reused: np.not_equal(labels(head, computed), labels(head, reused)).astype(np.float64)


def labels(head: Any, outputs: Floats) -> NDArray[np.generic]:
    """Return the decisions of a head, [n].

    head: as for `label_drift`. ConfigError when the head raises, gives NaN, or not one row per output.
    """
    try:
        decisions = np.asarray(head.predict(outputs) if hasattr(head, "predict") else head(outputs))
    except Exception as error:  # user code may raise anything
        raise ConfigError(f"the head failed on outputs {outputs.shape}: {type(error).__name__}: {error}") from error
    if decisions.ndim not in {1, 2} or len(decisions) != len(outputs):
        raise ConfigError(
            f"the head gave {decisions.shape} for {len(outputs)} outputs; it has to give one row per output"
        )
    if decisions.dtype.kind == "f" and np.isnan(decisions).any():
        place = int(np.flatnonzero(np.isnan(decisions))[0] // decisions[0].size)
        raise ConfigError(f"the head gave NaN for document {place}")
    return decisions.argmax(axis=1) if decisions.ndim == 2 else decisions


def cosine_drift(computed: Floats, reused: Floats) -> NDArray[np.float64]:
    """Return 1 - cosine, clipped to [0, 1]; a negative cosine counts as 1."""
    return np.clip(1 - _cosine(computed, reused), 0, 1)


def beyond(limit: float) -> Drift:
    """Return a measure that is 1 where 1 - cosine is above the limit, else 0.

    ConfigError when the limit is outside (0, 2].
    """
    if not 0 < limit <= 2:
        raise ConfigError(f"the limit of 1 - cosine has to lie in (0, 2], got {limit}; use 0.05 for close embeddings")
    return lambda computed, reused: (1 - _cosine(computed, reused) > limit).astype(np.float64)


def kl_drift(ceiling: float = 1.0) -> Drift:
    """Return a measure of the KL divergence of reused from computed logits, as a share of the ceiling, at most 1.

    ceiling: in nats. Only the mean of bounded values can be bounded, so budgets are shares of the ceiling.
    ConfigError when the ceiling is not above 0.
    """
    if not ceiling > 0:
        raise ConfigError(f"the ceiling of a KL divergence has to be above 0 nats, got {ceiling}")

    def divergence(computed: Floats, reused: Floats) -> NDArray[np.float64]:
        true, approximate = _log_softmax(computed), _log_softmax(reused)
        return np.asarray(np.clip((np.exp(true) * (true - approximate)).sum(axis=1) / ceiling, 0, 1))

    return divergence


def _cosine(one: Floats, other: Floats) -> NDArray[np.float64]:
    left, right = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / np.maximum(norms, 1e-30))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@dataclass(frozen=True, slots=True, eq=False)
class DriftMeasure:
    """A drift measure with the head that it is defined on.

    drift: computed and reused outputs to drift in [0, 1], [n].
    scores: outputs to logits of the head; None without a head (drift of embeddings).
    """

    drift: Drift
    scores: Scores | None = None


def judge(drift: str | Drift, limit: float | None, boundary: LinearHead | None) -> DriftMeasure:
    """Return the drift measure of a kind, or of the user's function.

    limit: of "beyond" (default 0.05) and "kl" (default 1). boundary: the head, for "label" and "accuracy".
    ConfigError when the kind is unknown or the head is missing.
    """
    if callable(drift):
        return DriftMeasure(drift)
    if drift in {"label", "accuracy"}:
        if boundary is None:
            raise ConfigError(f"drift={drift!r} needs a head; give head=, a classifier of the outputs")
        return DriftMeasure(label_drift(boundary), boundary)
    if drift == "beyond":
        return DriftMeasure(beyond(0.05 if limit is None else limit))
    if drift == "kl":
        return DriftMeasure(kl_drift(1.0 if limit is None else limit), lambda outputs: outputs)
    if drift == "cosine":
        return DriftMeasure(cosine_drift)
    raise ConfigError(f"drift is one of {', '.join(DRIFTS)}, or a function of two arrays [n, out], got {drift!r}")

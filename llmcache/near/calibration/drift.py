"""How far reused outputs are from computed ones: functions of two arrays [n, out] that give float64 [n]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.neighbors.index import Scores
from llmcache.near.neighbors.linear_head import LinearHead

Floats = NDArray[np.floating]
Drift = Callable[[Floats, Floats], NDArray[np.float64]]
DriftKind = Literal["label", "accuracy", "cosine", "beyond", "kl"]
DRIFTS: tuple[DriftKind, ...] = get_args(DriftKind)


def label_drift(head: Any) -> Drift:
    """1 where the head decides otherwise, else 0.

    head: a scikit-learn classifier, or a callable from outputs [n, out] to a label, or a row of logits, per document.
    """
    return lambda computed, reused: np.not_equal(labels(head, computed), labels(head, reused)).astype(np.float64)


def labels(head: Any, outputs: Floats) -> NDArray[np.generic]:
    """What a head decides, [n]. ConfigError: it raises, gives NaN, or not one answer per output."""
    try:
        found = np.asarray(head.predict(outputs) if hasattr(head, "predict") else head(outputs))
    except Exception as error:  # a stranger's code: whatever it raises is one clear error here
        raise ConfigError(f"the head failed on outputs {outputs.shape}: {type(error).__name__}: {error}") from error
    if found.ndim not in {1, 2} or len(found) != len(outputs):
        raise ConfigError(f"the head gave {found.shape} for {len(outputs)} outputs; it has to give one row per output")
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise ConfigError(f"the head gave NaN for document {int(np.flatnonzero(np.isnan(found))[0] // found[0].size)}")
    return found.argmax(axis=1) if found.ndim == 2 else found


def cosine_drift(computed: Floats, reused: Floats) -> NDArray[np.float64]:
    """1 - cosine, clipped to [0, 1]: what points away counts as a whole difference."""
    return np.clip(1 - _cosine(computed, reused), 0, 1)


def beyond(limit: float) -> Drift:
    """1 where 1 - cosine is above the limit, else 0."""
    if not 0 < limit <= 2:
        raise ConfigError(f"the limit of 1 - cosine has to lie in (0, 2], got {limit}; 0.05 is near for an embedding")
    return lambda computed, reused: (1 - _cosine(computed, reused) > limit).astype(np.float64)


def kl_drift(ceiling: float = 1.0) -> Drift:
    """KL divergence of the reused from the computed distribution, in nats, as a share of the ceiling and at most 1.

    The arrays are logits. A mean is only bounded when its values are: budgets are then shares of the ceiling.
    """
    if not ceiling > 0:
        raise ConfigError(f"the ceiling of a KL divergence has to be above 0 nats, got {ceiling}")

    def divergence(computed: Floats, reused: Floats) -> NDArray[np.float64]:
        right, taken = _log_softmax(computed), _log_softmax(reused)
        return np.asarray(np.clip((np.exp(right) * (right - taken)).sum(axis=1) / ceiling, 0, 1))

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
    """What drift is. drift: of computed and reused outputs, [n] in [0, 1].

    scores: logits of the head the drift is of, from outputs; None where there is none (drift of embeddings).
    """

    drift: Drift
    scores: Scores | None = None


def judge(drift: str | Drift, limit: float | None, boundary: LinearHead | None) -> DriftMeasure:
    """Return the measure of drift of this kind, or of the user's own function.

    limit: of "beyond" and "kl". boundary: the head, for "label" and "accuracy". ConfigError: a kind that is not known,
    or a head that is missing.
    """
    if callable(drift):
        return DriftMeasure(drift)
    if drift in {"label", "accuracy"}:
        if boundary is None:
            raise ConfigError(f"drift={drift!r} needs a head that decides; give head=, a classifier of the outputs")
        return DriftMeasure(label_drift(boundary), boundary)
    if drift == "beyond":
        return DriftMeasure(beyond(0.05 if limit is None else limit))
    if drift == "kl":
        return DriftMeasure(kl_drift(1.0 if limit is None else limit), lambda outputs: outputs)
    if drift == "cosine":
        return DriftMeasure(cosine_drift)
    raise ConfigError(f"drift is one of {', '.join(DRIFTS)}, or a function of two arrays [n, out], got {drift!r}")

"""Corrected reuse: the neighbours' outputs, moved by what differs between the documents; and what speaks for a hit.

The result is `vote + strength (predicted - vote of the predictions)`: regression with interpolated residuals. Plain
reuse of the nearest output is what is left at k = 1 and strength 0. All of it are functions over arrays of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError

NEIGHBOURS = 8
TEMPERATURE = 0.05
STRENGTH = 0.75
EVIDENCE = (
    "dissimilarity",
    "margin",
    "reach",
    "consensus",
    "least_consensus",
    "vote",
    "shift",
    "residual",
    "coherence",
    "length",
    "overlap",
)
"""Columns of `evidence`."""
DECIDED = ("gap", "log_gap", "gap_per_error")
"""Columns after them where a head's scores are known."""

_TINY = 1e-6
_ID_BITS = 32  # of a token id
_TEMPERATURES = (0.02, 0.05, 0.1)
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Floats = NDArray[np.float32]
Tokens = Sequence[NDArray[np.integer]]


@dataclass(frozen=True, slots=True)
class Voting:
    """How neighbours are weighed: softmax(similarity / temperature), and which share of the difference is applied."""

    temperature: float = TEMPERATURE
    strength: float = STRENGTH

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.strength <= 1:
            raise ConfigError(
                f"temperature has to be above 0 and strength in [0, 1], got {self.temperature} and {self.strength}"
            )


def units(vectors: NDArray[np.floating]) -> Floats:
    """Unit L2 norm along the last axis, float32, a copy; zeros stay zeros. Of predictions: the fingerprints."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-30), np.float32)


def weights(similarity: NDArray[np.floating], temperature: float = TEMPERATURE) -> Floats:
    """softmax(similarity / temperature), float32 [n, k]; -inf (no neighbour) weighs 0, a row without any is zeros."""
    best = similarity.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        raw = np.exp((similarity - best) / temperature)
    raw = np.where(np.isneginf(similarity), 0.0, raw)
    return np.asarray(raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-30), np.float32)


def eligible_sources(similarity: NDArray[np.floating], temperature: float = TEMPERATURE) -> NDArray[np.bool_]:
    """Which neighbours a result may be said to come from: those that count at least half as much as the nearest,
    bool [n, k]. similarity: as of `weights`.
    """
    part = weights(similarity, temperature)
    return (part >= 0.5 * part[:, :1]) & (part > 0)


def corrected(
    predicted: Floats,
    outputs: Floats,
    predictions: Floats,
    similarity: NDArray[np.floating],
    temperature: float = TEMPERATURE,
    strength: float = STRENGTH,
    *,
    unit: bool = True,
) -> Floats:
    """Results for a batch, float32 [n, out].

    predicted: [n, out], of the documents asked. outputs, predictions: [n, k, out], stored and predicted, of their
    neighbours. similarity: [n, k], between the fingerprints, -inf where there is no neighbour. unit: the stored outputs
    are of unit norm (`unit_norm`), so that the results have to be.
    """
    voting = Voting(temperature, strength)
    part = weights(similarity, voting.temperature)
    found = _mixed(part, outputs) + voting.strength * (predicted - _mixed(part, predictions))
    return units(found) if unit else np.asarray(found, np.float32)


def unit_norm(outputs: NDArray[np.floating]) -> bool:
    """Whether stored outputs are unit vectors, but for the rounding of float16."""
    return bool(len(outputs)) and bool(np.all(np.abs(np.linalg.norm(outputs, axis=-1) - 1) < 5e-3))


def evidence(
    predicted: Floats,
    outputs: Floats,
    predictions: Floats,
    similarity: NDArray[np.floating],
    tokens: tuple[Tokens, Tokens],
    scores: NDArray[np.floating] | None = None,
    temperature: float = TEMPERATURE,
) -> Floats:
    """What is known of each hit before anything is computed, float32 [n, columns], named by `EVIDENCE`, then `DECIDED`.

    Arguments as for `corrected`; a row that lacks a neighbour is not finite, which no gate trusts. tokens: ids of each
    document and of its best match. scores: logits that the head gives for the corrected results, [n, classes].
    Logarithms where an amount has no natural scale.
    """
    part = weights(similarity, temperature)
    norms = np.maximum(np.sqrt(_squares(outputs)), 1e-30)
    agree = np.ones((len(outputs), 1), np.float32)
    if outputs.shape[1] > 1:
        agree = np.matmul(outputs[:, 1:4], outputs[:, 0, :, None])[..., 0] / (norms[:, 1:4] * norms[:, :1])
    residuals = outputs - predictions
    own = (part * _squares(residuals)).sum(axis=1)
    joint = _squares(_mixed(part, residuals))
    moved = _squares(predicted - _mixed(part, predictions))
    columns = [
        np.log(np.maximum(1 - similarity[:, 0], 0) + _TINY),
        similarity[:, 0] - similarity[:, min(1, similarity.shape[1] - 1)],
        np.log(np.maximum(1 - similarity.mean(axis=1), 0) + _TINY),
        agree.mean(axis=1),
        agree.min(axis=1),
        np.sqrt(_squares(_mixed(np.asarray(part / norms, np.float32), outputs))),
        np.log(moved + _TINY),
        np.log(own + _TINY),
        joint / (own + _TINY),
        *likeness(*tokens),
    ]
    if scores is not None:
        gap = decided(scores)
        columns += [gap, np.log(gap + 0.05), gap / np.sqrt(own + _TINY)]
    return np.stack(columns, axis=1).astype(np.float32)


def _mixed(part: Floats, vectors: Floats) -> Floats:
    """Weighted sums, [n, out], of vectors [n, k, out] by weights [n, k]."""
    return np.asarray(np.matmul(part[:, None], vectors)[:, 0], np.float32)


def _squares(vectors: Floats) -> Floats:
    """Squared norms along the last axis, without a temporary array as large as the vectors."""
    return np.asarray(np.einsum("...i,...i->...", vectors, vectors), np.float32)


def likeness(one: Tokens, other: Tokens) -> tuple[Floats, Floats]:
    """What tokens alone say of pairs of documents, the columns "length" and "overlap": float32 [n] each."""
    mine, theirs = (np.array([len(ids) for ids in side], np.float64) for side in (one, other))
    ratio = np.log((np.minimum(mine, theirs) + 1) / (np.maximum(mine, theirs) + 1))
    return np.asarray(ratio, np.float32), jaccard(one, other)


def jaccard(one: Tokens, other: Tokens) -> Floats:
    """Share of distinct tokens that two documents have in common, float32 [n]."""
    mine, theirs = _distinct(one), _distinct(other)
    both = np.bincount(np.intersect1d(mine, theirs, assume_unique=True) >> _ID_BITS, minlength=len(one))
    sizes = [np.bincount(each >> _ID_BITS, minlength=len(one)) for each in (mine, theirs)]
    return np.asarray(both / np.maximum(sizes[0] + sizes[1] - both, 1), np.float32)


def _distinct(tokens: Tokens) -> NDArray[np.int64]:
    """The distinct tokens of every document, each with the document's number above its bits."""
    if not len(tokens):
        return np.zeros(0, np.int64)
    lengths = [len(ids) for ids in tokens]
    return np.unique((np.repeat(np.arange(len(tokens)), lengths) << _ID_BITS) | np.concatenate(tokens))


def decided(scores: NDArray[np.floating]) -> Floats:
    """How clearly a head decides: best score less the second best, float32 [n]. scores: logits [n, classes], or [n]."""
    if scores.ndim == 1:
        return np.asarray(np.abs(scores), np.float32)
    if scores.shape[1] < 2:
        return np.zeros(len(scores), np.float32)
    top = np.partition(scores, -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2], np.float32)


def choose_voting(
    predicted: Floats,
    outputs: Floats,
    predictions: Floats,
    similarity: NDArray[np.floating],
    wanted: Floats,
) -> Voting:
    """The setting whose results are nearest to the true outputs `wanted`, [n, out], of held-out entries."""
    unit = unit_norm(wanted)
    best, chosen = np.inf, Voting()
    for temperature in _TEMPERATURES:
        for strength in _STRENGTHS:
            found = corrected(predicted, outputs, predictions, similarity, temperature, strength, unit=unit)
            error = float(np.square(found - wanted).mean())
            if error < best:
                best, chosen = error, Voting(temperature, strength)
    return chosen

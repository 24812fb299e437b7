"""Corrected reuse: the neighbours' outputs, moved by what differs between the documents; and what speaks for a hit.

The result is `vote + strength (predicted - vote of the predictions)`: regression with interpolated residuals. Plain
reuse of the nearest output is what is left at k = 1 and strength 0. All of it are functions over arrays of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

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


Mixed: TypeAlias = tuple[Floats, Floats]
"""Weighted means, see `mixtures`; float32 [n, out] each."""


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


def mixtures(outputs: Floats, predictions: Floats, similarity: NDArray[np.floating], temperature: float) -> Mixed:
    """Means of the neighbours' outputs and of their predictions by what each counts; arguments as for `corrected`."""
    part = weights(similarity, temperature)
    return _mixed(part, outputs), _mixed(part, predictions)


def corrected(
    predicted: Floats,
    outputs: Floats,
    predictions: Floats,
    similarity: NDArray[np.floating],
    temperature: float = TEMPERATURE,
    strength: float = STRENGTH,
    *,
    unit: bool = True,
    mixed: Mixed | None = None,
) -> Floats:
    """Results for a batch, float32 [n, out].

    predicted: [n, out], of the documents asked. outputs, predictions: [n, k, out], stored and predicted, of their
    neighbours. similarity: [n, k], between the fingerprints, -inf where there is no neighbour. unit: the stored outputs
    are of unit norm (`unit_norm`), so that the results have to be. mixed: `mixtures` of the same, where they are known.
    """
    voting = Voting(temperature, strength)
    ours, theirs = mixed or mixtures(outputs, predictions, similarity, voting.temperature)
    found = ours + voting.strength * (predicted - theirs)
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
    mixed: Mixed | None = None,
) -> Floats:
    """What is known of each hit before anything is computed, float32 [n, columns], named by `EVIDENCE`, then `DECIDED`.

    Arguments as for `corrected`; a row that lacks a neighbour is not finite, which no gate trusts. tokens: ids of each
    document and of its best match. scores: logits that the head gives for the corrected results, [n, classes].
    Logarithms where an amount has no natural scale.
    """
    part = weights(similarity, temperature)
    squares = _squares(outputs)
    norms = np.maximum(np.sqrt(squares), 1e-30)
    agree = np.ones((len(outputs), 1), np.float32)
    if outputs.shape[1] > 1:
        agree = np.einsum("nki,ni->nk", outputs[:, 1:4], outputs[:, 0]) / (norms[:, 1:4] * norms[:, :1])
    # the residuals' norms by products, and their mixture by two: an array of all residuals takes longer to make
    between = np.einsum("nki,nki->nk", outputs, predictions)
    own = (part * np.maximum(squares + _squares(predictions) - 2 * between, 0)).sum(axis=1)
    ours, theirs = mixed or mixtures(outputs, predictions, similarity, temperature)
    joint, moved = _squares(ours - theirs), _squares(predicted - theirs)
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
    if not len(one):
        return np.zeros(0, np.float32)
    # all tokens of both sides by document, token and side: numpy sorts faster than it finds what is unique
    every = np.sort(np.concatenate([_numbered(one, 0), _numbered(other, 1)]))
    every = every[np.flatnonzero(np.diff(every, prepend=-1))]
    both = np.bincount(every[:-1][np.diff(every >> 1) == 0] >> 1 + _ID_BITS, minlength=len(one))
    total = np.bincount(every >> 1 + _ID_BITS, minlength=len(one))
    return np.asarray(both / np.maximum(total - both, 1), np.float32)


def _numbered(tokens: Tokens, side: int) -> NDArray[np.int64]:
    """Every token, with the number of its document above its bits and the side below them."""
    documents = np.repeat(np.arange(len(tokens)), [len(ids) for ids in tokens])
    return np.asarray((documents << _ID_BITS | np.concatenate(tokens)) << 1 | side, np.int64)


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

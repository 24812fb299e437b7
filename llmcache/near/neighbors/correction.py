"""Corrected reuse: blend the outputs of neighbours, correct for the difference between documents, compute evidence.

The result is `vote + strength (predicted - vote of the predictions)`, which is regression with interpolated residuals.
With k = 1 and strength 0 it is plain reuse of the nearest output. All functions work on the arrays of one batch; those
whose arguments are of type `Array` take NumPy arrays, or tensors on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Array, Floats, Floats32, namespace, single
from llmcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

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
"""Further columns of `evidence`, present when the scores of a head are known."""

_TINY = 1e-6
_LIKENESS = EVIDENCE.index("length")  # first of the columns of token ids
_ID_BITS = 32  # of a token id
_TEMPERATURES = (0.02, 0.05, 0.1)
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Tokens = Sequence[NDArray[np.integer]]


@dataclass(frozen=True, slots=True)
class Voting:
    """Weights of the neighbours, softmax(similarity / temperature), and strength of the correction in [0, 1].

    ConfigError when a value is out of range.
    """

    temperature: float = TEMPERATURE
    strength: float = STRENGTH

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.strength <= 1:
            raise ConfigError(
                f"temperature has to be above 0 and strength in [0, 1], got {self.temperature} and {self.strength}"
            )


class Mixed(NamedTuple, Generic[Array]):
    """Weighted means of outputs and of predictions, float32 [n, out] each; from `mixtures`."""

    outputs: Array
    predictions: Array


@overload
def units(vectors: Floats) -> Floats32: ...
@overload
def units(vectors: Tensor) -> Tensor: ...
def units(vectors: Floats | Tensor) -> Floats32 | Tensor:
    """Return a float32 copy with unit L2 norm along the last axis. Zero vectors stay zero."""
    xp = namespace(vectors)
    unit: Floats32 | Tensor = single(vectors / xp.clip(xp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30, None))
    return unit


def weights(similarity: Array, temperature: float = TEMPERATURE) -> Array:
    """Return softmax(similarity / temperature), float32 [n, k].

    similarity: [n, k]; -inf (no neighbour) has weight 0. A row without neighbours is all zeros.
    """
    xp = namespace(similarity)
    with np.errstate(invalid="ignore"):
        raw = xp.exp((similarity - xp.amax(similarity, axis=1, keepdims=True)) / temperature)
    raw = xp.where(xp.isneginf(similarity), 0.0, raw)
    weight: Array = single(raw / xp.clip(raw.sum(axis=1, keepdims=True), 1e-30, None))
    return weight


def eligible_sources(similarity: Floats32, temperature: float = TEMPERATURE) -> NDArray[np.bool_]:
    """Mark the neighbours that may be named as the source of a result, bool [n, k].

    These are the neighbours with at least half the weight of the nearest one. similarity: as for `weights`.
    """
    weight = weights(similarity, temperature)
    return (weight >= 0.5 * weight[:, :1]) & (weight > 0)


def mixtures(outputs: Array, predictions: Array, similarity: Array, temperature: float) -> Mixed[Array]:
    """Return the weighted means of the neighbours' outputs and of their predictions. Arguments as for `corrected`."""
    weight = weights(similarity, temperature)
    return Mixed(_mixed(weight, outputs), _mixed(weight, predictions))


def corrected(
    predicted: Array,
    outputs: Array,
    predictions: Array,
    similarity: Array,
    temperature: float = TEMPERATURE,
    strength: float = STRENGTH,
    *,
    unit: bool = True,
    mixed: Mixed[Array] | None = None,
) -> Array:
    """Compute the results of a batch.

    predicted: predicted outputs of the documents, [n, out].
    outputs, predictions: stored and predicted outputs of their neighbours, [n, k, out].
    similarity: between the fingerprints, [n, k]; -inf where there is no neighbour.
    unit: normalise the results, because the stored outputs have unit norm (`unit_norm`).
    mixed: `mixtures` of the same arguments, if already computed.
    Returns float32 [n, out]. ConfigError as for `Voting`.
    """
    voting = Voting(temperature, strength)
    vote, vote_of_predictions = mixed or mixtures(outputs, predictions, similarity, voting.temperature)
    results: Array = vote + voting.strength * (predicted - vote_of_predictions)
    return units(results) if unit else single(results)


def unit_norm(outputs: Floats) -> bool:
    """Return True if outputs [n, out] are unit vectors up to float16 rounding; False for no outputs."""
    return bool(len(outputs)) and bool(np.all(np.abs(np.linalg.norm(outputs, axis=-1) - 1) < 5e-3))


def evidence(
    predicted: Floats32,
    outputs: Floats32,
    predictions: Floats32,
    similarity: Floats32,
    tokens: tuple[Tokens, Tokens],
    scores: Floats | None = None,
    temperature: float = TEMPERATURE,
    mixed: Mixed[Floats32] | None = None,
) -> Floats32:
    """Describe each hit by what is known without running the model.

    Arguments as for `evidence_of_vectors`. tokens: ids of each document, and of its best match.
    Returns float32 [n, columns], columns as in `EVIDENCE`, then `DECIDED` if scores are given. Quantities without a
    natural scale are logarithms. A row with a missing neighbour is not finite, so that no gate accepts it.
    """
    logits: Any = scores  # of any floating dtype, so that a small gap of float64 is not rounded away
    columns = evidence_of_vectors(predicted, outputs, predictions, similarity, logits, temperature, mixed)
    return with_likeness(columns, *tokens)


def evidence_of_vectors(
    predicted: Array,
    outputs: Array,
    predictions: Array,
    similarity: Array,
    scores: Array | None = None,
    temperature: float = TEMPERATURE,
    mixed: Mixed[Array] | None = None,
) -> Array:
    """Compute the columns of `evidence` that need no token ids: all but "length" and "overlap".

    Arguments as for `corrected`. scores: logits of the head for the corrected results, [n, classes].
    Returns float32 [n, columns].
    """
    xp = namespace(outputs)
    weight = weights(similarity, temperature)
    squares = inner(outputs, outputs)
    norms = xp.clip(xp.sqrt(squares), 1e-30, None)
    agreement = xp.ones_like(similarity[:, :1])
    if outputs.shape[1] > 1:
        agreement = xp.einsum("nki,ni->nk", outputs[:, 1:4], outputs[:, 0]) / (norms[:, 1:4] * norms[:, :1])
    # norms of the residuals from inner products: an array [n, k, out] of all residuals would take longer
    apart = squares + inner(predictions, predictions) - 2 * inner(outputs, predictions)
    residual = (weight * xp.clip(apart, 0, None)).sum(axis=1)
    vote, vote_of_predictions = mixed or mixtures(outputs, predictions, similarity, temperature)
    shift, common = predicted - vote_of_predictions, vote - vote_of_predictions
    agreed = _mixed(single(weight / norms), outputs)
    columns = [
        xp.log(xp.clip(1 - similarity[:, 0], 0, None) + _TINY),
        similarity[:, 0] - similarity[:, min(1, similarity.shape[1] - 1)],
        xp.log(xp.clip(1 - xp.mean(similarity, axis=1), 0, None) + _TINY),
        agreement.mean(axis=1),
        xp.amin(agreement, axis=1),
        xp.sqrt(inner(agreed, agreed)),
        xp.log(inner(shift, shift) + _TINY),
        xp.log(residual + _TINY),
        inner(common, common) / (residual + _TINY),
    ]
    if scores is not None:
        gap = decided(scores)
        columns += [gap, xp.log(gap + 0.05), gap / xp.sqrt(residual + _TINY)]
    described: Array = single(xp.stack(columns, axis=1))
    return described


def _mixed(weight: Array, vectors: Array) -> Array:
    """Return weighted sums [n, out] of vectors [n, k, out] with weights [n, k]."""
    sums: Array = single(namespace(vectors).matmul(weight[:, None], vectors)[:, 0])
    return sums


def inner(one: Array, other: Array) -> Array:
    """Return inner products along the last axis."""
    if isinstance(one, np.ndarray):  # without a temporary array as large as the vectors
        products: Array = single(np.einsum("...i,...i->...", one, other))
        return products
    return (one * other).sum(-1)


def with_likeness(columns: Floats32, one: Tokens, other: Tokens) -> Floats32:
    """Insert the columns "length" and "overlap" into the result of `evidence_of_vectors`, on the host.

    one, other: token ids of each document, and of its best match.
    """
    return np.concatenate(
        [columns[:, :_LIKENESS], np.stack(likeness(one, other), axis=1), columns[:, _LIKENESS:]], axis=1
    )


def likeness(one: Tokens, other: Tokens) -> tuple[Floats32, Floats32]:
    """Compare the token ids of pairs of documents: the columns "length" and "overlap", float32 [n] each."""
    left, right = (np.array([len(ids) for ids in side], np.float64) for side in (one, other))
    ratio = np.log((np.minimum(left, right) + 1) / (np.maximum(left, right) + 1))
    return np.asarray(ratio, np.float32), jaccard(one, other)


def jaccard(one: Tokens, other: Tokens) -> Floats32:
    """Return the Jaccard index of the token sets of pairs of documents, float32 [n]."""
    if not len(one):
        return np.zeros(0, np.float32)
    # one sort over all pairs, by document, token and side: faster than np.unique
    codes = np.sort(np.concatenate([_coded(one, 0), _coded(other, 1)]))
    codes = codes[np.flatnonzero(np.diff(codes, prepend=-1))]
    shared = np.bincount(codes[:-1][np.diff(codes >> 1) == 0] >> 1 + _ID_BITS, minlength=len(one))
    total = np.bincount(codes >> 1 + _ID_BITS, minlength=len(one))
    return np.asarray(shared / np.maximum(total - shared, 1), np.float32)


def _coded(tokens: Tokens, side: int) -> NDArray[np.int64]:
    """Pack document number, token id and side (0 or 1) of every token into one integer, in this order of bits."""
    documents = np.repeat(np.arange(len(tokens)), [len(ids) for ids in tokens])
    return np.asarray((documents << _ID_BITS | np.concatenate(tokens)) << 1 | side, np.int64)


def decided(scores: Array) -> Array:
    """Return the margin of a head's decision: best score minus second best, float32 [n].

    scores: logits [n, classes], or [n] for a binary head.
    """
    if scores.ndim == 1:
        return single(abs(scores))
    if scores.shape[1] < 2:
        return single(0 * scores[:, 0])
    top = np.partition(scores, -2, axis=1) if isinstance(scores, np.ndarray) else scores.topk(2, dim=1).values.flip(1)
    return single(top[:, -1] - top[:, -2])


def choose_voting(
    predicted: Floats32,
    outputs: Floats32,
    predictions: Floats32,
    similarity: Floats32,
    wanted: Floats32,
) -> Voting:
    """Choose temperature and strength by the squared error of the results on held-out entries.

    Arguments as for `corrected`. wanted: the true outputs, [n, out].
    """
    unit = unit_norm(wanted)
    best, chosen = np.inf, Voting()
    for temperature in _TEMPERATURES:
        for strength in _STRENGTHS:
            results = corrected(predicted, outputs, predictions, similarity, temperature, strength, unit=unit)
            error = float(np.square(results - wanted).mean())
            if error < best:
                best, chosen = error, Voting(temperature, strength)
    return chosen

"""What a document costs the model by its length: from the seconds recorded with a store's entries, or a few probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.segment import Segment
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import TokenRows

_LATEST = 20_000  # recorded entries that are looked at
_LEAST = 32  # of them, to say anything
_TOKENS = 512  # of a probe on a CPU: enough to keep it busy, and soon done
_DUE = 8  # rows of the one batch that is computed in any case
_FEW = 2  # rows of the batch that tells what every batch takes, however small
_SHORT = 64  # tokens of a row, from which on that is too little to be seen
_SAME = 1.6  # a probe that is off by less tells of a busy moment, not of another machine
_PLACES = (0.5, 0.9, 0.15, 0.98, 0.7, 0.3)  # of the probes, among all tokens in order of length

Lengths = NDArray[np.int64]
Seconds = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one document of L tokens, computed in a batch: fixed + linear L + square L^2.

    source: "recorded", "probed", or "recorded, scaled by probes" where the machine is another one by now.
    """

    fixed: float
    linear: float
    square: float
    source: str

    def __call__(self, tokens: NDArray[np.integer] | NDArray[np.floating]) -> Seconds:
        """Seconds of documents with so many tokens, float64 [n]."""
        lengths = np.asarray(tokens, np.float64)
        return np.asarray(self.fixed + self.linear * lengths + self.square * lengths**2, np.float64)

    def scaled(self, factor: float, source: str) -> Cost:
        return Cost(self.fixed * factor, self.linear * factor, self.square * factor, source)

    @classmethod
    def fit(cls, tokens: Lengths, seconds: Seconds, source: str) -> Cost:
        """Least squares of the relative error, no part below zero. tokens, seconds: [n], n >= 1, both above 0."""
        from scipy.optimize import nnls

        lengths = tokens.astype(np.float64)
        columns = np.column_stack([np.ones(len(lengths)), lengths, lengths**2])
        if len(np.unique(tokens)) < 3:  # one length says nothing about the shape, two nothing about its bend
            columns[:, 2] = 0
        if len(np.unique(tokens)) < 2:
            columns[:, 0] = 0
        found, _ = nnls(columns / seconds[:, None], np.ones(len(lengths)))
        return cls(float(found[0]), float(found[1]), float(found[2]), source)


def recorded(bank: Bank) -> Cost | None:
    """The cost by what the model took when it computed the latest entries of a bank; None where they are too few."""
    lengths, costs, count = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for piece in reversed(list(bank.pieces)):
        if isinstance(piece, Segment):
            lengths.append(piece.rows["tokens"].astype(np.int64))
            costs.append(piece.rows["cost"].astype(np.float64))
            count += len(piece)
        if count >= _LATEST:
            break
    tokens, seconds = np.concatenate(lengths), np.concatenate(costs)
    good = (tokens > 0) & np.isfinite(seconds) & (seconds > 0)
    tokens, seconds = tokens[good], seconds[good]
    if len(tokens) < _LEAST:
        return None
    # a mean per length: a sum is forecast, and to that a slow first batch belongs
    every, place, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    mean = np.bincount(place, seconds) / counts
    weight = np.sqrt(counts).astype(int)
    return Cost.fit(np.repeat(every, weight), np.repeat(mean, weight), "recorded")


def probed(
    model: Model,
    rows: TokenRows,
    lengths: Lengths,
    batch_size: int,
    allowed: Callable[[Cost], float],
    known: Cost | None = None,
) -> Cost:
    """The cost by computing a few batches of different lengths, each of one row of the sample again and again.

    rows: of a sample, at least one; lengths: of its tokens. allowed: seconds that all probes may take, by what is
    known of the cost so far. known: of a store's entries; one probe then tells whether this machine is like that one.
    """
    order = np.argsort(lengths, kind="stable")
    heaped = np.cumsum(lengths[order])
    places = [int(order[np.searchsorted(heaped, share * heaped[-1])]) for share in _PLACES]
    _probe(model, rows, [int(order[0])])  # the first pass of all sets things up
    seen: list[int] = []
    seconds: list[float] = []
    spent = 0.0
    cost = known
    for place in places:
        tokens = int(lengths[place])
        size = _rows(model, tokens, batch_size)
        if known is not None and not seen:  # the record may be of a quicker machine: the first probe is due
            size = min(size, _DUE, max(_FEW, _TOKENS // 2 // max(1, tokens)))
        elif cost is not None and spent + size * float(cost(lengths[place])) > allowed(cost):
            break
        took = _probe(model, rows, [place] * size)
        spent += took
        if tokens >= _SHORT:  # twice, so that a busy moment is left out
            again = _probe(model, rows, [place] * size)
            took, spent = min(took, again), spent + again
        seen.append(tokens)
        if size < batch_size and tokens < _SHORT and size > _FEW:
            few = _probe(model, rows, [place] * _FEW)
            spent += few
            seconds.append(in_full_batches(size, took, _FEW, few, batch_size))
        else:
            seconds.append(took / size)
        cost = _settled(known, np.array(seen), np.array(seconds))
    assert cost is not None
    return cost


def in_full_batches(many: int, took: float, few: int, less: float, most: int) -> float:
    """Seconds a row in batches of `most`, by what batches of `many` and `few` took: each takes some time for itself."""
    row = min(max(0.0, (took - less) / (many - few)), took / many)
    return row + max(0.0, took - many * row) / most


def _settled(known: Cost | None, tokens: Lengths, seconds: Seconds) -> Cost:
    if known is None:
        return Cost.fit(tokens, seconds, "probed")
    factor = float(seconds.sum() / known(tokens).sum())
    return known if 1 / _SAME < factor < _SAME else known.scaled(factor, "recorded, scaled by probes")


def _rows(model: Model, tokens: int, batch_size: int) -> int:
    if model.token_embedding().device.type != "cpu":
        return batch_size
    return min(batch_size, max(_FEW, _TOKENS // max(1, tokens)))


def _probe(model: Model, rows: TokenRows, chosen: Sequence[int]) -> float:
    return sum(one.seconds for one in compute(model, rows.take(list(chosen)), len(chosen), None))

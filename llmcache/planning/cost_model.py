"""Cost model: seconds and output rows of a document by its length, from a store's entries or from probe batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.rows import ROW
from llmcache.indexes.format.segment import Segment
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import TokenRows

_LATEST = 20_000  # recorded entries to use
_LEAST = 32  # recorded entries needed for a fit
_TOKENS = 512  # of a probe batch on a CPU: enough for full speed, and quick
_DUE = 8  # most rows of the first probe batch, which is always computed
_FEW = 2  # rows of the small batch that measures the fixed time per batch
_SHORT = 64  # tokens of a row; from here on the fixed time per batch is negligible
_SAME = 1.6  # a probe within this factor of the record is noise, not another machine
_PLACES = (0.5, 0.9, 0.15, 0.98, 0.7, 0.3)  # quantiles of the probes, over all tokens in order of length

Lengths: TypeAlias = NDArray[np.int64]
Seconds: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = list[tuple[int, int]]
"""Tokens of some documents, and rows of their output matrices; empty for a model that gives vectors."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one document of L tokens, computed in a batch: fixed + linear L + square L^2.

    source: "recorded", "probed", or "recorded, scaled by probes" if this machine is faster or slower than the record.
    """

    fixed: float
    linear: float
    square: float
    source: str

    def __call__(self, tokens: NDArray[np.integer] | NDArray[np.floating]) -> Seconds:
        """Return the seconds of documents with these numbers of tokens, float64 [n]."""
        lengths = np.asarray(tokens, np.float64)
        return np.asarray(self.fixed + self.linear * lengths + self.square * lengths**2, np.float64)

    def scaled(self, factor: float, source: str) -> Cost:
        """Return the cost times a factor."""
        return Cost(self.fixed * factor, self.linear * factor, self.square * factor, source)

    @classmethod
    def fit(cls, tokens: Lengths, seconds: Seconds, source: str) -> Cost:
        """Fit non-negative coefficients by least squares of the relative error. tokens, seconds: [n >= 1], above 0."""
        from scipy.optimize import nnls

        lengths = tokens.astype(np.float64)
        columns = np.column_stack([np.ones(len(lengths)), lengths, lengths**2])
        if len(np.unique(tokens)) < 3:  # one length determines one coefficient, two lengths two
            columns[:, 2] = 0
        if len(np.unique(tokens)) < 2:
            columns[:, 0] = 0
        coefficients, _ = nnls(columns / seconds[:, None], np.ones(len(lengths)))
        return cls(float(coefficients[0]), float(coefficients[1]), float(coefficients[2]), source)


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """Rows of the output matrix of a document of L tokens: fixed + linear L."""

    fixed: float
    linear: float

    def mean(self, tokens: Lengths) -> float:
        """Return the mean number of rows of documents with these numbers of tokens; 0 without documents."""
        return self.fixed + self.linear * float(tokens.mean()) if len(tokens) else 0.0

    @classmethod
    def fit(cls, tokens: Lengths, rows: Lengths) -> MatrixRows:
        """Fit non-negative coefficients by least squares, which meets the sum of the rows. tokens, rows: [n >= 1]."""
        from scipy.optimize import nnls

        lengths = tokens.astype(np.float64)
        if len(np.unique(tokens)) < 2:  # one length determines one coefficient
            return cls(0.0, float(rows.mean()) / max(1.0, float(lengths.mean())))
        coefficients, _ = nnls(np.column_stack([np.ones(len(lengths)), lengths]), rows.astype(np.float64))
        return cls(float(coefficients[0]), float(coefficients[1]))


def recorded_rows(bank: Bank) -> MatrixRows | None:
    """Fit the rows of output matrices to a bank's latest entries. Returns None if they are too few."""
    latest = _latest(bank)
    if bank.facts.rank != 2 or len(latest) < _LEAST:
        return None
    sizes = latest["nbytes"].astype(np.int64) // (bank.facts.width * DTYPES[bank.facts.dtype])
    return MatrixRows.fit(latest["tokens"].astype(np.int64), sizes)


def _latest(bank: Bank) -> NDArray[np.void]:
    """Return the records (`rows.ROW`) of a bank's latest sealed entries, about `_LATEST` of them."""
    records: list[NDArray[np.void]] = [np.zeros(0, ROW)]
    for piece in reversed(list(bank.pieces)):
        if isinstance(piece, Segment):
            records.append(piece.rows)
        if sum(map(len, records)) >= _LATEST:
            break
    return np.concatenate(records)


def recorded(bank: Bank) -> Cost | None:
    """Fit the cost to the recorded seconds of a bank's latest entries. Returns None if they are too few."""
    latest = _latest(bank)
    tokens, seconds = latest["tokens"].astype(np.int64), latest["cost"].astype(np.float64)
    usable = (tokens > 0) & np.isfinite(seconds) & (seconds > 0)
    tokens, seconds = tokens[usable], seconds[usable]
    if len(tokens) < _LEAST:
        return None
    # means, not medians, since a sum is forecast, which includes slow first batches
    distinct, place, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    mean = np.bincount(place, seconds) / counts
    weight = np.sqrt(counts).astype(int)
    return Cost.fit(np.repeat(distinct, weight), np.repeat(mean, weight), "recorded")


def probed(
    model: Model,
    rows: TokenRows,
    lengths: Lengths,
    batch_size: int,
    allowed: Callable[[Cost], float],
    known: Cost | None = None,
    role: str | None = None,
) -> tuple[Cost, Sizes]:
    """Fit the cost to a few probe batches of different lengths, each of copies of one row of the sample.

    rows: of a sample, at least one. lengths: their numbers of tokens. allowed: gives the seconds that all probes may
    take, by the cost known so far. known: recorded cost; one probe then checks if this machine is equally fast. role:
    of the documents.
    Returns the cost, and the sizes of the matrices computed. For a model that gives matrices a batch has neighbouring
    rows in order of length instead of copies, since the sizes of one document's matrix say little about others.
    """
    order = np.argsort(lengths, kind="stable")
    cumulative = np.cumsum(lengths[order])
    places = [int(order[np.searchsorted(cumulative, share * cumulative[-1])]) for share in _PLACES]
    _, sizes = _probe(model, rows, [int(order[0])], role)  # warm-up
    probed_lengths: list[int] = []
    seconds: list[float] = []
    spent = 0.0
    cost = known
    for place in places:
        tokens = int(lengths[place])
        size = _rows(model, tokens, batch_size)
        if known is not None and not probed_lengths:  # always run: the record may be of a faster machine
            size = min(size, _DUE, max(_FEW, _TOKENS // 2 // max(1, tokens)))
        elif cost is not None and spent + size * float(cost(lengths[place])) > allowed(cost):
            break
        chosen = _around(order, place, 2 * size) if model.matrices else [place] * (2 * size)
        took, more = _probe(model, rows, chosen[::2], role)
        spent, sizes = spent + took, sizes + more
        if tokens >= _SHORT:  # twice, to exclude a busy moment
            again, more = _probe(model, rows, chosen[1::2], role)
            took, spent, sizes = min(took, again), spent + again, sizes + more
        probed_lengths.append(int(lengths[chosen].mean()))
        if size < batch_size and tokens < _SHORT and size > _FEW:
            few, _ = _probe(model, rows, [place] * _FEW, role)
            spent += few
            seconds.append(in_full_batches(size, took, _FEW, few, batch_size))
        else:
            seconds.append(took / size)
        cost = _settled(known, np.array(probed_lengths), np.array(seconds))
    assert cost is not None
    return cost, sizes


def in_full_batches(many: int, took: float, few: int, less: float, most: int) -> float:
    """Extrapolate the seconds per row to batches of `most` rows, with a fixed time per batch.

    took: seconds of a batch of `many` rows. less: of a batch of `few` rows.
    """
    row = min(max(0.0, (took - less) / (many - few)), took / many)
    return row + max(0.0, took - many * row) / most


def _settled(known: Cost | None, tokens: Lengths, seconds: Seconds) -> Cost:
    """Return the fit to probes, or the recorded cost, scaled if the probes differ much."""
    if known is None:
        return Cost.fit(tokens, seconds, "probed")
    factor = float(seconds.sum() / known(tokens).sum())
    return known if 1 / _SAME < factor < _SAME else known.scaled(factor, "recorded, scaled by probes")


def _rows(model: Model, tokens: int, batch_size: int) -> int:
    """Return the number of rows of a probe batch."""
    if model.token_embedding().device.type != "cpu":
        return batch_size
    return min(batch_size, max(_FEW, _TOKENS // max(1, tokens)))


def _around(order: NDArray[np.int64], place: int, size: int) -> list[int]:
    """Return `size` rows next to a row in order of length, each again where the sample has fewer. order: all rows."""
    start = int(np.flatnonzero(order == place)[0]) - size // 2
    window = order[max(0, min(start, len(order) - size)) :][:size]
    return [int(row) for row in np.resize(window, size)]


def _probe(model: Model, rows: TokenRows, chosen: Sequence[int], role: str | None) -> tuple[float, Sizes]:
    """Compute one batch of these rows. Returns the seconds, and the sizes of the matrices."""
    seconds, sizes = 0.0, Sizes()
    for done in compute(model, rows.take(list(chosen)), len(chosen), role):
        seconds += done.seconds
        if model.matrices:
            tokens = (len(rows.ids[chosen[i]]) for i in done.chosen)
            sizes += zip(tokens, map(len, done.outputs), strict=True)
    return seconds, sizes

"""Entries of a bank looked up on the host: predicted outputs, neighbours, corrected results and their evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.search.vector_index import VectorIndex, kind_at_hand
from llmcache.near.neighbors.correction import (
    NEIGHBOURS,
    Voting,
    corrected,
    evidence,
    mixtures,
    unit_norm,
    units,
)
from llmcache.near.neighbors.predictor import Predictor, fit

if TYPE_CHECKING:
    from torch import Tensor


Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Tokens = Sequence[NDArray[np.int32]]
Scores = Callable[[NDArray[np.floating]], NDArray[np.floating]]
_BLOCK = 512  # documents that are looked up together


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Some documents and what the model gave. features: raw, [n, width]; outputs: float32 [n, out]; tokens: of each."""

    features: NDArray[np.floating] = field(repr=False)
    outputs: Floats = field(repr=False)
    tokens: Tokens = field(repr=False)

    def __len__(self) -> int:
        return len(self.outputs)

    def take(self, rows: Rows) -> Entries:
        return Entries(self.features[rows], self.outputs[rows], [self.tokens[row] for row in rows.tolist()])


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """What a look-up gives for a batch.

    results: corrected outputs, float32 [n, out]; neighbours: int64 [n, k], rows of the entries that they are made of,
    the nearest first; similarities: float32 [n, k], to these; evidence: float32 [n, columns].
    """

    results: Floats = field(repr=False)
    neighbours: Rows = field(repr=False)
    similarities: Floats = field(repr=False)
    evidence: Floats = field(repr=False)

    @property
    def nearest(self) -> Rows:
        """Row of the best match, int64 [n]."""
        return self.neighbours[:, 0]

    @property
    def similarity(self) -> Floats:
        """To the best match, float32 [n]."""
        return self.similarities[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """What `Neighbors` has, of a batch that was matched: all but the results is on the host.

    results: float32 [n, out], an array, or a tensor on the device of the entries.
    """

    results: Floats | Tensor = field(repr=False)
    neighbours: Rows = field(repr=False)
    similarities: Floats = field(repr=False)
    evidence: Floats = field(repr=False)


class NeighborIndex(Protocol):
    """Entries that documents are looked up among: `HostNeighborIndex` on the host, `ondevice.DeviceMemory` on a device.

    features: raw, [n, width], not rounded, an array or a tensor on any device; tokens: ids of each document.
    """

    def match(self, features: Floats | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """What reuse has for these documents. scores: of the head that the results are for."""
        ...

    def nearest(self, features: Floats | Tensor, tokens: Tokens) -> tuple[Rows, Floats]:
        """Rows int64 [n, k] of the nearest entries and their similarities, nearest first."""
        ...


def rounded(predictions: Floats) -> Floats:
    """As they are kept: to float16, and float32 again."""
    return half(predictions).astype(np.float32)


class HostNeighborIndex:
    """Entries, a predictor fitted to them, and an index over their fingerprints."""

    def __init__(
        self,
        entries: Entries,
        predictor: Predictor,
        voting: Voting,
        kind: str | None = None,
        predictions: Floats | None = None,
    ) -> None:
        """kind: of the index, None goes by the number of entries. predictions: of these, `rounded`, where known.

        ConfigError: there are no entries.
        """
        if not len(entries):
            raise ConfigError("there are no entries to look among; fill the cache first")
        self.entries, self.predictor, self.voting = entries, predictor, voting
        self._predictions = rounded(predictor(entries.features)) if predictions is None else predictions
        # not unit vectors beside them: those would be as many bytes again to hold, and to read for each document
        self._lengths = np.maximum(np.linalg.norm(self._predictions, axis=1), 1e-30)
        chosen = kind or kind_at_hand(len(entries))
        self._index = VectorIndex.build(predictor.fingerprints(self._predictions), kind=chosen)
        self._unit = unit_norm(entries.outputs)

    @classmethod
    def fit(
        cls, entries: Entries, seed: int = 0, voting: Voting | None = None, like: Predictor | None = None
    ) -> HostNeighborIndex:
        """A memory of entries with a predictor fitted to them.

        voting: None uses the defaults. like: see `predictor.fit`.
        """
        predictor = fit(entries.features, entries.outputs, seed=seed, like=like)
        return cls(entries, predictor, voting or Voting())

    def neighbours(self, asked: Entries) -> tuple[Floats, Floats, Floats, Floats, Rows]:
        """predicted, outputs, predictions, similarity, as `corrected` takes them, and rows int64 [n, k]."""
        predicted, rows = self._nearest(asked)
        return predicted, *self._ordered(predicted, rows)

    def look_up(self, asked: Entries, scores: Scores | None = None) -> Neighbors:
        """asked: its outputs are not looked at. scores: of the head that the results are for."""
        predicted, rows = self._nearest(asked)
        starts = range(0, max(1, len(asked)), _BLOCK)
        parts = [slice(start, start + _BLOCK) for start in starts]
        found = [self._judged(predicted[part], rows[part], asked.tokens[part], scores) for part in parts]
        return Neighbors(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def match(self, features: Floats | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """See `NeighborIndex`."""
        found = self.look_up(_asked(features, tokens), scores)
        return Matches(found.results, found.neighbours, found.similarities, found.evidence)

    def nearest(self, features: Floats | Tensor, tokens: Tokens) -> tuple[Rows, Floats]:
        """See `NeighborIndex`."""
        *_, similarity, rows = self.neighbours(_asked(features, tokens))
        return rows, similarity

    def _nearest(self, asked: Entries) -> tuple[Floats, Rows]:
        """Predictions, and rows int64 [n, k] of the nearest entries: all at once, which the index does four times as
        fast as in small batches.
        """
        predicted = self.predictor(asked.features)
        most = min(NEIGHBOURS, len(self.entries))
        rows, _ = self._index.nearest(self.predictor.fingerprints(predicted), most, beside=True)
        return predicted, rows

    def _ordered(self, predicted: Floats, rows: Rows) -> tuple[Floats, Floats, Floats, Rows]:
        """outputs, predictions, similarity and rows of the neighbours, the nearest by whole predictions first."""
        predictions = self._predictions[rows]
        similarity = np.matmul(predictions, units(predicted)[:, :, None])[..., 0] / self._lengths[rows]
        order = np.argsort(-similarity, axis=1, kind="stable")
        rows, similarity = (np.take_along_axis(one, order, axis=1) for one in (rows, similarity))
        predictions = predictions[np.arange(len(order))[:, None], order]
        return self.entries.outputs[rows], predictions, similarity, rows

    def _judged(
        self, predicted: Floats, rows: Rows, tokens: Tokens, scores: Scores | None
    ) -> tuple[Floats, Rows, Floats, Floats]:
        """What `Neighbors` has of a block of documents, whose neighbours' outputs stay in the processor's cache."""
        outputs, predictions, similarity, rows = self._ordered(predicted, rows)
        temperature, strength = self.voting.temperature, self.voting.strength
        near = predicted, outputs, predictions, similarity
        mixed = mixtures(outputs, predictions, similarity, temperature)
        results = corrected(*near, temperature, strength, unit=self._unit, mixed=mixed)
        both = (tokens, [self.entries.tokens[row] for row in rows[:, 0].tolist()])
        given = None if scores is None else scores(results)
        seen = evidence(*near, both, given, temperature, mixed)
        return results, rows, similarity, seen


def _asked(features: Floats | Tensor, tokens: Tokens) -> Entries:
    """Documents that nothing was computed for yet, their features rounded as those of entries are."""
    raw = features if isinstance(features, np.ndarray) else features.float().cpu().numpy()
    return Entries(half(raw), np.zeros((len(raw), 0), np.float32), tokens)

"""Near look-ups on the host: predict outputs, search neighbours, correct the results, compute their evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Array, Floats, Floats32, namespace, single
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Rows
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


Tokens = Sequence[NDArray[np.int32]]
Scores = Callable[[Floats], Floats]
_BLOCK = 512  # documents per block: the outputs of their neighbours fit in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Documents with their model outputs.

    features: unrounded or as stored, [n, width]. outputs: float32 [n, out]. tokens: ids of each document.
    """

    features: Floats = field(repr=False)
    outputs: Floats32 = field(repr=False)
    tokens: Tokens = field(repr=False)

    def __len__(self) -> int:
        return len(self.outputs)

    def take(self, rows: Rows) -> Entries:
        """Return the entries at these positions, int64 [m]."""
        return Entries(self.features[rows], self.outputs[rows], [self.tokens[row] for row in rows.tolist()])


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """Results of a look-up on the host, for a batch of n documents.

    results: corrected outputs, float32 [n, out].
    neighbours: positions of the entries used, int64 [n, k], nearest first.
    similarities: to these entries, float32 [n, k].
    evidence: float32 [n, columns], see `correction.evidence`.
    """

    results: Floats32 = field(repr=False)
    neighbours: Rows = field(repr=False)
    similarities: Floats32 = field(repr=False)
    evidence: Floats32 = field(repr=False)

    @property
    def nearest(self) -> Rows:
        """Position of the best match, int64 [n]."""
        return self.neighbours[:, 0]

    @property
    def similarity(self) -> Floats32:
        """Similarity to the best match, float32 [n]."""
        return self.similarities[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Results of `NeighborIndex.match`: the fields of `Neighbors`, all on the host except `results`.

    results: corrected outputs, float32 [n, out]: an array, or a tensor on the device of the entries.
    """

    results: Floats32 | Tensor = field(repr=False)
    neighbours: Rows = field(repr=False)
    similarities: Floats32 = field(repr=False)
    evidence: Floats32 = field(repr=False)


class NeighborIndex(Protocol):
    """Interface to search entries: `HostNeighborIndex` on the host, `index_torch.DeviceMemory` on a device.

    Arguments of the methods. features: unrounded, [n, width], an array or a tensor on any device. tokens: ids of each
    document.
    """

    def match(self, features: Floats32 | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """Look up documents. scores: the head's scores, from outputs [n, out]; None without a head."""
        ...

    def nearest(self, features: Floats32 | Tensor, tokens: Tokens) -> tuple[Rows, Floats32]:
        """Return the nearest entries, int64 [n, k], and their similarities, float32 [n, k], nearest first."""
        ...


def rounded(predictions: Floats32) -> Floats32:
    """Round predictions to float16, in which they are stored, and return them as float32."""
    return half(predictions).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Stored(Generic[Array]):
    """Vectors of the entries that results are made of, on the host or on one device, by position of the entry.

    outputs: [entries, out]. predictions: `rounded`, [entries, out]. norms: of the predictions, float32 [entries];
    a second table of unit vectors would double memory and reads per document.
    """

    outputs: Any
    predictions: Any
    norms: Array

    def ordered(self, predicted: Array, rows: Any) -> tuple[Array, Array, Array, Any]:
        """Read the neighbours of documents, and sort them by the cosine of their predictions to the documents'.

        predicted: float32 [n, out]. rows: positions of the neighbours, int64 [n, k].
        Returns their outputs and predictions, float32 [n, k, out], similarity, float32 [n, k], and positions.
        """
        xp, predictions = namespace(predicted), single(self.predictions[rows])
        similarity = xp.matmul(predictions, units(predicted)[:, :, None])[..., 0] / self.norms[rows]
        order = xp.argsort(-similarity, axis=1, stable=True)
        each = xp.arange(len(order), device=order.device)[:, None]
        rows = rows[each, order]
        return single(self.outputs[rows]), predictions[each, order], similarity[each, order], rows


class HostNeighborIndex:
    """Entries in host memory, with a predictor fitted to them and a vector index of their fingerprints."""

    def __init__(
        self,
        entries: Entries,
        predictor: Predictor,
        voting: Voting,
        kind: str | None = None,
        predictions: Floats32 | None = None,
    ) -> None:
        """Build the index.

        kind: of the vector index; None chooses by the number of entries.
        predictions: of the entries, `rounded`; None to compute them.
        ConfigError when there are no entries.
        """
        if not len(entries):
            raise ConfigError("there are no entries to search; fill the cache first")
        self.entries, self.predictor, self.voting = entries, predictor, voting
        predictions = rounded(predictor(entries.features)) if predictions is None else predictions
        self._stored = Stored(entries.outputs, predictions, np.maximum(np.linalg.norm(predictions, axis=1), 1e-30))
        index_kind = kind or kind_at_hand(len(entries))
        self._index = VectorIndex.build(predictor.fingerprints(predictions), kind=index_kind)
        self._unit = unit_norm(entries.outputs)

    @classmethod
    def fit(
        cls, entries: Entries, seed: int = 0, voting: Voting | None = None, like: Predictor | None = None
    ) -> HostNeighborIndex:
        """Fit a predictor to entries, and return their index.

        voting: None for the defaults. like: see `predictor.fit`.
        """
        predictor = fit(entries.features, entries.outputs, seed=seed, like=like)
        return cls(entries, predictor, voting or Voting())

    def neighbours(self, asked: Entries) -> tuple[Floats32, Floats32, Floats32, Floats32, Rows]:
        """Return predicted, outputs, predictions, similarity as `corrected` takes them, and positions int64 [n, k]."""
        predicted, rows = self._nearest(asked)
        return predicted, *self._stored.ordered(predicted, rows)

    def look_up(self, asked: Entries, scores: Scores | None = None) -> Neighbors:
        """Look up documents whose features are rounded as stored ones are.

        asked: the documents; their outputs are not read. scores: the head's scores, from outputs [n, out].
        """
        predicted, rows = self._nearest(asked)
        starts = range(0, max(1, len(asked)), _BLOCK)
        blocks = [slice(start, start + _BLOCK) for start in starts]
        results = [self._corrected(predicted[block], rows[block], asked.tokens[block], scores) for block in blocks]
        return Neighbors(*(np.concatenate(column) for column in zip(*results, strict=True)))

    def match(self, features: Floats32 | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """See `NeighborIndex`."""
        neighbors = self.look_up(_as_entries(features, tokens), scores)
        return Matches(neighbors.results, neighbors.neighbours, neighbors.similarities, neighbors.evidence)

    def nearest(self, features: Floats32 | Tensor, tokens: Tokens) -> tuple[Rows, Floats32]:
        """See `NeighborIndex`."""
        *_, similarity, rows = self.neighbours(_as_entries(features, tokens))
        return rows, similarity

    def _nearest(self, asked: Entries) -> tuple[Floats32, Rows]:
        """Return predictions, and positions of the nearest entries by fingerprint, int64 [n, k].

        All documents are searched in one call, which is four times as fast as in small batches.
        """
        predicted = self.predictor(asked.features)
        k = min(NEIGHBOURS, len(self.entries))
        rows, _ = self._index.nearest(self.predictor.fingerprints(predicted), k, beside=True)
        return predicted, rows

    def _corrected(
        self, predicted: Floats32, rows: Rows, tokens: Tokens, scores: Scores | None
    ) -> tuple[Floats32, Rows, Floats32, Floats32]:
        """Return the fields of `Neighbors` for one block of documents."""
        outputs, predictions, similarity, rows = self._stored.ordered(predicted, rows)
        temperature, strength = self.voting.temperature, self.voting.strength
        near = predicted, outputs, predictions, similarity
        mixed = mixtures(outputs, predictions, similarity, temperature)
        results = corrected(*near, temperature, strength, unit=self._unit, mixed=mixed)
        token_pairs = (tokens, [self.entries.tokens[row] for row in rows[:, 0].tolist()])
        logits = None if scores is None else scores(results)
        return results, rows, similarity, evidence(*near, token_pairs, logits, temperature, mixed)


def _as_entries(features: Floats32 | Tensor, tokens: Tokens) -> Entries:
    """Return documents as `Entries` without outputs, with features rounded to float16 as stored ones are."""
    raw = features if isinstance(features, np.ndarray) else features.float().cpu().numpy()
    return Entries(half(raw), np.zeros((len(raw), 0), np.float32), tokens)

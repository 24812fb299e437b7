"""Evidence that nothing fitted has seen: the entries of a cache looked up among the others, fold by fold.

In each fold predictor and head are fitted on the other folds. Settings that look at no drift are the same in all
folds and in the cache that answers afterwards: kind, kernel width and penalty of the predictor, and how neighbours are
weighed.
"""

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
    choose_voting,
    corrected,
    evidence,
    mixtures,
    unit_norm,
    units,
)
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.predictor import LEAST, Predictor, fit

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Tokens = Sequence[NDArray[np.int32]]
Scores = Callable[[NDArray[np.floating]], NDArray[np.floating]]
Drift = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.float64]]

_BLOCK = 512  # documents that are looked up together
_VOTED = 1000  # held-out entries that temperature and strength are chosen by


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What drift is. drift: of computed and reused outputs, [n] in [0, 1].

    scores: logits of the head the drift is of, from outputs; None where there is none (drift of embeddings).
    """

    drift: Drift
    scores: Scores | None = None


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
class Found:
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
    """What `Found` has, of a batch that was matched: all but the results is on the host.

    results: float32 [n, out], an array, or a tensor on the device of the entries.
    """

    results: Floats | Tensor = field(repr=False)
    neighbours: Rows = field(repr=False)
    similarities: Floats = field(repr=False)
    evidence: Floats = field(repr=False)


class Neighbourhood(Protocol):
    """Entries that documents are looked up among: `Memory` on the host, `ondevice.DeviceMemory` on a device.

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


class Memory:
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
    ) -> Memory:
        """A memory of entries with a predictor fitted to them.

        voting: None uses the defaults. like: see `predictor.fit`.
        """
        predictor = fit(entries.features, entries.outputs, seed=seed, like=like)
        return cls(entries, predictor, voting or Voting())

    def neighbours(self, asked: Entries) -> tuple[Floats, Floats, Floats, Floats, Rows]:
        """predicted, outputs, predictions, similarity, as `corrected` takes them, and rows int64 [n, k]."""
        predicted, rows = self._nearest(asked)
        return predicted, *self._ordered(predicted, rows)

    def look_up(self, asked: Entries, scores: Scores | None = None) -> Found:
        """asked: its outputs are not looked at. scores: of the head that the results are for."""
        predicted, rows = self._nearest(asked)
        starts = range(0, max(1, len(asked)), _BLOCK)
        parts = [slice(start, start + _BLOCK) for start in starts]
        found = [self._judged(predicted[part], rows[part], asked.tokens[part], scores) for part in parts]
        return Found(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def match(self, features: Floats | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """See `Neighbourhood`."""
        found = self.look_up(_asked(features, tokens), scores)
        return Matches(found.results, found.neighbours, found.similarities, found.evidence)

    def nearest(self, features: Floats | Tensor, tokens: Tokens) -> tuple[Rows, Floats]:
        """See `Neighbourhood`."""
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
        """What `Found` has of a block of documents, whose neighbours' outputs stay in the processor's cache."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Drift and score of documents that were looked up among entries without them, for `calibration.choose`.

    drift: float64 [n] in [0, 1], of each document were it reused. score: float64 [n], of `gate.safety`.
    found: what their look-ups gave. fold: int8 [n], the fold each document was looked up in; all 0 without folds.
    """

    drift: NDArray[np.float64]
    score: NDArray[np.float64]
    found: Found = field(repr=False)
    fold: NDArray[np.int8] = field(repr=False)


def cross_fit(
    entries: Entries,
    judge_of: Callable[[Rows], Judge],
    *,
    folds: int = 5,
    seed: int = 0,
    voting: Voting | None = None,
    like: Predictor | None = None,
) -> Held:
    """Every entry as if it were asked and not known, with all that is fitted coming from the other folds.

    judge_of: the judge for some entries (by row): fits the head to them where it can be fitted again. A head that was
    trained on the entries judges them too kindly; give documents it has not seen, then. like: the predictor that
    answers later, whose settings those of the folds take.
    ConfigError: too few entries for so many folds.
    """
    if folds < 2 or len(entries) * (folds - 1) // folds < LEAST:
        raise ConfigError(f"{len(entries)} entries in {folds} folds; a predictor needs {LEAST} outside of its fold")
    fold = np.random.default_rng(seed).permutation(np.arange(len(entries)) % folds).astype(np.int8)
    parts: list[tuple[Rows, Found, NDArray[np.float64]]] = []
    for number in range(folds):
        apart, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        judge = judge_of(rest)
        found = Memory.fit(entries.take(rest), seed, voting, like).look_up(entries.take(apart), judge.scores)
        found = Found(found.results, rest[found.neighbours], found.similarities, found.evidence)
        parts.append((apart, found, judge.drift(entries.outputs[apart], found.results)))
    order = np.argsort(np.concatenate([apart for apart, _, _ in parts]))
    drift = np.concatenate([moved for _, _, moved in parts])[order]
    columns = (np.concatenate([getattr(found, name) for _, found, _ in parts])[order] for name in Found.__slots__)
    whole = Found(*columns)
    return Held(drift, safety(whole.evidence), whole, fold)


def ask(memory: Memory, sample: Entries, judge: Judge) -> Held:
    """Documents that are not in the cache (`unseen`), looked up in the memory that answers: nothing is fitted."""
    found = memory.look_up(sample, judge.scores)
    drift = judge.drift(sample.outputs, found.results)
    return Held(drift, safety(found.evidence), found, np.zeros(len(sample), np.int8))


def unseen(sample: NDArray[np.uint64], known: NDArray[np.uint64]) -> Rows:
    """Places of the sample's documents that the cache does not hold; both are keys, uint64 [n, 2].

    What it holds is an exact hit and says nothing about near ones. ConfigError: it holds all of them.
    """
    held = {one.tobytes() for one in known}
    places = np.flatnonzero([one.tobytes() not in held for one in sample])
    if not len(places):
        raise ConfigError(
            f"all {len(sample)} documents of the sample are in the cache and would be exact hits; calibrate on the "
            "cache's own entries (no sample), or give documents that it does not hold"
        )
    return places


def held_out_voting(entries: Entries, seed: int = 0) -> Voting:
    """Temperature and strength for these entries, chosen on a tenth of them (at most 1,000)."""
    order = np.random.default_rng(seed + 1).permutation(len(entries))
    cut = min(_VOTED, len(entries) // 10)
    apart = entries.take(order[:cut])
    predicted, outputs, predictions, similarity, _ = Memory.fit(entries.take(order[cut:]), seed).neighbours(apart)
    return choose_voting(predicted, outputs, predictions, similarity, apart.outputs)

"""Nearest-neighbour search among the live rows of a bank, optionally within one scope.

A bank's index also contains rows of other scopes, and evicted and damaged rows. If all rows have the same scope, the
index is searched directly. Otherwise k is increased until enough valid neighbours are found. If the scope is a small
part of the bank, or k would become very large, an exact index over the rows of the scope is searched instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.format.segment import Tombstone
from llmcache.indexes.format.segments import SegmentList, marks_in
from llmcache.indexes.search.bank_index import BankIndex, NearChoice, half
from llmcache.indexes.search.projection import Projection
from llmcache.indexes.search.vector_index import VectorIndex

if TYPE_CHECKING:
    from torch import Tensor

_MINORITY = 8  # a scope with less than an eighth of the rows gets its own index
_MOST_ASKED = 1024  # largest k for the index of all rows, above which the scope gets its own index


@dataclass(slots=True)
class _Scopes:
    """Scopes of the first `rows` rows of a bank.

    only: the scope of all these rows, while they have the same. each: the scope of each row, uint64 [at least rows],
    from the second scope on; None before.
    """

    rows: int = 0
    only: int = UNKNOWN
    each: NDArray[np.uint64] | None = None

    def append(self, scopes: NDArray[np.uint64]) -> None:
        """Append the scopes of further rows, uint64 [n], n >= 1."""
        first, after = int(scopes[0]), self.rows + len(scopes)
        if self.each is None:
            if (not self.rows or self.only == first) and (scopes == scopes[0]).all():
                self.only, self.rows = first, after
                return
            self.each = np.full(after, self.only, np.uint64)
        if after > len(self.each):
            room = np.zeros(max(after - len(self.each), len(self.each)), np.uint64)
            self.each = np.concatenate([self.each, room])
        self.each[self.rows : after] = scopes
        self.rows = after

    def of(self, scope: int) -> NDArray[np.bool_]:
        """Return a mask of the rows with this scope, bool [rows]."""
        if self.each is None:
            return np.full(self.rows, self.only == scope)
        return np.asarray(self.each[: self.rows] == np.uint64(scope), np.bool_)


@dataclass(slots=True)
class _ScopeIndex:
    """Exact index over the rows of one scope, int64, under one projection."""

    projection: Projection
    rows: Rows
    index: VectorIndex


class ScopedSearch:
    """Nearest-neighbour search among the live rows of one bank, of one scope or of all."""

    def __init__(self, near: BankIndex, pieces: SegmentList, choice: NearChoice) -> None:
        """near, pieces, choice: index, segment list and settings of the bank."""
        self._near, self._pieces, self._device = near, pieces, choice.device
        self._known = _Scopes()
        self._own: dict[int, _ScopeIndex] = {}

    def forget(self) -> None:
        """Discard scopes and scope indexes after rows were renumbered; they are built again when needed."""
        self._known, self._own = _Scopes(), {}

    def rows_of(self, scope: int, dead: Rows) -> Rows:
        """Return the rows of this scope that are not in `dead`, int64, in order."""
        of_scope = self._scopes().of(scope)
        of_scope[dead] = False
        return np.flatnonzero(of_scope)

    def nearest(
        self,
        features: NDArray[np.float32] | Tensor,
        k: int,
        unusable: Rows,
        *,
        scope: int | None = None,
        least: float = -np.inf,
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Search as in `Bank.nearest`. unusable: rows to exclude, int64."""
        if scope == UNKNOWN:
            return _no_results(len(features), k)
        scopes = self._scopes() if scope is not None else None
        if scope is None or scopes is None or (scopes.each is None and scopes.only == scope):
            left_out = None
            if len(unusable):
                left_out = np.zeros(self._pieces.rows, np.bool_)
                left_out[unusable] = True
            return self._search_widening(features, k, left_out, None, least)
        usable = scopes.of(scope)
        usable[unusable] = False
        count = int(np.count_nonzero(usable))
        if not count or not len(features):
            return _no_results(len(features), k)
        if count * _MINORITY < scopes.rows:
            return self._search_exactly(scope, np.flatnonzero(usable), features, k)
        return self._search_widening(features, k, ~usable, scope, least)

    def _search_widening(
        self,
        features: NDArray[np.float32] | Tensor,
        k: int,
        left_out: NDArray[np.bool_] | None,
        scope: int | None,
        least: float,
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Search with increasing k until k valid rows are found, or none of similarity `least` is left.

        left_out: mask of rows to exclude, bool [rows]; None: exclude none. scope: of the other rows, if an exact index
        over them may be searched instead.
        """
        best, value = _no_results(len(features), k)
        others = 0 if left_out is None else int(np.count_nonzero(left_out))
        active, ask = np.arange(len(features)), k + min(others, 4 * k + 16)
        while len(active):
            rows, similarity = self._near.nearest(features if len(active) == len(features) else features[active], ask)
            ended = rows[:, -1] < 0  # the index has no more neighbours
            far = ~ended & (similarity[:, -1] < least)
            lost = rows < 0 if left_out is None else (rows < 0) | left_out[rows]
            similarity[lost], rows[lost] = -np.inf, -1
            order = np.argsort(lost, axis=1, kind="stable")[:, :k]
            best[active], value[active] = np.take_along_axis(rows, order, 1), np.take_along_axis(similarity, order, 1)
            if ask >= k + others:
                break
            going_on = (best[active, -1] < 0) & ~far
            ask = min(4 * ask, k + others)
            if scope is None:
                active = active[going_on & ~ended]
                continue
            active = active[going_on]
            if len(active) and (ask > _MOST_ASKED or ended[going_on].any()):
                assert left_out is not None
                best[active], value[active] = self._search_exactly(
                    scope, np.flatnonzero(~left_out), features[active], k
                )
                break
        return best, value

    def _search_exactly(
        self, scope: int, mine: Rows, features: NDArray[np.float32] | Tensor, k: int
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Search exactly among `mine`, all live rows of a scope. Returns as `nearest`."""
        projection = self._near.projection
        if projection is None:
            return _no_results(len(features), k)
        own = self._own.get(scope)
        if own is None or own.projection is not projection or not np.array_equal(own.rows, mine[: len(own.rows)]):
            kind = "torch" if (self._near.kind or "").startswith("torch") else "flat"
            kind = "binary-flat" if projection.kind == "simhash" else kind
            index = VectorIndex.build(self._fingerprints(projection, mine), kind=kind, device=self._device)
            own = self._own[scope] = _ScopeIndex(projection, mine, index)
        elif len(own.rows) < len(mine):
            own.index.add(self._fingerprints(projection, mine[len(own.rows) :]))
            own.rows = mine
        raw = features if isinstance(features, np.ndarray) else features.float().cpu().numpy()
        places, similarity = own.index.nearest(projection.apply(half(raw).astype(np.float32)), k)
        return np.where(places >= 0, own.rows[np.maximum(places, 0)], -1), similarity

    def _fingerprints(self, projection: Projection, rows: Rows) -> NDArray[np.generic]:
        return projection.apply(self._near.features(rows).astype(np.float32))

    def _scopes(self) -> _Scopes:
        """Return the scopes of all rows of the bank, after reading those of rows added since the last call."""
        known, rows = self._known, self._pieces.rows
        for piece, start in self._pieces.placed() if known.rows < rows else ():
            if start + len(piece) <= known.rows or not len(piece):
                continue
            marks, skip = marks_in(piece), known.rows - start
            if isinstance(piece, Tombstone):  # these rows are never found, so they must not count as a second scope
                known.append(np.full(len(piece) - skip, known.only, np.uint64))
            elif marks is None:
                known.append(np.full(len(piece) - skip, UNKNOWN, np.uint64))
            else:
                known.append(marks["scope"][skip:])
        return known


def _no_results(n: int, k: int) -> tuple[Rows, NDArray[np.float32]]:
    return np.full((n, k), -1), np.full((n, k), -np.inf, np.float32)

"""The nearest rows of a bank that live, and of one scope only where one is asked for.

The index of a bank holds rows of all scopes, and rows that were evicted or are damaged. In a bank with one scope it is
asked as it is. Otherwise more is asked of it until enough has come back; where the scope is a small part of the bank,
or very much would have to be asked, an exact index over the scope's rows alone answers instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.format.segment import Tombstone
from llmcache.indexes.format.segments import Rows, SegmentList, marks_in
from llmcache.indexes.search.bank_index import BankIndex, NearChoice, half
from llmcache.indexes.search.projection import Projection
from llmcache.indexes.search.vector_index import VectorIndex

if TYPE_CHECKING:
    from torch import Tensor

_MINORITY = 8  # a scope with less than an eighth of the rows has an index of its own
_MOST_ASKED = 1024  # neighbours that are asked of the index of all rows, before the scope gets an index of its own


@dataclass(slots=True)
class _Known:
    """Scopes of the first rows of a bank. only: the one scope that all of them have, while there is one; from the
    second on the scope of each row is in `each`, uint64 [at least rows].
    """

    rows: int = 0
    only: int = UNKNOWN
    each: NDArray[np.uint64] | None = None

    def append(self, scopes: NDArray[np.uint64]) -> None:
        """Take the scopes of the next rows, of which there is at least one."""
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
        """Mask of the rows with this scope, bool [rows]."""
        if self.each is None:
            return np.full(self.rows, self.only == scope)
        return np.asarray(self.each[: self.rows] == np.uint64(scope), np.bool_)


@dataclass(slots=True)
class _Own:
    """An exact index over the rows of one scope, int64, under one projection."""

    projection: Projection
    rows: Rows
    index: VectorIndex


class ScopedSearch:
    """Searches the neighbours of one bank for rows that live, of one scope or of all."""

    def __init__(self, near: BankIndex, pieces: SegmentList, choice: NearChoice) -> None:
        """near, pieces, choice: the bank's own."""
        self._near, self._pieces, self._device = near, pieces, choice.device
        self._known = _Known()
        self._own: dict[int, _Own] = {}

    def forget(self) -> None:
        """Read scopes and rows again when they are next needed: the rows have other numbers now."""
        self._known, self._own = _Known(), {}

    def rows_of(self, scope: int, dead: Rows) -> Rows:
        """Rows of this scope that are not among the dead, int64, in order."""
        mine = self._scopes().of(scope)
        mine[dead] = False
        return np.flatnonzero(mine)

    def nearest(
        self,
        features: NDArray[np.float32] | Tensor,
        k: int,
        unusable: Rows,
        *,
        scope: int | None = None,
        least: float = -np.inf,
    ) -> tuple[Rows, NDArray[np.float32]]:
        """See `Bank.nearest`. unusable: rows that are never found, int64."""
        if scope == UNKNOWN:
            return _nothing(len(features), k)
        known = self._scopes() if scope is not None else None
        if scope is None or known is None or (known.each is None and known.only == scope):
            left_out = None
            if len(unusable):
                left_out = np.zeros(self._pieces.rows, np.bool_)
                left_out[unusable] = True
            return self._widening(features, k, left_out, None, least)
        mine = known.of(scope)
        mine[unusable] = False
        count = int(np.count_nonzero(mine))
        if not count or not len(features):
            return _nothing(len(features), k)
        if count * _MINORITY < known.rows:
            return self._among(scope, np.flatnonzero(mine), features, k)
        return self._widening(features, k, ~mine, scope, least)

    def _widening(
        self,
        features: NDArray[np.float32] | Tensor,
        k: int,
        left_out: NDArray[np.bool_] | None,
        scope: int | None,
        least: float,
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Ask the index for more and more until k rows have come back, or nothing similar enough is left.

        left_out: rows that do not count, bool [rows]; None: there are none. scope: whose rows the others are, where an
        exact index over them may answer instead.
        """
        best, value = _nothing(len(features), k)
        others = 0 if left_out is None else int(np.count_nonzero(left_out))
        open_, ask = np.arange(len(features)), k + min(others, 4 * k + 16)
        while len(open_):
            rows, similarity = self._near.nearest(features if len(open_) == len(features) else features[open_], ask)
            ended = rows[:, -1] < 0  # the index gives no more
            far = ~ended & (similarity[:, -1] < least)
            lost = rows < 0 if left_out is None else (rows < 0) | left_out[rows]
            similarity[lost], rows[lost] = -np.inf, -1
            order = np.argsort(lost, axis=1, kind="stable")[:, :k]
            best[open_], value[open_] = np.take_along_axis(rows, order, 1), np.take_along_axis(similarity, order, 1)
            if ask >= k + others:
                break
            going_on = (best[open_, -1] < 0) & ~far
            ask = min(4 * ask, k + others)
            if scope is None:
                open_ = open_[going_on & ~ended]
                continue
            open_ = open_[going_on]
            if len(open_) and (ask > _MOST_ASKED or ended[going_on].any()):
                assert left_out is not None
                best[open_], value[open_] = self._among(scope, np.flatnonzero(~left_out), features[open_], k)
                break
        return best, value

    def _among(
        self, scope: int, mine: Rows, features: NDArray[np.float32] | Tensor, k: int
    ) -> tuple[Rows, NDArray[np.float32]]:
        """The k nearest of these rows, which are all that a scope has, by an exact search."""
        projection = self._near.projection
        if projection is None:
            return _nothing(len(features), k)
        own = self._own.get(scope)
        if own is None or own.projection is not projection or not np.array_equal(own.rows, mine[: len(own.rows)]):
            kind = "torch" if (self._near.kind or "").startswith("torch") else "flat"
            kind = "binary-flat" if projection.kind == "simhash" else kind
            index = VectorIndex.build(self._fingerprints(projection, mine), kind=kind, device=self._device)
            own = self._own[scope] = _Own(projection, mine, index)
        elif len(own.rows) < len(mine):
            own.index.add(self._fingerprints(projection, mine[len(own.rows) :]))
            own.rows = mine
        raw = features if isinstance(features, np.ndarray) else features.float().cpu().numpy()
        places, similarity = own.index.nearest(projection.apply(half(raw).astype(np.float32)), k)
        return np.where(places >= 0, own.rows[np.maximum(places, 0)], -1), similarity

    def _fingerprints(self, projection: Projection, rows: Rows) -> NDArray[np.generic]:
        return projection.apply(self._near.features(rows).astype(np.float32))

    def _scopes(self) -> _Known:
        """Scopes of all rows of the bank; those of rows that came since are read."""
        known, rows = self._known, self._pieces.rows
        for piece, start in self._pieces.placed() if known.rows < rows else ():
            if start + len(piece) <= known.rows or not len(piece):
                continue
            marks, skip = marks_in(piece), known.rows - start
            if isinstance(piece, Tombstone):  # never found: they make no second scope
                known.append(np.full(len(piece) - skip, known.only, np.uint64))
            elif marks is None:
                known.append(np.full(len(piece) - skip, UNKNOWN, np.uint64))
            else:
                known.append(marks["scope"][skip:])
        return known


def _nothing(n: int, k: int) -> tuple[Rows, NDArray[np.float32]]:
    return np.full((n, k), -1), np.full((n, k), -np.inf, np.float32)

"""The near side of a bank: a projection, and a FAISS index over the projected features of the bank's rows.

Both are derived. They are made from the features in the segments when they are first needed, kept in files so that
the next opening is quick, and made again on any doubt about those files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import BankFacts, FileFacts, IndexFacts
from llmcache.indexes.projection import Projection, fit_pca, fit_simhash
from llmcache.indexes.segment import Entries, Segment, verified, write_file
from llmcache.indexes.vectors import VectorIndex, choose_kind

log = logging.getLogger("llmcache")

FIT_ROWS = 512
"""Rows from which on a PCA is fitted. Below, features are compared as they are."""
TRAIN_ROWS = 640
"""Rows from which on an index that must be trained can be."""
_FIT_SAMPLE = 50_000
_BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class NearChoice:
    """How a bank looks for neighbours. projection: "none", "pca" or "simhash"; dim: its components or bits."""

    index: str = "auto"
    projection: str = "pca"
    dim: int = 128
    device: str = "cpu"


def half(features: NDArray[np.floating]) -> NDArray[np.float16]:
    """Features as they are stored. Queries are rounded in the same way, so that a repeat has similarity 1.

    Features that are not numbers become zeros, which are near to nothing.
    """
    clipped: NDArray[np.floating] = np.nan_to_num(np.clip(features, -65504, 65504))
    return clipped.astype(np.float16)


class Neighbours:
    """Nearest rows of one bank. `pieces` is the bank's own list; its rows only ever grow at the end."""

    def __init__(
        self,
        folder: Folder,
        facts: BankFacts,
        pieces: Sequence[Segment | Entries],
        choice: NearChoice,
        *,
        read_index: bool = True,
    ) -> None:
        """read_index: False for a store that nobody vouches for, whose FAISS files are not touched."""
        self._folder, self._facts, self._pieces, self._choice = folder, facts, pieces, choice
        self._read_index = read_index
        self._projection: Projection | None = None
        self._index: VectorIndex | None = None
        self._row_of = np.zeros(0, np.int64)  # index position -> row
        self._built = 0  # rows at the last build
        self._saved = 0  # rows in the index file
        self._alike = 0  # rows when no PCA could be fitted to them

    @property
    def kind(self) -> str | None:
        """The FAISS index in use, None while none is needed."""
        return self._index.kind if self._index else None

    def nearest(self, features: NDArray[np.floating], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows int64 [n, k] (-1: none) and similarities float32 [n, k] (-inf there), nearest first."""
        self._catch_up()
        if self._index is None or self._projection is None or not len(features):
            return np.full((len(features), k), -1), np.full((len(features), k), -np.inf, np.float32)
        queries = self._projection.apply(half(features).astype(np.float32))
        positions, similarity = self._index.nearest(queries, k)
        rows = np.where(positions >= 0, self._row_of[np.maximum(positions, 0)], -1)
        return rows, similarity

    def rebuild(self) -> None:
        """Fit the projection and build the index again, over all rows."""
        rows = sum(map(len, self._pieces))
        if not rows:
            return
        self._projection = self._fit(rows)
        blocks = [self._projection.apply(block) for block in self._features(0, rows)]
        binary = self._projection.kind == "simhash"
        kind = choose_kind(rows, binary=binary) if self._choice.index == "auto" else self._choice.index
        if self._untrainable(kind, rows):
            kind = "binary-flat" if binary else "flat"
        self._index = VectorIndex.build(np.concatenate(blocks), kind=kind, device=self._choice.device)
        self._row_of = np.arange(rows)
        self._built, self._saved = rows, 0

    def _fit(self, rows: int) -> Projection:
        width = self._facts.feature_width
        if self._choice.projection == "simhash":
            return fit_simhash(self._sample(rows), self._choice.dim)
        if self._choice.projection == "pca" and rows >= FIT_ROWS:
            try:
                return fit_pca(self._sample(rows), self._choice.dim)
            except ConfigError as error:
                self._alike = rows
                log.info("features are compared as they are: %s", error)
        return Projection.none(width)

    def _sample(self, rows: int) -> NDArray[np.float32]:
        """At most `_FIT_SAMPLE` rows' features, spread evenly over the bank."""
        step = -(-rows // _FIT_SAMPLE)
        blocks = [block[:: max(1, step)] for block in self._features(0, rows)]
        return np.concatenate(blocks)

    def _features(self, start: int, end: int) -> Iterator[NDArray[np.float32]]:
        """Features of rows start to end, in blocks; zeros where a segment's file is damaged."""
        first = 0
        for piece in self._pieces:
            skip, stop = max(0, start - first), min(len(piece), end - first)
            first += len(piece)
            if skip >= stop:
                continue
            try:
                stored = piece.features if isinstance(piece, Entries) else piece.features()
            except SnapshotDamaged as error:
                log.warning("%s: its %d rows have no near matches", error, len(piece))
                stored = np.zeros((len(piece), self._facts.feature_width), np.float16)
            for at in range(skip, stop, _BLOCK):
                block = stored[at : min(at + _BLOCK, stop)].astype(np.float32)
                yield np.nan_to_num(block, copy=False, posinf=65504, neginf=-65504)  # only a stranger stores such

    # -- keeping up -----------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        rows = sum(map(len, self._pieces))
        if self._index is None and rows:
            self._load()
        if self._index is None or self._projection is None or self._outgrown(rows):
            self.rebuild()
        elif len(self._row_of) < rows:
            for block in self._features(len(self._row_of), rows):
                self._index.add(self._projection.apply(block))
            self._row_of = np.concatenate([self._row_of, np.arange(len(self._row_of), rows)])

    def _outgrown(self, rows: int) -> bool:
        """The projection or the kind of index was right for fewer rows. Explicit kinds stay as they were asked for."""
        assert self._projection is not None
        assert self._index is not None
        wanted, kind = self._choice.index, self._index.kind
        if self._choice.projection == "pca" and self._projection.kind == "none" and rows >= FIT_ROWS:
            return rows >= 2 * self._alike
        if wanted != "auto":
            return wanted != kind and not self._untrainable(wanted, rows)
        return rows >= 2 * self._built and choose_kind(rows, binary=self._projection.kind == "simhash") != kind

    @staticmethod
    def _untrainable(kind: str, rows: int) -> bool:
        """Inverted files and CAGRA graphs need some rows to be trained on; a flat index serves until then."""
        return ("ivf" in kind or kind == "cagra") and rows < TRAIN_ROWS

    def _load(self) -> None:
        """Take projection and index from their files; on any doubt leave both unset, so that they are built again."""
        facts, projection = self._facts.index, self._facts.projection
        if not self._read_index or facts is None or projection is None:
            return
        if self._choice.index not in {"auto", facts.kind}:
            return
        spans = self._spans()
        if any(id not in spans for id in facts.segments) or len(set(facts.segments)) != len(facts.segments):
            return
        covered = np.concatenate([np.zeros(0, np.int64), *(spans.pop(id) for id in facts.segments)])
        try:
            fitted = Projection.from_bytes(verified(self._folder, projection).tobytes())
            if fitted.width != self._facts.feature_width or fitted.kind != self._wanted(len(covered)):
                return
            data = verified(self._folder, facts.file)
            if (facts.dim, facts.kind.startswith("binary-")) != (fitted.dim, fitted.kind == "simhash"):
                raise SnapshotDamaged(f"its {facts.kind} index does not go with its {fitted.kind} projection")
            index = VectorIndex.from_bytes(data, kind=facts.kind, dim=facts.dim, count=len(covered))
        except (SnapshotDamaged, ConfigError, OSError) as error:
            log.warning("the index of this bank is built again: %s", error)
            return
        self._projection, self._index = fitted, index
        self._built = self._saved = len(covered)
        for span in spans.values():  # segments that came since, from this writer or another
            for block in self._features(int(span[0]), int(span[-1]) + 1):
                index.add(fitted.apply(block))
        self._row_of = np.concatenate([covered, *spans.values()])

    def _spans(self) -> dict[str, NDArray[np.int64]]:
        """Row numbers of each sealed segment that has rows, by its id."""
        spans, first = {}, 0
        for piece in self._pieces:
            if isinstance(piece, Segment) and len(piece):
                spans[piece.facts.id] = np.arange(first, first + len(piece))
            first += len(piece)
        return spans

    def _wanted(self, rows: int) -> str:
        return "none" if self._choice.projection == "pca" and rows < FIT_ROWS else self._choice.projection

    # -- files ----------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether the index covers sealed rows only, and has grown enough since its file to be worth a new one."""
        sealed = all(isinstance(piece, Segment) for piece in self._pieces)
        if self._index is not None and sealed:
            self._catch_up()
        return self._index is not None and sealed and len(self._row_of) > 1.2 * self._saved

    def save(self, id: str) -> tuple[FileFacts, IndexFacts]:
        """Write projection and index durably under this id; what a manifest has to say of them."""
        assert self._index is not None
        assert self._projection is not None
        names = {int(span[0]): name for name, span in self._spans().items()}
        covered = tuple(names[row] for row in self._row_of.tolist() if row in names)
        projection = write_file(self._folder, f"idx/{id}.proj", [self._projection.to_bytes()])
        file = write_file(self._folder, f"idx/{id}.faiss", [self._index.to_bytes()])
        self._folder.sync_folder("idx")
        self._saved = len(self._row_of)
        return projection, IndexFacts(self._index.kind, self._index.dim, len(self._index), covered, file)

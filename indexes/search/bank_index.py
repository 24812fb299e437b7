"""Similarity index of a bank: a projection, and a FAISS index over the projected features of the bank's rows.

Both are derived data. They are built from the features in the segments when they are first needed, saved in files so
that the next opening is quick, and rebuilt whenever those files are missing, damaged or do not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, FileFacts, IndexFacts
from llmcache.indexes.format.segment import Segment, Tombstone
from llmcache.indexes.format.segment_writer import PendingRows
from llmcache.indexes.format.segments import SegmentList
from llmcache.indexes.format.write_once import verified, write_file
from llmcache.indexes.search.index_coverage import DEAD_SHARE, covered_segments, live_spans, segment_spans
from llmcache.indexes.search.projection import Projection, fit_pca, fit_simhash
from llmcache.indexes.search.vector_index import LEAST_TRAINED, VectorIndex, choose_kind

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("llmcache")

FIT_ROWS = 512
"""Minimum number of rows for a PCA. With fewer rows, features are compared without a projection."""
_FIT_SAMPLE = 50_000
_BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class NearChoice:
    """Settings of similarity search. index: "auto" or one of index_kinds.KINDS.

    projection: "none", "pca" or "simhash". dim: its components or bits. device: "cpu" or "cuda".
    """

    index: str = "auto"
    projection: str = "pca"
    dim: int = 128
    device: str = "cpu"


def half(features: NDArray[np.floating]) -> NDArray[np.float16]:
    """Round features to float16, as they are stored. Queries are rounded too, so that a repeat has similarity 1.

    NaN becomes zero. A feature of zeros is similar to nothing.
    """
    clipped: NDArray[np.floating] = np.nan_to_num(np.clip(features, -65504, 65504))
    return clipped.astype(np.float16)


class BankIndex:
    """Similarity index of one bank.

    Evicted rows stay in the index, which may return them, until it is rebuilt or, in torch indexes, marks them deleted.
    """

    def __init__(
        self,
        folder: Folder,
        facts: BankFacts,
        pieces: SegmentList,
        choice: NearChoice,
        *,
        read_index: bool = True,
    ) -> None:
        """pieces: the bank's segment list; rows are only appended to it, except in `follow`.

        read_index: False for an untrusted store, whose FAISS files are not read.
        """
        self._folder, self._facts, self._pieces, self._choice = folder, facts, pieces, choice
        self._read_index = read_index
        self._projection: Projection | None = None
        self._index: VectorIndex | None = None
        self._projected: tuple[Projection, Any, Any] | None = None  # projection, device, projection on that device
        self._row_of = np.zeros(0, np.int64)  # index position -> row
        self._rows_added = 0  # rows of the bank that were added to the index
        self._dead = np.zeros(0, np.int64)  # evicted rows, in order
        self._evicted_in_index = 0  # evicted rows in the index
        self._built = 0  # rows at the last build
        self._saved = 0  # rows in the index file
        self._pca_failed_at = 0  # rows at the last failure to fit a PCA, because features were equal

    @property
    def kind(self) -> str | None:
        """Kind of the index in use, None while none was needed."""
        return self._index.kind if self._index else None

    @property
    def projection(self) -> Projection | None:
        """Projection that computes fingerprints; None while the bank is empty."""
        self._catch_up()
        return self._projection

    def nearest(self, features: NDArray[np.floating] | Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Search the k nearest rows, which may include evicted ones.

        features: float [n, feature width], an array, or a tensor, processed on its device, see `takes_tensors`.
        Returns rows, int64 [n, k], nearest first, -1 for none; and similarities, float32 [n, k], -inf for none.
        """
        self._catch_up()
        if self._index is None or self._projection is None or not len(features):
            return np.full((len(features), k), -1), np.full((len(features), k), -np.inf, np.float32)
        if isinstance(features, np.ndarray):
            queries = self._projection.apply(half(features).astype(np.float32))
            positions, similarity = self._index.nearest(queries, k)
        else:
            positions, similarity = self._nearest_on(self._projection, self._index, features, k)
        rows = np.where(positions >= 0, self._row_of[np.maximum(positions, 0)], -1)
        return rows, similarity

    @property
    def takes_tensors(self) -> bool:
        """Return whether features may be tensors on the device: it is a GPU, and the projection is not SimHash."""
        return self._choice.device == "cuda" and self._choice.projection != "simhash"

    def _nearest_on(
        self, projection: Projection, index: VectorIndex, features: Tensor, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Search on the device of the features. Only positions and similarities are copied to the host."""
        from llmcache.indexes.search import torch_index as matrix

        if self._projected is None or self._projected[0] is not projection or self._projected[1] != features.device:
            self._projected = projection, features.device, matrix.Projected(projection, features.device)
        positions, similarity = index.nearest_on(self._projected[2](matrix.half(features)), k)
        return positions.cpu().numpy(), similarity.cpu().numpy()

    def live(self) -> NDArray[np.int64]:
        """Return the live rows of the bank, int64, in order."""
        return np.delete(np.arange(sum(map(len, self._pieces))), self._dead)

    def features(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read raw features of rows. Returns float16 [n, feature width]; zeros where they cannot be read."""
        features = np.zeros((len(rows), self._facts.feature_width), np.float16)
        first = 0
        for block in self._features(0, sum(map(len, self._pieces))):
            chosen = np.flatnonzero((rows >= first) & (rows < first + len(block)))
            features[chosen] = block[rows[chosen] - first]
            first += len(block)
        return features

    def mark_deleted(self, dead: NDArray[np.int64]) -> None:
        """Set the rows that were evicted so far, int64, in order."""
        self._dead = dead
        evicted = np.isin(self._row_of, dead)
        self._evicted_in_index = int(evicted.sum())
        if self._index is not None and self._index.buries:
            self._index.mark_deleted(np.flatnonzero(evicted))

    def rebuild(self) -> None:
        """Fit the projection and build the index over all live rows."""
        total = self._pieces.rows
        self._row_of, self._rows_added = np.delete(np.arange(total), self._dead), total
        self._evicted_in_index = 0
        rows = len(self._row_of)
        if not rows:
            self._projection = self._index = None
            return
        self._projection = self._fit(rows)
        blocks = [self._projection.apply(block) for block in self._live_features()]
        binary = self._projection.kind == "simhash"
        kind = self._auto_kind(rows, binary) if self._choice.index == "auto" else self._choice.index
        if self._untrainable(kind, rows):
            kind = "binary-flat" if binary else "flat"
        self._index = VectorIndex.build(np.concatenate(blocks), kind=kind, device=self._choice.device)
        self._built, self._saved = rows, 0

    def _fit(self, rows: int) -> Projection:
        width = self._facts.feature_width
        if self._choice.projection == "simhash":
            return fit_simhash(self._sample(rows), self._choice.dim)
        if self._choice.projection == "pca" and rows >= FIT_ROWS:
            try:
                return fit_pca(self._sample(rows), self._choice.dim)
            except ConfigError as error:
                self._pca_failed_at = rows
                log.info("features are compared without a projection: %s", error)
        return Projection.none(width)

    def _sample(self, rows: int) -> NDArray[np.float32]:
        """Return the features of at most about 50,000 rows, spread evenly over the bank, float32 [n, feature width]."""
        step = -(-rows // _FIT_SAMPLE)
        blocks = [block[:: max(1, step)] for block in self._live_features()]
        return np.concatenate(blocks)

    def _live_features(self) -> Iterator[NDArray[np.float32]]:
        """Yield the features of the rows in `_row_of`, in blocks."""
        first = 0
        for block in self._features(0, self._pieces.rows):
            low, high = np.searchsorted(self._row_of, [first, first + len(block)])
            yield block if high - low == len(block) else block[self._row_of[low:high] - first]
            first += len(block)

    def _features(self, start: int, end: int) -> Iterator[NDArray[np.float32]]:
        """Yield the features of rows start to end, in blocks; zeros where a segment's file is damaged."""
        first = 0
        for piece in self._pieces:
            skip, stop = max(0, start - first), min(len(piece), end - first)
            first += len(piece)
            if skip >= stop:
                continue
            try:
                if isinstance(piece, Tombstone):
                    stored = np.zeros((len(piece), self._facts.feature_width), np.float16)
                else:
                    stored = piece.features if isinstance(piece, PendingRows) else piece.features()
                if stored.shape[1] != self._facts.feature_width:
                    raise SnapshotDamaged(
                        f"features have width {stored.shape[1]}, those of the bank {self._facts.feature_width}"
                    )
            except (SnapshotDamaged, OSError) as error:
                log.warning("%s: its %d rows have no near matches", error, len(piece))
                stored = np.zeros((len(piece), self._facts.feature_width), np.float16)
            for at in range(skip, stop, _BLOCK):
                block = stored[at : min(at + _BLOCK, stop)].astype(np.float32)
                # `half` writes no NaN; in files of other programs, only the affected rows lose their neighbours
                yield block if np.isfinite(block.sum()) else np.nan_to_num(block, posinf=0, neginf=0)

    # -- keeping up -----------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        rows = self._pieces.rows
        if rows == len(self._dead):
            self._projection = self._index = None
            return
        if self._index is None:
            self._load()
        if self._index is None or self._projection is None or self._outgrown(rows - len(self._dead)):
            self.rebuild()
        elif self._rows_added < rows:
            for block in self._features(self._rows_added, rows):
                self._index.add(self._projection.apply(block))
            self._row_of = np.concatenate([self._row_of, np.arange(self._rows_added, rows)])
            self._rows_added = rows

    def follow(self, facts: BankFacts, moved: NDArray[np.int64]) -> None:
        """Follow the bank to a newer generation. moved: new row of each old row, int64, -1: dropped."""
        self._facts = facts
        self._saved = facts.index.count if facts.index else 0
        if self._index is None:
            return
        self._row_of = moved[self._row_of]
        if (self._row_of < 0).any():  # most kinds of index cannot remove vectors: load its file or rebuild it later
            self._projection, self._index, self._row_of = None, None, np.zeros(0, np.int64)
            self._rows_added = 0
            return
        assert self._projection is not None
        covered = np.zeros(self._pieces.rows, np.bool_)
        covered[self._row_of] = True
        sealed = sum(len(piece) for piece in self._pieces if isinstance(piece, Segment))
        new_rows = np.flatnonzero(~covered[:sealed])
        for part in np.split(new_rows, np.flatnonzero(np.diff(new_rows) > 1) + 1) if len(new_rows) else ():
            for block in self._features(int(part[0]), int(part[-1]) + 1):
                self._index.add(self._projection.apply(block))
        self._row_of = np.concatenate([self._row_of, new_rows])
        covered[new_rows] = True
        self._rows_added = int(covered.sum())  # all sealed rows, and the first pending rows

    def _outgrown(self, rows: int) -> bool:
        """Return whether to rebuild: too many rows are dead, or a larger bank needs another projection or index kind.

        An explicit kind of index only replaces the flat index that stood in for it.
        """
        assert self._projection is not None
        assert self._index is not None
        if self._evicted_in_index > DEAD_SHARE * len(self._row_of):
            return True
        wanted, kind = self._choice.index, self._index.kind
        if self._choice.projection == "pca" and self._projection.kind == "none" and rows >= FIT_ROWS:
            return rows >= 2 * self._pca_failed_at
        if wanted != "auto":
            return wanted != kind and not self._untrainable(wanted, rows)
        return rows >= 2 * self._built and self._auto_kind(rows, self._projection.kind == "simhash") != kind

    def _auto_kind(self, rows: int, binary: bool) -> str:
        return choose_kind(rows, binary=binary, device=self._choice.device)

    @staticmethod
    def _untrainable(kind: str, rows: int) -> bool:
        """Return whether there are too few rows to train inverted lists or a CAGRA graph; a flat index stands in."""
        return ("ivf" in kind or kind == "cagra") and rows < LEAST_TRAINED

    def _load(self) -> None:
        """Load projection and index from their files. If anything is wrong, leave both unset; they are then rebuilt."""
        facts, projection = self._facts.index, self._facts.projection
        if not self._read_index or facts is None or projection is None:
            return
        if self._choice.index not in {"auto", facts.kind}:
            return
        binary = facts.kind.startswith("binary-")
        torch_preferred = self._choice.index == "auto" and self._auto_kind(facts.count, binary).startswith("torch")
        if torch_preferred and not facts.kind.startswith("torch"):
            return  # made on a machine with a FAISS build for its device
        spans, live = segment_spans(self._pieces), live_spans(self._pieces)
        rows_by_name = {**spans, **live}
        if any(name not in rows_by_name for name in facts.segments):
            return
        ids = [name.partition("-")[0] for name in facts.segments]
        if len(set(ids)) != len(ids):
            return
        covered = np.concatenate([np.zeros(0, np.int64), *(rows_by_name[name] for name in facts.segments)])
        for id in ids:
            del spans[id]
        try:
            fitted = Projection.from_bytes(verified(self._folder, projection).tobytes())
            if fitted.width != self._facts.feature_width or fitted.kind != self._wanted_projection(len(covered)):
                return
            data = verified(self._folder, facts.file)
            if (facts.dim, facts.kind.startswith("binary-")) != (fitted.dim, fitted.kind == "simhash"):
                raise SnapshotDamaged(f"its {facts.kind} index does not fit its {fitted.kind} projection")
            index = VectorIndex.from_bytes(
                data, kind=facts.kind, dim=facts.dim, count=len(covered), device=self._choice.device
            )
        except (SnapshotDamaged, ConfigError, OSError) as error:
            log.warning("the index of this bank is rebuilt: %s", error)
            return
        self._projection, self._index = fitted, index
        self._built = self._saved = len(covered)
        for span in spans.values():  # segments committed after the index file, by any writer
            for block in self._features(int(span[0]), int(span[-1]) + 1):
                index.add(fitted.apply(block))
        self._row_of = np.concatenate([covered, *spans.values()])
        self._rows_added = self._pieces.rows
        self.mark_deleted(self._dead)

    def _wanted_projection(self, rows: int) -> str:
        return "none" if self._choice.projection == "pca" and rows < FIT_ROWS else self._choice.projection

    # -- files ----------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Return whether to save the index: no rows are pending, and it has 20% more rows than its file."""
        sealed = not any(isinstance(piece, PendingRows) for piece in self._pieces)
        if self._index is not None and sealed:
            self._catch_up()
        return self._index is not None and sealed and len(self._row_of) > 1.2 * self._saved

    def save(self, id: str, room: int | None = None) -> tuple[FileFacts, IndexFacts] | None:
        """Write projection and index durably under this id. Returns their facts for a manifest.

        Writes nothing and returns None when they take more than `room` bytes.
        """
        covered = covered_segments(self._pieces, self._row_of)
        if covered is None:  # rows of the index were evicted after it was built
            self.rebuild()
            covered = covered_segments(self._pieces, self._row_of)
        assert self._index is not None
        assert self._projection is not None
        assert covered is not None
        fitted, data = self._projection.to_bytes(), self._index.to_bytes()
        if room is not None and len(fitted) + data.nbytes > room:
            self._saved = len(self._row_of)  # try again when the index has grown
            return None
        projection = write_file(self._folder, f"idx/{id}.proj", [fitted])
        file = write_file(self._folder, f"idx/{id}.faiss", [data])
        self._folder.sync_folder("idx")
        self._saved = len(self._row_of)
        return projection, IndexFacts(self._index.kind, self._index.dim, len(self._index), covered, file)

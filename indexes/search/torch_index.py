"""Exact search over unit vectors in torch, on a CPU or a GPU: the equivalent of a flat FAISS index, without FAISS.

It computes a matrix product and its top k, block by block, so that memory stays bounded. This module imports torch, so
it is imported only when such an index is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.search.projection import Projection

_HEADER = struct.Struct("<4sIQ")  # magic, components, rows; then the rows, little-endian
_QUERIES = 1024  # queries per block
_SCORES = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes of similarities per block
_GROUP = 64  # rows per group; the first pass of the top k compares only the maxima of groups
_FILES = {torch.float32: "<f4", torch.float16: "<f2"}


class Matrix:
    """Matrix of rows on one device, numbered from 0 in the order in which they were added.

    d: components of a row. ntotal: number of rows. Both are named as in FAISS.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: str) -> None:
        """dtype: of the rows, float32 or float16. ConfigError when the device does not exist."""
        self.device = usable(device)
        self.d, self.ntotal = dim, 0
        self._rows = torch.empty((0, dim), dtype=dtype, device=self.device)
        self._dead: Tensor | None = None  # bool [ntotal]; None while no row is deleted

    @property
    def rows(self) -> Tensor:
        """View of the rows, [ntotal, dim], on the device."""
        return self._rows[: self.ntotal]

    def add(self, vectors: NDArray[np.float32] | Tensor) -> None:
        """Append vectors, float32 [n, dim], on any device."""
        fresh = torch.as_tensor(vectors)
        wanted = self.ntotal + len(fresh)
        if wanted > len(self._rows):  # exact size for the first rows, then geometric growth
            room = wanted if not self.ntotal else max(wanted, self.ntotal + self.ntotal // 2)
            larger = torch.empty((room, self.d), dtype=self._rows.dtype, device=self.device)
            larger[: self.ntotal] = self._rows[: self.ntotal]
            self._rows = larger
        self._rows[self.ntotal : wanted] = fresh.to(self.device, self._rows.dtype)
        if self._dead is not None:
            self._dead = torch.cat([self._dead, torch.zeros(len(fresh), dtype=torch.bool, device=self.device)])
        self.ntotal = wanted

    def mark_deleted(self, numbers: NDArray[np.int64]) -> None:
        """Exclude rows from all later searches and overwrite them by zeros, so that purged data leaves the device."""
        if not len(numbers):
            return
        if self._dead is None:
            self._dead = torch.zeros(self.ntotal, dtype=torch.bool, device=self.device)
        chosen = torch.from_numpy(numbers).to(self.device)
        self._dead[chosen] = True
        self._rows[chosen] = 0

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search as `search_on`, with arrays, in FAISS' order of results: similarities, then numbers."""
        similarity, numbers = self.search_on(torch.from_numpy(queries), k)
        return similarity.cpu().numpy(), numbers.cpu().numpy()

    @torch.inference_mode()
    def search_on(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search the k rows of largest similarity.

        queries: float32 [n, dim], on any device. Returns similarities, float32 [n, k], largest first, and row numbers,
        int64 [n, k], on the index's device; -inf and -1 where there is no live row. Rows of equal similarity are in
        order of their numbers; which of them are returned when k cuts through them is undefined.
        """
        queries = queries.to(self.device, torch.float32)
        parts = [self._nearest(queries[at : at + _QUERIES], k) for at in range(0, len(queries), _QUERIES)]
        if not parts:
            return queries.new_empty((0, k)), torch.empty((0, k), dtype=torch.int64, device=self.device)
        return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = torch.full((len(queries), k), -torch.inf, device=self.device)
        which = torch.full((len(queries), k), -1, dtype=torch.int64, device=self.device)
        block = max(_GROUP * 64, _SCORES[self.device.type] // (4 * len(queries)))
        with in_full(self.device):
            for start in range(0, self.ntotal, block):
                end = min(start + block, self.ntotal)
                scores = self._scores(queries, start, end)
                if self._dead is not None:
                    scores.masked_fill_(self._dead[start:end], -torch.inf)
                found, numbers = _largest(scores, min(k, end - start))
                best, place = torch.cat([best, found], 1).topk(k, dim=1)
                which = torch.cat([which, numbers + start], 1).gather(1, place)
        return _ordered(best, torch.where(best.isneginf(), -1, which))

    def _scores(self, queries: Tensor, start: int, end: int) -> Tensor:
        """Compute similarities to the rows start to end, float32 [queries, end - start]."""
        rows = self._rows[start:end]
        if rows.dtype == torch.float32:
            return queries @ rows.T
        if self.device.type == "cuda":  # accumulates in float32 and returns float32
            return torch.mm(queries.half(), rows.T, out_dtype=torch.float32)
        return queries @ rows.float().T

    def to_bytes(self, magic: bytes) -> memoryview:
        """Serialise the rows. magic: four bytes to start with."""
        rows = self._rows[: self.ntotal].cpu().numpy()
        header = _HEADER.pack(magic, self.d, self.ntotal)
        return memoryview(header + rows.astype(_FILES[self._rows.dtype]).tobytes())

    @classmethod
    def from_bytes(
        cls, data: NDArray[np.uint8], magic: bytes, dtype: torch.dtype, dim: int, count: int, device: str
    ) -> Matrix:
        """Deserialise the result of `to_bytes`. SnapshotDamaged when the bytes are not that, or of another shape."""
        if len(data) < _HEADER.size:
            raise SnapshotDamaged(f"an index of kind torch has at least {_HEADER.size} bytes, found {len(data)}")
        first_bytes, width, rows = _HEADER.unpack_from(data.data)
        stored = np.dtype(_FILES[dtype])
        expected = (magic, dim, count, _HEADER.size + stored.itemsize * dim * count)
        found = (first_bytes, width, rows, len(data))
        if found != expected:
            raise SnapshotDamaged(
                f"expected in an index of kind torch (magic, width, count, bytes) {expected}, found {found}"
            )
        numbers = np.frombuffer(data, stored, offset=_HEADER.size).reshape(count, dim)
        if not np.isfinite(numbers).all():
            raise SnapshotDamaged("an index of kind torch has finite numbers, found NaN or infinity")
        index = cls(dim, dtype, device)
        index.add(torch.from_numpy(numbers.astype(stored.newbyteorder("="))))
        return index


def usable(device: str) -> torch.device:
    """Return the torch device. ConfigError when torch does not have it."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("an index on device 'cuda' needs a CUDA device, and torch sees none; use device 'cpu'")
    return torch.device(device)


@contextmanager
def in_full(device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products in full precision inside the block, whatever the caller's settings.

    TF32 has an error of 0.001, and autocast a larger one.
    """
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or before in ("none", "ieee"):
            yield
            return
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, and their columns.

    A row's k largest values lie in the k groups with the largest maxima, so only those groups are searched.
    """
    n, columns = scores.shape
    whole = columns // _GROUP
    if whole < 4 * k:
        found = scores.topk(k, dim=1)
        return found.values, found.indices
    groups = scores[:, : whole * _GROUP].view(n, whole, _GROUP)
    chosen = groups.amax(2).topk(k, dim=1).indices
    members = groups.gather(1, chosen[:, :, None].expand(n, k, _GROUP)).flatten(1)
    numbers = (chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(whole * _GROUP, columns, device=scores.device).expand(n, -1)
    found = torch.cat([members, scores[:, whole * _GROUP :]], 1).topk(k, dim=1)
    return found.values, torch.cat([numbers, rest], 1).gather(1, found.indices)


def _ordered(similarity: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by similarity, largest first, and equal similarities by number."""
    by_number = numbers.sort(dim=1, stable=True).indices
    similarity, numbers = similarity.gather(1, by_number), numbers.gather(1, by_number)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return similarity.gather(1, order), numbers.gather(1, order)


# -- features on the device ---------------------------------------------------------------------------------


def half(features: Tensor) -> Tensor:
    """Round features to float16, as they are stored; `bank_index.half` for tensors."""
    return torch.nan_to_num(features.clamp(-65504, 65504)).half()


class Projected:
    """Projection on a device, for the kinds "none" and "pca"; equivalent to `Projection.apply`."""

    def __init__(self, projection: Projection, device: torch.device | str) -> None:
        """ConfigError for the kind "simhash", whose codes only FAISS can search."""
        if projection.kind == "simhash":
            raise ConfigError("codes of a SimHash are searched by FAISS; use projection 'pca' on a device")
        self._plain = projection.kind == "none"
        self._mean, self._matrix = (torch.from_numpy(part).to(device) for part in (projection.mean, projection.matrix))

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Project features, float16 or float32 [n, width], finite. Returns float32 [n, dim], unit norm, same device."""
        block = features.double()
        silent = ~block.any(dim=1, keepdim=True)
        if not self._plain:
            block = ((block - self._mean) @ self._matrix).masked_fill(silent, 0)
        norms = block.norm(dim=1, keepdim=True)
        unit: Tensor = block / norms.masked_fill(norms == 0, 1)
        return unit.float()

"""An exact search over unit vectors in torch, on a CPU or a GPU: what a flat FAISS index does, without FAISS.

A matrix product and the largest of its numbers, block by block, so that memory stays bounded. Only who asks for such an
index imports this module, since it imports torch; it knows no model.
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
_QUERIES = 1024  # at a time
_SCORES = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes of similarities at a time
_GROUP = 64  # rows of which only the largest similarity is looked at first
_FILES = {torch.float32: "<f4", torch.float16: "<f2"}


class Matrix:
    """Rows numbered from 0 in the order in which they were added, on one device. d: components; ntotal: rows."""

    def __init__(self, dim: int, dtype: torch.dtype, device: str) -> None:
        """dtype: float32 or float16, of the rows. ConfigError: there is no such device."""
        self.device = usable(device)
        self.d, self.ntotal = dim, 0
        self._rows = torch.empty((0, dim), dtype=dtype, device=self.device)
        self._dead: Tensor | None = None  # bool [ntotal]; None while all are alive

    @property
    def rows(self) -> Tensor:
        """[ntotal, dim], on the device; a view."""
        return self._rows[: self.ntotal]

    def add(self, vectors: NDArray[np.float32] | Tensor) -> None:
        """Append vectors, float32 [n, dim], on any device."""
        fresh = torch.as_tensor(vectors)
        wanted = self.ntotal + len(fresh)
        if wanted > len(self._rows):  # the first rows get the room they need, later ones some to grow into
            room = wanted if not self.ntotal else max(wanted, self.ntotal + self.ntotal // 2)
            larger = torch.empty((room, self.d), dtype=self._rows.dtype, device=self.device)
            larger[: self.ntotal] = self._rows[: self.ntotal]
            self._rows = larger
        self._rows[self.ntotal : wanted] = fresh.to(self.device, self._rows.dtype)
        if self._dead is not None:
            self._dead = torch.cat([self._dead, torch.zeros(len(fresh), dtype=torch.bool, device=self.device)])
        self.ntotal = wanted

    def mark_deleted(self, numbers: NDArray[np.int64]) -> None:
        """Let no search give these rows from now on. They become zeros: what was purged is not kept on a device."""
        if not len(numbers):
            return
        if self._dead is None:
            self._dead = torch.zeros(self.ntotal, dtype=torch.bool, device=self.device)
        chosen = torch.from_numpy(numbers).to(self.device)
        self._dead[chosen] = True
        self._rows[chosen] = 0

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and numbers, as FAISS gives them."""
        similarity, numbers = self.search_on(torch.from_numpy(queries), k)
        return similarity.cpu().numpy(), numbers.cpu().numpy()

    @torch.inference_mode()
    def search_on(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarities float32 [n, k] and numbers int64 [n, k], largest first, both on the index's device.

        queries: float32 [n, dim], on any device. -inf and -1 where there is no live row. Of equal similarities the row
        with the lower number comes first; which of them come back where k would cut them is not defined.
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
        """float32 [queries, end - start]."""
        rows = self._rows[start:end]
        if rows.dtype == torch.float32:
            return queries @ rows.T
        if self.device.type == "cuda":  # the sums are float32, and stay so
            return torch.mm(queries.half(), rows.T, out_dtype=torch.float32)
        return queries @ rows.float().T

    def to_bytes(self, magic: bytes) -> memoryview:
        rows = self._rows[: self.ntotal].cpu().numpy()
        header = _HEADER.pack(magic, self.d, self.ntotal)
        return memoryview(header + rows.astype(_FILES[self._rows.dtype]).tobytes())

    @classmethod
    def from_bytes(
        cls, data: NDArray[np.uint8], magic: bytes, dtype: torch.dtype, dim: int, count: int, device: str
    ) -> Matrix:
        """What `to_bytes` wrote. SnapshotDamaged: it is not that, or of another size."""
        if len(data) < _HEADER.size:
            raise SnapshotDamaged(f"an index of kind torch has at least {_HEADER.size} bytes, found {len(data)}")
        begins, width, rows = _HEADER.unpack_from(data.data)
        stored = np.dtype(_FILES[dtype])
        expected = (magic, dim, count, _HEADER.size + stored.itemsize * dim * count)
        found = (begins, width, rows, len(data))
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
    """The device. ConfigError where torch has none such."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("an index on device 'cuda' needs a CUDA device, and torch sees none; use device 'cpu'")
    return torch.device(device)


@contextmanager
def in_full(device: torch.device) -> Iterator[None]:
    """Inside, float32 products are of float32 numbers, whatever the caller computes in: rounded to TF32 they would be
    off by 0.001, and under autocast by more.
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
    """The k largest of each row and their columns. A row's k largest lie in the k groups with the largest maxima."""
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
    """Largest first, and of equal ones the lower number."""
    by_number = numbers.sort(dim=1, stable=True).indices
    similarity, numbers = similarity.gather(1, by_number), numbers.gather(1, by_number)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return similarity.gather(1, order), numbers.gather(1, order)


# -- features on the device ---------------------------------------------------------------------------------


def half(features: Tensor) -> Tensor:
    """Features as they are stored, float16; `neighbours.half` of numbers on a device."""
    return torch.nan_to_num(features.clamp(-65504, 65504)).half()


class Projected:
    """`Projection.apply` on a device, for kinds "none" and "pca"."""

    def __init__(self, projection: Projection, device: torch.device | str) -> None:
        """ConfigError for "simhash", whose codes only FAISS searches."""
        if projection.kind == "simhash":
            raise ConfigError("codes of a SimHash are searched by FAISS; use projection 'pca' on a device")
        self._plain = projection.kind == "none"
        self._mean, self._matrix = (torch.from_numpy(one).to(device) for one in (projection.mean, projection.matrix))

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """float32 [n, dim], unit L2 norm, of features float16 or float32 [n, width], finite, on the same device."""
        block = features.double()
        silent = ~block.any(dim=1, keepdim=True)
        if not self._plain:
            block = ((block - self._mean) @ self._matrix).masked_fill(silent, 0)
        norms = block.norm(dim=1, keepdim=True)
        unit: Tensor = block / norms.masked_fill(norms == 0, 1)
        return unit.float()

"""One index over unit vectors, or over packed sign bits: FAISS', or an exact search in torch.

FAISS types stay in here and in `serialised`.

Similarity is the cosine: [-1, 1], higher is nearer. For sign bits (SimHash) it is cos(pi * hamming / bits),
an estimate of the cosine between the vectors that the bits were taken from.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError
from llmcache.indexes.search.faiss_bytes import check_loaded, check_magic, deserialised
from llmcache.indexes.search.index_kinds import (
    FORMS,
    KINDS,
    faiss_module,
    inverted,
    is_binary,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("llmcache")


_CANDIDATES = 64
_GPU_KINDS = frozenset({"flat", "ivf-flat", "ivf-sq8", "ivf-fp16", "cagra"})
FEW = 20_000
"""Vectors, below which a flat index is as quick as any other."""
LEAST_TRAINED = 640
"""Vectors to train on: 16 lists, or 16 codes of a quantiser, of 40 vectors each. FAISS asks for 39."""


def choose_kind(n: int, *, binary: bool = False, device: str = "cpu") -> str:
    """The kind of index for n vectors of some hundred components, or n codes of some hundred bits.

    device: "cuda" without a FAISS build for it gives the exact search in torch.
    """
    if device == "cuda" and not binary and not _faiss_on_gpu():
        _say_once_that_torch_searches()
        return "torch" if n < 4_000_000 else "torch-fp16"
    # Milliseconds per query, two cores, 128 components, large batches. flat: 0.15 at 20,000, 0.7 at 100,000.
    # ivf-flat: 0.04 at 100,000, 0.44 at a million, where a query reads 4 MB of lists; ivf-fp16 0.13 there, and half of
    # them; ivf-pq 0.03 at both, with the recall of the others: it reads 0.25 MB of codes and compares 64 vectors.
    # 256 bits, binary-flat: 0.06 at 100,000, 0.7 at a million; there binary-ivf takes 0.07.
    if binary:
        return "binary-flat" if n < 200_000 else "binary-ivf"
    if n < FEW:
        return "flat"
    if device == "cpu" and n >= 100_000:
        return "ivf-pq"
    return "ivf-flat" if n < 1_000_000 else "ivf-fp16"


def needs_faiss(kind: str, device: str, *, binary: bool = False) -> bool:
    """Whether an index of this kind, or "auto", on this device is one of FAISS."""
    if kind == "auto":
        return device == "cpu" or binary
    return not kind.startswith("torch")


@contextmanager
def _alone(faiss: Any) -> Iterator[None]:
    """FAISS with one thread, where there are no more than two processors.

    The threads of what torch and numpy multiplied just before still wait on the same processors. On two of them 3,080
    queries among 10,000 then take a flat search 0.23 s, against 0.1 s with one thread; 2,048 among 200,000 take ivf-pq
    0.038 ms each, 0.030 with one thread, and 0.019 when no other threads wait.
    """
    threads = faiss.omp_get_max_threads()
    if threads != 2 or len(os.sched_getaffinity(0)) > 2:
        yield
        return
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def kind_at_hand(n: int) -> str:
    """`choose_kind` of vectors on a CPU; the exact search in torch where there is no FAISS."""
    return "torch" if importlib.util.find_spec("faiss") is None else choose_kind(n)


class VectorIndex:
    """Vectors numbered 0, 1, 2, ... in the order in which they were added.

    Searches may run side by side on a CPU, one at a time on a GPU. Nothing may run beside `add`.
    """

    __slots__ = ("_index", "_kind", "_on_gpu")

    def __init__(self, index: Any, kind: str, on_gpu: bool) -> None:
        self._index, self._kind, self._on_gpu = index, kind, on_gpu

    @classmethod
    def build(cls, vectors: NDArray[Any], *, kind: str = "auto", device: str = "cpu", seed: int = 0) -> VectorIndex:
        """An index of these vectors.

        vectors: float32 [n, dim], unit L2 norm (zeros are near nothing), or uint8 [n, bits / 8]. Copied.
        kind: one of KINDS, or "auto" for `choose_kind`. cagra is built on a GPU whatever the device.
        device: "cpu" or "cuda"; hnsw, ivf-pq and the binary kinds stay on the CPU.
        seed: for k-means and its sample. Graphs are built by several threads and differ all the same.
        ConfigError: unknown kind, too few vectors to train it, no GPU. ValueError: not such vectors.
        """
        vectors = np.asarray(vectors)
        if kind == "auto":
            kind = choose_kind(len(vectors), binary=vectors.dtype == np.uint8, device=device)
        on_gpu = _on_gpu(kind, "cuda" if kind == "cagra" else device)
        vectors = _checked(vectors, kind)
        if ("ivf" in kind or kind == "cagra") and len(vectors) < LEAST_TRAINED:
            raise ConfigError(
                f"an index of kind {kind!r} needs at least {LEAST_TRAINED} vectors to train on, got {len(vectors)}; "
                f"use 'auto', or {'binary-flat' if is_binary(kind) else 'flat'!r}"
            )
        if kind == "cagra":
            return cls(_cagra(vectors), kind, on_gpu)
        if kind.startswith("torch"):
            from llmcache.indexes.search.torch_index import Matrix

            matrix = Matrix(vectors.shape[1], _torch_dtype(kind), device)
            matrix.add(vectors)
            return cls(matrix, kind, on_gpu)
        index = _trained(vectors, kind, seed)
        return cls(_to_gpu(index) if on_gpu else index, kind, on_gpu)

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def binary(self) -> bool:
        """Whether it holds sign bits."""
        return is_binary(self._kind)

    @property
    def dim(self) -> int:
        """Components of a vector, or bits of a code."""
        return int(self._index.d)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: NDArray[Any]) -> None:
        """Append vectors, as in `build`. A cagra index is built anew each time: give it few large pieces."""
        vectors = _checked(vectors, self._kind, self.dim)
        if not len(vectors):
            return
        if self._kind != "cagra":
            self._index.add(vectors)
            return
        if not self._on_gpu:
            raise ConfigError("a cagra index grows only on a GPU; open it there, or build another kind")
        stored = faiss_module().index_gpu_to_cpu(self._index)
        self._index = _cagra(np.concatenate([stored.storage.reconstruct_n(0, len(self)), vectors]))

    def nearest(
        self, queries: NDArray[Any], k: int, *, beside: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids int64 [n, k] and similarities float32 [n, k], nearest first; -1 and -inf where there is none.

        queries: float32 [n, dim], unit L2 norm, or uint8 [n, bits / 8].
        beside: numpy multiplied large matrices just before, and its threads still wait on the processors.
        """
        queries = _checked(queries, self._kind, self.dim)
        if k < 1:
            raise ValueError(f"k is the number of neighbours, at least 1, got {k}")
        ids = np.full((len(queries), k), -1, np.int64)
        similarity = np.full((len(queries), k), -np.inf, np.float32)
        most = min(k, len(self))
        if ids.size and most:
            found, near = self._search(queries, most, beside)
            # Checked although `from_bytes` did: an id from here becomes the number of a row in a file.
            sound = (near >= 0) & (near < len(self)) & np.isfinite(found)
            ids[:, :most] = np.where(sound, near, -1)
            similarity[:, :most] = np.where(sound, np.clip(found, -1, 1), -np.inf)
        return ids, similarity

    def nearest_on(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`nearest` of a tensor, float32 [n, dim], finite; ids and similarities on the index's device if it is one of
        torch, else on that of the queries.
        """
        import torch

        if not self._kind.startswith("torch"):
            found = self.nearest(queries.float().cpu().numpy(), k)
            ids, similarity = (torch.from_numpy(one).to(queries.device) for one in found)
            return ids, similarity
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"expected queries [n, {self.dim}] and k of at least 1, got {tuple(queries.shape)} and {k}"
            )
        similarity, ids = self._index.search_on(queries, k)
        return ids, similarity.clamp(max=1)

    @property
    def buries(self) -> bool:
        """Whether it can leave out rows that were evicted."""
        return self._kind.startswith("torch")

    def mark_deleted(self, ids: NDArray[np.int64]) -> None:
        """Let no search give these vectors from now on; where `buries`."""
        self._index.mark_deleted(ids)

    def _search(self, queries: NDArray[Any], k: int, beside: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._kind.startswith("torch"):
            answer: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, k)
            return answer
        faiss, params = faiss_module(), None
        if self._kind == "ivf-pq":  # four-bit codes rank roughly, so many candidates are compared again
            params = faiss.IndexRefineSearchParameters(k_factor=max(8.0, _CANDIDATES / k))
        elif self._kind == "cagra" and self._on_gpu:
            params = faiss.SearchParametersCagra(itopk_size=max(64, -(-k // 32) * 32))  # must not be below k
        alone = beside and "ivf" in self._kind if self._kind != "flat" else len(self) < FEW
        with _alone(faiss) if alone and not self._on_gpu else nullcontext():
            found, near = self._index.search(queries, k, params=params)
        return (np.cos(found * (np.pi / self.dim)).astype(np.float32) if self.binary else found), near

    def to_bytes(self) -> memoryview:
        """The serialised index, for `from_bytes` on any device."""
        if self._kind.startswith("torch"):
            data: memoryview = self._index.to_bytes(FORMS[self._kind].magic)
            return data
        # Not faiss.write_index: it returns normally when the disk is full, and does not fsync.
        faiss = faiss_module()
        if self.binary:
            return memoryview(faiss.serialize_index_binary(self._index))
        return memoryview(faiss.serialize_index(faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index))

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview | NDArray[np.uint8],
        *,
        kind: str,
        dim: int,
        count: int,
        device: str = "cpu",
    ) -> VectorIndex:
        """The index that `to_bytes` serialised, which has `count` vectors of `dim` components or bits.

        SnapshotDamaged: the bytes are no such index. Wrong numbers inside vectors go unseen: the caller has
        compared a checksum before. ConfigError: unknown kind, no GPU.
        """
        on_gpu = _on_gpu(kind, device)
        if kind.startswith("torch"):
            from llmcache.indexes.search.torch_index import Matrix

            raw = np.frombuffer(data, np.uint8)
            check_magic(raw, kind)
            matrix = Matrix.from_bytes(raw, FORMS[kind].magic, _torch_dtype(kind), dim, count, device)
            return cls(matrix, kind, on_gpu)
        index = deserialised(np.frombuffer(data, np.uint8), kind)
        check_loaded(index, kind, dim, count)
        _tune(index, kind)
        return cls(_to_gpu(index) if on_gpu else index, kind, on_gpu)


def _on_gpu(kind: str, device: str) -> bool:
    """Whether an index of this kind goes to the GPU. ConfigError: no such kind or device."""
    if kind not in FORMS:
        raise ConfigError(f"no index of kind {kind!r}; choose one of: auto, {', '.join(KINDS)}")
    if device not in {"cpu", "cuda"}:
        raise ConfigError(f"an index lives on 'cpu' or 'cuda', got {device!r}")
    if kind.startswith("torch"):
        return device == "cuda"
    if device == "cpu":
        return False
    if not _faiss_on_gpu():
        faiss_module()
        raise ConfigError(
            "an index on device 'cuda' needs a CUDA device and a FAISS build for it, and FAISS sees none; "
            "install llmcache[gpu] in place of llmcache[cpu], use index 'torch', or device 'cpu'"
        )
    if kind not in _GPU_KINDS:
        _say_once_that_it_stays(kind)
    return kind in _GPU_KINDS


def _faiss_on_gpu() -> bool:
    """Whether there is a FAISS build that sees a GPU."""
    if importlib.util.find_spec("faiss") is None:
        return False
    faiss = faiss_module()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def _say_once_that_torch_searches() -> None:
    log.info("there is no FAISS for this GPU: indexes of kind auto are an exact search in torch")


def _torch_dtype(kind: str) -> Any:
    import torch

    return getattr(torch, FORMS[kind].recipe)


@cache
def _say_once_that_it_stays(kind: str) -> None:
    log.warning("indexes of kind %s stay on the CPU: FAISS has none such on a GPU", kind)


def _checked(vectors: NDArray[Any], kind: str, dim: int | None = None) -> NDArray[Any]:
    """The vectors as FAISS takes them: C-contiguous, float32 or uint8, of the right width, finite."""
    vectors = np.asarray(vectors)
    wanted, family = ("uint8", np.uint8) if is_binary(kind) else ("float32", np.floating)
    if vectors.ndim != 2 or not vectors.shape[1] or not np.issubdtype(vectors.dtype, family):
        raise ValueError(f"an index of kind {kind!r} takes {wanted} [n, width], got {vectors.dtype} {vectors.shape}")
    width = vectors.shape[1] * (8 if is_binary(kind) else 1)
    if dim not in {None, width}:
        unit = "bits" if is_binary(kind) else "components"
        raise ValueError(f"this index holds vectors of {dim} {unit}, got vectors of {width}")
    vectors = np.ascontiguousarray(vectors, dtype=wanted)
    if not is_binary(kind):
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {int(np.argmin(finite))} of the vectors holds NaN or infinity")
    return vectors


def _trained(vectors: NDArray[Any], kind: str, seed: int) -> Any:
    """A CPU index of these vectors."""
    faiss = faiss_module()
    n, width = vectors.shape
    lists = min(int(4 * n**0.5), n // 40)
    recipe = FORMS[kind].recipe.format(lists=lists, parts=width if width % 2 else width // 2)
    if is_binary(kind):
        index = faiss.index_binary_factory(8 * width, recipe)
    else:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf-sq8":
        # Eight bits span what is seen in training, and what is added later is cut off there. Whole vectors with a
        # margin keep to 0.005; differences from the centre, FAISS' default, lost up to 0.08 on new clusters.
        index.by_residual, index.sq.rangestat_arg = False, 0.25
    if "ivf" in kind:
        inverted(index, kind).cp.seed = seed % 2**31
        index.train(_sampled(vectors, 64 * lists, seed))
    _tune(index, kind)
    index.add(vectors)
    return index


def _sampled(vectors: NDArray[Any], most: int, seed: int) -> NDArray[Any]:
    if len(vectors) <= most:
        return vectors
    rows = np.random.default_rng(seed).choice(len(vectors), most, replace=False)
    return vectors[np.sort(rows)]


def _tune(index: Any, kind: str) -> None:
    """Set what a search costs. Set after loading too, so that it is never what a file says."""
    # Chosen for recall@1 >= 0.99 on 100,000 vectors of 1,500 clusters, apart or half overlapping. Not met:
    # ivf-sq8, 0.87 to 0.96 for its rounding; binary-ivf on overlapping clusters, 0.96.
    if "ivf" in kind:
        lists = inverted(index, kind)
        lists.nprobe = min(lists.nlist, 128 if is_binary(kind) else 32)
    if "hnsw" in kind or kind == "cagra":
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    if kind == "cagra":
        index.num_base_level_search_entrypoints = 32  # a damaged count here made FAISS abort or hang


def _to_gpu(index: Any) -> Any:
    faiss = faiss_module()
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    resources.setTempMemory(256 << 20)  # per index; left alone, each takes 1.5 GB
    options.use_cuvs = False  # FAISS' own kernels have all our kinds; those of cuVS lack ivf-sq8
    return faiss.index_cpu_to_gpu(resources, 0, index, options)


def _cagra(vectors: NDArray[np.float32]) -> Any:
    faiss = faiss_module()
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError("this FAISS has no cagra index, it comes with builds for cuVS; use 'ivf-flat'")
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexCagra(resources, vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)  # stores them as well; its `add` would do nothing, and say nothing
    return index

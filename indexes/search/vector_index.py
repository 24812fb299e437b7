"""Similarity index over unit vectors or packed sign bits, by FAISS or by an exact search in torch.

Only this module, `faiss_bytes` and `index_kinds` use FAISS types.

Similarity is the cosine: [-1, 1], higher is nearer. For sign bits (SimHash) it is cos(pi * hamming / bits),
an estimate of the cosine between the vectors that the bits were computed from.
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
from llmcache.indexes.search.index_kinds import FORMS, KINDS, faiss_module, inverted, is_binary

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("llmcache")


_CANDIDATES = 64
_GPU_KINDS = frozenset({"flat", "ivf-flat", "ivf-sq8", "ivf-fp16", "cagra"})
FEW = 20_000
"""Number of vectors below which a flat index is as fast as any other."""
LEAST_TRAINED = 640
"""Minimum vectors to train on: 40 for each of 16 lists, or of 16 codes of a quantiser. FAISS requires 39 for each."""


def choose_kind(n: int, *, binary: bool = False, device: str = "cpu") -> str:
    """Choose the kind of index for n vectors of some hundred components, or n codes of some hundred bits.

    device: "cuda" without a FAISS build for GPUs gives the exact search in torch.
    """
    if device == "cuda" and not binary and not _faiss_on_gpu():
        _log_torch_search_once()
        return "torch" if n < 4_000_000 else "torch-fp16"
    # Measured in milliseconds per query: two cores, 128 components, large batches. flat: 0.15 for 20,000 vectors, 0.7
    # for 100,000. ivf-flat: 0.04 for 100,000, 0.44 for a million, where a query reads 4 MB of lists. ivf-fp16: 0.13 for
    # a million, reading half as much. ivf-pq: 0.03 for both sizes, with the recall of the others, since it reads
    # 0.25 MB of codes and re-ranks 64 vectors. 256 bits, binary-flat: 0.06 for 100,000, 0.7 for a million, where
    # binary-ivf takes 0.07.
    if binary:
        return "binary-flat" if n < 200_000 else "binary-ivf"
    if n < FEW:
        return "flat"
    if device == "cpu" and n >= 100_000:
        return "ivf-pq"
    return "ivf-flat" if n < 1_000_000 else "ivf-fp16"


def needs_faiss(kind: str, device: str, *, binary: bool = False) -> bool:
    """Return whether an index of this kind, or "auto", on this device requires FAISS."""
    if kind == "auto":
        return device == "cpu" or binary
    return not kind.startswith("torch")


@contextmanager
def _single_threaded(faiss: Any) -> Iterator[None]:
    """Run FAISS with one thread inside the block, on machines with at most two processors.

    After a matrix product, threads of torch and NumPy still spin on the same processors. On two processors, a flat
    search of 3,080 queries among 10,000 vectors then takes 0.23 s, against 0.1 s with one thread. ivf-pq takes 0.038 ms
    for each of 2,048 queries among 200,000 vectors, 0.030 ms with one thread, and 0.019 ms without spinning threads.
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
    """Choose the kind of index for n vectors on a CPU, see `choose_kind`; "torch" when FAISS is not installed."""
    return "torch" if importlib.util.find_spec("faiss") is None else choose_kind(n)


class VectorIndex:
    """Index of vectors, numbered 0, 1, 2, ... in the order in which they were added.

    Searches may run concurrently on a CPU, one at a time on a GPU. No call may run concurrently with `add`.
    """

    __slots__ = ("_index", "_kind", "_on_gpu")

    def __init__(self, index: Any, kind: str, on_gpu: bool) -> None:
        self._index, self._kind, self._on_gpu = index, kind, on_gpu

    @classmethod
    def build(cls, vectors: NDArray[Any], *, kind: str = "auto", device: str = "cpu", seed: int = 0) -> VectorIndex:
        """Build an index of these vectors.

        vectors: float32 [n, dim], unit L2 norm (zeros are similar to nothing), or uint8 [n, bits / 8]. Copied.
        kind: one of KINDS, or "auto" for `choose_kind`. cagra is always built on a GPU.
        device: "cpu" or "cuda"; hnsw, ivf-pq and the binary kinds stay on the CPU.
        seed: for k-means and its sample. Graphs are built by several threads and differ despite the seed.
        ConfigError for an unknown kind, too few vectors to train, or no GPU. ValueError for invalid vectors.
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
        """Kind of the index, one of KINDS."""
        return self._kind

    @property
    def binary(self) -> bool:
        """Return whether the index holds sign bits."""
        return is_binary(self._kind)

    @property
    def dim(self) -> int:
        """Components of a vector, or bits of a code."""
        return int(self._index.d)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: NDArray[Any]) -> None:
        """Append vectors, as in `build`. A cagra index is rebuilt on each call, so add few large batches."""
        vectors = _checked(vectors, self._kind, self.dim)
        if not len(vectors):
            return
        if self._kind != "cagra":
            self._index.add(vectors)
            return
        if not self._on_gpu:
            raise ConfigError(
                "vectors can be added to a cagra index only on a GPU; open it there, or build another kind"
            )
        stored = faiss_module().index_gpu_to_cpu(self._index)
        self._index = _cagra(np.concatenate([stored.storage.reconstruct_n(0, len(self)), vectors]))

    def nearest(
        self, queries: NDArray[Any], k: int, *, beside: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Search the k nearest vectors.

        queries: float32 [n, dim], unit L2 norm, or uint8 [n, bits / 8].
        beside: NumPy multiplied large matrices just before, so its threads still spin on the processors.
        Returns ids, int64 [n, k], nearest first, and similarities, float32 [n, k]; -1 and -inf for none.
        """
        queries = _checked(queries, self._kind, self.dim)
        if k < 1:
            raise ValueError(f"k is the number of neighbours, at least 1, got {k}")
        ids = np.full((len(queries), k), -1, np.int64)
        similarity = np.full((len(queries), k), -np.inf, np.float32)
        most = min(k, len(self))
        if ids.size and most:
            found, near = self._search(queries, most, beside)
            # Checked again after `from_bytes`, because these ids become row numbers in files.
            sound = (near >= 0) & (near < len(self)) & np.isfinite(found)
            ids[:, :most] = np.where(sound, near, -1)
            similarity[:, :most] = np.where(sound, np.clip(found, -1, 1), -np.inf)
        return ids, similarity

    def nearest_on(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `nearest`, for a tensor, float32 [n, dim], finite.

        Returns ids and similarities on the index's device for torch kinds, else on the device of the queries.
        """
        import torch

        if not self._kind.startswith("torch"):
            found = self.nearest(queries.float().cpu().numpy(), k)
            ids, similarity = (torch.from_numpy(array).to(queries.device) for array in found)
            return ids, similarity
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"expected queries [n, {self.dim}] and k of at least 1, got {tuple(queries.shape)} and {k}"
            )
        similarity, ids = self._index.search_on(queries, k)
        return ids, similarity.clamp(max=1)

    @property
    def buries(self) -> bool:
        """Return whether the index supports `mark_deleted`."""
        return self._kind.startswith("torch")

    def mark_deleted(self, ids: NDArray[np.int64]) -> None:
        """Exclude these vectors from all later searches. Only where `buries`."""
        self._index.mark_deleted(ids)

    def _search(self, queries: NDArray[Any], k: int, beside: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._kind.startswith("torch"):
            answer: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, k)
            return answer
        faiss, params = faiss_module(), None
        if self._kind == "ivf-pq":  # four-bit codes rank roughly, so many candidates are re-ranked
            params = faiss.IndexRefineSearchParameters(k_factor=max(8.0, _CANDIDATES / k))
        elif self._kind == "cagra" and self._on_gpu:
            params = faiss.SearchParametersCagra(itopk_size=max(64, -(-k // 32) * 32))  # must not be below k
        alone = beside and "ivf" in self._kind if self._kind != "flat" else len(self) < FEW
        with _single_threaded(faiss) if alone and not self._on_gpu else nullcontext():
            found, near = self._index.search(queries, k, params=params)
        return (np.cos(found * (np.pi / self.dim)).astype(np.float32) if self.binary else found), near

    def to_bytes(self) -> memoryview:
        """Serialise the index, for `from_bytes` on any device."""
        if self._kind.startswith("torch"):
            data: memoryview = self._index.to_bytes(FORMS[self._kind].magic)
            return data
        # faiss.write_index would return normally when the disk is full, and does not fsync
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
        """Deserialise an index that `to_bytes` wrote, with `count` vectors of `dim` components or bits.

        SnapshotDamaged when the bytes are no such index. Wrong numbers inside vectors are not detected: the caller
        checks a checksum before. ConfigError for an unknown kind or no GPU.
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
    """Return whether an index of this kind is placed on the GPU. ConfigError for an unknown kind or missing device."""
    if kind not in FORMS:
        raise ConfigError(f"no index of kind {kind!r}; choose one of: auto, {', '.join(KINDS)}")
    if device not in {"cpu", "cuda"}:
        raise ConfigError(f"the device of an index is 'cpu' or 'cuda', got {device!r}")
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
        _warn_cpu_only_once(kind)
    return kind in _GPU_KINDS


def _faiss_on_gpu() -> bool:
    """Return whether a FAISS build with GPU support sees a GPU."""
    if importlib.util.find_spec("faiss") is None:
        return False
    faiss = faiss_module()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def _log_torch_search_once() -> None:
    log.info("FAISS has no GPU support here: indexes of kind auto use the exact search in torch")


def _torch_dtype(kind: str) -> Any:
    import torch

    return getattr(torch, FORMS[kind].recipe)


@cache
def _warn_cpu_only_once(kind: str) -> None:
    log.warning("indexes of kind %s stay on the CPU: FAISS does not support them on a GPU", kind)


def _checked(vectors: NDArray[Any], kind: str, dim: int | None = None) -> NDArray[Any]:
    """Check vectors and convert them for FAISS: C-contiguous, float32 or uint8, of the right width, finite.

    ValueError when they do not fit.
    """
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
    """Train a CPU index and add these vectors."""
    faiss = faiss_module()
    n, width = vectors.shape
    lists = min(int(4 * n**0.5), n // 40)
    recipe = FORMS[kind].recipe.format(lists=lists, parts=width if width % 2 else width // 2)
    if is_binary(kind):
        index = faiss.index_binary_factory(8 * width, recipe)
    else:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf-sq8":
        # Eight bits span the range of the training vectors; later vectors are clipped to it. Encoding whole vectors
        # with a margin has an error of 0.005; residuals, FAISS' default, had errors up to 0.08 on new clusters.
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
    """Set the search parameters. Set them after loading too, so that a file cannot choose them."""
    # Chosen for recall@1 >= 0.99 on 100,000 vectors of 1,500 clusters, separate or half overlapping. Exceptions:
    # ivf-sq8 reaches 0.87 to 0.96 because of its rounding; binary-ivf reaches 0.96 on overlapping clusters.
    if "ivf" in kind:
        lists = inverted(index, kind)
        lists.nprobe = min(lists.nlist, 128 if is_binary(kind) else 32)
    if "hnsw" in kind or kind == "cagra":
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    if kind == "cagra":
        index.num_base_level_search_entrypoints = 32  # a damaged value would make FAISS abort or hang


def _to_gpu(index: Any) -> Any:
    faiss = faiss_module()
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    resources.setTempMemory(256 << 20)  # per index; the default is 1.5 GB
    options.use_cuvs = False  # FAISS' own kernels support all kinds; cuVS lacks ivf-sq8
    return faiss.index_cpu_to_gpu(resources, 0, index, options)


def _cagra(vectors: NDArray[np.float32]) -> Any:
    faiss = faiss_module()
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError("this FAISS has no cagra index, which needs a build with cuVS; use 'ivf-flat'")
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexCagra(resources, vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)  # also stores them; `add` does nothing, without an error
    return index

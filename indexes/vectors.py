"""One index over unit vectors, or over packed sign bits: FAISS', or an exact search in torch. FAISS types stay in here.

Similarity is the cosine: [-1, 1], higher is nearer. For sign bits (SimHash) it is cos(pi * hamming / bits),
an estimate of the cosine between the vectors that the bits were taken from.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, FaissMissing, SnapshotDamaged

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("llmcache")


class _Form(NamedTuple):
    """recipe: for FAISS' index factory; magic: first four bytes serialised; type: FAISS class then."""

    recipe: str
    magic: bytes
    type: str


_FORMS = {
    "flat": _Form("Flat", b"IxFI", "IndexFlatIP"),
    "ivf-flat": _Form("IVF{lists},Flat", b"IwFl", "IndexIVFFlat"),
    "ivf-sq8": _Form("IVF{lists},SQ8", b"IwSq", "IndexIVFScalarQuantizer"),
    "ivf-fp16": _Form("IVF{lists},SQfp16", b"IwSq", "IndexIVFScalarQuantizer"),
    # Four-bit codes of two components each, scanned in registers; the best are compared again, in float16.
    # Eight-bit codes took 54 s instead of 1.4 s to train on 80,000 vectors, and were slower to search.
    "ivf-pq": _Form("IVF{lists},PQ{parts}x4fsr,Refine(SQfp16)", b"IxRF", "IndexRefine"),
    "hnsw": _Form("HNSW32", b"IHNf", "IndexHNSWFlat"),
    "cagra": _Form("", b"IHc2", "IndexHNSWCagra"),
    "binary-flat": _Form("BFlat", b"IBxF", "IndexBinaryFlat"),
    "binary-ivf": _Form("BIVF{lists}", b"IBwF", "IndexBinaryIVF"),
    "binary-hnsw": _Form("BHNSW32", b"IBHf", "IndexBinaryHNSW"),
    "torch": _Form("float32", b"LTf4", ""),
    "torch-fp16": _Form("float16", b"LTf2", ""),
}
KINDS = tuple(_FORMS)
"""flat: exact.
ivf-flat: exact within the lists probed.
ivf-sq8: a quarter of the memory; similarities are good to 0.005 (from 64 components on), so among neighbours
closer to each other than that it may name the wrong one.
ivf-fp16: half the memory; similarities are good to 0.0001.
ivf-pq: codes of four bits for two components, scanned in registers; the best 64 are compared again as ivf-fp16 does.
The quickest from 100,000 vectors on, in 0.6 of the memory of ivf-flat.
hnsw: the most accurate of the fast ones on vectors that differ; slow to build; where hundreds of vectors are
equal, its graph falls apart and it misses others.
cagra: built on a GPU, searched on either.
binary-*: over sign bits.
torch: exact, by a matrix product in torch on the device; needs no FAISS, and no search gives rows that were buried.
torch-fp16: half the memory; similarities are good to 0.0002."""

_CANDIDATES = 64
_GPU_KINDS = frozenset({"flat", "ivf-flat", "ivf-sq8", "ivf-fp16", "cagra"})
LEAST_TRAINED = 640
"""Vectors to train on: 16 lists, or 16 codes of a quantiser, of 40 vectors each. FAISS asks for 39."""
_LOADING = threading.Lock()  # FAISS' limits for loading are global


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
    if n < 20_000:
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
                f"use 'auto', or {'binary-flat' if _binary(kind) else 'flat'!r}"
            )
        if kind == "cagra":
            return cls(_cagra(vectors), kind, on_gpu)
        if kind.startswith("torch"):
            from llmcache.indexes.matrix import Matrix

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
        return _binary(self._kind)

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
        stored = _faiss().index_gpu_to_cpu(self._index)
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

    def bury(self, ids: NDArray[np.int64]) -> None:
        """Let no search give these vectors from now on; where `buries`."""
        self._index.bury(ids)

    def _search(self, queries: NDArray[Any], k: int, beside: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._kind.startswith("torch"):
            answer: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, k)
            return answer
        faiss, params = _faiss(), None
        if self._kind == "ivf-pq":  # four-bit codes rank roughly, so many candidates are compared again
            params = faiss.IndexRefineSearchParameters(k_factor=max(8.0, _CANDIDATES / k))
        elif self._kind == "cagra" and self._on_gpu:
            params = faiss.SearchParametersCagra(itopk_size=max(64, -(-k // 32) * 32))  # must not be below k
        alone = self._kind == "flat" or (beside and "ivf" in self._kind)
        with _alone(faiss) if alone and not self._on_gpu else nullcontext():
            found, near = self._index.search(queries, k, params=params)
        return (np.cos(found * (np.pi / self.dim)).astype(np.float32) if self.binary else found), near

    def to_bytes(self) -> memoryview:
        """The serialised index, for `from_bytes` on any device."""
        if self._kind.startswith("torch"):
            data: memoryview = self._index.to_bytes(_FORMS[self._kind].magic)
            return data
        # Not faiss.write_index: it returns normally when the disk is full, and does not fsync.
        faiss = _faiss()
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
            from llmcache.indexes.matrix import Matrix

            raw = np.frombuffer(data, np.uint8)
            _check_magic(raw, kind)
            matrix = Matrix.from_bytes(raw, _FORMS[kind].magic, _torch_dtype(kind), dim, count, device)
            return cls(matrix, kind, on_gpu)
        index = _deserialised(np.frombuffer(data, np.uint8), kind)
        _check_loaded(index, kind, dim, count)
        _tune(index, kind)
        return cls(_to_gpu(index) if on_gpu else index, kind, on_gpu)


def _faiss() -> Any:
    """The module, imported on first use: a cache of exact matches does without."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":  # a GPU build that lacks its CUDA libraries says itself what to install
            raise
        raise FaissMissing from error
    return faiss


def _binary(kind: str) -> bool:
    return kind.startswith("binary-")


def _on_gpu(kind: str, device: str) -> bool:
    """Whether an index of this kind goes to the GPU. ConfigError: no such kind or device."""
    if kind not in _FORMS:
        raise ConfigError(f"no index of kind {kind!r}; choose one of: auto, {', '.join(KINDS)}")
    if device not in {"cpu", "cuda"}:
        raise ConfigError(f"an index lives on 'cpu' or 'cuda', got {device!r}")
    if kind.startswith("torch"):
        return device == "cuda"
    if device == "cpu":
        return False
    if not _faiss_on_gpu():
        _faiss()
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
    faiss = _faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def _say_once_that_torch_searches() -> None:
    log.info("there is no FAISS for this GPU: indexes of kind auto are an exact search in torch")


def _torch_dtype(kind: str) -> Any:
    import torch

    return getattr(torch, _FORMS[kind].recipe)


@cache
def _say_once_that_it_stays(kind: str) -> None:
    log.warning("indexes of kind %s stay on the CPU: FAISS has none such on a GPU", kind)


def _checked(vectors: NDArray[Any], kind: str, dim: int | None = None) -> NDArray[Any]:
    """The vectors as FAISS takes them: C-contiguous, float32 or uint8, of the right width, finite."""
    vectors = np.asarray(vectors)
    wanted, family = ("uint8", np.uint8) if _binary(kind) else ("float32", np.floating)
    if vectors.ndim != 2 or not vectors.shape[1] or not np.issubdtype(vectors.dtype, family):
        raise ValueError(f"an index of kind {kind!r} takes {wanted} [n, width], got {vectors.dtype} {vectors.shape}")
    width = vectors.shape[1] * (8 if _binary(kind) else 1)
    if dim not in {None, width}:
        unit = "bits" if _binary(kind) else "components"
        raise ValueError(f"this index holds vectors of {dim} {unit}, got vectors of {width}")
    vectors = np.ascontiguousarray(vectors, dtype=wanted)
    if not _binary(kind):
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {int(np.argmin(finite))} of the vectors holds NaN or infinity")
    return vectors


def _trained(vectors: NDArray[Any], kind: str, seed: int) -> Any:
    """A CPU index of these vectors."""
    faiss = _faiss()
    n, width = vectors.shape
    lists = min(int(4 * n**0.5), n // 40)
    recipe = _FORMS[kind].recipe.format(lists=lists, parts=width if width % 2 else width // 2)
    if _binary(kind):
        index = faiss.index_binary_factory(8 * width, recipe)
    else:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf-sq8":
        # Eight bits span what is seen in training, and what is added later is cut off there. Whole vectors with a
        # margin keep to 0.005; differences from the centre, FAISS' default, lost up to 0.08 on new clusters.
        index.by_residual, index.sq.rangestat_arg = False, 0.25
    if "ivf" in kind:
        _inverted(index, kind).cp.seed = seed % 2**31
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
        inverted = _inverted(index, kind)
        inverted.nprobe = min(inverted.nlist, 128 if _binary(kind) else 32)
    if "hnsw" in kind or kind == "cagra":
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    if kind == "cagra":
        index.num_base_level_search_entrypoints = 32  # a damaged count here made FAISS abort or hang


def _inverted(index: Any, kind: str) -> Any:
    """The part that has inverted lists."""
    return _faiss().downcast_index(index.base_index) if kind == "ivf-pq" else index


def _to_gpu(index: Any) -> Any:
    faiss = _faiss()
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    resources.setTempMemory(256 << 20)  # per index; left alone, each takes 1.5 GB
    options.use_cuvs = False  # FAISS' own kernels have all our kinds; those of cuVS lack ivf-sq8
    return faiss.index_cpu_to_gpu(resources, 0, index, options)


def _cagra(vectors: NDArray[np.float32]) -> Any:
    faiss = _faiss()
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError("this FAISS has no cagra index, it comes with builds for cuVS; use 'ivf-flat'")
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexCagra(resources, vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)  # stores them as well; its `add` would do nothing, and say nothing
    return index


@contextmanager
def _limited(size: int) -> Iterator[None]:
    """Within, FAISS allocates no array of more than twice `size` bytes, whatever a damaged length says."""
    faiss = _faiss()
    with _LOADING:
        loops, span = faiss.get_deserialization_loop_limit(), faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_loop_limit(size)  # every turn of a counted loop reads a byte or more
        faiss.set_deserialization_vector_byte_limit(2 * size)
        try:
            yield
        finally:
            faiss.set_deserialization_loop_limit(loops)
            faiss.set_deserialization_vector_byte_limit(span)


def _check_magic(data: NDArray[np.uint8], kind: str) -> None:
    magic = data[:4].tobytes()
    if magic != _FORMS[kind].magic:
        raise SnapshotDamaged(f"expected {_FORMS[kind].magic!r} to begin a {kind} index, found {magic!r}")


def _deserialised(data: NDArray[np.uint8], kind: str) -> Any:
    _check_magic(data, kind)
    faiss = _faiss()
    load = faiss.deserialize_index_binary if _binary(kind) else faiss.deserialize_index
    try:
        with _limited(len(data)):
            return load(data)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise SnapshotDamaged(f"FAISS cannot read this {kind} index: {reason[0]}") from error


def _check_loaded(index: Any, kind: str, dim: int, count: int) -> None:
    """SnapshotDamaged unless the index and all its parts are what this kind, dim and count come to."""
    faiss = _faiss()
    metric = faiss.METRIC_L2 if _binary(kind) else faiss.METRIC_INNER_PRODUCT  # Hamming counts as L2
    for part, wanted, size in _parts(index, kind, count):
        expected = (wanted, dim, size, metric, True)
        found = (type(part).__name__, part.d, part.ntotal, part.metric_type, bool(part.is_trained))
        if found != expected:
            raise SnapshotDamaged(
                f"expected in a {kind} index (type, width, count, metric, trained) {expected}, found {found}"
            )
    sixteen = faiss.ScalarQuantizer.QT_fp16
    codes = {"ivf-sq8": faiss.ScalarQuantizer.QT_8bit, "ivf-fp16": sixteen, "ivf-pq": sixteen}
    coded = faiss.downcast_index(index.refine_index) if kind == "ivf-pq" else index
    if kind in codes and coded.sq.qtype != codes[kind]:
        raise SnapshotDamaged(f"expected codes of type {codes[kind]} in a {kind} index, found {coded.sq.qtype}")
    if "ivf" in kind:
        _check_lists(_inverted(index, kind), count)


def _parts(index: Any, kind: str, count: int) -> Iterator[tuple[Any, str, int]]:
    """The index and those inside it, outermost first, each with the FAISS class and size it should have."""
    faiss = _faiss()
    downcast = faiss.downcast_IndexBinary if _binary(kind) else faiss.downcast_index
    flat = "IndexBinaryFlat" if _binary(kind) else "IndexFlatIP"
    yield index, _FORMS[kind].type, count
    if "hnsw" in kind or kind == "cagra":
        yield downcast(index.storage), flat, count
    if kind == "ivf-pq":
        yield downcast(index.refine_index), "IndexScalarQuantizer", count
        yield downcast(index.base_index), "IndexIVFPQFastScan", count
    if "ivf" in kind:
        inverted = _inverted(index, kind)
        yield downcast(inverted.quantizer), flat, inverted.nlist


def _check_lists(inverted: Any, count: int) -> None:
    """SnapshotDamaged unless the inverted lists hold each of the ids 0 to count - 1 once."""
    lists = inverted.invlists
    sizes = [lists.list_size(i) for i in range(lists.nlist)]
    if lists.nlist != inverted.nlist or sum(sizes) != count:
        raise SnapshotDamaged(
            f"expected {inverted.nlist} lists of {count} ids together, found {lists.nlist} of {sum(sizes)}"
        )
    seen = np.zeros(count, bool)
    for i in np.flatnonzero(sizes).tolist():
        ids = _faiss().rev_swig_ptr(lists.get_ids(i), sizes[i])
        if ids.min() < 0 or ids.max() >= count:
            raise SnapshotDamaged(f"expected ids from 0 to {count - 1}, found {ids.min()} to {ids.max()}")
        seen[ids] = True
    if not seen.all():
        raise SnapshotDamaged(f"expected each id once, found {count - int(seen.sum())} of {count} missing")

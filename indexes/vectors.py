"""One FAISS index over unit vectors, or over packed sign bits. FAISS types stay in here.

Similarity is the cosine, in [-1, 1], higher is nearer. For sign bits (SimHash) it is cos(pi * hamming / bits), an
estimate of the cosine between the vectors that the bits were taken from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, FaissMissing, SnapshotDamaged

log = logging.getLogger("llmcache")


class _Form(NamedTuple):
    """recipe: for FAISS' index factory; magic: the first four bytes of the serialised index; type: its FAISS class."""

    recipe: str
    magic: bytes
    type: str


_FORMS = {
    "flat": _Form("Flat", b"IxFI", "IndexFlatIP"),
    "ivf-flat": _Form("IVF{lists},Flat", b"IwFl", "IndexIVFFlat"),
    "ivf-sq8": _Form("IVF{lists},SQ8", b"IwSq", "IndexIVFScalarQuantizer"),
    # Four-bit codes of two components each, scanned in registers, and the best of them compared again with the full
    # vectors. Eight-bit codes took 50 s instead of 1.5 s to train on 80,000 vectors and were slower to search.
    "ivf-pq": _Form("IVF{lists},PQ{parts}x4fsr,RFlat", b"IxRF", "IndexRefineFlat"),
    "hnsw": _Form("HNSW32", b"IHNf", "IndexHNSWFlat"),
    "cagra": _Form("", b"IHc2", "IndexHNSWCagra"),
    "binary-flat": _Form("BFlat", b"IBxF", "IndexBinaryFlat"),
    "binary-ivf": _Form("BIVF{lists}", b"IBwF", "IndexBinaryIVF"),
    "binary-hnsw": _Form("BHNSW32", b"IBHf", "IndexBinaryHNSW"),
}
KINDS = tuple(_FORMS)
"""flat: exact. ivf-flat: exact within the lists probed. ivf-sq8: a quarter of the memory, similarities good to 0.003
and therefore 3-7 % other answers among near ties. ivf-pq: for speed, not for memory, since it keeps the full vectors.
hnsw: most accurate of the fast ones, slow to build. cagra: built on a GPU, searched on either. binary-*: sign bits."""

_ON_GPU = {"flat", "ivf-flat", "ivf-sq8", "cagra"}
_LEAST = (
    640  # vectors to train on: 16 lists, or 16 codes of a quantiser, of 40 vectors each; FAISS asks for 39
)
_SAMPLE = 64  # vectors per list that k-means looks at: more moved recall by less than 0.001
_PROBES = {"binary-ivf": 128}  # Hamming distances tie, so the nearest code is often in another list
_LOADING = threading.Lock()  # FAISS' limits for loading are global


def choose_kind(n: int, *, binary: bool = False) -> str:
    """The kind of index for n vectors of some hundred components, or n codes of some hundred bits."""
    # Measured on two cores, 128 components, batches of 64, per query. Flat: 0.15 ms at 20,000, 0.7 at 100,000;
    # ivf-flat: 0.03 ms at 100,000, 0.44 at a million, where ivf-sq8 takes 0.13 and a quarter of the memory.
    # Flat over 256-bit codes: 0.06 ms at 100,000, 0.7 at a million; binary-ivf: 0.07 at a million.
    if binary:
        return "binary-flat" if n < 200_000 else "binary-ivf"
    if n < 20_000:
        return "flat"
    return "ivf-flat" if n < 1_000_000 else "ivf-sq8"


class VectorIndex:
    """Vectors numbered 0, 1, 2, ... in the order in which they were added.

    Searches may run side by side on a CPU, and one at a time on a GPU. Nothing may run beside `add`.
    """

    __slots__ = ("_gpu", "_index", "_kind")

    def __init__(self, index: Any, kind: str, device: str) -> None:
        self._kind = kind
        self._gpu = device == "cuda" and kind in _ON_GPU
        self._index = _to_gpu(index) if self._gpu and kind != "cagra" else index

    @classmethod
    def build(
        cls, vectors: NDArray[Any], *, kind: str = "auto", device: str = "cpu", seed: int = 0
    ) -> VectorIndex:
        """An index of these vectors.

        vectors: float32 [n, dim], unit L2 norm (zero vectors are near nothing), or uint8 [n, bits / 8]. Copied.
        kind: one of KINDS, or "auto" for `choose_kind`.
        device: "cpu" or "cuda"; hnsw, ivf-pq and the binary kinds stay on the CPU.
        seed: for k-means and its sample. An hnsw built by several threads differs from build to build all the same.
        ConfigError: unknown kind, too few vectors to train it, no GPU. ValueError: vectors that cannot be stored.
        """
        vectors = np.asarray(vectors)
        if kind == "auto":
            kind = choose_kind(len(vectors), binary=vectors.dtype == np.uint8)
        _check_choice(kind, device)
        vectors = _checked(vectors, kind)
        if ("ivf" in kind or kind == "cagra") and len(vectors) < _LEAST:
            raise ConfigError(
                f"an index of kind {kind!r} needs at least {_LEAST} vectors to train on, got {len(vectors)}; "
                "use 'flat' (or 'binary-flat'), or 'auto'"
            )
        if kind == "cagra":
            return cls(_cagra(vectors), kind, "cuda")
        return cls(_trained(vectors, kind, seed), kind, device)

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
        """Append vectors, as in `build`. A cagra index is built anew each time, so give it few large pieces."""
        vectors = _checked(vectors, self._kind, self.dim)
        if not len(vectors):
            return
        if self._kind != "cagra":
            self._index.add(vectors)
            return
        if not self._gpu:
            raise ConfigError("a cagra index grows only on a GPU; open it there, or build another kind")
        stored = _faiss().index_gpu_to_cpu(self._index)
        self._index = _cagra(np.concatenate([stored.storage.reconstruct_n(0, len(self)), vectors]))

    def nearest(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids int64 [n, k] and similarities float32 [n, k], nearest first; id -1 and similarity -inf where none.

        queries: float32 [n, dim], unit L2 norm, or uint8 [n, bits / 8].
        """
        queries = _checked(queries, self._kind, self.dim)
        if k < 1:
            raise ValueError(f"k is the number of neighbours, at least 1, got {k}")
        ids = np.full((len(queries), k), -1, np.int64)
        similarity = np.full((len(queries), k), -np.inf, np.float32)
        most = min(k, len(self))
        if ids.size and most:
            found, near = self._search(queries, most)
            # Checked although `from_bytes` did: an id from here becomes the number of a row in a file.
            sound = (near >= 0) & (near < len(self)) & np.isfinite(found)
            ids[:, :most] = np.where(sound, near, -1)
            similarity[:, :most] = np.where(sound, np.clip(found, -1, 1), -np.inf)
        return ids, similarity

    def _search(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._kind == "cagra" and self._gpu:
            params = _faiss().SearchParametersCagra(
                itopk_size=max(64, -(-k // 32) * 32)
            )  # must not be below k
            found, near = self._index.search(queries, k, params=params)
        else:
            found, near = self._index.search(queries, k)
        if self.binary:
            found = np.cos(found * (np.pi / self.dim)).astype(np.float32)
        return found, near

    def to_bytes(self) -> memoryview:
        """The serialised index, for `from_bytes` on any device."""
        # Not faiss.write_index: it returns normally when the disk is full, and does not fsync.
        faiss = _faiss()
        if self.binary:
            return memoryview(faiss.serialize_index_binary(self._index))
        return memoryview(
            faiss.serialize_index(faiss.index_gpu_to_cpu(self._index) if self._gpu else self._index)
        )

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
        """The index that `to_bytes` serialised, of this kind, with `count` vectors of `dim` components or bits.

        SnapshotDamaged: the bytes are not such an index. Numbers inside vectors are not checked: compare a checksum
        first. ConfigError: unknown kind, no GPU.
        """
        _check_choice(kind, device)
        index = _deserialised(np.frombuffer(data, np.uint8), kind)
        _check_loaded(index, kind, dim, count)
        _tune(index, kind)
        if kind == "cagra" and device == "cuda":
            index = _to_gpu(index)
        return cls(index, kind, device)


# -- choices and arguments ---------------------------------------------------------------------------------------


def _faiss() -> Any:
    """The module, imported on first use: it takes 0.2 s, and a cache of exact matches does without."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":  # a GPU build that lacks its CUDA libraries says itself what to install
            raise
        raise FaissMissing from error
    return faiss


def _binary(kind: str) -> bool:
    return kind.startswith("binary-")


def _check_choice(kind: str, device: str) -> None:
    if kind not in _FORMS:
        raise ConfigError(f"no index of kind {kind!r}; choose one of: auto, {', '.join(KINDS)}")
    if device not in {"cpu", "cuda"}:
        raise ConfigError(f"an index lives on 'cpu' or 'cuda', got {device!r}")
    if device == "cuda":
        _check_gpu(kind)


def _check_gpu(kind: str) -> None:
    faiss = _faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() < 1:
        raise ConfigError(
            "device 'cuda' needs a CUDA device and a FAISS build for it, and FAISS sees none; "
            "install llmcache[gpu] in place of llmcache[cpu], or use device 'cpu'"
        )
    if kind not in _ON_GPU:
        _say_once_that_it_stays(kind)


@cache
def _say_once_that_it_stays(kind: str) -> None:
    log.warning("indexes of kind %s stay on the CPU: FAISS has no such index on a GPU", kind)


def _checked(vectors: NDArray[Any], kind: str, dim: int | None = None) -> NDArray[Any]:
    """The vectors as FAISS takes them: C-contiguous, float32 or uint8, of the right width, finite."""
    vectors = np.asarray(vectors)
    wanted, found = ("uint8", np.uint8) if _binary(kind) else ("float32", np.floating)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, found):
        raise ValueError(f"{kind} takes {wanted} [n, width], got {vectors.dtype} {list(vectors.shape)}")
    width = vectors.shape[1] if dim is None else dim // 8 if _binary(kind) else dim
    if vectors.shape[1] != width or width < 1:
        raise ValueError(f"vectors of this index are {width} wide, got {vectors.shape[1]}")
    vectors = np.ascontiguousarray(vectors, dtype=wanted)
    if not _binary(kind):
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {int(np.argmin(finite))} of the vectors holds NaN or infinity")
    return vectors


# -- building ----------------------------------------------------------------------------------------------------


def _trained(vectors: NDArray[Any], kind: str, seed: int) -> Any:
    """A CPU index of these vectors."""
    faiss = _faiss()
    n, width = vectors.shape
    lists = max(1, min(int(4 * n**0.5), n // 40))
    recipe = _FORMS[kind].recipe.format(lists=lists, parts=width if width % 2 else width // 2)
    if _binary(kind):
        index = faiss.index_binary_factory(8 * width, recipe)
    else:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if "ivf" in kind:
        _inverted(index, kind).cp.seed = seed % 2**31
        index.train(_sampled(vectors, _SAMPLE * lists, seed))
    _tune(index, kind)
    index.add(vectors)
    return index


def _sampled(vectors: NDArray[Any], most: int, seed: int) -> NDArray[Any]:
    if len(vectors) <= most:
        return vectors
    rows = np.random.default_rng(seed).choice(len(vectors), most, replace=False)
    return vectors[np.sort(rows)]


def _tune(index: Any, kind: str) -> None:
    """Set what a search costs. Not stored: a loaded index gets the values of this version."""
    # Recall@1 >= 0.99 on 100,000 vectors of 1,500 clusters that hardly or half overlap; see tests/test_vectors.py.
    if "ivf" in kind:
        inverted = _inverted(index, kind)
        inverted.nprobe = min(inverted.nlist, _PROBES.get(kind, 32))
    if kind == "ivf-pq":
        index.k_factor = 32
    if "hnsw" in kind or kind == "cagra":
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64


def _inverted(index: Any, kind: str) -> Any:
    """The part that has inverted lists."""
    return _faiss().downcast_index(index.base_index) if kind == "ivf-pq" else index


def _to_gpu(index: Any) -> Any:
    faiss = _faiss()
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    resources.setTempMemory(256 << 20)  # for each index; the default is 1.5 GB
    options.use_cuvs = False  # FAISS' own kernels have all the kinds; those of cuVS lack ivf-sq8
    return faiss.index_cpu_to_gpu(resources, 0, index, options)


def _cagra(vectors: NDArray[np.float32]) -> Any:
    faiss = _faiss()
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError("this FAISS has no cagra index, it comes with builds for cuVS; use 'ivf-flat'")
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexCagra(resources, vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)  # stores them as well; its `add` would do nothing, and say nothing
    return index


# -- loading -----------------------------------------------------------------------------------------------------


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


def _deserialised(data: NDArray[np.uint8], kind: str) -> Any:
    magic = data[:4].tobytes()
    if magic != _FORMS[kind].magic:
        raise SnapshotDamaged(
            f"an index of kind {kind!r} begins with {_FORMS[kind].magic!r}, found {magic!r}"
        )
    faiss = _faiss()
    load = faiss.deserialize_index_binary if _binary(kind) else faiss.deserialize_index
    try:
        with _limited(len(data)):
            return load(data)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise SnapshotDamaged(f"FAISS cannot read this index of kind {kind!r}: {reason[0]}") from error


def _check_loaded(index: Any, kind: str, dim: int, count: int) -> None:
    """SnapshotDamaged unless the index and all its parts are what this kind, dim and count come to."""
    metric = (
        1 if _binary(kind) else 0
    )  # faiss.METRIC_L2, which binary indexes carry, and METRIC_INNER_PRODUCT
    for part, wanted, size in _parts(index, kind, count):
        found = (type(part).__name__, part.d, part.ntotal, part.metric_type, bool(part.is_trained))
        if found != (wanted, dim, size, metric, True):
            raise SnapshotDamaged(
                f"expected in an index of kind {kind!r} (type, width, vectors, metric, trained): "
                f"{(wanted, dim, size, metric, True)}, found {found}"
            )
    if "ivf" in kind:
        _check_lists(_inverted(index, kind), count)


def _parts(index: Any, kind: str, count: int) -> Iterator[tuple[Any, str, int]]:
    """The index and those inside it, outermost first: each with the FAISS class and the size that it should have."""
    faiss = _faiss()
    downcast = faiss.downcast_IndexBinary if _binary(kind) else faiss.downcast_index
    flat = "IndexBinaryFlat" if _binary(kind) else "IndexFlatIP"
    yield index, _FORMS[kind].type, count
    if "hnsw" in kind or kind == "cagra":
        yield downcast(index.storage), flat, count
    if kind == "ivf-pq":
        yield downcast(index.refine_index), flat, count
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
        raise SnapshotDamaged(f"expected each id once; {count - int(seen.sum())} of {count} are missing")

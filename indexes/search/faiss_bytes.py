"""Safe deserialisation of FAISS indexes from untrusted or damaged bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.search.index_kinds import FORMS, faiss_module, inverted, is_binary

_LOADING = threading.Lock()  # FAISS' deserialisation limits are global


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit arrays that FAISS allocates inside the block to twice `size` bytes, whatever a damaged length claims."""
    faiss = faiss_module()
    with _LOADING:
        loops, span = faiss.get_deserialization_loop_limit(), faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_loop_limit(size)  # each iteration of a counted loop reads at least one byte
        faiss.set_deserialization_vector_byte_limit(2 * size)
        try:
            yield
        finally:
            faiss.set_deserialization_loop_limit(loops)
            faiss.set_deserialization_vector_byte_limit(span)


def check_magic(data: NDArray[np.uint8], kind: str) -> None:
    """Check the first four bytes of a serialised index. SnapshotDamaged when they are not those of this kind."""
    magic = data[:4].tobytes()
    if magic != FORMS[kind].magic:
        raise SnapshotDamaged(f"expected {FORMS[kind].magic!r} to begin a {kind} index, found {magic!r}")


def deserialised(data: NDArray[np.uint8], kind: str) -> Any:
    """Deserialise a FAISS index; check it with `check_loaded` before use. SnapshotDamaged when FAISS cannot read it."""
    check_magic(data, kind)
    faiss = faiss_module()
    load = faiss.deserialize_index_binary if is_binary(kind) else faiss.deserialize_index
    try:
        with limited(len(data)):
            return load(data)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise SnapshotDamaged(f"FAISS cannot read this {kind} index: {reason[0]}") from error


def check_loaded(index: Any, kind: str, dim: int, count: int) -> None:
    """Check that the index and all its parts match kind, dim and count. SnapshotDamaged when they do not."""
    faiss = faiss_module()
    metric = faiss.METRIC_L2 if is_binary(kind) else faiss.METRIC_INNER_PRODUCT  # Hamming counts as L2
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
        _check_lists(inverted(index, kind), count)


def _parts(index: Any, kind: str, count: int) -> Iterator[tuple[Any, str, int]]:
    """Yield the index and its nested indexes, outermost first, each with the expected FAISS class and size."""
    faiss = faiss_module()
    downcast = faiss.downcast_IndexBinary if is_binary(kind) else faiss.downcast_index
    flat = "IndexBinaryFlat" if is_binary(kind) else "IndexFlatIP"
    yield index, FORMS[kind].type, count
    if "hnsw" in kind or kind == "cagra":
        yield downcast(index.storage), flat, count
    if kind == "ivf-pq":
        yield downcast(index.refine_index), "IndexScalarQuantizer", count
        yield downcast(index.base_index), "IndexIVFPQFastScan", count
    if "ivf" in kind:
        found = inverted(index, kind)
        yield downcast(found.quantizer), flat, found.nlist


def _check_lists(found: Any, count: int) -> None:
    """Check that the inverted lists hold each of the ids 0 to count - 1 once. SnapshotDamaged when they do not."""
    lists = found.invlists
    sizes = [lists.list_size(i) for i in range(lists.nlist)]
    if lists.nlist != found.nlist or sum(sizes) != count:
        raise SnapshotDamaged(
            f"expected {found.nlist} lists of {count} ids together, found {lists.nlist} of {sum(sizes)}"
        )
    seen = np.zeros(count, bool)
    for i in np.flatnonzero(sizes).tolist():
        ids = faiss_module().rev_swig_ptr(lists.get_ids(i), sizes[i])
        if ids.min() < 0 or ids.max() >= count:
            raise SnapshotDamaged(f"expected ids from 0 to {count - 1}, found {ids.min()} to {ids.max()}")
        seen[ids] = True
    if not seen.all():
        raise SnapshotDamaged(f"expected each id once, found {count - int(seen.sum())} of {count} missing")

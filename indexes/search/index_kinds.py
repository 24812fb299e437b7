"""The kinds of index there are, and what FAISS calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmcache.indexes.errors import FaissMissing


class Form(NamedTuple):
    """recipe: for FAISS' index factory; magic: first four bytes serialised; type: FAISS class then."""

    recipe: str
    magic: bytes
    type: str


FORMS = {
    "flat": Form("Flat", b"IxFI", "IndexFlatIP"),
    "ivf-flat": Form("IVF{lists},Flat", b"IwFl", "IndexIVFFlat"),
    "ivf-sq8": Form("IVF{lists},SQ8", b"IwSq", "IndexIVFScalarQuantizer"),
    "ivf-fp16": Form("IVF{lists},SQfp16", b"IwSq", "IndexIVFScalarQuantizer"),
    # Four-bit codes of two components each, scanned in registers; the best are compared again, in float16.
    # Eight-bit codes took 54 s instead of 1.4 s to train on 80,000 vectors, and were slower to search.
    "ivf-pq": Form("IVF{lists},PQ{parts}x4fsr,Refine(SQfp16)", b"IxRF", "IndexRefine"),
    "hnsw": Form("HNSW32", b"IHNf", "IndexHNSWFlat"),
    "cagra": Form("", b"IHc2", "IndexHNSWCagra"),
    "binary-flat": Form("BFlat", b"IBxF", "IndexBinaryFlat"),
    "binary-ivf": Form("BIVF{lists}", b"IBwF", "IndexBinaryIVF"),
    "binary-hnsw": Form("BHNSW32", b"IBHf", "IndexBinaryHNSW"),
    "torch": Form("float32", b"LTf4", ""),
    "torch-fp16": Form("float16", b"LTf2", ""),
}
KINDS = tuple(FORMS)
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


def faiss_module() -> Any:
    """The module, imported on first use: a cache of exact matches does without."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":  # a GPU build that lacks its CUDA libraries says itself what to install
            raise
        raise FaissMissing from error
    return faiss


def is_binary(kind: str) -> bool:
    """Whether it is an index over sign bits."""
    return kind.startswith("binary-")


def inverted(index: Any, kind: str) -> Any:
    """The part that has inverted lists."""
    return faiss_module().downcast_index(index.base_index) if kind == "ivf-pq" else index

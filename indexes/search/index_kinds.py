"""Kinds of similarity index, and their FAISS names."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmcache.indexes.errors import FaissMissing


class Form(NamedTuple):
    """FAISS names of an index kind.

    recipe: for FAISS' index factory, or the torch dtype. magic: first four serialised bytes. type: deserialised class.
    """

    recipe: str
    magic: bytes
    type: str


FORMS = {
    "flat": Form("Flat", b"IxFI", "IndexFlatIP"),
    "ivf-flat": Form("IVF{lists},Flat", b"IwFl", "IndexIVFFlat"),
    "ivf-sq8": Form("IVF{lists},SQ8", b"IwSq", "IndexIVFScalarQuantizer"),
    "ivf-fp16": Form("IVF{lists},SQfp16", b"IwSq", "IndexIVFScalarQuantizer"),
    # Four-bit codes of two components each, scanned in registers; the best candidates are re-ranked in float16.
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
ivf-flat: exact within the probed lists.
ivf-sq8: a quarter of the memory; similarities have an error of at most 0.005 (from 64 components on), so the order of
neighbours that are closer to each other than that may be wrong.
ivf-fp16: half the memory; similarities have an error of at most 0.0001.
ivf-pq: codes of four bits for two components, scanned in registers; the best 64 are re-ranked with the precision of
ivf-fp16. The fastest kind from 100,000 vectors on, in 0.6 of the memory of ivf-flat.
hnsw: the most accurate of the fast kinds on distinct vectors; slow to build; where hundreds of vectors are equal, its
graph becomes disconnected and it misses other vectors.
cagra: built on a GPU, searched on CPU or GPU.
binary-*: over sign bits.
torch: exact, by a matrix product in torch on the device; needs no FAISS, and never returns deleted rows.
torch-fp16: half the memory; similarities have an error of at most 0.0002."""


def faiss_module() -> Any:
    """Import FAISS on first use: a cache of exact matches needs none. FaissMissing when it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":  # a GPU build without its CUDA libraries says what to install
            raise
        raise FaissMissing from error
    return faiss


def is_binary(kind: str) -> bool:
    """Return whether this is a kind over sign bits."""
    return kind.startswith("binary-")


def inverted(index: Any, kind: str) -> Any:
    """Return the part of a FAISS index that has inverted lists."""
    return faiss_module().downcast_index(index.base_index) if kind == "ivf-pq" else index

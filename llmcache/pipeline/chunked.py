"""Chunks that fit a model, and the vector of a document from those of its chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.document import Document
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError
from llmcache.model.private_tokenizer import private_copy
from llmcache.pipeline.batches import Cut
from llmcache.pipeline.chunk_places import NoChunk, chunk_places
from llmcache.pipeline.chunking import (
    LEAST,
    LIMIT,
    Chunk,
    chunks,
)

Cutting: TypeAlias = Callable[[str], Iterable["Chunk | str | tuple[int, int]"]]
"""The user's own chunks of a text: as Chunks, as (start, end), or as parts of the text in their order."""

STRUCTURE = "structure"
_REMEMBERED = 1 << 17  # chunks known to fit, 16 MiB


@dataclass(frozen=True, slots=True)
class Chunked(Result):
    """What became of a document that was cut into chunks.

    output: float32 [width], the mean of the chunks' vectors weighted by their characters, of unit length where the
        model's vectors are; of a document that is one chunk, that chunk's vector itself.
    tier: "miss" when a chunk was computed, else "near" when one was near, else "exact". layer, source: where all
        chunks have the same, else None. similarity: the lowest, None for a miss.
    chunks: one result per chunk, whose id is "<document>#<start>-<end>". spans: int64 [chunks, 2], of characters.
    """

    chunks: tuple[Result, ...] = ()
    spans: NDArray[np.int64] | None = None

    @property
    def vectors(self) -> NDArray[np.float32]:
        """float32 [chunks, width], a copy."""
        return np.stack([one.output for one in self.chunks])


def cut_by(given: str | Cutting | None, model: SentenceTransformer, prompt: str | None) -> Cut | None:
    """What cuts documents into chunks, as `Pipeline(chunk=...)` says; None where texts stay whole."""
    if given is None:
        return None
    if given == STRUCTURE:
        return partial(_structure, Fitting(model, prompt))
    if callable(given):
        return partial(_by_caller, given)
    raise ConfigError(f"chunk is None, {STRUCTURE!r} or a function from a text to its chunks, got {given!r}")


def cut_name(given: str | Cutting | None) -> str:
    """A name of the cutting that another process can compare."""
    if callable(given):
        return f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', type(given).__name__)}"
    return str(given)


class Fitting:
    """Tells how many tokens texts have, without touching the tokenizer that the model uses: it cannot be shared."""

    def __init__(self, model: SentenceTransformer, prompt: str | None) -> None:
        fast: Any = getattr(model.tokenizer, "backend_tokenizer", None)
        self._fast: Any = type(fast).from_str(fast.to_str()) if fast is not None else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self._tokenizer: Any = model.tokenizer
        self._prompt = prompt or ""
        self.most: int | None = model.max_seq_length
        """Tokens that the model reads of a text; None where it has no limit."""
        self._fitting: set[bytes] = set()

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text, with prompt and special tokens."""
        prompted = [self._prompt + text for text in texts]
        if self._fast is not None:
            return [len(one) for one in self._fast.encode_batch_fast(prompted)]
        with private_copy(self._tokenizer) as slow:
            return [len(ids) for ids in slow(prompted, padding=False, truncation=False)["input_ids"]]

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Whether the model would not read each text to its end. Chunks that come again are not counted again."""
        if self.most is None:
            return [False] * len(texts)
        keys = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
        unknown = [i for i, key in enumerate(keys) if key not in self._fitting]
        counts = self.tokens([texts[i] for i in unknown]) if unknown else []
        long = {i for i, count in zip(unknown, counts, strict=True) if count > self.most}
        if len(self._fitting) > _REMEMBERED:
            self._fitting.clear()
        self._fitting.update(keys[i] for i in unknown if i not in long)
        return [i in long for i in range(len(texts))]

    def again(self, chunk: Chunk) -> list[Chunk]:
        """Cut a chunk that is too long in half, and the halves again, until the model reads each of them whole.

        A single character that is still too long stays as it is; `too_long` says so.
        """
        found = chunks(chunk.text, limit=max(1, len(chunk.text) // 2), least=0)
        if len(found) == 1:
            return [chunk]
        parts = [Chunk(chunk.start + part.start, chunk.start + part.end, part.text) for part in found]
        long = self.too_long([part.text for part in parts])
        return [half for part, cut in zip(parts, long, strict=True) for half in (self.again(part) if cut else [part])]


def _structure(fitting: Fitting, documents: list[Document]) -> list[list[Chunk] | str]:
    """Chunks of each document by its structure, or why it is refused: a part that the model would cut off."""
    cut = [chunks(document.text, limit=LIMIT, least=LEAST) or [_whole(document.text)] for document in documents]
    long = iter(fitting.too_long([chunk.text for document_chunks in cut for chunk in document_chunks]))
    return [_all_fitting(fitting, document_chunks, long) for document_chunks in cut]


def _all_fitting(fitting: Fitting, cut: list[Chunk], long: Iterator[bool]) -> list[Chunk] | str:
    """The chunks of one document, cut on until they fit. long: whether each is too long, taken from in step."""
    fitted: list[Chunk] = []
    refused: Chunk | None = None
    for chunk in cut:
        if not next(long):
            fitted.append(chunk)
            continue
        smaller = fitting.again(chunk)
        fitted += smaller
        if len(smaller) == 1:  # nothing left to cut
            refused = smaller[0]
        else:
            still = fitting.too_long([part.text for part in smaller])
            refused = next((part for part, over in zip(smaller, still, strict=True) if over), refused)
    if refused is not None:
        return (
            f"cannot be cut into parts that the model reads whole: {refused.text[:20]!r} at character "
            f"{refused.start:,} has more tokens than max_seq_length={fitting.most}"
        )
    return fitted


def _whole(text: str) -> Chunk:
    return Chunk(0, len(text), text)


def _by_caller(cutting: Cutting, documents: list[Document]) -> list[list[Chunk] | str]:
    return [_as_given(cutting, one.text) for one in documents]


def _as_given(cutting: Cutting, text: str) -> list[Chunk] | str:
    """The caller's chunks of one text with their places, or why the document is refused."""
    try:
        cut: Any = cutting(text)
        given = list(cut)
    except Exception as error:  # of one document: collected with it
        return f"cannot be cut: {type(error).__name__}: {error}"
    if isinstance(cut, str) and cut != text:
        return "cannot be cut: the function gave one text, not a list of chunks"
    places = chunk_places(text, [cut] if isinstance(cut, str) else given)
    if isinstance(places, NoChunk):
        return f"cannot be cut: {places.part!r:.60} is no part of its {len(text):,} characters"
    return [Chunk(start, end, text[start:end]) for start, end in places] or [_whole(text)]


def pooled(vectors: NDArray[np.float32], weights: NDArray[np.int64], *, unit: bool) -> NDArray[np.float32]:
    """The weighted mean of some vectors. vectors: float32 [n, width]; weights: [n], not negative. float32 [width].

    unit: scale the mean to unit length. One vector is given back as it is.
    """
    if len(vectors) == 1:
        only: NDArray[np.float32] = vectors[0]
        return only
    shares = np.maximum(weights, 1).astype(np.float64)
    mean: NDArray[np.float64] = (shares / shares.sum()) @ vectors.astype(np.float64)
    length = float(np.linalg.norm(mean))
    return (mean / length if unit and length > 0 else mean).astype(np.float32)


def together(document: Document, chunks: Sequence[Chunk], found: Sequence[Result], *, unit: bool) -> Chunked:
    """The document's result from those of its chunks."""
    spans = np.array([(one.start, one.end) for one in chunks], np.int64)
    output = pooled(np.stack([one.output for one in found]), spans[:, 1] - spans[:, 0], unit=unit)
    tier = next((one for one in ("miss", "near") if any(result.tier == one for result in found)), "exact")
    similarities = [one.similarity for one in found if one.similarity is not None]
    layers, sources = {one.layer for one in found}, {one.source for one in found}
    return Chunked(
        document.id,
        output,
        tier,
        layers.pop() if len(layers) == 1 else None,
        sources.pop() if len(sources) == 1 else None,
        min(similarities) if tier != "miss" else None,
        any(one.audited for one in found),
        min((one.consensus for one in found if one.consensus is not None), default=None),
        tuple(found),
        spans,
    )


def chunk_documents(document: Document, chunks: Sequence[Chunk]) -> list[Document]:
    """The chunks as documents of their own, "<id>#<start>-<end>"."""
    return [replace(document, id=f"{document.id}#{one.start}-{one.end}", text=one.text) for one in chunks]


def gives_unit_vectors(model: Any) -> bool:
    """Whether a SentenceTransformer ends with a normalisation."""
    return any(type(module).__name__ == "Normalize" for module in model)

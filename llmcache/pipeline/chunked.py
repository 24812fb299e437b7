"""Cut documents into chunks that fit a model, and pool the chunks' vectors into one of the document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.document import Document, only_text
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
from llmcache.pipeline.late_chunks import Window

Cutting: TypeAlias = Callable[[str], Iterable["Chunk | str | tuple[int, int]"]]
"""Function of the user from a text to its chunks: Chunks, pairs (start, end), or substrings in order."""

STRUCTURE = "structure"
_MOST_FITTING = 1 << 17  # texts known to fit that are remembered, 16 MiB


@dataclass(frozen=True, slots=True)
class Chunked(Result):
    """Result of a document that was cut into chunks.

    output: float32 [width], mean of the chunks' vectors weighted by their characters, scaled to unit length if the
        model's vectors are; for a document of one chunk, the vector of that chunk.
    tier: "miss" if any chunk was computed, else "near" if any was a near match, else "exact". layer, source: the
        common value of all chunks, else None. similarity: the lowest of the chunks', None for a miss.
    chunks: result of each chunk, with the id "<document>#<start>-<end>". spans: int64 [chunks, 2], in characters.
    """

    chunks: tuple[Result, ...] = ()
    spans: NDArray[np.int64] | None = None

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Vectors of the chunks, float32 [chunks, width], a copy."""
        return np.stack([chunk.output for chunk in self.chunks])


def cut_by(option: str | Cutting | None, model: SentenceTransformer, prompt: str | None) -> Cut | None:
    """Return the function that cuts documents. option: see `Pipeline(chunk=...)`; None leaves texts whole.

    ConfigError for anything else than None, "structure" or a function.
    """
    if option is None:
        return None
    if option == STRUCTURE:
        return partial(_structure, Fitting(model, prompt))
    if callable(option):
        return partial(_by_caller, option)
    raise ConfigError(f"chunk is None, {STRUCTURE!r} or a function from a text to its chunks, got {option!r}")


def cut_name(option: str | Cutting | None) -> str:
    """Return a name of the cutting function, so that another process can tell whether it uses the same."""
    if callable(option):
        return f"{getattr(option, '__module__', '')}.{getattr(option, '__qualname__', type(option).__name__)}"
    return str(option)


class Fitting:
    """Token counts of texts, with a copy of the model's tokenizer, since that cannot be shared between threads."""

    def __init__(self, model: SentenceTransformer, prompt: str | None) -> None:
        fast: Any = getattr(model.tokenizer, "backend_tokenizer", None)
        self._fast: Any = type(fast).from_str(fast.to_str()) if fast is not None else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self._tokenizer: Any = model.tokenizer
        self._prompt = prompt or ""
        self.most: int | None = model.max_seq_length
        """Maximum number of tokens that the model reads of a text; None for no limit."""
        self._fitting: set[bytes] = set()

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, with prompt and special tokens."""
        prompted = [self._prompt + text for text in texts]
        if self._fast is not None:
            return [len(encoding) for encoding in self._fast.encode_batch_fast(prompted)]
        with private_copy(self._tokenizer) as slow:
            return [len(ids) for ids in slow(prompted, padding=False, truncation=False)["input_ids"]]

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Tell for each text whether the model would truncate it. Texts known to fit are not tokenised again."""
        if self.most is None:
            return [False] * len(texts)
        keys = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
        unknown = [i for i, key in enumerate(keys) if key not in self._fitting]
        counts = self.tokens([texts[i] for i in unknown]) if unknown else []
        long = {i for i, count in zip(unknown, counts, strict=True) if count > self.most}
        if len(self._fitting) > _MOST_FITTING:
            self._fitting.clear()
        self._fitting.update(keys[i] for i in unknown if i not in long)
        return [i in long for i in range(len(texts))]

    def again(self, chunk: Chunk) -> list[Chunk]:
        """Cut a chunk that is too long in half, recursively, until no part is truncated. Returns the parts.

        A single character that is still too long stays as it is; `too_long` reports it.
        """
        halves = chunks(chunk.text, limit=max(1, len(chunk.text) // 2), least=0)
        if len(halves) == 1:
            return [chunk]
        parts = [Chunk(chunk.start + half.start, chunk.start + half.end, half.text) for half in halves]
        long = self.too_long([part.text for part in parts])
        return [half for part, cut in zip(parts, long, strict=True) for half in (self.again(part) if cut else [part])]


def _structure(fitting: Fitting, documents: list[Document]) -> list[list[Chunk] | str]:
    """Cut documents by their structure. Returns the chunks of each, or the reason why one cannot be made to fit."""
    texts = map(only_text, documents)
    cut = [chunks(text, limit=LIMIT, least=LEAST) or [_whole(text)] for text in texts]
    long = iter(fitting.too_long([chunk.text for document_chunks in cut for chunk in document_chunks]))
    return [_all_fitting(fitting, document_chunks, long) for document_chunks in cut]


def _all_fitting(fitting: Fitting, cut: list[Chunk], long: Iterator[bool]) -> list[Chunk] | str:
    """Cut one document's chunks further until they fit. long: for each chunk, whether it is too long."""
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
    return [_cut_by_caller(cutting, only_text(document)) for document in documents]


def _cut_by_caller(cutting: Cutting, text: str) -> list[Chunk] | str:
    """Cut one text with the caller's function. Returns the chunks, or the reason why the document is refused."""
    try:
        cut: Any = cutting(text)
        parts = list(cut)
    except Exception as error:  # fails this document only, with its reason among the refused records
        return f"cannot be cut: {type(error).__name__}: {error}"
    if isinstance(cut, str) and cut != text:
        return "cannot be cut: the function gave one text, not a list of chunks"
    places = chunk_places(text, [cut] if isinstance(cut, str) else parts)
    if isinstance(places, NoChunk):
        return f"cannot be cut: {places.part!r:.60} is no part of its {len(text):,} characters"
    return [Chunk(start, end, text[start:end]) for start, end in places] or [_whole(text)]


def pooled(vectors: NDArray[np.float32], weights: NDArray[np.int64], *, unit: bool) -> NDArray[np.float32]:
    """Average vectors by weight. vectors: float32 [n, width]; weights: [n], not negative.

    unit: scale the mean to unit length. Returns float32 [width]; a single vector is returned as it is.
    """
    if len(vectors) == 1:
        only: NDArray[np.float32] = vectors[0]
        return only
    shares = np.maximum(weights, 1).astype(np.float64)
    mean: NDArray[np.float64] = (shares / shares.sum()) @ vectors.astype(np.float64)
    length = float(np.linalg.norm(mean))
    return (mean / length if unit and length > 0 else mean).astype(np.float32)


def together(document: Document, chunks: Sequence[Chunk], results: Sequence[Result], *, unit: bool) -> Chunked:
    """Combine the results of a document's chunks. results: one per chunk. unit: see `pooled`."""
    spans = np.array([(chunk.start, chunk.end) for chunk in chunks], np.int64)
    output = pooled(np.stack([result.output for result in results]), spans[:, 1] - spans[:, 0], unit=unit)
    return Chunked(
        document.id,
        output,
        *_common(results),
        any(result.audited for result in results),
        min((result.consensus for result in results if result.consensus is not None), default=None),
        tuple(results),
        spans,
    )


def part_documents(document: Document, parts: Sequence[Chunk | Window]) -> list[Document]:
    """Return each chunk or window as a document with the id "<id>#<start>-<end>"; a window of all keeps the id."""
    text = only_text(document)
    return [
        document
        if isinstance(part, Window) and (part.start, part.end) == (0, len(text))
        else replace(document, id=f"{document.id}#{part.start}-{part.end}", text=text[part.start : part.end])
        for part in parts
    ]


def pooled_results(
    document: Document, chunks: Sequence[Chunk], windows: Sequence[Result], outputs: NDArray[np.float32]
) -> list[Result]:
    """Return the results of late chunks. windows: results of the document's windows. outputs: float32 [chunks, width].

    A chunk counts as computed if any of the windows was.
    """
    tier, layer, source, similarity = _common(windows)
    return [
        Result(f"{document.id}#{chunk.start}-{chunk.end}", output, tier, layer, source, similarity)
        for chunk, output in zip(chunks, outputs, strict=True)
    ]


def _common(results: Sequence[Result]) -> tuple[str, str | None, str | None, float | None]:
    """Return tier, layer, source and similarity of several results together; see `Chunked`."""
    tier = next((tier for tier in ("miss", "near") if any(result.tier == tier for result in results)), "exact")
    similarities = [result.similarity for result in results if result.similarity is not None]
    layers, sources = {result.layer for result in results}, {result.source for result in results}
    return (
        tier,
        layers.pop() if len(layers) == 1 else None,
        sources.pop() if len(sources) == 1 else None,
        min(similarities) if tier != "miss" else None,
    )


def gives_unit_vectors(model: Any) -> bool:
    """Return whether a SentenceTransformer has a normalisation module."""
    return any(type(module).__name__ == "Normalize" for module in model)

"""Comparison of chunks by structure with fixed windows on revised documents: exact repeats, documents per second."""

from __future__ import annotations

import json
import lzma
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.cache import LLMCache
from llmcache.document import Document
from llmcache.pipeline.chunked import STRUCTURE, Chunked, cut_by
from llmcache.pipeline.pipeline import Pipeline

Revision = tuple[str, str]  # name of the document, text


def revisions(path: Path) -> list[Revision]:
    """Read revisions in the order of a file of JSON lines with "doc" and "text", compressed with xz."""
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [(fact["doc"], fact["text"]) for fact in map(json.loads, lines)]


def repeats(history: Sequence[Revision], chunks: Callable[[str], Iterable[str]]) -> dict[str, Any]:
    """Return the share of characters in chunks that occurred before; first revisions of documents do not count."""
    seen: set[str] = set()
    known: set[str] = set()
    total = repeated = count = 0
    for name, text in history:
        first = name not in known
        known.add(name)
        for chunk in chunks(text):
            if not first:
                total, count, repeated = total + len(chunk), count + 1, repeated + len(chunk) * (chunk in seen)
            seen.add(chunk)
    return {"chunks": count, "mean_characters": total / count, "repeated": repeated / total}


def words(count: int) -> Callable[[str], Iterable[str]]:
    """Return a function that cuts a text into windows of `count` words."""

    def cut(text: str) -> Iterable[str]:
        parts = text.split()
        return (" ".join(parts[start : start + count]) for start in range(0, len(parts), count))

    return cut


def characters(count: int) -> Callable[[str], Iterable[str]]:
    """Return a function that cuts a text into windows of `count` characters."""
    return lambda text: (text[start : start + count] for start in range(0, len(text), count))


def measured(model: SentenceTransformer, path: Path, histories: int) -> dict[str, Any]:
    """Measure repeats over all revisions, and documents per second over the revisions of a few documents.

    histories: number of documents whose revisions are encoded, drawn evenly.
    """
    history = revisions(path)
    cut = cut_by(STRUCTURE, model, None)
    assert cut is not None

    def structure(text: str) -> list[str]:
        (chunks,) = cut([Document("", text)])
        return [chunk.text for chunk in chunks if not isinstance(chunks, str) and not isinstance(chunk, str)]

    rows = [{"chunks_are": "structure", **repeats(history, structure)}]
    size = round(rows[0]["mean_characters"])
    mean_word = np.mean([len(text) / max(1, len(text.split())) for _, text in history])
    for name, other in (
        (f"windows of {size} characters", characters(size)),
        (f"windows of {round(size / mean_word)} words", words(round(size / mean_word))),
        ("windows of 180 words", words(180)),
        ("blank lines", lambda text: filter(None, map(str.strip, text.split("\n\n")))),
    ):
        rows.append({"chunks_are": name, **repeats(history, other)})
    names = list(dict.fromkeys(name for name, _ in history))
    chosen = set(names[:: max(1, len(names) // histories)][:histories])
    return {"rows": rows, "rates": rates(model, [text for name, text in history if name in chosen], structure)}


def rates(model: SentenceTransformer, texts: Sequence[str], cut: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    """Measure documents per second: all chunks of all revisions encoded, then through an empty cache, then again.

    The encoder alone gets all chunks in one call, which the library sorts by length: its best case.
    """
    model.encode(list(texts[:2]))
    began = time.perf_counter()
    plain = model.encode([chunk for text in texts for chunk in cut(text)])
    rows = [_rate("encoding every revision", len(texts), time.perf_counter() - began, None)]
    with tempfile.TemporaryDirectory() as folder, LLMCache.open(folder, model) as cache:
        for name in ("cache, nothing known", "cache, all known"):
            before = cache.stats().counters.misses
            began = time.perf_counter()
            results = [item for item in Pipeline(cache, chunk=STRUCTURE).run(texts) if isinstance(item, Chunked)]
            seconds = time.perf_counter() - began
            vectors = np.concatenate([result.vectors for result in results])
            rows.append(_rate(name, len(texts), seconds, float(np.abs(vectors - plain).max())))
            rows[-1]["computed_chunks"] = cache.stats().counters.misses - before
            rows[-1]["chunks"] = len(vectors)
    for row in rows:
        row["times"] = rows[0]["seconds"] / row["seconds"]
    return rows


def _rate(name: str, documents: int, seconds: float, difference: float | None) -> dict[str, Any]:
    return {
        "name": name, "documents": documents, "seconds": seconds, "documents_per_second": documents / seconds,
        "difference": difference,
    }  # fmt: skip

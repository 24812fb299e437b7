"""Comparison of chunks by structure with fixed windows on revised documents: exact repeats, documents per second."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.datasets import objects
from llmcache.bench.harness.turns import Turn, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.document import Document
from llmcache.pipeline.chunked import STRUCTURE, Chunked, cut_by
from llmcache.pipeline.pipeline import Pipeline

Revision = tuple[str, str]  # name of the document, text


def revisions(path: Path) -> list[Revision]:
    """Read revisions in the order of a file of JSON lines with "doc" and "text", compressed with xz."""
    return [(fact["doc"], fact["text"]) for fact in objects(path)]


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
    plain = "encoding every revision"
    with tempfile.TemporaryDirectory() as folder, LLMCache.open(folder, model) as cache:

        def run() -> Any:
            before = cache.stats().counters.misses
            results = [item for item in Pipeline(cache, chunk=STRUCTURE).run(texts) if isinstance(item, Chunked)]
            return [result.vectors for result in results], cache.stats().counters.misses - before

        turns = [Turn(plain, len(texts), steady(lambda: model.encode([*chain.from_iterable(map(cut, texts))])), plain)]
        turns += [Turn(f"cache, {known} known", len(texts), steady(run), plain) for known in ("nothing", "all")]
        made = in_turn(turns, 1, warm=0)
    expected = made[plain].outputs[0]
    for row in list(made.values())[1:]:
        ((vectors, computed),) = row.outputs
        row.outputs, row.facts = [np.concatenate(vectors)], {"computed_chunks": computed, "chunks": len(expected)}
        row.compare([expected])
    return [
        {"name": row.name, "documents": row.documents, "seconds": row.median, "documents_per_second": row.rate,
         "difference": row.difference, **row.facts, "times": row.ratio}
        for row in made.values()
    ]  # fmt: skip

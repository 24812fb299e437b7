"""Split a stream of records into parts of bounded size, and prefetch the parts in a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmcache.document import Document, characters, only_text
from llmcache.model.keys import framed
from llmcache.pipeline.chunking import Chunk
from llmcache.pipeline.late_chunks import Window
from llmcache.records import RejectedRecord, Taken

T = TypeVar("T")
CHARACTERS = 1 << 18  # a part ends with the document that reaches this total

Cut = Callable[[list[Document]], list[list[Chunk] | str]]
"""Function from documents to the chunks of each, or to the reason why a document cannot be cut."""
FindWindows = Callable[[Sequence[str], Sequence[Sequence[Chunk]]], list[list[Window] | str]]
"""Function from texts and their chunks to the windows of each text, or to the reason why chunks cannot be pooled."""

Prepare = Callable[[list[Document]], list[Any]]
"""Function from documents to the prompt of each, or to the reason (a str) why there is none."""


@dataclass(slots=True)
class DocumentBatch:
    """Consecutive documents of the stream, which are answered together.

    chunks: chunks of each document, None if texts are not cut. windows: for late chunks, parts of each document that
    the model reads; else None. prompts: of a language-model job, what is asked for each document; else None.
    refused: records of the part that are no documents.
    end: position in the stream after the part. digest: digest of all records up to there. error: exception that ended
    the stream after this part.
    """

    documents: list[Document] = field(default_factory=list)
    chunks: list[list[Chunk]] | None = None
    windows: list[list[Window]] | None = None
    prompts: list[Any] | None = None
    refused: list[RejectedRecord] = field(default_factory=list)
    end: int = 0
    digest: bytes = b""
    error: BaseException | None = None


def parts(
    stream: Iterable[Taken],
    most: int,
    cut: Cut | None,
    windows: FindWindows | None = None,
    *,
    prepare: Prepare | None = None,
    most_characters: int = CHARACTERS,
    digests: bool = False,
) -> Iterator[DocumentBatch]:
    """Split the stream into parts of `most` documents, fewer where their texts reach `most_characters`.

    cut: cuts documents into chunks; None leaves texts whole. windows: finds the windows for late chunks. prepare: makes
    the prompts of a language-model job.
    digests: fill in `DocumentBatch.digest`.
    The boundaries depend on the records alone, never on timing. The last part carries the error that ended the stream.
    """
    part, size, end, digest = DocumentBatch(), 0, 0, b""
    places: list[int] = []

    def finished() -> DocumentBatch:
        nonlocal digest
        part.end = end
        if digests:
            digest = part.digest = _digest(digest, part)
        if cut is not None:
            _cut(part, places, cut)
            if windows is not None:
                _add_windows(part, places, windows)
        if prepare is not None:
            part.prompts = _accepted(part, places, prepare(part.documents))
        return part

    try:
        for taken in stream:
            if isinstance(taken, RejectedRecord):
                part.refused.append(taken)
            else:
                part.documents.append(taken)
                places.append(end)
                size += characters(taken.text)
            end += 1
            if len(part.documents) >= most or size >= most_characters or len(part.refused) >= most:
                yield finished()
                part, size, places = DocumentBatch(), 0, []
    except Exception as error:  # raised later, where results are taken: the records before it are answered first
        part.error = error
    if part.documents or part.refused or part.error:
        yield finished()


def _digest(before: bytes, part: DocumentBatch) -> bytes:
    sha256 = hashlib.sha256(before)
    for document in part.documents:
        texts = (document.text,) if isinstance(document.text, str) else document.text
        sha256.update(framed(document.id.encode(), *(text.encode() for text in texts)))
    for record in part.refused:
        sha256.update(framed(str(record.place).encode(), record.reason.encode("utf-8", "surrogatepass")))
    return sha256.digest()


def _cut(part: DocumentBatch, places: list[int], cut: Cut) -> None:
    """Fill in the part's chunks; a document that cannot be cut moves to the refused records."""
    part.chunks = _accepted(part, places, cut(part.documents))


def _add_windows(part: DocumentBatch, places: list[int], windows: FindWindows) -> None:
    """Fill in the windows; a document whose chunks cannot be pooled moves to the refused records."""
    assert part.chunks is not None
    found = windows([only_text(document) for document in part.documents], part.chunks)
    part.chunks = [chunks for chunks, result in zip(part.chunks, found, strict=True) if not isinstance(result, str)]
    part.windows = _accepted(part, places, found)


def _accepted(part: DocumentBatch, places: list[int], results: list[T | str]) -> list[T]:
    """Return the results that are no reasons; the documents with a reason move to the refused records.

    places: positions of the part's documents in the stream; they lose those of the refused documents.
    """
    reasons = {i: result for i, result in enumerate(results) if isinstance(result, str)}
    part.refused += [RejectedRecord(places[i], part.documents[i].id, reason) for i, reason in reasons.items()]
    part.refused.sort(key=lambda record: record.place)
    part.documents = [document for i, document in enumerate(part.documents) if i not in reasons]
    places[:] = [place for i, place in enumerate(places) if i not in reasons]
    return [result for result in results if not isinstance(result, str)]


def ahead(stream: Iterator[DocumentBatch], count: int) -> Generator[DocumentBatch]:
    """Prefetch up to `count` parts in a thread; 0 reads in the caller's thread. Yields the same parts.

    Closing the generator ends the thread. If the thread waits inside the caller's iterator, it ends when that returns.
    """
    if count == 0:
        yield from stream
        return
    waiting: queue.Queue[DocumentBatch | None] = queue.Queue(count)
    stopped = threading.Event()

    def read() -> None:
        try:
            for part in stream:
                if not stopped.is_set():
                    waiting.put(part)
                if stopped.is_set():
                    return
        except BaseException as error:  # such as SystemExit in the iterator; a silent end would look like the last part
            waiting.put(DocumentBatch(error=error))
        finally:
            if not stopped.is_set():
                waiting.put(None)

    thread = threading.Thread(target=read, name="llmcache-reader", daemon=True)
    thread.start()
    try:
        while (part := waiting.get()) is not None:
            yield part
    finally:
        stopped.set()
        while thread.is_alive():  # it may be blocked on a full queue
            with suppress(queue.Empty):
                waiting.get(timeout=0.05)
                continue
            break
        thread.join(timeout=0.05)

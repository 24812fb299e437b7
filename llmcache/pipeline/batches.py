"""A stream of records cut into parts of bounded size, read ahead by a thread of its own."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from llmcache.document import Document
from llmcache.model.keys import framed
from llmcache.pipeline.chunking import Chunk
from llmcache.records import RejectedRecord, Taken

CHARACTERS = 1 << 18  # a part ends at the document that reaches them

Cut = Callable[[list[Document]], list[list[Chunk] | str]]
"""The chunks of each document, or why it has none."""


@dataclass(slots=True)
class Part:
    """Documents that are answered together.

    chunks: of each document, None where texts stay whole. refused: records among them that are no documents. end:
    place in the stream after the part. digest: of all that was read until there. error: what reading ended with.
    """

    documents: list[Document] = field(default_factory=list)
    chunks: list[list[Chunk]] | None = None
    refused: list[RejectedRecord] = field(default_factory=list)
    end: int = 0
    digest: bytes = b""
    error: BaseException | None = None


def parts(stream: Iterable[Taken], most: int, cut: Cut | None, *, digests: bool = False) -> Iterator[Part]:
    """The stream in parts: each of `most` documents, fewer where these would pass 262,144 characters.

    Where a part ends depends on the records alone, never on time. The last part carries the error that ended the
    stream. digests: fill in `Part.digest`.
    """
    part, characters, end, digest = Part(), 0, 0, b""
    places: list[int] = []

    def finished() -> Part:
        nonlocal digest
        part.end = end
        if digests:
            digest = part.digest = _digest(digest, part)
        if cut is not None:
            _cut(part, places, cut)
        return part

    try:
        for taken in stream:
            if isinstance(taken, RejectedRecord):
                part.refused.append(taken)
            else:
                part.documents.append(taken)
                places.append(end)
                characters += len(taken.text)
            end += 1
            if len(part.documents) >= most or characters >= CHARACTERS or len(part.refused) >= most:
                yield finished()
                part, characters, places = Part(), 0, []
    except Exception as error:  # to be raised where the results are: what was read before it is answered first
        part.error = error
    if part.documents or part.refused or part.error:
        yield finished()


def _digest(before: bytes, part: Part) -> bytes:
    running = hashlib.sha256(before)
    for document in part.documents:
        running.update(framed(document.id.encode(), document.text.encode()))
    for one in part.refused:
        running.update(framed(str(one.place).encode(), one.reason.encode("utf-8", "surrogatepass")))
    return running.digest()


def _cut(part: Part, places: list[int], cut: Cut) -> None:
    """Fill in the chunks; a document that cannot be cut is refused."""
    found = cut(part.documents)
    lost = {i: one for i, one in enumerate(found) if isinstance(one, str)}
    part.refused += [RejectedRecord(places[i], part.documents[i].id, reason) for i, reason in lost.items()]
    part.documents = [one for i, one in enumerate(part.documents) if i not in lost]
    part.chunks = [one for one in found if not isinstance(one, str)]


def ahead(found: Iterator[Part], count: int) -> Generator[Part]:
    """The same parts, up to `count` of them read before they are asked for; 0 reads in the caller's thread.

    Closing it ends the thread, unless that waits inside the caller's own iterator: then it ends when that returns.
    """
    if count == 0:
        yield from found
        return
    waiting: queue.Queue[Part | None] = queue.Queue(count)
    stopped = threading.Event()

    def read() -> None:
        try:
            for part in found:
                if not stopped.is_set():
                    waiting.put(part)
                if stopped.is_set():
                    return
        except BaseException as error:  # such as SystemExit in the iterator: a silent end would look like the last part
            waiting.put(Part(error=error))
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
        while thread.is_alive():  # it may be waiting for a place in the queue
            with suppress(queue.Empty):
                waiting.get(timeout=0.05)
                continue
            break
        thread.join(timeout=0.05)

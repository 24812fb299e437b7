"""Batch document pipelines: documents of any kind in, results with their provenance out, in order."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from llmcache.cache import LLMCache
from llmcache.encoding.call import Progress, nothing
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.stats import unfinished
from llmcache.model.prompts import resolve
from llmcache.pipeline.batches import Part, ahead, parts
from llmcache.pipeline.checkpoints import (
    Written,
    check_target,
    clipped,
    resumable,
)
from llmcache.pipeline.chunked import (
    Cutting,
    chunk_documents,
    cut_by,
    cut_name,
    gives_unit_vectors,
    together,
)
from llmcache.pipeline.journal import beside, discard
from llmcache.pipeline.writers import result_writer
from llmcache.records import (
    MOST_CHARACTERS,
    FieldSpec,
    RejectedRecord,
    intake,
)

ERRORS_KEPT = 100
_BATCHES = 32  # in a part: enough to sort by length, and a stop loses no more than a part


class Pipeline:
    """Runs documents through a cache. Reading and cutting go on in a thread of their own, up to `prefetch` parts ahead.

    The cache is used by the thread that takes the results alone, so that several pipelines may share it.

    A part is 32 * batch_size documents, fewer where they pass 262,144 characters. In memory are, whatever the length
    of the corpus: `prefetch` + 2 parts of texts, the results of one part, and what the cache itself holds: entries
    that wait to be committed (at most 256 MiB of activations, or a sixteenth of `max_bytes`, or what one minute
    computes), and its tables, some 300 bytes for each entry of the store; `write` holds up to 4096 rows more. One
    document is as large as `max_characters` lets it be, and a part may pass its limit by one document.

    errors: what was wrong with the first 100 refused records, of all runs; refused: how many there were.
    """

    def __init__(
        self,
        cache: LLMCache,
        *,
        chunk: str | Cutting | None = None,
        per: str = "document",
        batch_size: int = 32,
        prefetch: int = 2,
        text_field: str = "text",
        id_field: str = "id",
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        strict: bool = False,
        max_characters: int = MOST_CHARACTERS,
        progress: Progress = nothing,
    ) -> None:
        """cache: open, with a SentenceTransformer.

        chunk: None gives texts to the model as they are, which cuts off what is beyond its length. "structure" cuts
            them at headings, paragraphs and sentences into parts that the model reads whole; a function from a text
            to its chunks (texts, or pairs of start and end) cuts as you like. Every chunk is looked up by itself.
        per: with chunks, one result per "document" (`Chunked`, with the chunks in it), or one per "chunk".
        batch_size: documents or chunks that the model computes at a time. prefetch: parts read ahead; 0 reads in the
            caller's thread, for iterables that cannot be used in another one, such as cursors of SQLite.
        text_field, id_field: of mappings, objects and frames.
        role, prompt_name, prompt: as in `LLMCache.encode`. strict: raise CorpusError at the first record that is no
            document, instead of collecting it. max_characters: of a document; a longer one is refused.
        progress: called with the numbers of documents (with chunks: of chunks) answered, and of these computed.
        ConfigError for settings that make no sense.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch, 0),
            ("max_characters", max_characters, 1),
        ):
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is a whole number from {least} on, got {value!r}")
        if per not in ("document", "chunk") or (per == "chunk" and chunk is None):
            raise ConfigError(f"per is 'document', or with chunk=... 'chunk', got {per!r}")
        self._width = cache.width  # ConfigError where the model gives no vectors
        model: Any = cache.model
        resolved = resolve(model.prompts, model.default_prompt_name, role=role, name=prompt_name, prompt=prompt)
        self._cache, self._per, self._prefetch, self._strict = cache, per, prefetch, strict
        self._cut, self._unit = cut_by(chunk, model, resolved), gives_unit_vectors(model)
        self._wanted = FieldSpec(text_field, id_field, max_characters)
        self._asked: dict[str, Any] = {
            "role": role, "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, "progress": progress,
        }  # fmt: skip
        self._most = _BATCHES * batch_size
        self._facts: dict[str, Any] = {
            "model": cache.identity.digest.hex(), "namespace": cache.namespace, "role": role, "prompt": resolved,
            "tau": cache.config.tau, "chunk": cut_name(chunk), "per": per, "batch_size": batch_size,
            "text_field": text_field, "id_field": id_field, "max_characters": max_characters,
        }  # fmt: skip
        self.errors: list[RejectedRecord] = []
        self.refused = 0

    def run(self, documents: Any) -> Generator[Result]:
        """One result per document, in order, as soon as its part is answered; with per="chunk" one per chunk.

        documents: any iterable of texts, `Document`s, mappings, dataclasses or other objects with the fields; a frame
            of pandas or polars, an Arrow table or its batches, a `datasets.Dataset`. See `intake`.
        A record that is no document has no result, and is noted in `errors`. What the iterable itself raises is
        raised here, after the results of all that came before. Stop taking results, or close the iterator, to stop;
        what was computed is in the cache.
        """
        with closing(self._parts(documents)) as found:
            for part in found:
                yield from self._answered(part)
                if part.error is not None:
                    raise part.error

    def write(
        self,
        documents: Any,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        max_documents: int | None = None,
        max_seconds: float | None = None,
    ) -> Written:
        """Run the documents and write one row per result into `out` (.parquet, .npy or .jsonl, see `result_writer`).

        resume: keep the results beside `out` until they are whole, in "<name>.unfinished", and go on with what is
            there. However often it is stopped, by Ctrl-C, an error or SIGKILL, the file is byte for byte that of a
            run that was not: results are durable before their entries are committed to the store, and what counts is
            the last point where both agree. That holds for exact matches, on one machine with one number of threads,
            while nobody else changes the store; near matches and a byte budget may answer otherwise after a stop. The
            documents must come again in the same order; those that were answered are read and compared.
        max_documents, max_seconds: stop at the end of the part that reaches it, to be resumed.
        ConfigError when the unfinished run is of another model, cutting, format or setting; CorpusError when its
        documents were others.
        """
        path = Path(out)
        for name, value in (("max_documents", max_documents), ("max_seconds", max_seconds)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is above 0, or None, got {value!r}")
        check_target(path)
        if resume or max_documents is not None or max_seconds is not None:
            return self._write_journaled(documents, path, resume, max_documents, max_seconds)
        discard(path)
        folder = self._cache.storing.store.folder
        run = unfinished.Run(beside(path).absolute(), self._cache.namespace)
        if self._cache.storing.store.writable:
            unfinished.note(folder, run)  # a purge finds what is left when this process is killed
        before, counts = self.refused, Counter[str]()
        try:
            with result_writer(path, width=self._width) as writer, closing(self._parts(documents)) as found:
                for part in found:
                    results = self._answered(part)
                    counts.update(one.tier for one in results)
                    writer.write(map(clipped, results))
                    if part.error is not None:
                        raise part.error
        finally:
            unfinished.forget(folder, run)
        return Written.of(path, counts, self.refused - before)

    def _write_journaled(
        self, documents: Any, path: Path, resume: bool, max_documents: int | None, max_seconds: float | None
    ) -> Written:
        began, before = time.monotonic(), self.refused
        with resumable(path, self._facts, self._width, self._cache.storing, resume=resume) as resumption:
            start = resumption.start
            with closing(self._parts(documents, digests=True)) as found:
                for part in found:
                    if part.error is not None:  # its part is not whole: another one once the documents can be read
                        raise part.error
                    if resumption.skip(part):
                        self._note(part.refused)
                        continue
                    resumption.take(part, self._answered(part))
                    over = max_seconds is not None and time.monotonic() - began >= max_seconds
                    if over or (max_documents is not None and resumption.rows - start.rows >= max_documents):
                        resumption.checkpoint()
                        return Written.of(path, resumption.tiers, self.refused - before, start.rows, finished=False)
            resumption.finish(path)
            return Written.of(path, resumption.tiers, self.refused - before, start.rows)

    def _parts(self, documents: Any, *, digests: bool = False) -> Generator[Part]:
        return ahead(parts(intake(documents, self._wanted), self._most, self._cut, digests=digests), self._prefetch)

    def _answered(self, part: Part) -> list[Result]:
        """The results of a part; its refused records are noted first."""
        self._note(part.refused)
        asked = part.documents
        if part.chunks is not None:
            both = zip(part.documents, part.chunks, strict=True)
            asked = [*chain.from_iterable(chunk_documents(document, chunks) for document, chunks in both)]
        found = list(self._cache.run(asked, chunk=max(1, len(asked)), **self._asked))
        if part.chunks is None or self._per == "chunk":
            return found
        upcoming = iter(found)
        return [
            together(document, chunks, [next(upcoming) for _ in chunks], unit=self._unit)
            for document, chunks in zip(part.documents, part.chunks, strict=True)
        ]

    def _note(self, refused: Iterable[RejectedRecord]) -> None:
        for one in refused:
            if self._strict:
                raise CorpusError(f"document {one.place} ({one.id!r:.60}) {one.reason}; strict=False collects such")
            self.refused += 1
            if len(self.errors) < ERRORS_KEPT:
                self.errors.append(one)

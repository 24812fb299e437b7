"""Document pipelines: run a stream of documents through a cache, and yield or write results with their provenance."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from llmcache.cache import LLMCache
from llmcache.document import Document, TextFields
from llmcache.encoding.call import Progress, nothing
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.stats import unfinished
from llmcache.model.encoders import text_fields
from llmcache.model.prompts import resolve
from llmcache.pipeline.batches import DocumentBatch, ahead, parts
from llmcache.pipeline.checkpoints import (
    Written,
    check_target,
    clipped,
    resumable,
)
from llmcache.pipeline.chunked import (
    Cutting,
    cut_by,
    cut_name,
    gives_unit_vectors,
    part_documents,
    pooled_results,
    together,
)
from llmcache.pipeline.chunking import Chunk
from llmcache.pipeline.journal import beside, discard
from llmcache.pipeline.late_chunks import LateChunks, Window
from llmcache.pipeline.writers import Form, result_writer
from llmcache.records import (
    MOST_CHARACTERS,
    FieldSpec,
    RejectedRecord,
    intake,
)

ERRORS_KEPT = 100
_BATCHES = 32  # batches in a part: enough to sort documents by length, and a stop loses at most one part


class Pipeline:
    """Pipeline of documents through a cache. A thread reads and cuts documents, up to `prefetch` parts ahead.

    Only the thread that takes the results uses the cache, so several pipelines may share it.

    A part is 32 * batch_size documents, fewer where their texts reach 262,144 characters. Memory does not depend on the
    length of the corpus: `prefetch` + 2 parts of texts; the results of one part; uncommitted entries of the cache (at
    most 256 MiB of activations, or a sixteenth of `max_bytes`, or those of one minute; and as much again while the
    background writer is writing) and its tables, some 300 bytes per entry of the store; in `write`, up to 4096 more
    rows. A document has at most `max_characters`, and a part may exceed its limit by one document.

    errors: the first 100 refused records, over all runs. refused: number of all refused records.
    """

    def __init__(
        self,
        cache: LLMCache,
        *,
        chunk: str | Cutting | None = None,
        per: str = "document",
        late: bool = False,
        output_value: str | None = None,
        batch_size: int = 32,
        prefetch: int = 2,
        text_field: TextFields | None = None,
        id_field: str = "id",
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        strict: bool = False,
        max_characters: int = MOST_CHARACTERS,
        progress: Progress = nothing,
    ) -> None:
        """cache: open cache of a model of sentence-transformers.

        chunk: None passes texts to the model as they are; it truncates those beyond its maximum length. "structure"
            cuts them at headings, paragraphs and sentences into chunks that the model reads in full. A function from a
            text to its chunks (substrings, or pairs of start and end) cuts as you like. Every chunk is looked up by
            itself. Pairs of texts cannot be cut.
        per: with chunks, one result per "document" (a `Chunked`, which includes the chunks' results), or per "chunk",
            which is the only choice for a SparseEncoder or a MultiVectorEncoder.
        late: True pools the chunks' vectors from the token embeddings of the whole document, which give every chunk the
            document as context. They are stored, so that cutting the same documents in another way needs no model. For
            SentenceTransformers with mean pooling; see `llmcache.pipeline.late_chunks`. The results of a part then need
            memory for the token embeddings of its documents, some 100 MB at width 384.
        output_value: "token_embeddings" gives the vectors of all tokens of each document; see `LLMCache.run`.
        batch_size: documents or chunks per batch of the model.
        prefetch: number of parts to read ahead; 0 reads in the caller's thread, for iterables that must not be used in
            another one, such as SQLite cursors.
        text_field, id_field: names of the fields of mappings, objects and frames. For a CrossEncoder text_field is a
            pair of names, in the order of the pair. None: "text", or ("query", "document") for a CrossEncoder.
        role, prompt_name, prompt: as in `LLMCache.encode`.
        strict: raise CorpusError at the first record that is no document, instead of collecting it in `errors`.
        max_characters: longest text of a document; records with longer ones are refused.
        progress: called with the number of documents (or chunks) answered, and the number of these that were computed.
        ConfigError for invalid settings.
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
        self._width = cache.width  # ConfigError if the model does not output vectors
        model: Any = cache.model
        text_field = text_field_of(model, text_field)
        if chunk is not None and isinstance(model, CrossEncoder):
            raise ConfigError("chunk cuts documents of one text, and a CrossEncoder reads pairs; leave chunk out")
        self._form: Form = "sparse" if isinstance(model, SparseEncoder) else "vector"
        if isinstance(model, MultiVectorEncoder) or output_value == "token_embeddings":
            self._form = "tokens"
        if chunk is not None and per == "document" and self._form != "vector":
            what = "sparse vectors" if self._form == "sparse" else "vectors of tokens"
            raise ConfigError(f"{what} have no mean over the chunks of a document; use per='chunk'")
        if late and (chunk is None or output_value not in (None, "sentence_embedding")):
            raise ConfigError("late=True pools the vectors of chunks; give chunk=..., and leave out output_value")
        resolved = resolve(model.prompts, model.default_prompt_name, role=role, name=prompt_name, prompt=prompt)
        self._cache, self._per, self._prefetch, self._strict = cache, per, prefetch, strict
        cache.run((), output_value=output_value)  # ConfigError now for an output that the model does not give
        self._cut, self._unit_vectors = cut_by(chunk, model, resolved), gives_unit_vectors(model)
        self._late = LateChunks(model, resolved) if late else None
        self._fields = FieldSpec(text_field, id_field, max_characters)
        self._run_options: dict[str, Any] = {
            "role": role, "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, "progress": progress,
            "output_value": "token_embeddings" if late else output_value,
        }  # fmt: skip
        self._part_documents = _BATCHES * batch_size
        self._facts: dict[str, Any] = {
            "model": cache.identity.digest.hex(), "namespace": cache.namespace, "role": role, "prompt": resolved,
            "tau": cache.config.tau, "chunk": cut_name(chunk), "per": per, "batch_size": batch_size,
            "text_field": text_field if isinstance(text_field, str) else list(text_field),  # as JSON gives it back
            "id_field": id_field, "max_characters": max_characters,
        }  # fmt: skip
        if late or output_value is not None:  # else the facts are those of earlier versions
            self._facts |= {"late": late, "output_value": output_value}
        self.errors: list[RejectedRecord] = []
        self.refused = 0

    def run(self, documents: Any) -> Generator[Result]:
        """Run documents. Yields one result per document (per chunk with per="chunk"), in order, part by part.

        documents: any iterable of texts, `Document`s, mappings, dataclasses or other objects with the fields; a frame
            of pandas or polars, an Arrow table or its batches, a `datasets.Dataset`. For a CrossEncoder tuples or lists
            of two texts, or any of these with two text fields. See `intake`.
        A record that is no document has no result, and is added to `errors`. An exception of the iterable is raised
        here, after the results of all records before it. Close the generator, or take no more results, to stop; all
        computed results are in the cache.
        """
        with closing(self._parts(documents)) as stream:
            for part in stream:
                yield from self._answer(part)
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
        """Run documents and write one row per result to `out` (.parquet, .npy or .jsonl, see `result_writer`).

        Sparse vectors and vectors of tokens differ in length, and can be written as .parquet or .jsonl only.
        resume: keep a journal of the results in "<name>.unfinished" until the result file is written, and continue an
            unfinished run. However often the run is stopped, by Ctrl-C, an error or SIGKILL, the result file is byte
            for byte that of an uninterrupted run: results are durable before their entries are committed to the store,
            and the run continues from the last checkpoint where both agree. This holds for exact matches, on one
            machine with the same number of threads, while no other process changes the store; near matches or a byte
            budget may give other results after a stop. The same documents must come again in the same order; those
            that were answered are read and compared.
        max_documents, max_seconds: stop after the part that reaches the limit; the run can then be resumed.
        Returns a summary. ConfigError when the unfinished run has another model, cutting, format or setting.
        CorpusError when its documents were others, or the file cannot be written.
        """
        path = Path(out)
        for name, value in (("max_documents", max_documents), ("max_seconds", max_seconds)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is above 0, or None, got {value!r}")
        check_target(path, self._form)
        if resume or max_documents is not None or max_seconds is not None:
            return self._write_journaled(documents, path, resume, max_documents, max_seconds)
        discard(path)
        folder = self._cache.storing.store.folder
        run = unfinished.Run(beside(path).absolute(), self._cache.namespace)
        if self._cache.storing.store.writable:
            unfinished.note(folder, run)  # so that a purge finds the partial file if this process is killed
        before, counts = self.refused, Counter[str]()
        try:
            with (
                result_writer(path, width=self._width, form=self._form) as writer,
                closing(self._parts(documents)) as stream,
            ):
                for part in stream:
                    results = self._answer(part)
                    counts.update(result.tier for result in results)
                    writer.write(map(clipped, results))
                    if part.error is not None:
                        raise part.error
        finally:
            unfinished.forget(folder, run)
        return Written.of(counts, path=path, refused=self.refused - before)

    def _write_journaled(
        self, documents: Any, path: Path, resume: bool, max_documents: int | None, max_seconds: float | None
    ) -> Written:
        began, before = time.monotonic(), self.refused
        storing, form = self._cache.storing, self._form
        with resumable(path, self._facts, self._width, storing, resume=resume, form=form) as resumption:
            start = resumption.start

            def summary(*, finished: bool) -> Written:
                refused = self.refused - before
                return Written.of(resumption.tiers, path=path, refused=refused, resumed=start.rows, finished=finished)

            with closing(self._parts(documents, digests=True)) as stream:
                for part in stream:
                    if part.error is not None:  # the part is incomplete, and would have other documents when resumed
                        raise part.error
                    if resumption.skip(part):
                        self._collect(part.refused)
                        continue
                    resumption.take(part, self._answer(part))
                    over = max_seconds is not None and time.monotonic() - began >= max_seconds
                    if over or (max_documents is not None and resumption.rows - start.rows >= max_documents):
                        resumption.checkpoint()
                        return summary(finished=False)
            resumption.finish(path)
            return summary(finished=True)

    def _parts(self, documents: Any, *, digests: bool = False) -> Generator[DocumentBatch]:
        records = intake(documents, self._fields)
        windows = None if self._late is None else self._late.windows
        return ahead(parts(records, self._part_documents, self._cut, windows, digests=digests), self._prefetch)

    def _answer(self, part: DocumentBatch) -> list[Result]:
        """Compute the results of a part, after its refused records were collected."""
        self._collect(part.refused)
        if part.windows is not None:
            results = self._late_results(part)
        else:
            results = self._run(part.documents if part.chunks is None else _parts(part.documents, part.chunks))
        if part.chunks is None or self._per == "chunk":
            return results
        upcoming = iter(results)
        return [
            together(document, chunks, [next(upcoming) for _ in chunks], unit=self._unit_vectors)
            for document, chunks in zip(part.documents, part.chunks, strict=True)
        ]

    def _run(self, inputs: list[Document]) -> list[Result]:
        return list(self._cache.run(inputs, chunk=max(1, len(inputs)), **self._run_options))

    def _late_results(self, part: DocumentBatch) -> list[Result]:
        """Compute the results of late chunks, from the token embeddings of the windows of each document."""
        assert self._late is not None
        assert part.windows is not None
        assert part.chunks is not None
        windows = iter(self._run(_parts(part.documents, part.windows)))
        found = [[next(windows) for _ in parts] for parts in part.windows]
        vectors = self._late.vectors(part.windows, [[window.output for window in of] for of in found], part.chunks)
        return [
            result
            for document, chunks, read, outputs in zip(part.documents, part.chunks, found, vectors, strict=True)
            for result in pooled_results(document, chunks, read, outputs)
        ]

    def _collect(self, refused: Iterable[RejectedRecord]) -> None:
        """Add refused records to `errors`; with strict=True raise CorpusError at the first."""
        for record in refused:
            if self._strict:
                where = f"document {record.place} ({record.id!r:.60})"
                raise CorpusError(f"{where} {record.reason}; correct it, or collect such records with strict=False")
            self.refused += 1
            if len(self.errors) < ERRORS_KEPT:
                self.errors.append(record)


def _parts(documents: Iterable[Document], parts: Iterable[Sequence[Chunk | Window]]) -> list[Document]:
    """Return the parts of all documents, as documents."""
    pairs = zip(documents, parts, strict=True)
    return [*chain.from_iterable(part_documents(document, cut) for document, cut in pairs)]


def text_field_of(model: Any, given: TextFields | None) -> TextFields:
    """Return the names of the text fields for a model; None for the usual ones.

    ConfigError for one name where the model scores pairs of texts, or for two names where it reads one text.
    """
    usual = text_fields(model)
    if given is None:
        return usual
    if isinstance(usual, str):
        if not isinstance(given, str):
            raise ConfigError(f"a {type(model).__name__} reads one text; name one field, got {given!r}")
        return given
    names = () if isinstance(given, str) else tuple(given)
    if len(names) != 2 or not all(isinstance(name, str) for name in names) or names[0] == names[1]:
        raise ConfigError(f"a CrossEncoder scores pairs of texts; name two fields, such as {usual!r}, got {given!r}")
    return names[0], names[1]

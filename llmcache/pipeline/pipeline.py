"""Document pipelines: run a stream of documents through a cache, and yield or write results with their provenance."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from llmcache.cache import LLMCache
from llmcache.document import TextFields
from llmcache.encoding.call import Progress, nothing
from llmcache.errors import ConfigError, CorpusError
from llmcache.indexes.stats import unfinished
from llmcache.pipeline.batches import DocumentBatch, ahead
from llmcache.pipeline.checkpoints import Written, check_target, resumable
from llmcache.pipeline.chunked import Cutting
from llmcache.pipeline.job_plan import JobPlan
from llmcache.pipeline.jobs import LanguageJob
from llmcache.pipeline.journal import beside, discard
from llmcache.pipeline.task import PipelineTask
from llmcache.pipeline.vector_task import VectorTask
from llmcache.records import MOST_CHARACTERS, RejectedRecord, intake

ERRORS_KEPT = 100


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
        task: str = "embed",
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
        **job: Any,
    ) -> None:
        """cache: open cache of a model of sentence-transformers, or of a language model with its tokenizer.

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
        task: "embed" computes vectors. "generate", "score" and "classify" are language-model jobs: a prompt is made of
            each record by a template, and answered. job: settings of such a job, see `LanguageJob`, for example
            template="Topic of this text: {text}", max_new_tokens=8. Of the settings above, jobs have batch_size,
            prefetch, id_field, strict, max_characters and progress.
        ConfigError for invalid settings.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch, 0),
            ("max_characters", max_characters, 1),
        ):
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is a whole number from {least} on, got {value!r}")
        shared: dict[str, Any] = {
            "batch_size": batch_size, "id_field": id_field, "max_characters": max_characters, "progress": progress,
        }  # fmt: skip
        vectors: dict[str, Any] = {
            "chunk": chunk, "per": per, "late": late, "output_value": output_value, "text_field": text_field,
            "role": role, "prompt_name": prompt_name, "prompt": prompt,
        }  # fmt: skip
        self._task: PipelineTask
        if task == "embed":
            if job:
                raise ConfigError(f"{next(iter(job))} is no setting of vectors; for language models give task=...")
            self._task = VectorTask(cache, **vectors, **shared)
        else:
            given = [name for name, value in vectors.items() if value not in (None, False, "document")]
            if given:
                raise ConfigError(f"{given[0]} is a setting of vectors, and task={task!r} is a language-model job")
            if "template" not in job:
                raise ConfigError(f'task={task!r} needs a prompt template, such as template="Topic of {{text}}:"')
            self._task = LanguageJob(cache, task, **job, **shared)
        self._cache, self._prefetch, self._strict = cache, prefetch, strict
        self.errors: list[RejectedRecord] = []
        self.refused = 0

    def run(self, documents: Any) -> Generator[Any]:
        """Run documents. Yields one result per document (per chunk with per="chunk"), in order, part by part.

        Results are `Result`s; those of language-model jobs are `GeneratedRow`, `ScoredRow` or `ClassifiedRow`.

        documents: any iterable of texts, `Document`s, mappings, dataclasses or other objects with the fields; a frame
            of pandas or polars, an Arrow table or its batches, a `datasets.Dataset`. For a CrossEncoder tuples or lists
            of two texts, or any of these with two text fields. See `intake`.
        A record that is no document has no result, and is added to `errors`. An exception of the iterable is raised
        here, after the results of all records before it. Close the generator, or take no more results, to stop; all
        computed results are in the cache.
        """
        with closing(self._parts(documents)) as stream:
            for part in stream:
                yield from self._results(part)
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
        check_target(path, self._task.form)
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
                self._task.write(path) as write,
                closing(self._parts(documents)) as stream,
            ):
                for part in stream:
                    results = self._results(part)
                    counts.update(result.tier for result in results)
                    write(results)
                    if part.error is not None:
                        raise part.error
        finally:
            unfinished.forget(folder, run)
        return Written.of(counts, path=path, refused=self.refused - before)

    def plan(self, documents: Any) -> JobPlan:
        """Forecast a language-model job with these documents: stored answers, shared tokens, seconds and bytes.

        All prompts are made and looked up; a sample is computed, and nothing stored. For vectors see `LLMCache.plan`.
        """
        if not isinstance(self._task, LanguageJob):
            raise ConfigError("this pipeline computes vectors; their forecast is cache.plan(documents)")
        return self._task.plan(intake(documents, self._task.fields))

    def _write_journaled(
        self, documents: Any, path: Path, resume: bool, max_documents: int | None, max_seconds: float | None
    ) -> Written:
        began, before = time.monotonic(), self.refused
        storing, task = self._cache.storing, self._task
        with resumable(path, task.facts, task.width, storing, resume=resume, form=task.form) as resumption:
            start = resumption.start

            def summary(*, finished: bool) -> Written:
                refused = self.refused - before
                return Written.of(resumption.tiers, path=path, refused=refused, resumed=start.rows, finished=finished)

            with closing(self._parts(documents, digests=True)) as stream:
                for part in stream:
                    if part.error is not None:  # the part is incomplete, and would have other documents when resumed
                        raise part.error
                    self._collect(part.refused)
                    if resumption.skip(part):
                        continue
                    answered = resumption.answered()
                    done = len(answered)
                    for batch in task.answer(part, answered):
                        done += len(batch)
                        task.record(resumption, part, batch, done)
                        over = max_seconds is not None and time.monotonic() - began >= max_seconds
                        if over or (max_documents is not None and resumption.rows - start.rows >= max_documents):
                            resumption.checkpoint()
                            return summary(finished=False)
                    resumption.end_part()
            resumption.finish(path, task.columns)
            return summary(finished=True)

    def _parts(self, documents: Any, *, digests: bool = False) -> Generator[DocumentBatch]:
        records = intake(documents, self._task.fields)
        return ahead(self._task.parts(records, digests=digests), self._prefetch)

    def _results(self, part: DocumentBatch) -> list[Any]:
        """Return the results of a part in order, after its refused records were collected."""
        self._collect(part.refused)
        answered = chain.from_iterable(self._task.answer(part))
        return [result for _, result in sorted(answered, key=itemgetter(0))]

    def _collect(self, refused: Iterable[RejectedRecord]) -> None:
        """Add refused records to `errors`; with strict=True raise CorpusError at the first."""
        for record in refused:
            if self._strict:
                where = f"document {record.place} ({record.id!r:.60})"
                raise CorpusError(f"{where} {record.reason}; correct it, or collect such records with strict=False")
            self.refused += 1
            if len(self.errors) < ERRORS_KEPT:
                self.errors.append(record)

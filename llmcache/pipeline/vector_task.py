"""Vectors of documents: what a pipeline computes unless another task is named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from llmcache.cache import LLMCache
from llmcache.document import Document, TextFields
from llmcache.encoding.call import Progress
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError
from llmcache.model.encoders import text_fields
from llmcache.model.prompts import resolve
from llmcache.pipeline.batches import DocumentBatch, parts
from llmcache.pipeline.checkpoints import Resumption, clipped
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
from llmcache.pipeline.late_chunks import LateChunks, Window
from llmcache.pipeline.task import PlacedResults, Write
from llmcache.pipeline.writers import Form, result_writer
from llmcache.records import FieldSpec, Taken

_BATCHES = 32  # batches in a part: enough to sort documents by length, and a stop loses at most one part


class VectorTask:
    """Task of a model of sentence-transformers: one result per document or chunk; see `Pipeline`."""

    columns = None

    def __init__(
        self,
        cache: LLMCache,
        *,
        chunk: str | Cutting | None,
        per: str,
        late: bool,
        output_value: str | None,
        batch_size: int,
        text_field: TextFields | None,
        id_field: str,
        role: str | None,
        prompt_name: str | None,
        prompt: str | None,
        max_characters: int,
        progress: Progress,
    ) -> None:
        """Arguments and errors are those of `Pipeline`."""
        if per not in ("document", "chunk") or (per == "chunk" and chunk is None):
            raise ConfigError(f"per is 'document', or with chunk=... 'chunk', got {per!r}")
        self.width = cache.width  # ConfigError if the model does not output vectors
        model: Any = cache.model
        text_field = text_field_of(model, text_field)
        if chunk is not None and isinstance(model, CrossEncoder):
            raise ConfigError("chunk cuts documents of one text, and a CrossEncoder reads pairs; leave chunk out")
        self.form: Form = "sparse" if isinstance(model, SparseEncoder) else "vector"
        if isinstance(model, MultiVectorEncoder) or output_value == "token_embeddings":
            self.form = "tokens"
        if chunk is not None and per == "document" and self.form != "vector":
            what = "sparse vectors" if self.form == "sparse" else "vectors of tokens"
            raise ConfigError(f"{what} have no mean over the chunks of a document; use per='chunk'")
        if late and (chunk is None or output_value not in (None, "sentence_embedding")):
            raise ConfigError("late=True pools the vectors of chunks; give chunk=..., and leave out output_value")
        resolved = resolve(model.prompts, model.default_prompt_name, role=role, name=prompt_name, prompt=prompt)
        self._cache, self._per = cache, per
        cache.run((), output_value=output_value)  # ConfigError now for an output that the model does not give
        self._cut, self._unit_vectors = cut_by(chunk, model, resolved), gives_unit_vectors(model)
        self._late = LateChunks(model, resolved) if late else None
        self.fields = FieldSpec(text_field, id_field, max_characters)
        self._run_options: dict[str, Any] = {
            "role": role, "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, "progress": progress,
            "output_value": "token_embeddings" if late else output_value,
        }  # fmt: skip
        self._part_documents = _BATCHES * batch_size
        self.facts: dict[str, Any] = {
            "model": cache.identity.digest.hex(), "namespace": cache.namespace, "role": role, "prompt": resolved,
            "tau": cache.config.tau, "chunk": cut_name(chunk), "per": per, "batch_size": batch_size,
            "text_field": text_field if isinstance(text_field, str) else list(text_field),  # as JSON gives it back
            "id_field": id_field, "max_characters": max_characters,
        }  # fmt: skip
        if late or output_value is not None:  # else the facts are those of earlier versions
            self.facts |= {"late": late, "output_value": output_value}

    def parts(self, records: Iterable[Taken], *, digests: bool) -> Iterator[DocumentBatch]:
        """Split records into parts, see `batches.parts`."""
        windows = None if self._late is None else self._late.windows
        return parts(records, self._part_documents, self._cut, windows, digests=digests)

    def answer(self, part: DocumentBatch, done: Collection[int] = ()) -> Iterator[PlacedResults]:
        """Yield the results of a part, all at once."""
        yield list(enumerate(self._results(part)))

    def write(self, path: Path) -> AbstractContextManager[Write]:
        """Open the result file, as a context that gives a function which writes results; see `result_writer`."""

        @contextmanager
        def opened() -> Iterator[Write]:
            with result_writer(path, width=self.width, form=self.form) as writer:
                yield lambda results: writer.write(map(clipped, results))

        return opened()

    def record(self, resumption: Resumption, part: DocumentBatch, answered: PlacedResults, done: int) -> None:
        """Write the results of a part to the journal of a run."""
        resumption.take(part, [result for _, result in answered])

    def _results(self, part: DocumentBatch) -> list[Result]:
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

"""Interface of the tasks of a pipeline: what is computed for its documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from llmcache.pipeline.batches import DocumentBatch
from llmcache.pipeline.checkpoints import Resumption
from llmcache.pipeline.job_rows import Columns
from llmcache.pipeline.writers import Form
from llmcache.records import FieldSpec, Taken

PlacedResults: TypeAlias = list[tuple[int, Any]]
"""Results, each with its place in the part of documents."""
Write: TypeAlias = Callable[[Iterable[Any]], None]
"""Function that writes results to a file."""


class PipelineTask(Protocol):
    """A task of a pipeline.

    fields: of the records. facts: settings that decide the results, by name, as JSON values. form, width, columns: of
    the result file; columns are those of a language-model job.
    """

    @property
    def fields(self) -> FieldSpec: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def form(self) -> Form: ...
    @property
    def width(self) -> int: ...
    @property
    def columns(self) -> Columns | None: ...

    def parts(self, records: Iterable[Taken], *, digests: bool) -> Iterator[DocumentBatch]:
        """Split records into parts, which are answered one after the other. digests: fill in `DocumentBatch.digest`."""

    def answer(self, part: DocumentBatch, done: Collection[int] = ()) -> Iterator[PlacedResults]:
        """Yield the results of a part, batch by batch, in any order. done: places that are answered already."""

    def write(self, path: Path) -> AbstractContextManager[Write]:
        """Open the result file, as a context that gives a function which writes results."""

    def record(self, resumption: Resumption, part: DocumentBatch, answered: PlacedResults, done: int) -> None:
        """Write a batch of results to the journal of a run. done: number of complete results of the part."""

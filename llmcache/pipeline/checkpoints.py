"""Resumable runs: checkpoints that keep the results and the store consistent, so that a run can be killed at any time.

At a checkpoint the results are made durable first, then the store commits the entries they came from; between
checkpoints the store commits nothing. After a kill the store therefore is at the last checkpoint or at the one before,
and shows which. The results after that checkpoint are truncated and computed again, in the same batches from the same
entries, so they become the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcache.banks.writer import BankWriter
from llmcache.encoding.results import Result, TierCounts
from llmcache.errors import CorpusError, LLMCacheError
from llmcache.indexes.stats import unfinished
from llmcache.pipeline.batches import DocumentBatch
from llmcache.pipeline.job_files import check_job_ending, job_writer
from llmcache.pipeline.job_rows import Columns
from llmcache.pipeline.journal import Journal
from llmcache.pipeline.writers import Form, check_ending, result_writer

log = logging.getLogger("llmcache")

_SOURCE_BYTES = 1024  # bytes of a source id that a sealed segment stores


@dataclass(frozen=True, slots=True, kw_only=True)
class Written(TierCounts):
    """Summary of a call of `Pipeline.write`. documents: rows of the result file.

    refused: records that were no documents. resumed: rows that an earlier call had computed. finished: True if the
    result file is written, False if the run is to be resumed.
    """

    path: Path
    refused: int
    resumed: int = 0
    finished: bool = True


class Resumption:
    """Journaled run in progress. start: the checkpoint from which it resumes."""

    def __init__(self, journal: Journal, storing: BankWriter, namespace: str | None = None) -> None:
        """Go back to the last checkpoint that the store has committed.

        namespace: namespace of the entries that the results come from; a purge of it finds this run.
        """
        self._journal, self._storing, self._store = journal, storing, storing.store
        if self._store.writable:
            with storing.lock:
                storing.commit()  # entries that earlier calls left uncommitted are not part of this run
        self._run = unfinished.Run(journal.folder.absolute(), namespace)
        if self._store.writable:
            unfinished.note(self._store.folder, self._run)
        self.start = journal.checkpoints[-1]
        if not self.start.sure and self._store.committed(self.start.writer) <= self.start.committed:
            self.start = journal.checkpoints[0]
        journal.back_to(self.start)
        self._place, self._digest = 0, ""  # of the last part that was read
        self._before = 0, ""  # of the part before it
        # complete rows, and their uncommitted entries; a single value, so that they agree after Ctrl-C
        self._complete = (self.start, self._store.pending())
        self._consistent = True  # False once a commit has failed: the store cannot reach the last rows any more
        self._committing = False

    @property
    def rows(self) -> int:
        """Number of complete rows."""
        return self._complete[0].rows

    @property
    def tiers(self) -> Mapping[str, int]:
        """Number of complete rows by tier."""
        return self._complete[0].tiers

    def skip(self, part: DocumentBatch) -> bool:
        """Return True if the part lies before the checkpoint `start`. CorpusError when its records differ."""
        self._before = self._place, self._digest
        self._place, self._digest = part.end, part.digest.hex()
        before = self._before[0]
        if before >= self.start.place:
            return False
        if part.end > self.start.place or (part.end == self.start.place and self._digest != self.start.digest):
            raise self._wrong_corpus()
        return True

    def _wrong_corpus(self) -> CorpusError:
        which = f"the first {self.start.place:,} records" if self.start.place else "the records"
        return CorpusError(
            f"{which} of the corpus are not those that the unfinished run in {self._journal.folder} read; give it the "
            "same corpus, or remove that folder to begin anew"
        )

    def answered(self) -> set[int]:
        """Return the places of the last part's documents that an earlier call has answered, batch by batch.

        CorpusError when the records of the part differ.
        """
        if self.start.open_rows is None or self._before[0] != self.start.place:
            return set()
        if self._digest != self.start.open_digest:
            raise self._wrong_corpus()
        return set(self._journal.job_places(self.start.open_rows))

    def take_rows(self, rows: Sequence[tuple[int, str, Sequence[Any]]], done: int) -> None:
        """Write rows of a batch of the last part to the journal, see `Journal.add_rows`, with a checkpoint if due.

        done: number of rows of the part that are complete now.
        """
        place, digest = self._before
        self._journal.add_rows(place, rows)
        with self._storing.lock:
            here = self._journal.here(place, digest, open_rows=done, open_digest=self._digest)
            self._complete = here, self._store.pending()
            if self._storing.due:
                self.checkpoint()

    def end_part(self) -> None:
        """Record that all rows of the last part are complete."""
        with self._storing.lock:
            self._complete = self._journal.here(self._place, self._digest), self._store.pending()

    def take(self, part: DocumentBatch, results: Sequence[Result]) -> None:
        """Write the results of a complete part to the journal, with a checkpoint when one is due."""
        self._journal.add(clipped(result) for result in results)
        with self._storing.lock:
            self._complete = (self._journal.here(self._place, self._digest), self._store.pending())
            if self._storing.due:
                self.checkpoint()

    def checkpoint(self) -> None:
        """Make the results durable, then commit their entries. Does nothing once a commit has failed."""
        with self._storing.lock:
            self._checkpoint()

    def _checkpoint(self) -> None:
        store, position = self._store, self._complete[0]
        if not self._consistent:
            return
        committed = store.committed(store.writer)
        self._journal.checkpoint(replace(position, writer=store.writer, committed=committed, sure=False))
        if store.writable:
            self._committing = True
            try:
                self._storing.commit()
            except LLMCacheError as error:
                log.warning("%s. Going on without storing", error)
                self._consistent = False
                return
        pending = store.pending()
        self._complete, self._committing = (position, pending), False
        if not any(sum(counts) for counts in pending.values()):  # else another process is committing to the store
            self._journal.commit_done()

    def finish(self, out: Path, columns: Columns | None = None) -> None:
        """Write the result file after the last part, and remove the journal.

        columns: of a language-model job; None for vectors.
        CorpusError when the corpus ended before the checkpoint `start`.
        """
        if self._place < self.start.place:
            raise self._wrong_corpus()
        self.checkpoint()
        if columns is not None:
            with job_writer(out, columns) as rows:
                rows.write(self._journal.job_rows())
        else:
            with result_writer(out, width=self._journal.width, form=self._journal.form) as writer:
                writer.write(self._journal.results())
        self._journal.remove()
        unfinished.forget(self._store.folder, self._run)

    def leave(self) -> None:
        """Clean up after an error: drop the entries of the incomplete part, and checkpoint the complete ones."""
        with self._storing.lock:
            if not self._committing:
                self._store.drop_pending(self._complete[1])
                self.checkpoint()
            self._store.drop_pending({})


@contextmanager
def resumable(
    out: Path, facts: Mapping[str, Any], width: int, storing: BankWriter, *, resume: bool, form: Form = "vector"
) -> Iterator[Resumption]:
    """Open the journaled run that writes `out`, as a context. facts, width, resume, form: see `Journal.open`.

    Inside, the store commits at the run's checkpoints only. Other users of the store's banks wait for these.
    """
    journal, lock = Journal.open(out, facts, width, resume=resume, form=form)
    with ExitStack() as stack:
        stack.enter_context(lock)
        stack.enter_context(closing(journal))
        stack.enter_context(storing.held())
        resumption = Resumption(journal, storing, facts.get("namespace"))
        try:
            yield resumption
        except BaseException:
            resumption.leave()
            raise


def clipped(result: Result) -> Result:
    """Truncate the source of a result as a sealed segment does, so that it is the same before and after a commit."""
    if result.source is None or len(result.source) <= _SOURCE_BYTES // 4:
        return result
    return replace(result, source=result.source.encode()[:_SOURCE_BYTES].decode(errors="replace"))


def check_target(out: Path, form: Form) -> None:
    """Check the path of a result file before anything is computed. ConfigError or CorpusError when it cannot be one."""
    if form == "rows":
        check_job_ending(out)
    else:
        check_ending(out, form)
    if not out.parent.is_dir():
        raise CorpusError(f"there is no folder {out.parent} to write {out.name} into; make it first")

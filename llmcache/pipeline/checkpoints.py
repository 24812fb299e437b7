"""Runs that can be stopped at any time and resumed: results and store are kept in step.

At a checkpoint the results are made durable first, then the store commits the entries they came from; between
checkpoints it commits nothing. So after a kill the store is either where the last checkpoint is, or where the one
before it was, and shows which. The rows behind that point are cut off and made again, by the same batches from the same
entries, and become the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcache.banks.writer import BankWriter
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError, LLMCacheError
from llmcache.indexes.stats import unfinished
from llmcache.pipeline.batches import Part
from llmcache.pipeline.journal import Journal
from llmcache.pipeline.writers import FORMATS, result_writer

log = logging.getLogger("llmcache")

_SOURCE_BYTES = 1024  # what a sealed segment keeps of a source id


@dataclass(frozen=True, slots=True)
class Written:
    """What `Pipeline.write` did. documents: rows of the file, by tier in exact, near and misses.

    refused: records that were no documents. resumed: rows that were there already. finished: whether the file is
    written; else the run waits to be resumed.
    """

    path: Path
    documents: int
    exact: int
    near: int
    misses: int
    refused: int
    resumed: int = 0
    finished: bool = True

    @classmethod
    def of(
        cls, path: Path, tiers: Mapping[str, int], refused: int, resumed: int = 0, *, finished: bool = True
    ) -> Written:
        exact, near, misses = (tiers.get(tier, 0) for tier in ("exact", "near", "miss"))
        return cls(path, exact + near + misses, exact, near, misses, refused, resumed, finished)

    @property
    def hit_rate(self) -> float:
        """Share of rows that cost no model time."""
        return 1 - self.misses / self.documents if self.documents else 0.0


class Resumption:
    """One journaled run at work. start: the checkpoint that it goes on from."""

    def __init__(self, journal: Journal, storing: BankWriter, namespace: str | None = None) -> None:
        """namespace: whose entries the results come from, so that a purge of it finds them."""
        self._journal, self._storing, self._store = journal, storing, storing.store
        if self._store.writable:
            with storing.lock:
                storing.commit()  # what others left waiting is no part of this run
        self._run = unfinished.Run(journal.folder.absolute(), namespace)
        if self._store.writable:
            unfinished.note(self._store.folder, self._run)
        self.start = journal.checkpoints[-1]
        if not self.start.sure and self._store.committed(self.start.writer) <= self.start.committed:
            self.start = journal.checkpoints[0]
        journal.back_to(self.start)
        self._place, self._digest = 0, ""  # of the part that was read last
        # what is complete: rows, and what of their entries waits to be committed. One value, so that Ctrl-C finds both
        self._whole = (self.start, self._store.pending())
        self._in_step = True  # the store can be brought to where the rows are
        self._committing = False

    @property
    def rows(self) -> int:
        return self._whole[0].rows

    @property
    def tiers(self) -> Mapping[str, int]:
        at = self._whole[0]
        return {"exact": at.exact, "near": at.near, "miss": at.misses}

    def skip(self, part: Part) -> bool:
        """Whether the part was answered before the stop. CorpusError when it was another one."""
        before, self._place, self._digest = self._place, part.end, part.digest.hex()
        if before >= self.start.place:
            return False
        if part.end > self.start.place or (part.end == self.start.place and self._digest != self.start.digest):
            raise self._other()
        return True

    def _other(self) -> CorpusError:
        return CorpusError(
            f"the first {self.start.place:,} records of the corpus are not those that the unfinished run in "
            f"{self._journal.folder} answered; give it the same corpus, or remove that folder to begin anew"
        )

    def take(self, part: Part, results: Sequence[Result]) -> None:
        """Keep the results of a whole part, with a checkpoint when one is due."""
        self._journal.add(clipped(one) for one in results)
        with self._storing.lock:
            self._whole = (self._journal.here(self._place, self._digest), self._store.pending())
            if self._storing.due:
                self.checkpoint()

    def checkpoint(self) -> None:
        """Results durable, then entries committed. Once the store cannot be written, the last one stays."""
        with self._storing.lock:
            self._checkpoint()

    def _checkpoint(self) -> None:
        store, at = self._store, self._whole[0]
        if not self._in_step:
            return
        self._journal.checkpoint(replace(at, writer=store.writer, committed=store.committed(store.writer), sure=False))
        if store.writable:
            self._committing = True
            try:
                self._storing.commit()
            except LLMCacheError as error:
                log.warning("%s. Going on without storing", error)
                self._in_step = False
                return
        waiting = store.pending()
        self._whole, self._committing = (at, waiting), False
        if not any(sum(one) for one in waiting.values()):  # else another process is busy with the store
            self._journal.commit_done()

    def finish(self, out: Path) -> None:
        """All documents were answered: write the result file, and remove what was kept beside it."""
        if self._place < self.start.place:
            raise self._other()
        self.checkpoint()
        with result_writer(out, width=self._journal.width) as writer:
            writer.write(self._journal.results())
        self._journal.remove()
        unfinished.forget(self._store.folder, self._run)

    def leave(self) -> None:
        """After an error: what a part put that did not come to its end is given up, and the rest committed."""
        with self._storing.lock:
            if not self._committing:
                self._store.drop_pending(self._whole[1])
                self.checkpoint()
            self._store.drop_pending({})


@contextmanager
def resumable(
    out: Path, facts: Mapping[str, Any], width: int, storing: BankWriter, *, resume: bool
) -> Iterator[Resumption]:
    """A run that writes `out`, whose commits are its checkpoints; other users of the store's banks have to wait."""
    journal, lock = Journal.open(out, facts, width, resume=resume)
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
    """The same with a source as the store keeps it: it must not matter whether its entry was committed already."""
    if result.source is None or len(result.source) <= _SOURCE_BYTES // 4:
        return result
    return replace(result, source=result.source.encode()[:_SOURCE_BYTES].decode(errors="replace"))


def check_target(out: Path) -> None:
    """Before anything is computed: ConfigError or CorpusError when `out` cannot be a result file."""
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"results can be written as .parquet, .npy or .jsonl, not as {out.name!r}")
    if not out.parent.is_dir():
        raise CorpusError(f"there is no folder {out.parent} to write {out.name} into; make it first")

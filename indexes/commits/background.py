"""Background writer: a thread that writes batches of pending rows as segments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.format.pending import FlushBatch

log = logging.getLogger("llmcache")


@dataclass(frozen=True, slots=True)
class PendingSegment:
    """Batch that is being written as a segment, which no manifest names yet.

    place: names of the namespace and of the bank. lease: protects the segment's files from garbage collection until
    they are published. written: future of the segment's facts.
    """

    place: tuple[str, str]
    bank: Bank
    flush: FlushBatch
    lease: Lease
    written: Future[SegmentFacts]


class BackgroundWriter:
    """Writer thread of one store. It has at most one batch of each bank, so memory is bounded by two batches a bank.

    The thread only writes new files of rows that do not change any more. The thread that owns the store chooses the
    rows and publishes the files.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._thread: ThreadPoolExecutor | None = None
        self._in_progress: list[PendingSegment] = []

    def begin(self, place: tuple[str, str], bank: Bank) -> None:
        """Start writing the bank's first pending batch. No other batch of this bank may be in progress."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmcache-writer")
        lease, flush = Lease(self._folder), bank.begin_flush()
        self._in_progress.append(
            PendingSegment(place, bank, flush, lease, self._thread.submit(_seal, bank, flush, lease))
        )

    @property
    def commit_ready(self) -> bool:
        """Return whether batches were started and all of them are written or have failed."""
        return bool(self._in_progress) and all(pending.written.done() for pending in self._in_progress)

    def taken(self) -> Iterator[PendingSegment]:
        """Yield and remove the started batches, oldest first. The caller waits for their futures."""
        while self._in_progress:
            yield self._in_progress.pop(0)

    def give_up(self) -> None:
        """Wait for the thread and remove its unpublished segments."""
        for pending in self.taken():
            try:
                for file in pending.written.result().files:
                    self._folder.remove(file.name)
            except OSError as error:  # garbage collection removes the rest
                log.info("an unpublished segment was not removed; garbage collection removes it: %s", error)
            finally:
                pending.lease.close()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _seal(bank: Bank, flush: FlushBatch, lease: Lease) -> SegmentFacts:
    return bank.seal(lease.new(), flush)

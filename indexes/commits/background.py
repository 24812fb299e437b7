"""Commits in the background: a thread writes lots of rows into segments while their owner goes on."""

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
    """A lot of a bank on its way into a segment that no manifest names yet.

    place: names of the bank's namespace and of the bank. written: the facts of the segment, once it is written. lease:
    keeps its files from being collected until they are published.
    """

    place: tuple[str, str]
    bank: Bank
    lot: FlushBatch
    lease: Lease
    written: Future[SegmentFacts]


class BackgroundWriter:
    """What a thread writes for one store: at most one lot of each bank, so that memory is bounded by two of them.

    The thread only makes new files of rows that nobody changes any more. What they are, and when they count, is for
    the thread that owns the store.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._thread: ThreadPoolExecutor | None = None
        self._begun: list[PendingSegment] = []

    def begin(self, place: tuple[str, str], bank: Bank) -> None:
        """Have what waits in the bank written; call it when nothing of the bank is on its way."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmcache-writer")
        lease, lot = Lease(self._folder), bank.set_apart()
        self._begun.append(PendingSegment(place, bank, lot, lease, self._thread.submit(_sealed, bank, lot, lease)))

    @property
    def commit_ready(self) -> bool:
        """Whether there is something, and all of it is written or has failed."""
        return bool(self._begun) and all(one.written.done() for one in self._begun)

    def taken(self) -> Iterator[PendingSegment]:
        """Each lot once, oldest first; whoever takes it waits for its future."""
        while self._begun:
            yield self._begun.pop(0)

    def give_up(self) -> None:
        """Wait for the thread and remove what it has written: nothing will name it."""
        for one in self.taken():
            try:
                for file in one.written.result().files:
                    self._folder.remove(file.name)
            except OSError as error:  # what is left is for gc
                log.info("a segment that was given up was not removed: %s", error)
            finally:
                one.lease.close()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _sealed(bank: Bank, lot: FlushBatch, lease: Lease) -> SegmentFacts:
    return bank.seal(lease.new(), lot)

"""Keeping what was computed: batches go into banks, and are committed when enough of them wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from llmcache.banks.audits import ExactAudits
from llmcache.banks.break_even import Decision
from llmcache.banks.counters import Counters
from llmcache.banks.history import History
from llmcache.banks.payoff import Payoff, Rows
from llmcache.config import CacheConfig
from llmcache.errors import LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.bank_commit import Place
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.store import Store
from llmcache.model.description.watch import ModelWatch

log = logging.getLogger("llmcache")

_COMMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Vouched:
    """A model, and what was put when it was last known to be as described. puts: how often something was put by then.

    last: of each bank, the last batch that waited.
    """

    watch: ModelWatch
    puts: int
    last: Mapping[Place, object]


class BankWriter:
    """Puts rows into the banks of a store. A failure ends storing, with one warning, and never an inference."""

    def __init__(self, store: Store, config: CacheConfig, counters: Counters, exact_audits: ExactAudits) -> None:
        self.lock: AbstractContextManager[Any] = nullcontext()
        """For whoever commits outside of a call of the cache, while other threads may be inside one."""
        self.store = store
        self.exact_audits = exact_audits
        exact_audits.discard_with(self.discard)
        self.counters = counters
        self._seconds = config.commit_seconds
        # a segment is evicted whole, so it should be small beside the budget
        self._most = min(_COMMIT_BYTES, config.max_bytes // 16) if config.max_bytes else _COMMIT_BYTES
        self._committed = time.monotonic()
        self._held = False
        self.history = History(store, counters)
        self._aside, self._behind = config.stand_aside, config.background
        self.worths: dict[str, Payoff] = {}
        """What reuse from a bank is worth, by its name."""
        self._puts = 0
        self._vouched: dict[int, _Vouched] = {}

    # -- whose results these are ----------------------------------------------------------------------------

    def asked(self, watch: ModelWatch) -> None:
        """Note that a model may compute something that is put; see `watching.Witness`."""
        if id(watch) not in self._vouched:
            self.vouched(watch)

    def vouched(self, watch: ModelWatch) -> None:
        """Note that a model was what it is described as until now, so that what was put so far is its own."""
        self._vouched[id(watch)] = _Vouched(watch, self._puts, self.store.last_put())

    def doubted(self) -> None:
        """Drop what was put since models were last vouched for: nobody can say which model computed it."""
        try:
            self._taking(self.store.finish_commit)  # what a thread writes was verified before
        except LLMCacheError as error:
            log.warning("%s. Going on without storing", error)
        oldest = min(self._vouched.values(), key=lambda one: one.puts, default=None)
        lost = self.store.drop_since({} if oldest is None else oldest.last)
        self._vouched = {}
        self.counters.not_stored += lost
        if lost:
            log.warning(
                "%d computed results are not stored: the model was written to without a trace (through tensor.data, or "
                "NumPy) since it was last read as a whole, so that they may be of the model before or after that",
                lost,
            )

    def model_seconds(self) -> float:
        """Seconds that models have computed in this opening."""
        return self.counters.model_seconds + self.counters.prefix.model_seconds

    def _verify(self) -> None:
        """Look at all models in use as a whole, before anything of theirs is committed; drop what does not hold."""
        waiting = [one for one in self._vouched.values() if one.puts < self._puts]
        if all(one.watch.verified() for one in waiting):
            for one in waiting:
                self.vouched(one.watch)
        else:
            self.doubted()

    # -- what is put ----------------------------------------------------------------------------------------

    def worth(self, bank: Bank, name: str, again: Callable[[Rows], float] | None = None) -> Payoff:
        """Of this bank, see `Payoff`; the one that is there when it was asked for before."""
        if name not in self.worths or self.worths[name].bank is not bank:
            self.worths[name] = Payoff(bank, name, on=self._aside, again=again)
        return self.worths[name]

    def decisions(self) -> list[Decision]:
        """What was decided about the banks in use."""
        return [self.worths[name].decision() for name in sorted(self.worths)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is committed of itself: the caller calls `commit`, when `due` says so."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @property
    def is_held(self) -> bool:
        """True if a caller commits by itself, see `held`."""
        return self._held

    @property
    def due(self) -> bool:
        """Whether enough waits, or has waited long enough, to be committed."""
        return self.store.pending_bytes > self._most or time.monotonic() - self._committed > self._seconds

    def put(self, bank: Bank, keys: Keys, values: Any, text_keys: Keys | None = None, **entry: Any) -> None:
        """Keep a computed batch, as `Bank.put` takes it, and commit when enough waits.

        text_keys: uint64 [n, 2], other keys that lead to the same rows.
        """
        if not self.store.writable or self.exact_audits.mismatch:
            self.counters.not_stored += len(keys)
            return
        began = time.perf_counter()
        self._puts += 1
        kept = bank.put(keys, values, **entry)
        if text_keys is not None:
            bank.alias(text_keys, keys)
        self.counters.not_stored += int((~kept).sum())
        if not self._held:
            try:
                self._keep_up()
            except LLMCacheError as error:
                log.warning("%s. Going on without storing", error)
        self.counters.store_seconds += time.perf_counter() - began

    def _keep_up(self) -> None:
        if self.due and not self._behind:
            self.commit()
        elif self.due:
            self._committed = time.monotonic()
            self._verify()
            self._taking(self.store.commit_behind)
        elif self.store.commit_ready:
            self._taking(self.store.finish_commit)

    def alias(self, bank: Bank, text_keys: Keys, keys: Keys) -> None:
        """Let these texts lead to the rows of these keys from now on."""
        if self.store.writable and not self.exact_audits.mismatch:
            bank.alias(text_keys, keys)

    def discard(self) -> None:
        """Drop what was put and not committed yet."""
        self.counters.not_stored += self.store.discard()

    def commit(self) -> None:
        """Commit what was put. StoreFull or StoreFenced when a write fails; nothing in a store that is only read.

        What a changed model may have computed is dropped before, with a warning.
        """
        if self.store.read_only:
            return
        self._committed = time.monotonic()
        self._verify()
        self._taking(self.store.commit)
        self._vouched = {}

    def give_up(self) -> None:
        """Count what was put and cannot be committed any more as not stored, and let it go."""
        self.counters.not_stored += self.store.drop_pending({})

    def _taking(self, step: Callable[[], Manifest]) -> None:
        """A step of a commit, and what is to be said and counted after it."""
        given_up = self.store.not_stored
        try:
            before, after = self.store.manifest.generation, step().generation
            if after != before:
                log.info("generation %d is committed", after, extra={"facts": {"llmcache.generation": after}})
        finally:
            self.counters.not_stored += self.store.not_stored - given_up
        if any(self.counters.as_dict().values()):  # an opening that did nothing leaves no file
            self.store.write_counters(self.counters.as_dict())
            self.history.write()

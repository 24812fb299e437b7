"""Bank writer: put computed batches into banks, and commit them when enough bytes or seconds have passed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from llmcache.banks.audits import ExactAudits
from llmcache.banks.break_even import Decision
from llmcache.banks.counters import Counters
from llmcache.banks.history import History
from llmcache.banks.payoff import Payoff
from llmcache.config import CacheConfig
from llmcache.errors import LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.bank_commit import Place
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.indexes.store import Store

log = logging.getLogger("llmcache")

_COMMIT_BYTES = 256 << 20
_REMEMBERED_BYTES = 64 << 20  # of entries that other processes have committed, kept in memory until a reload


class WatchedModel(Protocol):
    """Interface of a model whose entries are committed only once it is verified; `ModelWatch` is one."""

    def verified(self) -> bool:
        """Return whether all results since the last verification came from the model as described."""
        ...


@dataclass(frozen=True, slots=True)
class _Verification:
    """State of the writer when a model was last verified against its identity.

    puts: number of calls of `put` by then. last: last uncommitted batch of each bank.
    """

    watch: WatchedModel
    puts: int
    last: Mapping[Place, object]


class BankWriter:
    """Writer of the banks of a store. A failure to write ends storing, with one warning, and never an inference.

    The writer also watches the models: entries are committed only after their model was verified to be unchanged.
    """

    def __init__(self, store: Store, config: CacheConfig, counters: Counters, exact_audits: ExactAudits) -> None:
        self.lock: AbstractContextManager[Any] = nullcontext()
        """Lock for commits made outside of a call of the cache, while other threads may be inside one."""
        self.store = store
        self.exact_audits = exact_audits
        exact_audits.discard_with(self.discard)
        self.counters = counters
        self._seconds = config.commit_seconds
        # a segment is evicted as a whole, so it should be small compared with the budget
        self._commit_bytes = min(_COMMIT_BYTES, config.max_bytes // 16) if config.max_bytes else _COMMIT_BYTES
        self._committed_at = time.monotonic()
        self._suspended = False
        self.history = History(store, counters)
        self._may_bypass, self._in_background = config.stand_aside, config.background
        self.worths: dict[str, Payoff] = {}
        """Payoff of reuse from each bank in use, by name of the bank."""
        self._remembered: dict[int, Bank] = {}  # banks whose pending rows other processes have committed, by `id`
        self._puts = 0
        self._verifications: dict[int, _Verification] = {}

    # -- verification of models -----------------------------------------------------------------------------

    def asked(self, watch: WatchedModel) -> None:
        """Register a model that may compute entries; see `watch.Witness`."""
        if id(watch) not in self._verifications:
            self.vouched(watch)

    def vouched(self, watch: WatchedModel) -> None:
        """Record that a model is verified up to now, so that the entries put so far are its own."""
        self._verifications[id(watch)] = _Verification(watch, self._puts, self.store.last_put())

    def doubted(self) -> None:
        """Drop the entries put since the last verification: they may be from the model before or after a change."""
        try:
            self._commit_step(self.store.finish_commit)  # the background writer's entries were verified before
        except LLMCacheError as error:
            log.warning("%s. Going on without storing", error)
        oldest = min(self._verifications.values(), key=lambda verification: verification.puts, default=None)
        dropped = self.store.drop_since({} if oldest is None else oldest.last)
        self._verifications = {}
        self.counters.not_stored += dropped
        if dropped:
            log.warning(
                "%d computed results are not stored: the model was written to without a trace (through tensor.data, or "
                "NumPy) since it was last verified, so they may be from the model before or after the change",
                dropped,
            )

    def model_seconds(self) -> float:
        """Return the seconds that models have computed in this opening."""
        return self.counters.model_seconds + self.counters.prefix.model_seconds

    def _verify(self) -> None:
        """Verify all models in use before their entries are committed; drop the entries if one has changed."""
        unverified = [verification for verification in self._verifications.values() if verification.puts < self._puts]
        if all(verification.watch.verified() for verification in unverified):
            for verification in unverified:
                self.vouched(verification.watch)
        else:
            self.doubted()

    # -- writing --------------------------------------------------------------------------------------------

    def worth(self, bank: Bank, name: str, again: Callable[[Rows], float] | None = None) -> Payoff:
        """Return the Payoff of this bank; created at first use. again: see `Payoff`."""
        if name not in self.worths or self.worths[name].bank is not bank:
            self.worths[name] = Payoff(bank, name, on=self._may_bypass, again=again)
        return self.worths[name]

    def decisions(self) -> list[Decision]:
        """Return the current decision about each bank in use, by name of the bank."""
        return [self.worths[name].decision() for name in sorted(self.worths)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Suspend automatic commits inside the block; the caller calls `commit` when `due` is True."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    @property
    def is_held(self) -> bool:
        """True while automatic commits are suspended, see `held`."""
        return self._suspended

    @property
    def due(self) -> bool:
        """True if enough bytes are uncommitted, or the last commit was long enough ago."""
        return self.store.pending_bytes > self._commit_bytes or time.monotonic() - self._committed_at > self._seconds

    def put(self, bank: Bank, keys: Keys, values: Any, text_keys: Keys | None = None, **entry: Any) -> None:
        """Put a computed batch into a bank, see `Bank.put` for the arguments, and commit when that is due.

        text_keys: uint64 [n, 2], further keys for the same rows.
        """
        if not self.store.writable or self.exact_audits.mismatch:
            self.counters.not_stored += len(keys)
            return
        began = time.perf_counter()
        self._puts += 1
        accepted = bank.put(keys, values, **entry)
        if text_keys is not None:
            bank.alias(text_keys, keys)
        self.counters.not_stored += int((~accepted).sum())
        if not self._suspended:
            try:
                self._commit_if_due()
            except LLMCacheError as error:
                log.warning("%s. Going on without storing", error)
        self.counters.store_seconds += time.perf_counter() - began

    def remember(self, bank: Bank, keys: Keys, values: Any, text_keys: Keys, **entry: Any) -> None:
        """Keep a batch in memory that another process has computed and committed; arguments as for `put`.

        A reload of the store puts the committed rows in its place. A bank gets its batches from `put` or from here.
        """
        if self.exact_audits.mismatch:
            self.counters.not_stored += len(keys)
            return
        accepted = bank.put(keys, values, **entry)
        bank.alias(text_keys, keys, stored=True)
        self.counters.not_stored += int((~accepted).sum())
        self._remembered[id(bank)] = bank

    def release(self) -> None:
        """Reload the store and commit if many remembered entries are in memory.

        Called between calls of the cache, since rows get other numbers. A failure to write is logged. Errors as
        `Store.reload`.
        """
        if not self._remembered or self.store.pending_bytes <= _REMEMBERED_BYTES:
            return
        self.reload()
        try:
            self.commit()
        except LLMCacheError as error:
            log.warning("%s. Going on without storing", error)

    def reload(self) -> None:
        """Move to the newest generation of the store, see `Store.reload`. Remembered entries are read from there."""
        self._drop_remembered()
        self.store.reload()

    def _drop_remembered(self) -> None:
        """Drop the remembered entries from memory. Aliases that this process has to commit stay."""
        for bank in self._remembered.values():
            bank.drop_pending((0, bank.pending[1]))
        self._remembered = {}

    def _commit_if_due(self) -> None:
        if self._remembered:  # a commit now would reload and renumber rows during a call
            return
        if self.due and not self._in_background:
            self.commit()
        elif self.due:
            self._committed_at = time.monotonic()
            self._verify()
            self._commit_step(self.store.commit_behind)
        elif self.store.commit_ready:
            self._commit_step(self.store.finish_commit)

    def alias(self, bank: Bank, text_keys: Keys, keys: Keys) -> None:
        """Add keys of texts for the rows of these keys; both uint64 [n, 2]."""
        if self.store.writable and not self.exact_audits.mismatch:
            bank.alias(text_keys, keys)

    def discard(self) -> None:
        """Drop the uncommitted entries, and count them as not stored."""
        self._drop_remembered()
        self.counters.not_stored += self.store.discard()

    def commit(self) -> None:
        """Commit all entries; does nothing in a read-only store. StoreFull or StoreFenced when a write fails.

        Entries that a changed model may have computed are dropped first, with a warning. With remembered entries the
        store is reloaded first, and rows get other numbers.
        """
        if self._remembered:
            self.reload()
        if self.store.read_only:
            return
        self._committed_at = time.monotonic()
        self._verify()
        self._commit_step(self.store.commit)
        self._verifications = {}

    def give_up(self) -> None:
        """Drop uncommitted entries that cannot be committed any more, and count them as not stored."""
        self._drop_remembered()
        self.counters.not_stored += self.store.drop_pending({})

    def _commit_step(self, step: Callable[[], Manifest]) -> None:
        """Run one step of a commit, then log the new generation and update the counters."""
        not_stored_before = self.store.not_stored
        try:
            before, after = self.store.manifest.generation, step().generation
            if after != before:
                log.info("generation %d is committed", after, extra={"facts": {"llmcache.generation": after}})
        finally:
            self.counters.not_stored += self.store.not_stored - not_stored_before
        if any(self.counters.as_dict().values()):  # an opening without any activity writes no file
            self.store.write_counters(self.counters.as_dict())
            self.history.write()

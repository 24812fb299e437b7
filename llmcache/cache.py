"""`LLMCache`: a model with a persistent cache of its activations."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache import opening
from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.writer import BankWriter
from llmcache.calls.base import LAYER, log
from llmcache.calls.encoding import EncodeMethods
from llmcache.calls.models import ModelMethods
from llmcache.calls.near import NearMethods
from llmcache.calls.pairs import PairMethods
from llmcache.concurrency import at_exit as leaving
from llmcache.concurrency.calls import Calls, WorkerCommits, call
from llmcache.concurrency.reopening import reopened
from llmcache.config import CacheConfig
from llmcache.encoding.calibrations import Calibrations
from llmcache.encoding.compute import Compute, LocalCompute
from llmcache.encoding.executor import Executor
from llmcache.encoding.pooled_states import PooledStates
from llmcache.encoding.results import TOKENS
from llmcache.errors import ConfigError, ForkedStoreError, LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.trust import Trust
from llmcache.indexes.store import Store
from llmcache.layers.registry import Layers
from llmcache.model.batching import Model
from llmcache.model.description.watch import ModelWatch
from llmcache.model.encoders import ENCODERS, TokenVectors, encoder
from llmcache.model.locks import lock_of
from llmcache.model.private_tokenizer import PrivateCopy
from llmcache.model.token_states import Tail
from llmcache.near.calibration.drift import Drift
from llmcache.report.statistics import Statistics, statistics


class LLMCache(EncodeMethods, PairMethods, NearMethods, ModelMethods):
    """A model with a store: documents are computed once and stored; repeats cost a lookup.

    Threads may share a cache, and caches may share a model: calls of one model wait for each other. In a forked child
    the first call opens the store again. A pickle holds the arguments of `open`; loading it opens the store.
    """

    def __init__(self, parts: opening.OpenedParts, backend: Compute | None = None) -> None:
        """Make a cache of opened parts; use `LLMCache.open` instead.

        backend: computes the misses, and is closed with the cache; None: this process computes. A cache with a backend
        can neither be forked nor pickled.
        """
        model, identity, self._opening = parts.model, parts.identity, parts.arguments
        self.model = model
        tokenizer = self._opening.tokenizer
        self.tokenizer: Any = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        self.identity = identity
        self.config = parts.config
        self.namespace = self._opening.namespace
        self._salt, self._drift = parts.secret, self._opening.drift
        self._backend = backend
        self._worker_commits = WorkerCommits()
        self._calls = Calls(lock_of(model), self._reopen, lambda: self._worker_commits.commit(self._storing))
        self._tokenizer_copy = PrivateCopy()
        self._watch, self._current = ModelWatch(model, self.tokenizer, name=identity.name), identity
        self._begin(parts.store)

    def _begin(self, store: Store) -> None:
        """Set up everything that depends on a store opened in this process."""
        model, identity, config, namespace = self.model, self.identity, self.config, self.namespace
        secret = self._salt
        self._store = store
        store.budget = config.budget
        self._counters = Counters()
        self._exact_audits = ExactAudits(config, self._counters)
        self._storing = BankWriter(store, config, self._counters, self._exact_audits)
        self._storing.lock = self._calls.lock
        self._storing.history.namespace, self._storing.history.model = namespace, identity.name
        self._watch.witness = self._storing
        self._layers = Layers(config, namespace, self._storing, secret, self._calls.lock, lambda: self.is_open)
        self._calibrations = Calibrations(store, namespace, config, self._drift, self._storing.commit)
        self._encoding: Executor | None = None
        self._token_states: Executor | None = None
        if isinstance(model, ENCODERS):
            inside = nullcontext if config.layers == "output" else self.attached
            backend = self._backend
            if backend is None and isinstance(model, SentenceTransformer):
                local = LocalCompute(encoder(model), inside)
                backend = PooledStates(local, self._stored_token_states, Tail(model))
            self._encoding = self._executor(LAYER, encoder(model), inside, backend)
            self._calibrations.follow(LAYER, self._encoding)
        self._opened = True
        leaving.opened(self)
        self._last: Statistics | None = None
        self._planned_at: dict[str, float] = {}
        self._reasons: set[str] = set()

    def _executor(
        self,
        bank_name: str,
        runner: Model,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
        backend: Compute | None = None,
    ) -> Executor:
        """Return an executor on a bank for the outputs of the cache's model; the bank is made if there is none."""
        facts = partial(opening.fresh_bank, cast(Any, self.model), runner, self.config)
        bank = self._store.bank(self.namespace, bank_name, facts, self.config.near)
        if self._store.trust != "own":
            opening.check_width(bank.facts, facts())
        return Executor(
            runner, self.identity.digest, self.config, self._storing, bank, self._salt, inside, bank_name, backend
        )

    def _token_execution(self) -> Executor:
        """Executor of the bank of a SentenceTransformer's token embeddings."""
        if self._token_states is None:
            self._token_states = self._executor(TOKENS, TokenVectors(cast(Any, self.model)))
        return self._token_states

    def _stored_token_states(self) -> Executor | None:
        """Executor of the bank of token embeddings, where the store has one; None otherwise."""
        space = self._store.namespace(self.namespace)
        known = self._token_states is not None or (space is not None and TOKENS in space.banks)
        return self._token_execution() if known else None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Module | str | os.PathLike[str] | None = None,
        *,
        kind: str | None = None,
        tokenizer: Any = None,
        config: CacheConfig | None = None,
        namespace: str = "default",
        tau: float | None = None,
        drift: Drift | None = None,
        max_bytes: int | None = None,
        secret: bytes | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        trust: Trust = "auto",
        key: bytes | None = None,
        key_file: str | os.PathLike[str] | None = None,
        min_generation: int = 0,
        allow_untrusted: bool = False,
        read_only: bool = False,
    ) -> Self:
        """Open the store in this folder for this model; create the store if there is none.

        model: a SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder, or its name or path; None loads
            the model that the store was made with. Any other transformers model, or a module with a list of layers, is
            used through `attached`, `generate` and `score`.
        kind: of a model given by name: "sentence-transformer", "cross-encoder", "sparse-encoder" or
            "multi-vector-encoder"; None for the kind that its folder names.
        tokenizer: of a transformers model, for `generate` and `score`; one of sentence-transformers has its own.
        config: settings, saved with a new namespace. For an existing namespace, settings given here hold for this
            opening only; `fingerprint` and `dtype` cannot change.
        namespace: entries of different models live in different namespaces of one store.
        tau, max_bytes: replace those of the settings, for this opening. A CrossEncoder or MultiVectorEncoder takes
            no tau.
        drift: the custom drift function that near reuse was calibrated with, if any.
        secret, secret_file: at least 32 bytes that enter all keys of this namespace, or the file that holds them. An
            opening with another secret, or none, is refused.
        trust, key, key_file, min_generation, allow_untrusted: authentication of the store, see `Store.open`. An
            untrusted store is only read, needs `model`, and gives exact matches by token ids only.
        read_only: write nothing in the folder; misses are computed but not stored. A folder without write permission
            is opened read-only, with a warning.
        Returns the open cache. ModelMismatch when the namespace belongs to another model; ConfigError for invalid
        settings; UntrustedSnapshot when the store cannot be authenticated.
        """
        parts = opening.open_parts(
            path, model, kind=kind, tokenizer=tokenizer, config=config, namespace=namespace, tau=tau, drift=drift,
            max_bytes=max_bytes, secret=secret, secret_file=secret_file, trust=trust, key=key, key_file=key_file,
            min_generation=min_generation, allow_untrusted=allow_untrusted, read_only=read_only,
        )  # fmt: skip
        try:
            return cls(parts)
        except BaseException:
            parts.store.close()
            raise

    # -- other processes ------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """Open the store again in a forked child. Entries that the parent has not committed are left to the parent."""
        if self._backend is not None:
            raise ForkedStoreError(
                "a cache with workers was used by a child of the process that opened it; open the store in the child"
            )
        if not self._opened:
            return
        inherited = self._store
        self._begin(self._opening.store())
        inherited.close()

    def works_for_another_process(self) -> None:
        """Commit after each call from now on, since this process may be terminated at any time."""
        self._calls.worker = True

    def __reduce__(self) -> Any:
        if self._backend is not None:
            raise ConfigError("a cache with workers cannot be pickled; open the store where it is needed")
        if not self._opened:
            raise LLMCacheError("a closed cache cannot be pickled or copied; open it again with LLMCache.open")
        return reopened, (type(self), self._opening)

    # -- the store ------------------------------------------------------------------------------------------

    @property
    @call
    def bank(self) -> Bank:
        """The bank of embeddings, for code that looks up or stores batches itself. ConfigError without embeddings."""
        return self._bank

    @property
    @call
    def storing(self) -> BankWriter:
        """The writer of the banks, for runs that decide themselves when to commit."""
        self._check_open()
        return self._storing

    def __repr__(self) -> str:
        if not self._opened:
            state = "closed"
        elif self._encoding is None:
            state = "for attached models and decoders"
        else:
            state = f"{len(self._encoding.bank):,} entries" + (", read-only" if self._store.read_only else "")
        path = str(self._store.folder.path)
        return f"LLMCache({path!r}, model={self.identity.name!r}, namespace={self.namespace!r}: {state})"

    def __bool__(self) -> bool:
        """Return True, also for an empty cache, whose `len` is 0."""
        return True

    @call
    def __len__(self) -> int:
        """Return the number of entries in the output bank, including uncommitted ones."""
        return len(self._bank)

    @property
    def read_only(self) -> bool:
        """True if new entries are not stored: opened with `read_only=True`, or the folder is not writable."""
        return self._store.read_only

    @call
    def commit(self) -> None:
        """Make new entries durable and visible to other processes; in a read-only store, do nothing.

        StoreFull or StoreFenced when a write fails. Earlier commits are safe then, and the cache goes on serving hits
        and computing misses, without storing.
        """
        self._check_open()
        self._storing.commit()
        self._calibrations.keep()

    @call
    def reload(self) -> None:
        """Load the latest commit of other processes. Uncommitted entries of this cache are kept.

        ModelMismatch when the namespace now belongs to another model.
        """
        self._check_open()
        self._storing.reload()
        self._calibrations.forget()

    @call
    def rebuild(self) -> None:
        """Refit the projection and rebuild the FAISS index over all entries, and commit both.

        StoreFenced when the store may not be written.
        """
        self._check_open()
        if self._store.read_only:
            self._store.commit()  # raises StoreFenced with the reason
        self._storing.commit()
        self._bank.near.rebuild()
        self.commit()

    @property
    @call
    def levels(self) -> DeviceCache | None:
        """Entries in device memory and in page-locked memory; None before the first call for a tensor."""
        return self._execution.reader.levels

    @property
    @call
    def corpus(self) -> str:
        """Name of the corpus being processed, for the store's run history (`llmcache report`); "" for none."""
        return self._storing.history.corpus

    @corpus.setter
    @call
    def corpus(self, name: str) -> None:
        self._storing.history.begin(name)

    @property
    @call
    def width(self) -> int:
        """Dimension of an output vector."""
        return self._bank.facts.width

    def stats(self) -> Statistics:
        """Return hits, savings and store contents since this opening; of a closed cache, those at closing."""
        if self._last is not None:
            return self._last
        with self._calls:
            return self._statistics()

    def _statistics(self) -> Statistics:
        index = self._bank.near.kind if self._encoding else None
        return statistics(
            self._store, self._counters, index, self.namespace, self._calibrations.states(), self._storing.decisions(),
            self._exact_audits.mismatch,
        )  # fmt: skip

    def close(self) -> None:
        """Commit and close. Closing twice is fine. Caches that are still open when Python exits are closed then.

        Running calls of other threads are waited for; later calls raise LLMCacheError.
        """
        if self._calls.inherited:  # a forked child made no call; uncommitted entries are the parent's
            self._opened = False
            self._store.close()
            return
        with self._calls:
            if not self._opened:
                return
            try:
                if self._store.writable:
                    self.commit()
                self._last = self._statistics()
            finally:
                self._opened = False
                try:
                    self._store.close()
                finally:
                    if self._backend is not None:
                        self._backend.close()

    @property
    def is_open(self) -> bool:
        """False once the cache is closed."""
        return self._opened

    @property
    def busy(self) -> bool:
        """True while any thread runs a call on this model."""
        return self._calls.lock.depth > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except LLMCacheError as second:  # `error` is the one to raise
            log.warning("%s", second)

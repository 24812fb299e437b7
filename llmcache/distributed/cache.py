"""A cache whose model runs on the workers of a Ray cluster.

Look-ups, order and provenance are those of one process, which asks the same banks in the same way; only the batches are
computed elsewhere, by processes that store and commit them. So results do not depend on the number of workers: a batch
has the same documents wherever it is computed. (Only torch may round small batches by the number of its threads.)
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache.banks.writer import BankWriter
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.distributed.workers import (
    WorkerConfig,
    Workers,
    WorkItem,
    WorkResult,
    library,
)
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.encoding.executor import Executor
from llmcache.errors import ConfigError, ForkedStoreError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.store import Store
from llmcache.model.batching import Sentences
from llmcache.model.description.process_settings import running_mode
from llmcache.model.identity import Identity
from llmcache.near.calibration.drift import Drift

_PER_WORKER = 4  # shares of a window for each worker, so that none waits long for the last
_REMEMBERED = 64 << 20  # bytes of outputs that workers have committed, held until the store is read again


class Remembered(BankWriter):
    """Keeps what workers committed in memory, until the store is read again. Commits only names of rows."""

    def __init__(self, *finished: Any) -> None:
        super().__init__(*finished)
        self._banks: dict[int, Bank] = {}
        self._names: list[tuple[Bank, Keys, Keys]] = []

    def put(self, bank: Bank, keys: Keys, values: Any, text_keys: Keys | None = None, **entry: Any) -> None:
        if self.exact_audits.mismatch:
            self.counters.not_stored += len(keys)
            return
        kept = bank.put(keys, values, **entry)
        if text_keys is not None:
            bank.alias(text_keys, keys)
        self.counters.not_stored += int((~kept).sum())
        self._banks[id(bank)] = bank

    def alias(self, bank: Bank, text_keys: Keys, keys: Keys) -> None:
        super().alias(bank, text_keys, keys)
        if len(keys) and self.store.writable and not self.exact_audits.mismatch:
            self._names.append((bank, text_keys, keys))

    def discard(self) -> None:
        """Forget what workers committed since the last commit, and the names of rows that came up here."""
        self._banks, self._names = {}, []
        self.store.discard()

    def commit(self) -> None:
        """Read the store as the workers left it, in place of what was remembered; commit names that came up here."""
        names, self._names = self._names, []
        if self._banks or names:
            for bank in self._banks.values():
                bank.drop_pending()
            for bank in {id(one): one for one, _, _ in names}.values():
                bank.drop_pending()
            self._banks = {}
            self.store.reload()
            for bank, text_keys, keys in names:
                bank.alias(text_keys, keys)
        super().commit()


class SpreadExecution(Executor):
    """Answers calls as `Executor` does; the batches are computed by workers."""

    workers: Workers

    def answers(self, call: EncodeCall) -> Answers:
        mode = running_mode(self.embedding.device.type)
        if mode:
            raise ConfigError(f"workers do not compute under the settings of this process ({mode}); use one process")
        # between two calls nobody holds numbers of rows, which a commit changes here
        if self._storing.store.pending_bytes > _REMEMBERED:
            self._storing.commit()
        return super().answers(call)

    def _compute(self, answers: Answers, call: EncodeCall, unknown: Misses) -> None:
        order = np.argsort(-unknown.tokens.lengths, kind="stable")
        if not len(order):
            return
        began = time.perf_counter()
        parts = _parts(order, call.batch_size, self.workers.count)
        done: list[WorkResult | None] = [None] * len(parts)
        shares = [self._share(call, unknown, part) for part in parts]
        for number, one in self.workers.computed(shares):
            done[number] = one
            call.progress(len(parts[number]), len(parts[number]))
        self.counters.model_seconds += time.perf_counter() - began
        for part, share, result in zip(parts, shares, done, strict=True):
            assert result is not None
            answers.outputs[unknown.places[part]] = result.outputs
            if result.stored:
                self._remember(share, result)
            else:
                self.counters.not_stored += len(part)

    def _remember(self, share: WorkItem, done: WorkResult) -> None:
        self._storing.put(
            self.bank,
            share.keys,
            done.outputs,
            share.text_keys,
            tokens=share.tokens.ids,
            sources=share.sources,
            features=share.features,
            cost=np.full(len(share.keys), done.seconds / len(share.keys), np.float32),
            marks=share.marks,
        )

    def _share(self, call: EncodeCall, unknown: Misses, part: NDArray[np.int64]) -> WorkItem:
        """Work item of one worker: a part of the documents to compute."""
        places = unknown.places[part]
        return WorkItem(
            unknown.tokens.take(part.tolist()),
            unknown.keys[part],
            unknown.text_keys[part],
            [call.ids[i] if call.ids else "" for i in places.tolist()],
            unknown.features[part],
            call.batch_size,
            call.role,
            self.marks(call, places),
        )


def _parts(order: NDArray[np.int64], batch_size: int, workers: int) -> list[NDArray[np.int64]]:
    """Whole batches, in order, so many of them together that each worker gets a few parts."""
    batches = -(-len(order) // batch_size)
    size = batch_size * max(1, -(-batches // (_PER_WORKER * workers)))
    return [order[start : start + size] for start in range(0, len(order), size)]


class SpreadCache(LLMCache):
    """An `LLMCache` whose model runs on workers. Made by `llmcache.distributed.ray.open`."""

    workers: Workers

    def __init__(
        self,
        store: Store,
        model: Module,
        identity: Identity,
        config: CacheConfig,
        namespace: str,
        secret: bytes = b"",
        drift: Drift | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(store, model, identity, config, namespace, secret, drift, tokenizer)
        self._secret = secret

    @classmethod
    def on(
        cls,
        path: str | os.PathLike[str],
        model: str | os.PathLike[str] | None,
        workers: int,
        threads: int | None,
        gpus: float,
        **keywords: Any,
    ) -> Self:
        """`LLMCache.open`, with workers that open the same store. ConfigError for what they cannot compute."""
        library()
        if workers < 1:
            raise ConfigError(f"there is at least one worker, got {workers}")
        cache = cls.open(path, model, **keywords)
        try:
            cache._spread(None if model is None else os.fspath(model), (workers, threads, gpus), keywords)
        except BaseException:
            cache.close()
            raise
        return cache

    def _spread(self, model: str | None, asked: tuple[int, int | None, float], keywords: dict[str, Any]) -> None:
        if not isinstance(self.model, SentenceTransformer) or self.config.layers != "output":
            raise ConfigError(
                "workers compute embeddings, of a SentenceTransformer and with layers='output'; use one process"
            )
        there = {name: value for name, value in keywords.items() if name not in ("config", "tau", "min_generation")}
        store, old = self._store, self._execution
        place = WorkerConfig(os.fspath(store.folder.path), model, store.manifest.generation, there)
        self._storing = Remembered(store, self.config, self._counters, self._exact_audits)
        execution = SpreadExecution(
            Sentences(self.model), self.identity.digest, self.config, self._storing, old.bank, self._secret, nullcontext
        )
        execution.reuse, execution.fields = old.reuse, old.fields
        execution.workers = self.workers = Workers(place, *asked)
        self._encoding = execution

    def _reopen(self) -> None:
        raise ForkedStoreError(
            "a cache with Ray workers was used by a child of the process that opened it; open the store in the child"
        )

    def __reduce__(self) -> Any:
        raise ConfigError("a cache with Ray workers cannot be pickled; open the store where it is needed")

    def close(self) -> None:
        """Commit and close, and end the workers."""
        inherited = self._calls.inherited
        try:
            super().close()
        finally:
            if hasattr(self, "workers") and not inherited:  # they are the parent's
                self.workers.close()

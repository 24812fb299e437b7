"""Cache whose model runs on the workers of a Ray cluster.

Look-ups, order and provenance are those of a single process. Only batches are computed elsewhere, by worker processes
that store and commit them. A batch has the same documents wherever it is computed, so results do not depend on the
number of workers, except that torch may round small batches differently with another number of threads.
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
from llmcache.calls.base import LAYER
from llmcache.config import CacheConfig
from llmcache.distributed.workers import (
    WorkerConfig,
    Workers,
    WorkItem,
    WorkResult,
    library,
)
from llmcache.encoding.answers import Answers
from llmcache.encoding.calibrations import Calibrations
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

_PER_WORKER = 4  # work items per worker and window, so that no worker waits long for the last item
_REMEMBERED = 64 << 20  # bytes of outputs that workers have committed, kept in memory until the store is reloaded


class Remembered(BankWriter):
    """Bank writer that keeps entries in memory which workers have committed, until the store is reloaded.

    It commits nothing but aliases: further text keys of rows.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._banks: dict[int, Bank] = {}
        self._aliases: list[tuple[Bank, Keys, Keys]] = []

    def put(self, bank: Bank, keys: Keys, values: Any, text_keys: Keys | None = None, **entry: Any) -> None:
        """Put a batch that a worker has committed into the bank's memory."""
        if self.exact_audits.mismatch:
            self.counters.not_stored += len(keys)
            return
        accepted = bank.put(keys, values, **entry)
        if text_keys is not None:
            bank.alias(text_keys, keys)
        self.counters.not_stored += int((~accepted).sum())
        self._banks[id(bank)] = bank

    def alias(self, bank: Bank, text_keys: Keys, keys: Keys) -> None:
        """Add keys of texts for the rows of these keys, to be committed here."""
        super().alias(bank, text_keys, keys)
        if len(keys) and self.store.writable and not self.exact_audits.mismatch:
            self._aliases.append((bank, text_keys, keys))

    def discard(self) -> None:
        """Drop the workers' entries since the last commit, and the uncommitted aliases."""
        self._banks, self._aliases = {}, []
        self.store.discard()

    def commit(self) -> None:
        """Reload the store with the workers' entries in place of those in memory, and commit the aliases."""
        aliases, self._aliases = self._aliases, []
        if self._banks or aliases:
            for bank in self._banks.values():
                bank.drop_pending()
            for bank in {id(aliased): aliased for aliased, _, _ in aliases}.values():
                bank.drop_pending()
            self._banks = {}
            self.store.reload()
            for bank, text_keys, keys in aliases:
                bank.alias(text_keys, keys)
        super().commit()


class SpreadExecution(Executor):
    """Executor whose batches are computed by workers."""

    workers: Workers

    def answers(self, call: EncodeCall) -> Answers:
        """Execute a call, see `Executor.answers`.

        ConfigError when this process has settings that workers do not share, such as autocast.
        """
        mode = running_mode(self.embedding.device.type)
        if mode:
            raise ConfigError(f"workers do not compute under the settings of this process ({mode}); use one process")
        # a commit reloads the store and renumbers rows; between calls no row numbers are in use
        if self._storing.store.pending_bytes > _REMEMBERED:
            self._storing.commit()
        return super().answers(call)

    def _compute(self, answers: Answers, call: EncodeCall, unknown: Misses) -> None:
        order = np.argsort(-unknown.tokens.lengths, kind="stable")
        if not len(order):
            return
        began = time.perf_counter()
        parts = _parts(order, call.batch_size, self.workers.count)
        results: list[WorkResult | None] = [None] * len(parts)
        items = [self._work_item(call, unknown, part) for part in parts]
        for number, completed in self.workers.computed(items):
            results[number] = completed
            call.progress(len(parts[number]), len(parts[number]))
        self.counters.model_seconds += time.perf_counter() - began
        for part, item, result in zip(parts, items, results, strict=True):
            assert result is not None
            answers.outputs[unknown.places[part]] = result.outputs
            if result.stored:
                self._remember(item, result)
            else:
                self.counters.not_stored += len(part)

    def _remember(self, item: WorkItem, result: WorkResult) -> None:
        self._storing.put(
            self.bank,
            item.keys,
            result.outputs,
            item.text_keys,
            tokens=item.tokens.ids,
            sources=item.sources,
            features=item.features,
            cost=np.full(len(item.keys), result.seconds / len(item.keys), np.float32),
            marks=item.marks,
        )

    def _work_item(self, call: EncodeCall, unknown: Misses, part: NDArray[np.int64]) -> WorkItem:
        """Make the work item of some misses. part: int64 [n], their indices in `unknown`."""
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
    """Split the order of documents into parts of whole batches, some parts per worker. order: int64 [n]."""
    batches = -(-len(order) // batch_size)
    size = batch_size * max(1, -(-batches // (_PER_WORKER * workers)))
    return [order[start : start + size] for start in range(0, len(order), size)]


class SpreadCache(LLMCache):
    """`LLMCache` whose model runs on workers; opened by `llmcache.distributed.ray.open`."""

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
        """Open a cache, see `LLMCache.open`, with workers that open the same store; see `ray.open` for the arguments.

        ConfigError for a model or settings that workers cannot compute.
        """
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

    def _spread(self, model: str | None, resources: tuple[int, int | None, float], keywords: dict[str, Any]) -> None:
        """Replace the executor and the bank writer. resources: number of workers; threads and GPUs of each."""
        if not isinstance(self.model, SentenceTransformer) or self.config.layers != "output":
            raise ConfigError(
                "workers compute embeddings, of a SentenceTransformer and with layers='output'; use one process"
            )
        local = ("config", "tau", "min_generation")  # settings of this process alone
        options = {name: value for name, value in keywords.items() if name not in local}
        store, old = self._store, self._execution
        config = WorkerConfig(os.fspath(store.folder.path), model, store.manifest.generation, options)
        self._storing = Remembered(store, self.config, self._counters, self._exact_audits)
        execution = SpreadExecution(
            Sentences(self.model), self.identity.digest, self.config, self._storing, old.bank, self._secret, nullcontext
        )
        execution.reuse, execution.fields = old.reuse, old.fields
        execution.workers = self.workers = Workers(config, *resources)
        self._encoding = execution
        # calibrations are saved by the writer that workers share, and act on the executor in use
        self._calibrations = Calibrations(store, self.namespace, self.config, self._drift, self._storing.commit)
        self._calibrations.follow(LAYER, execution)

    def _reopen(self) -> None:
        raise ForkedStoreError(
            "a cache with Ray workers was used by a child of the process that opened it; open the store in the child"
        )

    def __reduce__(self) -> Any:
        raise ConfigError("a cache with Ray workers cannot be pickled; open the store where it is needed")

    def close(self) -> None:
        """Commit, close the cache and end the workers."""
        inherited = self._calls.inherited
        try:
            super().close()
        finally:
            if hasattr(self, "workers") and not inherited:  # in a forked child the workers are the parent's
                self.workers.close()

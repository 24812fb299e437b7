"""Use a store from the processes of a Ray cluster: a cache with workers, or a callable class for Ray Data.

from llmcache.distributed.ray import CachedModel, open

with open("store/", workers=4) as cache:  # an LLMCache with the results of one process, computed by four
    for result in cache.run(documents): ...

dataset.map_batches(CachedModel, fn_constructor_kwargs={"store": "/shared/store"}, concurrency=4, batch_size=4096)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmcache.cache import LLMCache
from llmcache.distributed.compute import open_with_workers
from llmcache.distributed.workers import committed, library
from llmcache.errors import ConfigError, CorpusError

__all__ = ["CachedModel", "open"]


def open(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    workers: int = 2,
    threads: int | None = None,
    gpus: float = 0,
    **keywords: Any,
) -> LLMCache:
    """Open a cache whose model runs on processes of a Ray cluster. Close it, or use `with`.

    The store must be at the same path on every machine. Results, their order and their provenance are those of one
    process, bit for bit if that has as many threads as a worker (torch may round small batches differently with another
    number of threads). Each worker loads the model, opens the store and commits its results before it returns them. A
    worker that dies is restarted, and its work is repeated.

    model: name or path of a SentenceTransformer; None for the one the store was made with.
    workers: maximum number of workers. threads: torch threads of each; None for an equal part of the cluster's cores.
    gpus: GPUs of each worker. keywords: as for `LLMCache.open`.
    Unless Ray runs already, joins the cluster of RAY_ADDRESS, or starts one on this machine and stops it at the end.
    ConfigError when Ray is not installed, or for a model or settings that workers cannot compute.
    """
    return open_with_workers(path, model, workers, threads, gpus, **keywords)[0]


class CachedModel:
    """Callable class for `ray.data.Dataset.map_batches` with batches of NumPy arrays, the default of Ray Data.

    Every actor opens the store once. It reuses stored results, computes the others and commits them before it returns
    the batch. An actor that is killed loses its current batch, which Ray repeats. Each batch of map_batches becomes a
    segment of the store, so use a batch_size of some thousand rows there. Actors do not see results that others
    computed after they opened the store; `llmcache compact STORE --duplicates` removes entries stored twice.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
        *,
        text: str = "text",
        id: str = "id",
        output: str = "output",
        role: str | None = None,
        batch_size: int = 32,
        threads: int | None = None,
        **keywords: Any,
    ) -> None:
        """Open the store.

        text, id: columns of a batch; without an id column, positions in the batch are the ids. output: column to add.
        batch_size: documents per batch of the model. threads: torch threads; None for the cores Ray assigns the actor.
        keywords: as for `LLMCache.open`, such as namespace, tau or key_file.
        """
        import torch

        torch.set_num_threads(threads or _cores())
        self._text, self._id, self._output = text, id, output
        self._role, self._batch_size = role, batch_size
        self._cache = LLMCache.open(store, model, **keywords)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add columns to a batch: output (float32 [rows, width]), tier, layer, source, similarity (NaN for a miss).

        ConfigError for a batch that is no mapping. CorpusError without the text column, or for a value that is no text.
        """
        if not isinstance(batch, Mapping):
            raise ConfigError(f'a batch is a mapping of arrays, got {type(batch).__name__}; use batch_format="numpy"')
        texts = self._column(batch, self._text)
        ids = [str(value) for value in batch[self._id]] if self._id in batch else [str(i) for i in range(len(texts))]
        documents = [{"id": name, "text": text} for name, text in zip(ids, texts, strict=True)]
        results = list(
            self._cache.run(documents, role=self._role, batch_size=self._batch_size, chunk=max(1, len(documents)))
        )
        if self._cache.storing.store.pending_bytes:  # any batch may be the actor's last; Ray does not tell
            committed(self._cache)
        outputs = np.zeros((len(results), self._cache.width), np.float32)
        for place, result in enumerate(results):
            outputs[place] = result.output
        similarities = [np.nan if result.similarity is None else result.similarity for result in results]
        return {
            **batch,
            self._output: outputs,
            "tier": np.array([result.tier for result in results], object),
            "layer": np.array([result.layer for result in results], object),
            "source": np.array([result.source for result in results], object),
            "similarity": np.array(similarities, np.float32),
        }

    def _column(self, batch: Mapping[str, Any], name: str) -> list[str]:
        if name not in batch:
            raise CorpusError(
                f"the batch has no column {name!r}, only {', '.join(map(repr, batch))}; name it: text=..."
            )
        texts = [value.item() if isinstance(value, np.generic) else value for value in batch[name]]
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise CorpusError(f"row {place} of a batch has {type(text).__name__} under {name!r}, not a text")
        return texts


def _cores() -> int:
    """Return the number of cores that Ray assigns this actor; outside of Ray, of all cores."""
    ray = library()
    if not ray.is_initialized():
        return len(os.sched_getaffinity(0))
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))

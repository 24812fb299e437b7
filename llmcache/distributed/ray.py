"""Many processes on one store, with Ray: a whole job spread over workers, or a model for Ray Data.

from llmcache.ray import CachedModel, open

with open("store/", workers=4) as cache:  # an LLMCache: the results of one process, computed by four
    for result in cache.run(documents): ...

dataset.map_batches(CachedModel, fn_constructor_kwargs={"store": "/shared/store"}, concurrency=4, batch_size=4096)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmcache.distributed.cache import SpreadCache
from llmcache.distributed.workers import OpenCache, committed, library
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
) -> SpreadCache:
    """`LLMCache.open`, with the model running on so many processes of a Ray cluster. Close it, or use `with`.

    The store has to be at the same path on every machine. Results, their order and their provenance are those of one
    process, bit for bit where that has as many threads as a worker (torch may round small batches by their number).
    Each worker loads the model, opens the store and commits what it computed before it hands it over; one that dies
    is started again and its work done again.

    model: the name or path of a SentenceTransformer, None for the one the store was made with.
    workers: at most so many. threads: of torch in each; None is its part of the cluster's cores. gpus: of each worker.
    keywords: as for `LLMCache.open`.
    Joins the cluster of RAY_ADDRESS, or starts one on this machine, and ends it again, unless Ray runs already.
    ConfigError where Ray is not installed, or for a model or settings that workers cannot compute.
    """
    return SpreadCache.on(path, model, workers, threads, gpus, **keywords)


class CachedModel:
    """A callable class for `ray.data.Dataset.map_batches` with batches of NumPy arrays, its default.

    Every actor opens the store once, reads what is there, computes the rest and commits it before it gives the batch
    back: an actor that is killed loses the batch it was at, which Ray does again. Rows of `batch_size` for map_batches
    become one segment of the store, so take some thousand. Actors do not see what others computed since they opened
    the store; what two of them stored is dropped by `llmcache compact STORE --duplicates`.
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
        """text, id: columns of a batch; without ids the places in the batch are taken. output: column that is added.

        batch_size: documents the model computes at a time. threads: of torch; None takes the cores Ray gives the actor.
        keywords: as for `LLMCache.open`, such as namespace, tau or key_file.
        """
        import torch

        torch.set_num_threads(threads or _cores())
        self._text, self._id, self._output = text, id, output
        self._role, self._batch_size = role, batch_size
        self._cache = OpenCache.open(store, model, **keywords)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The same columns, and: output (float32 [rows, width]), tier, layer, source, similarity (NaN for a miss)."""
        if not isinstance(batch, Mapping):
            raise ConfigError(f'a batch is a mapping of arrays, got {type(batch).__name__}; use batch_format="numpy"')
        texts = self._column(batch, self._text)
        ids = [str(one) for one in batch[self._id]] if self._id in batch else [str(i) for i in range(len(texts))]
        documents = [{"id": one, "text": text} for one, text in zip(ids, texts, strict=True)]
        found = list(
            self._cache.run(documents, role=self._role, batch_size=self._batch_size, chunk=max(1, len(documents)))
        )
        if self._cache.storing.store.pending_bytes:  # nobody tells an actor that this was its last batch
            committed(self._cache)
        outputs = np.zeros((len(found), self._cache.width), np.float32)
        for place, one in enumerate(found):
            outputs[place] = one.output
        return {
            **batch,
            self._output: outputs,
            "tier": np.array([one.tier for one in found], object),
            "layer": np.array([one.layer for one in found], object),
            "source": np.array([one.source for one in found], object),
            "similarity": np.array([np.nan if one.similarity is None else one.similarity for one in found], np.float32),
        }

    def _column(self, batch: Mapping[str, Any], name: str) -> list[str]:
        if name not in batch:
            raise CorpusError(
                f"the batch has no column {name!r}, only {', '.join(map(repr, batch))}; name it: text=..."
            )
        texts = [one.item() if isinstance(one, np.generic) else one for one in batch[name]]
        for place, one in enumerate(texts):
            if not isinstance(one, str):
                raise CorpusError(f"row {place} of a batch has {type(one).__name__} under {name!r}, not a text")
        return texts


def _cores() -> int:
    """What Ray gives this actor; all cores outside of Ray."""
    ray = library()
    if not ray.is_initialized():
        return len(os.sched_getaffinity(0))
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))

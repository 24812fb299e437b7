"""Contenders without other libraries: the model alone, de-duplication, a cache of final outputs, LLMCache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np

from llmcache.arrays import Floats32
from llmcache.bench.harness.rounds import Contender, Opened, Task
from llmcache.bench.harness.turns import Row
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.model.batching import compute, token_embedding
from llmcache.model.encoders import Sentences
from llmcache.model.features import features
from llmcache.model.tokens import tokenise

ASIDE_BUDGET = 0.001
"""Calibration budget of `aside`: mean 1 - cosine over all results."""


class Counted:
    """`SentenceTransformer.encode` with a count of the texts computed."""

    def __init__(self, task: Task) -> None:
        self._task, self.texts = task, 0

    def __call__(self, texts: Sequence[str]) -> Floats32:
        self.texts += len(texts)
        return np.asarray(self._task.model.encode(list(texts), batch_size=self._task.batch_size), np.float32)

    def computed(self) -> int:
        return self.texts


@contextmanager
def alone(task: Task, _: Path) -> Iterator[Opened]:
    """Contender: `SentenceTransformer.encode`, whose batches are sorted by characters."""
    encode = Counted(task)
    yield Opened(encode, encode.computed)


@contextmanager
def by_tokens(task: Task, _: Path) -> Iterator[Opened]:
    """Contender: the same model in batches sorted by tokens, which pad less: the strictest base."""
    answered, model = 0, Sentences(task.model)

    def answer(texts: Sequence[str]) -> Floats32:
        nonlocal answered
        answered += len(texts)
        rows = tokenise(task.model, list(texts), None, None)
        outputs: Floats32 = np.empty((len(texts), width(task)), np.float32)
        for batch in compute(model, rows, task.batch_size, None):
            outputs[batch.chosen] = batch.outputs
        return outputs

    yield Opened(answer, lambda: answered)


@contextmanager
def once_per_call(task: Task, _: Path) -> Iterator[Opened]:
    """Contender: equal texts of one call are computed once; nothing is stored between calls."""
    encode = Counted(task)

    def answer(texts: Sequence[str]) -> Floats32:
        places: dict[str, int] = {}
        of = [places.setdefault(text, len(places)) for text in texts]
        return encode(list(places))[of]

    yield Opened(answer, encode.computed)


def final_outputs(tau: float) -> Callable[[Task, Path], AbstractContextManager[Opened]]:
    """Contender: the paper's DocCache, which reuses final outputs of neighbours.

    The cosine of the fingerprints is at least `tau`. Outputs are in memory, and the search is exact.
    """

    @contextmanager
    def opened(task: Task, folder: Path) -> Iterator[Opened]:
        encode, embedding = Counted(task), token_embedding(task.model)
        index = faiss.IndexFlatIP(int(embedding.shape[1]))
        kept: list[Floats32] = []
        if (folder / "kept.npz").exists():
            with np.load(folder / "kept.npz") as file:
                index.add(file["fingerprints"])
                kept = list(file["outputs"])

        def answer(texts: Sequence[str]) -> Floats32:
            prints = features(embedding, tokenise(task.model, list(texts), None, None).ids, "mean")
            prints /= np.linalg.norm(prints, axis=1, keepdims=True)
            similarity, nearest = index.search(prints, 1)  # an empty index returns the least float
            new = {texts[i]: i for i in np.flatnonzero(similarity[:, 0] < tau).tolist()}
            fresh = dict(zip(new, encode(list(new)), strict=True)) if new else {}
            outputs: Floats32 = np.empty((len(texts), width(task)), np.float32)
            for place, text in enumerate(texts):
                outputs[place] = fresh[text] if text in fresh else kept[int(nearest[place, 0])]
            if new:
                index.add(prints[list(new.values())])
                kept.extend(fresh.values())
            return outputs

        yield Opened(answer, encode.computed)
        if kept:
            prints = index.reconstruct_n(0, len(kept))
            np.savez(folder / "kept.npz", fingerprints=prints, outputs=np.array(kept))

    return opened


def ours(config: CacheConfig | None = None) -> Callable[[Task, Path], AbstractContextManager[Opened]]:
    """Contender: `LLMCache.encode`, committed."""

    @contextmanager
    def opened(task: Task, folder: Path) -> Iterator[Opened]:
        with LLMCache.open(folder / "store", task.model, config=config) as cache:
            yield _cached(task, cache)

    return opened


def _cached(task: Task, cache: LLMCache) -> Opened:
    return Opened(
        lambda texts: cache.encode(texts, batch_size=task.batch_size),
        lambda: cache.stats().counters.misses,
        cache.commit,
    )


@contextmanager
def aside(task: Task, folder: Path) -> Iterator[Opened]:
    """Contender: the cache, calibrated on its entries to a mean 1 - cosine that hardly any neighbour keeps."""
    with LLMCache.open(folder / "store", task.model) as cache:

        def commit() -> None:
            cache.commit()
            if cache.calibration is None:
                cache.calibrate(budget=ASIDE_BUDGET, drift="cosine")
                cache.commit()

        def noted() -> Row:
            counters = cache.stats().counters
            return {
                "off": cache.near_is_off, "asked": counters.documents, "looked_up": counters.near_asked,
                "near": counters.near,
            }  # fmt: skip

        yield _cached(task, cache)._replace(commit=commit, noted=noted)


def width(task: Task) -> int:
    """Return the number of components of a vector."""
    dimension = task.model.get_embedding_dimension()
    assert dimension is not None
    return dimension


def near(tau: float) -> list[Contender]:
    """Return the cache and the paper's DocCache, with the same fingerprint and tau."""
    config = replace(CacheConfig(), tau=tau, projection="none", index="flat")
    return [
        Contender(f"LLMCache, near from {tau}", ours(config)),
        Contender(f"final outputs, near from {tau} (DocCache)", final_outputs(tau)),
    ]

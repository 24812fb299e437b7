"""Ways to one vector per text that need no other library: the model alone, de-duplication, final outputs, the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from llmcache.bench.harness.rounds import (
    Contender,
    Floats,
    Opened,
    Row,
    Task,
)
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.model.batching import Sentences, compute, token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise

ASIDE_BUDGET = 0.001
"""Mean 1 - cosine over all results."""


class Counted:
    """`SentenceTransformer.encode`, which counts what it computes."""

    def __init__(self, task: Task) -> None:
        self._task, self.texts = task, 0

    def __call__(self, texts: Sequence[str]) -> Floats:
        self.texts += len(texts)
        return np.asarray(self._task.model.encode(list(texts), batch_size=self._task.batch_size), np.float32)

    def computed(self) -> int:
        return self.texts


@contextmanager
def alone(task: Task, _: Path) -> Iterator[Opened]:
    """`SentenceTransformer.encode`: its batches are sorted by characters."""
    encode = Counted(task)
    yield Opened(encode, encode.computed)


@contextmanager
def by_tokens(task: Task, _: Path) -> Iterator[Opened]:
    """The same model in batches sorted by tokens, which pad less: the strictest base."""
    answered, model = 0, Sentences(task.model)

    def answer(texts: Sequence[str]) -> Floats:
        nonlocal answered
        answered += len(texts)
        rows = tokenise(task.model, list(texts), None, None)
        found: Floats = np.empty((len(texts), width(task)), np.float32)
        for one in compute(model, rows, task.batch_size, None):
            found[one.chosen] = one.outputs
        return found

    yield Opened(answer, lambda: answered)


@contextmanager
def once_per_call(task: Task, _: Path) -> Iterator[Opened]:
    """Equal texts of one call are computed once; nothing is kept for the next call."""
    encode = Counted(task)

    def answer(texts: Sequence[str]) -> Floats:
        places: dict[str, int] = {}
        of = [places.setdefault(text, len(places)) for text in texts]
        return encode(list(places))[of]

    yield Opened(answer, encode.computed)


def final_outputs(tau: float) -> Callable[[Task, Path], AbstractContextManager[Opened]]:
    """The paper's DocCache: final outputs by fingerprint, given from cosine `tau` on; in memory, searched exactly."""

    @contextmanager
    def opened(task: Task, folder: Path) -> Iterator[Opened]:
        encode, embedding = Counted(task), token_embedding(task.model)
        index = faiss.IndexFlatIP(int(embedding.shape[1]))
        kept: list[Floats] = []
        if (folder / "kept.npz").exists():
            with np.load(folder / "kept.npz") as file:
                index.add(file["fingerprints"])
                kept = list(file["outputs"])

        def answer(texts: Sequence[str]) -> Floats:
            prints = features(embedding, tokenise(task.model, list(texts), None, None).ids, "mean")
            prints /= np.linalg.norm(prints, axis=1, keepdims=True)
            similarity, nearest = index.search(prints, 1)  # of an empty index: the least number there is
            new = {texts[i]: i for i in np.flatnonzero(similarity[:, 0] < tau).tolist()}
            fresh = dict(zip(new, encode(list(new)), strict=True)) if new else {}
            found: Floats = np.empty((len(texts), width(task)), np.float32)
            for place, text in enumerate(texts):
                found[place] = fresh[text] if text in fresh else kept[int(nearest[place, 0])]
            if new:
                index.add(prints[list(new.values())])
                kept.extend(fresh.values())
            return found

        yield Opened(answer, encode.computed)
        if kept:
            prints = index.reconstruct_n(0, len(kept))
            np.savez(folder / "kept.npz", fingerprints=prints, outputs=np.array(kept))

    return opened


def ours(config: CacheConfig | None = None) -> Callable[[Task, Path], AbstractContextManager[Opened]]:
    """`LLMCache.encode`, committed."""

    @contextmanager
    def opened(task: Task, folder: Path) -> Iterator[Opened]:
        with LLMCache.open(folder / "store", task.model, config=config) as cache:

            def answer(texts: Sequence[str]) -> Any:
                return cache.encode(texts, batch_size=task.batch_size)

            yield Opened(answer, lambda: cache.stats().counters.misses, cache.commit)

    return opened


@contextmanager
def aside(task: Task, folder: Path) -> Iterator[Opened]:
    """The cache, calibrated on what it knows to a mean 1 - cosine that hardly any neighbour keeps."""
    with LLMCache.open(folder / "store", task.model) as cache:

        def answer(texts: Sequence[str]) -> Any:
            return cache.encode(texts, batch_size=task.batch_size)

        def commit() -> None:
            cache.commit()
            if cache.calibration is None:
                cache.calibrate(budget=ASIDE_BUDGET, drift="cosine")
                cache.commit()

        def noted() -> Row:
            counters = cache.stats().counters
            return {
                "off": cache.near_is_off,
                "asked": counters.documents,
                "looked_up": counters.near_asked,
                "near": counters.near,
            }

        yield Opened(answer, lambda: cache.stats().counters.misses, commit, noted)


def width(task: Task) -> int:
    """Numbers in a vector."""
    found = task.model.get_embedding_dimension()
    assert found is not None
    return found


def near(tau: float) -> list[Contender]:
    """The cache and the paper's DocCache at one fingerprint and one tau."""
    config = replace(CacheConfig(), tau=tau, projection="none", index="flat")
    return [
        Contender(f"LLMCache, near from {tau}", ours(config)),
        Contender(f"final outputs, near from {tau} (DocCache)", final_outputs(tau)),
    ]

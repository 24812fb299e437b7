"""Contenders from other libraries (the extra "rivals"), each configured in its favour, and a fixed cut layer.

A library that is not installed is named and left out. No code of these libraries is copied, and nothing is installed.
"""

from __future__ import annotations

import base64
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llmcache.arrays import Floats32
from llmcache.bench.competitors.baselines import Counted, width
from llmcache.bench.competitors.embedding_recycling import cut_layer
from llmcache.bench.competitors.names import CUT, DISKCACHE, DISKCACHE_RAW, GPTCACHE, SEMHASH
from llmcache.bench.harness.rounds import Contender, Opened, Task
from llmcache.errors import LLMCacheError
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import tokenise

GPTCACHE_SHARE = 256
"""Most texts for GPTCache, which answers one text per call with one SQLite commit each."""
NEARLY_ONE = 0.99999
"""Threshold on GPTCache's similarity, 1 - squared distance / 4. Its default, 0.8, is a cosine of 0.6: other queries."""
SEMHASH_THRESHOLD = 0.9
"""SemHash's default threshold."""


def _answered(
    texts: Sequence[str],
    stored: Sequence[Floats32 | None],
    encode: Counted,
    store: Callable[[dict[str, Floats32]], object],
) -> Floats32:
    """Compute the texts that are not stored, each once, and store them. Returns all vectors."""
    new = list(dict.fromkeys(text for text, one in zip(texts, stored, strict=True) if one is None))
    fresh = dict(zip(new, encode(new), strict=True)) if new else {}
    if fresh:
        store(fresh)
    return np.stack([fresh[text] if one is None else one for text, one in zip(texts, stored, strict=True)])


@contextmanager
def on_diskcache(task: Task, folder: Path) -> Iterator[Opened]:
    """Contender: diskcache as in its manual, `cache[text] = vector` (pickled); new vectors in one transaction."""
    from diskcache import Cache

    encode = Counted(task)
    with Cache(str(folder / "diskcache"), eviction_policy="none") as cache:

        def store(fresh: dict[str, Floats32]) -> None:
            with cache.transact():
                for text, vector in fresh.items():
                    cache[text] = vector

        yield Opened(lambda texts: _answered(texts, [cache.get(one) for one in texts], encode, store), encode.computed)


@contextmanager
def raw_on_diskcache(task: Task, folder: Path) -> Iterator[Opened]:
    """Contender: diskcache, tuned: raw bytes instead of pickles, joined in one step where all texts hit.

    Texts are read one by one: transactions take the writers' lock, and were no faster.
    """
    from diskcache import Cache

    encode, dim = Counted(task), width(task)
    with Cache(str(folder / "diskcache"), eviction_policy="none") as cache:

        def store(fresh: dict[str, Floats32]) -> None:
            with cache.transact():
                for text, vector in fresh.items():
                    cache.set(text, vector.tobytes())

        def answer(texts: Sequence[str]) -> Floats32:
            raw = [cache.get(text) for text in texts]
            if None not in raw:
                return np.frombuffer(b"".join(raw), np.float32).reshape(len(texts), dim)
            stored = [None if one is None else np.frombuffer(one, np.float32) for one in raw]
            return _answered(texts, stored, encode, store)

        yield Opened(answer, encode.computed)


def _refuse(command: object, **_: object) -> None:
    raise LLMCacheError(f"GPTCache tried to run {command!r}; a benchmark installs nothing: install llmcache[rivals]")


@contextmanager
def in_gptcache(task: Task, folder: Path) -> Iterator[Opened]:
    """Contender: GPTCache through `get` of its adapter, text by text; misses are computed and imported as one batch.

    Embeddings are means of token embeddings, which need no layer of the model; answers are the vectors in base64. Only
    equal embeddings hit, which texts with the same tokens in another order have too. Nothing is evicted.
    """
    encode, embedding = Counted(task), token_embedding(task.model)

    def fingerprints(texts: Sequence[str]) -> Floats32:
        return features(embedding, tokenise(task.model, list(texts), None, None).ids, "mean")

    # GPTCache installs missing packages by subprocess.check_call, also at import
    with mock.patch.object(subprocess, "check_call", _refuse), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside GPTCache
        get, manager = _gptcache(folder / "gptcache", int(embedding.shape[1]), lambda text: fingerprints([text])[0])

        def store(fresh: dict[str, Floats32]) -> None:
            answers = [base64.b64encode(vector.tobytes()).decode() for vector in fresh.values()]
            manager.import_data(list(fresh), answers, list(fingerprints(list(fresh))), [None] * len(fresh))

        def answer(texts: Sequence[str]) -> Floats32:
            raw = [get(text) for text in texts]
            stored = [None if one is None else np.frombuffer(base64.b64decode(one), np.float32) for one in raw]
            return _answered(texts, stored, encode, store)

        try:
            yield Opened(answer, encode.computed, manager.flush)
        finally:
            manager.close()
            manager.s._engine.dispose()  # close() leaves the SQLite file open


def _gptcache(folder: Path, dim: int, embed: Callable[[str], Floats32]) -> tuple[Callable[[str], Any], Any]:
    """Set up GPTCache. Returns the look-up of one text (None for a miss), and the data manager."""
    import gptcache
    from gptcache.adapter.api import get
    from gptcache.manager import manager_factory
    from gptcache.processor.pre import get_prompt
    from gptcache.similarity_evaluation import SearchDistanceEvaluation

    manager = manager_factory(
        "sqlite,faiss",
        data_dir=str(folder),
        vector_params={"dimension": dim},
        eviction_params={"max_size": 1 << 30},
    )
    cache = gptcache.Cache()
    with mock.patch("gptcache.core.atexit"):  # its exit handler would write the index into a removed folder
        cache.init(
            pre_embedding_func=get_prompt,
            embedding_func=lambda text, **_: embed(text),
            data_manager=manager,
            similarity_evaluation=SearchDistanceEvaluation(),
            config=gptcache.Config(similarity_threshold=NEARLY_ONE),
        )
    return lambda text: get(text, cache_obj=cache), manager


@contextmanager
def after_semhash(task: Task, _: Path) -> Iterator[Opened]:
    """Contender: SemHash drops near-duplicates of a call; they get the vector of the text they duplicate.

    Its encoder is the mean of the model's token embeddings: static like SemHash's default, which is a download.
    """
    from semhash import SemHash

    encode, embedding = Counted(task), token_embedding(task.model)

    class Static:
        def encode(self, inputs: Any, **_: Any) -> Floats32:
            return features(embedding, tokenise(task.model, list(inputs), None, None).ids, "mean")

    def answer(texts: Sequence[str]) -> Floats32:
        found = SemHash.from_records(list(texts), model=Static()).self_deduplicate(SEMHASH_THRESHOLD)
        kept = dict(zip(found.selected, encode(found.selected), strict=True))
        of = {one.record: one.duplicate_of for one in found.filtered}
        return np.stack([kept[text] if text in kept else kept[of[text]] for text in texts])

    yield Opened(answer, encode.computed)


# -- the contenders --------------------------------------------------------------------------------------------

_NOT_ON_REGISTRY = "not installed: {}; no package of it is on the registry"

EXACT_RIVALS = [
    Contender(DISKCACHE, on_diskcache, "diskcache"),
    Contender(DISKCACHE_RAW, raw_on_diskcache, "diskcache"),
    Contender(GPTCACHE, in_gptcache, "gptcache", GPTCACHE_SHARE),
]
CUT_LAYER = Contender(CUT, cut_layer)
SEMHASH_FIRST = Contender(SEMHASH, after_semhash, "semhash")
ABSENT = [
    Contender("vCache", _NOT_ON_REGISTRY.format("vcache") + ", and its licence (CC BY-NC-ND) lets none be made of it"),
    Contender("s2re", _NOT_ON_REGISTRY.format("s2re") + f"; its idea is the row {CUT!r}"),
]

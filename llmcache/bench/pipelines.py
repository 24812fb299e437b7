"""Measurement of a pipeline over a long corpus: peak memory against its bound, overlap of reading and look-up."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.datasets import BANKING77, LOGS, labelled_texts, lines
from llmcache.document import characters
from llmcache.pipeline.batches import CHARACTERS, parts
from llmcache.pipeline.files import documents
from llmcache.pipeline.writers import CHUNK_ROWS
from llmcache.records import intake

_MIB = 1 << 20
SYSTEMS = ("HDFS", "Linux", "Apache", "Zookeeper")
BATCH, PREFETCH, BYTES_PER_ENTRY, COMMIT_BYTES = 32, 2, 300, 256 << 20
_TIDY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_OF_MEMORY = ("peak_mib", "model_alone_mib", "peak_above_model_mib", "peak_with_mapped_mib", "bound_mib")


def pool(data: Path, distinct: int, seed: int = 0) -> list[str]:
    """Draw distinct texts: log lines and bank queries, and variations with other numbers and endings."""
    texts: dict[str, None] = {}
    for name in SYSTEMS:
        path = data / LOGS / f"{name}_2k.log.gz"
        texts.update(dict.fromkeys(line.strip() for line in lines(path) if line.strip()))
    for pairs in labelled_texts(data / BANKING77):
        texts.update(dict.fromkeys(text for text, _ in pairs))
    chance = random.Random(seed)
    base = list(texts)
    while len(texts) < distinct:
        text = chance.choice(base)
        new = re.sub(r"\d+", lambda number: str(chance.randrange(10 ** len(number[0]))), text)
        texts[
            new if new != text else f"{text} {chance.choice(['Please', 'Thanks', 'Hello'])} {chance.randrange(999)}"
        ] = None
    return chance.sample(list(texts), distinct)


def corpus(path: Path, texts: Sequence[str], count: int, seed: int = 1) -> None:
    """Write JSON lines with `count` documents drawn uniformly from these texts."""
    chance = random.Random(seed)
    with open(path, "w") as file:
        for i in range(count):
            file.write(json.dumps({"id": f"d{i}", "text": texts[chance.randrange(len(texts))]}) + "\n")


def measured(model: str, data: Path, counts: Sequence[int], distinct: int) -> list[dict[str, Any]]:
    """Measure one row per length of the corpus, each in two processes: one for the seconds, one for the memory.

    In the second process freed memory returns to the system at once. Otherwise the model's buffers, which differ in
    size from batch to batch, fragment the heap, and the peak measures the fragmentation.
    """
    texts = pool(data, distinct)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for count in counts:
            path = Path(folder, f"{count}.jsonl")
            corpus(path, texts, count)
            program = "import sys; from llmcache.bench.pipelines import child; child(*sys.argv[1:])"
            command = [sys.executable, "-c", program, model, str(path), str(Path(folder, f"store{count}"))]
            row: dict[str, Any] = {}
            for environment in ({}, _TIDY):
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
                )
                now = json.loads(done.stdout.splitlines()[-1])
                row |= now if not row else {name: now[name] for name in _OF_MEMORY}
                shutil.rmtree(Path(folder, f"store{count}"))
            rows.append({"documents": count, "distinct": distinct, **row})
        return rows


def child(model_name: str, path: str, store: str) -> None:
    """Measure one corpus in this process and print one JSON object.

    Steps: reading alone; the whole pipeline with an empty store; reading and look-up alone, with all texts stored and
    no reader thread, which is the time that the overlap hides.
    """
    from sentence_transformers import SentenceTransformer

    from llmcache.cache import LLMCache
    from llmcache.pipeline.pipeline import Pipeline

    model = SentenceTransformer(model_name)
    began = time.perf_counter()
    longest = 0
    for part in parts(intake(documents(path)), 32 * BATCH, None):
        longest = max(longest, sum(4 * characters(document.text) for document in part.documents))
    reading = time.perf_counter() - began
    with LLMCache.open(store, model) as cache:
        longest_batch = ["a long text of many words " * 60] * (2 * BATCH)
        model.encode(longest_batch, batch_size=BATCH)  # warm-up
        with Peak() as alone:
            model.encode(longest_batch, batch_size=BATCH)
        with Peak() as peak:
            began = time.perf_counter()
            written = Pipeline(cache, batch_size=BATCH, prefetch=PREFETCH).write(documents(path), f"{store}.npy")
            seconds = time.perf_counter() - began
        counters, entries = cache.stats().counters, len(cache)
        compute, storing = counters.model_seconds, counters.store_seconds
        began = time.perf_counter()
        count = sum(1 for _ in Pipeline(cache, batch_size=BATCH, prefetch=0).run(documents(path)))
        looking_up = time.perf_counter() - began
    assert count == written.documents
    waiting = min(COMMIT_BYTES, int(60 / seconds * written.misses) * 4 * cache_width(model))
    writer = CHUNK_ROWS * (4 * cache_width(model) + 512)
    in_flight = writer + (PREFETCH + 2) * min(longest, 4 * CHARACTERS) + 32 * BATCH * (4 * cache_width(model) + 1024)
    row = {
        "seconds": seconds, "reading_seconds": reading, "reading_and_look_up_seconds": looking_up,
        "model_seconds": compute, "storing_seconds": storing, "over_the_larger": seconds / max(looking_up, compute),
        "hit_rate": written.hit_rate, "entries": entries, "peak_mib": peak.above / _MIB,
        "model_alone_mib": alone.above / _MIB, "peak_above_model_mib": (peak.above - alone.above) / _MIB,
        "peak_with_mapped_mib": peak.resident_above / _MIB,
        "bound_mib": (in_flight + 3 * waiting + BYTES_PER_ENTRY * entries) / _MIB,
    }  # fmt: skip
    sys.stdout.write(json.dumps(row) + "\n")


def cache_width(model: Any) -> int:
    """Return the number of components of a vector of this SentenceTransformer."""
    return int(model.get_embedding_dimension())


class Peak:
    """Context manager that measures peak memory above that at its start, sampled every 5 ms, in bytes.

    above: anonymous pages. resident_above: with mapped pages of the store, which the kernel can reclaim.
    """

    def __enter__(self) -> Peak:
        self._before = dict(_memory())
        self._most = dict(self._before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            for name, value in _memory():
                self._most[name] = max(self._most[name], value)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.above = self._most["RssAnon"] - self._before["RssAnon"]
        self.resident_above = self._most["VmRSS"] - self._before["VmRSS"]


def _memory() -> Iterator[tuple[str, int]]:
    with open("/proc/self/status") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "RssAnon"):
                yield name, int(rest.split()[0]) * 1024

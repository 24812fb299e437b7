"""Benchmarks of the suite that have modules of their own, under the names of their records."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from llmcache.bench.harness.datasets import BANKING77, OPENBOOKQA, POLICIES, QQP, SQUAD, labelled_texts, squad_contexts
from llmcache.bench.harness.drawing import Bars
from llmcache.bench.harness.suite import Benchmark, Record, Sizes
from llmcache.bench.harness.workloads import read


def linked() -> Iterator[Benchmark]:
    """Yield these benchmarks in the order of `llmcache bench list`."""
    yield Benchmark(
        "encode-banking77", "the cache with none, half and all of the queries stored", (f"{BANKING77}/test.csv",),
        _once(_encode), Bars("rows", ("name",), "rate", "texts per second"),
    )  # fmt: skip
    yield Benchmark(
        "layers-minilm", "mixed batches and second heads, beside the remaining layers alone", (str(SQUAD),),
        _once(_layers), Bars("rows", ("name",), "ratio", "times as fast as what it is compared with"),
    )  # fmt: skip
    yield Benchmark(
        "decoding-gpt2-small", "common prefixes and choices, beside transformers' key/value cache per request",
        (str(SQUAD), str(OPENBOOKQA)), _decoding,
        Bars("squad", ("name",), "times_as_fast_median", "times as fast as transformers"), True,
    )  # fmt: skip
    for name, folder in _LABELLED.items():
        yield Benchmark(
            f"near-{name}", "near matches within a budget of changed labels, seeds as repeats", (folder,),
            _once(partial(_near, folder)),
            Bars("summary", ("method", "drift_is", "budget"), "hits", "share of near hits"),
        )  # fmt: skip
    for name, guard, drift in (
        ("banking77", True, "accuracy"),
        ("banking77", False, "accuracy"),
        ("sst2", True, "label"),
    ):
        folder = _LABELLED[name]
        yield Benchmark(
            f"reuse-{name}" + ("" if guard else "-no-guard"), f"near reuse end to end, a budget of {drift}", (folder,),
            _once(partial(_reuse, folder, guard, drift)), Bars("rows", ("seed",), "ratio", "times the model alone"),
        )  # fmt: skip
    for name, folder in (("banking77", str(BANKING77)), ("qqp", str(QQP.parent))):
        yield Benchmark(
            f"rivals-{name}", "wrong hits beside a fixed similarity and a cache of final outputs", (folder,),
            _once(partial(_rivals, folder)),
            Bars("rows", ("method",), "wrong_of_hits", "share of hits that are wrong"),
        )  # fmt: skip
    yield Benchmark(
        "guard", "pairs accepted with and without the field guard",
        ("dup-products", str(QQP.parent), str(BANKING77)), _once(_guard),
        Bars("rows", ("data", "threshold"), "precision", "precision of what is accepted"),
    )  # fmt: skip
    yield Benchmark(
        "chunks", "revised policies: chunks by structure beside fixed windows", (str(POLICIES),), _once(_chunks),
        Bars("rates", ("name",), "documents_per_second", "revisions per second"),
    )  # fmt: skip
    yield Benchmark(
        "index-100000", "FAISS indexes on clustered vectors", (), _once(_index),
        Bars("rows", ("index",), "ms_per_query", "milliseconds per query"),
    )  # fmt: skip
    yield Benchmark(
        "store", "the store without a model, beside the bare system calls", (), _once(_store),
        Bars("rates", ("row_bytes", "operation", "cache", "contender"), "mib_per_second", "MiB per second"),
    )  # fmt: skip
    yield Benchmark("open-100000", "opening a large store, until its first hits", (), _once(_open), None)


def _once(measure: Callable[[Sizes], Record]) -> Callable[[Sizes], Iterator[Record]]:
    """Return the `run` of a benchmark whose record is complete at once."""
    return lambda sizes: (measure(sizes) for _ in range(1))


_LABELLED = {"banking77": str(BANKING77), "snips": "cls-snips", "agnews": "cls-agnews-test", "sst2": "cls-sst2"}


# -- one function per module ---------------------------------------------------------------------------------------


def _encode(sizes: Sizes) -> Record:
    from llmcache.bench.encoding import encode

    texts = read(sizes.data, "banking77", sizes.limit)
    return {"batch_size": 32, "rows": encode(sizes.model(), texts, repeats=sizes.repeats)}


def _layers(sizes: Sizes) -> Record:
    from llmcache.bench.layers import layers

    texts = squad_contexts(sizes.data / SQUAD, max(64, sizes.at_most(256)))
    return {"rows": layers(sizes.model(), texts, repeats=sizes.repeats)}


def _decoding(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.decoding import choices, gpt2_small, openbookqa, prefill, squad

    assert sizes.tokenizer is not None
    model, words = gpt2_small(sizes.tokenizer)
    requests = squad(sizes.data / SQUAD, sizes.at_most(40), 5)
    found: Record = {"clock": "perf_counter", "rows": 8, "squad": prefill(model, words, requests)}
    yield found
    questions = openbookqa(sizes.data / OPENBOOKQA, sizes.at_most(200))
    yield {**found, "openbookqa": choices(model, words, questions, rows=64)}


def _near(folder: str, sizes: Sizes) -> Record:
    from llmcache.bench.near import near

    with labelled(sizes, folder) as path:
        return near(sizes.model(), path, seeds=sizes.repeats, exact=sizes.limit is None)


def _reuse(folder: str, guard: bool, drift: str, sizes: Sizes) -> Record:
    from llmcache.bench.reusing import reusing

    confidence = None if drift == "accuracy" else 0.95
    with labelled(sizes, folder) as path:
        rows = reusing(sizes.model(), path, drift=drift, confidence=confidence, guard=guard, repeats=sizes.repeats)
    return {"rows": rows}


def _rivals(folder: str, sizes: Sizes) -> Record:
    from llmcache.bench.competitors.gptcache_rule import rivals

    whole = folder == str(QQP.parent)
    with nullcontext(sizes.data / folder) if whole else labelled(sizes, folder) as path:
        return {"rows": rivals(sizes.model(), path, seed=sizes.seed)}


def _guard(sizes: Sizes) -> Record:
    from llmcache.bench.guard import measure

    return {"rows": measure(sizes.data, sizes.model().encode)}


def _chunks(sizes: Sizes) -> Record:
    from llmcache.bench.chunks import measured

    histories = sizes.at_most(6)
    return {"histories": histories, **measured(sizes.model(), sizes.data / POLICIES, histories)}


def _index(sizes: Sizes) -> Record:
    from llmcache.bench.encoding import index

    kinds = ("flat", "ivf-flat", "ivf-fp16", "ivf-sq8", "ivf-pq", "hnsw")
    return {"rows": index(kinds, count=max(3000, sizes.at_most(100_000)))}


def _store(sizes: Sizes) -> Record:
    from llmcache.bench.store import measured

    payload = 512 if sizes.limit is None else 16
    return {"payload": f"{payload}MiB", **measured((262144, 1536), payload << 20, None, sizes.repeats)}


def _open(sizes: Sizes) -> Record:
    from llmcache.bench.encoding import reopen
    from llmcache.demo import demo_model_path

    return reopen(str(demo_model_path()), count=max(1000, sizes.at_most(100_000)), repeats=sizes.repeats)


@contextmanager
def labelled(sizes: Sizes, folder: str) -> Iterator[Path]:
    """Yield the folder of labelled texts; with a limit, a temporary one with random samples of both parts."""
    if sizes.limit is None:
        yield sizes.data / folder
        return
    random = np.random.default_rng(sizes.seed)
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        for part, pairs in zip(("train", "test"), labelled_texts(sizes.data / folder), strict=True):
            with (Path(name) / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "category"])
                writer.writerows(pairs[i] for i in random.permutation(len(pairs))[: sizes.limit].tolist())
        yield Path(name)

"""Benchmarks of the suite that have modules of their own, under the names of their records."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.bench.harness.drawing import Bars
from llmcache.bench.harness.suite import Benchmark, Record, Sizes
from llmcache.bench.harness.workloads import WORKLOADS, read

_PREFIX = ("qa-squad2-dev/dev-v2.0.json.gz", "qa-openbookqa/test_original_form.jsonl")
_SQUAD, _POLICIES = WORKLOADS["squad"].path, WORKLOADS["policies"].path


def linked() -> Iterator[Benchmark]:
    """Yield these benchmarks in the order of `llmcache bench list`."""
    yield Benchmark(
        "encode-banking77", "the cache with none, half and all of the queries stored", ("cls-banking77/test.csv",),
        _encode, Bars("rows", ("name",), "rate", "texts per second"),
    )  # fmt: skip
    yield Benchmark(
        "layers-minilm", "mixed batches and second heads, beside the remaining layers alone", (_SQUAD,),
        _layers, Bars("rows", ("name",), "ratio", "times as fast as what it is compared with"),
    )  # fmt: skip
    yield Benchmark(
        "decoding-gpt2-small", "common prefixes and choices, beside transformers' key/value cache per request", _PREFIX,
        _decoding, Bars("squad", ("name",), "times_as_fast_median", "times as fast as transformers"), True,
    )  # fmt: skip
    for name, folder in _LABELLED.items():
        yield Benchmark(
            f"near-{name}", "near matches within a budget of changed labels, seeds as repeats", (folder,),
            _near(folder), Bars("summary", ("method", "drift_is", "budget"), "hits", "share of near hits"),
        )  # fmt: skip
    for name, guard, drift in (
        ("banking77", True, "accuracy"),
        ("banking77", False, "accuracy"),
        ("sst2", True, "label"),
    ):
        yield Benchmark(
            f"reuse-{name}" + ("" if guard else "-no-guard"), f"near reuse end to end, a budget of {drift}",
            (_LABELLED[name],), _reuse(_LABELLED[name], guard, drift),
            Bars("rows", ("seed",), "ratio", "times the model alone"),
        )  # fmt: skip
    wrong = Bars("rows", ("method",), "wrong_of_hits", "share of hits that are wrong")
    for name, folder in (("banking77", _LABELLED["banking77"]), ("qqp", "pair-qqp")):
        yield Benchmark(
            f"rivals-{name}", "wrong hits beside a fixed similarity and a cache of final outputs", (folder,),
            _rivals(folder), wrong,
        )  # fmt: skip
    yield Benchmark(
        "guard", "pairs accepted with and without the field guard", ("dup-products", "pair-qqp", "cls-banking77"),
        _guard, Bars("rows", ("data", "threshold"), "precision", "precision of what is accepted"),
    )  # fmt: skip
    yield Benchmark(
        "chunks", "revised policies: chunks by structure beside fixed windows", (_POLICIES,), _chunks,
        Bars("rates", ("name",), "documents_per_second", "revisions per second"),
    )  # fmt: skip
    yield Benchmark(
        "index-100000", "FAISS indexes on clustered vectors", (), _index,
        Bars("rows", ("index",), "ms_per_query", "milliseconds per query"),
    )  # fmt: skip
    yield Benchmark(
        "store", "the store without a model, beside the bare system calls", (), _store,
        Bars("rates", ("row_bytes", "operation", "cache", "contender"), "mib_per_second", "MiB per second"),
    )  # fmt: skip
    yield Benchmark("open-100000", "opening a large store, until its first hits", (), _open, None)


_LABELLED = {"banking77": "cls-banking77", "snips": "cls-snips", "agnews": "cls-agnews-test", "sst2": "cls-sst2"}


# -- one function per module ---------------------------------------------------------------------------------------


def _encode(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.encoding import encode, ratio

    rows = encode(sizes.model(), read(sizes.data, "banking77", sizes.limit), repeats=sizes.repeats)
    yield {
        "batch_size": 32,
        "rows": [
            {"name": row.name, "documents": row.documents, "seconds": row.seconds, "rate": row.rate,
             "ratio": ratio(rows[0], row), "difference": row.difference}
            for row in rows
        ],
    }  # fmt: skip


def _layers(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.layers import layers, squad_paragraphs

    texts = squad_paragraphs(sizes.data / _SQUAD, max(64, min(256, sizes.limit or 256)))
    yield {"rows": [row.as_dict() for row in layers(sizes.model(), texts, repeats=sizes.repeats)]}


def _decoding(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.decoding import choices, gpt2_small, openbookqa, prefill, squad

    assert sizes.tokenizer is not None
    model, words = gpt2_small(sizes.tokenizer)
    squad_path, choices_path = (sizes.data / one for one in _PREFIX)
    requests = squad(squad_path.parent, min(40, sizes.limit or 40), 5)
    found: Record = {"clock": "perf_counter", "rows": 8, "squad": prefill(model, words, requests)}
    yield found
    questions = openbookqa(choices_path.parent, min(200, sizes.limit or 200))
    yield {**found, "openbookqa": choices(model, words, questions, rows=64)}


def _near(folder: str) -> Any:
    def run(sizes: Sizes) -> Iterator[Record]:
        from llmcache.bench.near import near, summary

        with labelled(sizes, folder) as path:
            rows = near(sizes.model(), path, seeds=sizes.repeats, exact=sizes.limit is None)
        yield {"seeds": sizes.repeats, "summary": summary(rows), "rows": rows}

    return run


def _reuse(folder: str, guard: bool, drift: str) -> Any:
    def run(sizes: Sizes) -> Iterator[Record]:
        from llmcache.bench.reusing import reusing

        with labelled(sizes, folder) as path:
            confidence = None if drift == "accuracy" else 0.95
            rows = reusing(sizes.model(), path, drift=drift, confidence=confidence, guard=guard, repeats=sizes.repeats)
        yield {"rows": rows}

    return run


def _rivals(folder: str) -> Any:
    def run(sizes: Sizes) -> Iterator[Record]:
        from llmcache.bench.competitors.gptcache_rule import rivals

        if folder == "pair-qqp":
            yield {"rows": rivals(sizes.model(), sizes.data / folder, seed=sizes.seed)}
            return
        with labelled(sizes, folder) as path:
            yield {"rows": rivals(sizes.model(), path, seed=sizes.seed)}

    return run


def _guard(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.guard import measure

    yield {"rows": measure(sizes.data, sizes.model().encode)}


def _chunks(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.chunks import measured

    histories = min(6, sizes.limit or 6)
    yield {"histories": histories, **measured(sizes.model(), sizes.data / _POLICIES, histories)}


def _index(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.encoding import index

    kinds = ("flat", "ivf-flat", "ivf-fp16", "ivf-sq8", "ivf-pq", "hnsw")
    yield {"rows": index(kinds, count=max(3000, min(100_000, sizes.limit or 100_000)))}


def _store(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.store import measured

    payload = 512 if sizes.limit is None else 16
    yield {"payload": f"{payload}MiB", **measured((262144, 1536), payload << 20, None, sizes.repeats)}


def _open(sizes: Sizes) -> Iterator[Record]:
    from llmcache.bench.encoding import reopen
    from llmcache.demo import demo_model_path

    count = max(1000, min(100_000, sizes.limit or 100_000))
    yield reopen(str(demo_model_path()), count=count, repeats=sizes.repeats)


@contextmanager
def labelled(sizes: Sizes, folder: str) -> Iterator[Path]:
    """Yield the folder of labelled texts; with a limit, a temporary one with random samples of both parts."""
    from llmcache.bench.near import labelled_texts

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

"""Named benchmarks of `llmcache bench run`: contenders, data and targets of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llmcache.bench.competitors import baselines as own
from llmcache.bench.competitors import others
from llmcache.bench.competitors.names import ALONE, ASIDE, DISKCACHE, DISKCACHE_RAW, GPTCACHE, ONCE, OURS, SORTED
from llmcache.bench.harness.drawing import Bars
from llmcache.bench.harness.rounds import Contender, Task, rounds, times
from llmcache.bench.harness.turns import Row
from llmcache.bench.harness.workloads import STREAMS, WORKLOADS, read
from llmcache.errors import ConfigError

Record = dict[str, Any]

CALL = 256
"""Texts per call of a stream."""
STREAM = 4096
"""Texts of a stream, drawn from a pool of a quarter as many."""
_KNOWN, _BEFORE = 3584, 1280  # of `off-sst2`: texts to calibrate on, and texts that show whether near reuse pays
_LEAST = 192  # texts that a calibration needs, with a margin


@dataclass(frozen=True, slots=True)
class Sizes:
    """Settings of a run. limit: most texts (questions, documents). tokenizer: folder of GPT-2's tokenizer."""

    data: Path
    repeats: int = 3
    limit: int | None = None
    seed: int = 0
    tokenizer: Path | None = None
    model: Callable[[], SentenceTransformer] = field(kw_only=True)

    def at_most(self, count: int) -> int:
        """Return a number of texts, at most the limit."""
        return count if self.limit is None else min(count, self.limit)


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a contender: a multiple of the texts per second of another."""

    name: str
    base: str
    at_least: float

    def found(self, rows: Sequence[Row]) -> Row:
        """Return the target with the measured value, None where one of the two did not take part."""
        value = times(rows, self.name, self.base)
        return {
            "contender": self.name,
            "base": self.base,
            "at_least": self.at_least,
            "found": value,
            "met": None if value is None else value >= self.at_least,
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of the suite.

    needs: paths below the data folder. run: yields records, each more complete than the last. bars: drawing of a
    record, None for none.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    run: Callable[[Sizes], Iterator[Record]]
    bars: Bars | None
    wants_tokenizer: bool = False

    def missing(self, data: Path, tokenizer: Path | None) -> str:
        """Return the reason why the benchmark cannot run; empty when it can."""
        lacking = [path for path in self.needs if not (data / path).exists()]
        if lacking:
            return f"{data} has no {' and no '.join(lacking)}"
        if self.wants_tokenizer and tokenizer is None:
            return "it needs --tokenizer, the folder of GPT-2's vocab.json and merges.txt"
        return ""


# -- vectors of texts, by contenders in turn --------------------------------------------------------------------

_MODELS = [
    Contender(ALONE, own.alone, keeps=False),
    Contender(SORTED, own.by_tokens, keeps=False),
]
_ONCE = Contender(ONCE, own.once_per_call, keeps=False)
_OURS = Contender(OURS, own.ours())
_REUSE = [_OURS, *others.EXACT_RIVALS, others.CUT_LAYER, *others.ABSENT]
_STREAM = [*_MODELS, _ONCE, *_REUSE, others.SEMHASH_FIRST, *own.near(0.9)]


def _measured(
    sizes: Sizes, task: Task, taking_part: Sequence[Contender], targets: Sequence[Target], facts: dict[str, Any]
) -> Iterator[Record]:
    for rows in rounds(task, taking_part, sizes.repeats):
        yield {
            **facts, "texts": sum(map(len, task.calls)), "calls": len(task.calls), "known": len(task.known),
            "batch_size": task.batch_size, "rounds": len(rows[0]["seconds"]), "rows": rows,
            "targets": [target.found(rows) for target in targets],
        }  # fmt: skip


def _unknown(workload: str, sizes: Sizes) -> Iterator[Record]:
    """Measure new texts; storing them durably is in the time."""
    texts = list(dict.fromkeys(read(sizes.data, workload, sizes.limit)))
    targets = [Target(OURS, base, 0.97) for base in (ALONE, SORTED)]
    everybody = [*_MODELS, _ONCE, *_REUSE, others.SEMHASH_FIRST]
    yield from _measured(sizes, Task(sizes.model(), [], [texts]), everybody, targets, {})


def _known(workload: str, times_the_model: float, sizes: Sizes) -> Iterator[Record]:
    """Measure known texts, from a store that was closed and opened again."""
    texts = list(dict.fromkeys(read(sizes.data, workload, sizes.limit)))
    wanted = {ALONE: times_the_model, GPTCACHE: 10, DISKCACHE: 3, DISKCACHE_RAW: 3}
    targets = [Target(OURS, base, at_least) for base, at_least in wanted.items()]
    yield from _measured(sizes, Task(sizes.model(), texts, [texts]), [*_MODELS, *_REUSE], targets, {})


def _off(sizes: Sizes) -> Iterator[Record]:
    """Measure new texts with a cache whose near reuse does not pay, after it has detected that."""
    texts = list(dict.fromkeys(read(sizes.data, "sst2")))
    known, before, asked = texts[:_KNOWN], texts[_KNOWN : _KNOWN + _BEFORE], texts[_KNOWN + _BEFORE :]
    if sizes.limit is not None:
        known, before, asked = known[: max(sizes.limit, _LEAST)], before[: sizes.limit], asked[: sizes.limit]
    task = Task(sizes.model(), known, _calls(asked), before=_calls(before))
    targets = [Target(ASIDE, base, 0.99) for base in (ALONE, SORTED)]
    facts = {"before": len(before), "budget": own.ASIDE_BUDGET, "drift": "cosine"}
    for record in _measured(sizes, task, [*_MODELS, _OURS, Contender(ASIDE, own.aside)], targets, facts):
        off = all(row["noted"]["off"] for row in record["rows"] if "noted" in row)
        yield record if off else {**record, "targets": []}


def _corpus(workload: str, sizes: Sizes) -> Iterator[Record]:
    """Measure a corpus in its own order, in calls, from an empty store: only its own repeats can hit."""
    texts = read(sizes.data, workload, sizes.limit or STREAM)
    yield from _measured(sizes, Task(sizes.model(), [], _calls(texts)), _STREAM, [], _redundancy(texts))


def _stream(kind: str, sizes: Sizes) -> Iterator[Record]:
    """Measure texts drawn from a pool of bank queries, in calls, from an empty store."""
    length = sizes.limit or STREAM
    pool = read(sizes.data, "banking77", max(2, length // 4))
    texts = [pool[place] for place in STREAMS[kind](len(pool), length, sizes.seed).tolist()]
    facts = {"pool": len(pool), **_redundancy(texts)}
    yield from _measured(sizes, Task(sizes.model(), [], _calls(texts)), _STREAM, [], facts)


def _calls(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[at : at + CALL] for at in range(0, len(texts), CALL)]


def _redundancy(texts: Sequence[str]) -> dict[str, Any]:
    return {"distinct": len(set(texts)), "repeated": 1 - len(set(texts)) / len(texts)}


# -- the registry -----------------------------------------------------------------------------------------------


_BARS = Bars("rows", ("name",), "per_second", "texts per second", logarithmic=True)


def _text_benchmarks() -> Iterator[Benchmark]:
    def benchmark(name: str, about: str, workload: str, run: Callable[[Sizes], Iterator[Record]]) -> Benchmark:
        return Benchmark(name, about, (WORKLOADS[workload].path,), run, _BARS)

    for name, times_the_model in (("banking77", 200), ("squad", 1000)):
        about = WORKLOADS[name].about
        yield benchmark(f"miss-{name}", f"an empty store, storing included: {about}", name, partial(_unknown, name))
        hits = partial(_known, name, times_the_model)
        yield benchmark(f"hit-{name}", f"all texts stored: hits per second beside other caches: {about}", name, hits)
    about = "near reuse that does not pay and is suspended, storing included: film sentences"
    yield benchmark("off-sst2", about, "sst2", _off)
    for kind in STREAMS:
        about = f"bank queries drawn again and again, {kind}"
        yield benchmark(f"stream-{kind}", about, "banking77", partial(_stream, kind))
    for name, workload in WORKLOADS.items():
        if name not in ("banking77", "squad"):  # nothing repeats in these: `miss-*` covers them
            yield benchmark(f"corpus-{name}", f"from an empty store: {workload.about}", name, partial(_corpus, name))


def rivals() -> list[Contender]:
    """Return all contenders of the benchmarks of texts, available or not."""
    return list(_STREAM)


def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name."""
    from llmcache.bench.harness.registry import linked

    return {benchmark.name: benchmark for benchmark in [*_text_benchmarks(), *linked()]}


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Select benchmarks by names or patterns (hit-*, all), in the order of the registry. ConfigError: unknown name."""
    every = benchmarks()
    for name in names:
        if name != "all" and not any(fnmatchcase(known, name) for known in every):
            raise ConfigError(f"no benchmark is called {name!r}; `llmcache bench list` names them")
    return [
        benchmark
        for benchmark in every.values()
        if any(name == "all" or fnmatchcase(benchmark.name, name) for name in names)
    ]

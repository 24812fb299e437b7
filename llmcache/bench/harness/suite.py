"""The named benchmarks of `llmcache bench run`: what each compares, what it needs, and its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llmcache.bench.competitors import baselines as own
from llmcache.bench.competitors import others
from llmcache.bench.competitors.names import (
    ALONE,
    ASIDE,
    DISKCACHE,
    DISKCACHE_RAW,
    GPTCACHE,
    ONCE,
    OURS,
    SORTED,
)
from llmcache.bench.harness.drawing import Bars
from llmcache.bench.harness.rounds import (
    Contender,
    Row,
    Task,
    rounds,
    times,
)
from llmcache.bench.harness.workloads import STREAMS, WORKLOADS, read
from llmcache.errors import ConfigError

Record = dict[str, Any]

CALL = 256
"""Texts of one call in a stream."""
STREAM = 4096
"""Texts of a stream, drawn from a quarter as many."""
_KNOWN, _BEFORE = 3584, 1280  # of `off-sst2`: texts to calibrate on, and texts after which it is seen what that pays
_LEAST = 192  # texts that a calibration needs, and some


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a run was asked for. limit: at most this many texts (questions, documents). tokenizer: folder of GPT-2's."""

    data: Path
    repeats: int = 3
    limit: int | None = None
    seed: int = 0
    tokenizer: Path | None = None
    model: Callable[[], SentenceTransformer] = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Target:
    """What one contender should reach beside another, as a multiple of its texts per second."""

    name: str
    base: str
    at_least: float

    def found(self, rows: Sequence[Row]) -> Row:
        """The target with what was measured, None where one of the two did not take part."""
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
    """One name of the suite. needs: paths below the data folder. run: gives records, each more complete than the last.

    bars: how a record is drawn, None where there is nothing to draw.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    run: Callable[[Sizes], Iterator[Record]]
    bars: Bars | None
    wants_tokenizer: bool = False

    def missing(self, data: Path, tokenizer: Path | None) -> str:
        """Why it cannot be run; empty when it can."""
        lacking = [one for one in self.needs if not (data / one).exists()]
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
            **facts,
            "texts": sum(map(len, task.calls)),
            "calls": len(task.calls),
            "known": len(task.known),
            "batch_size": task.batch_size,
            "rounds": len(rows[0]["seconds"]),
            "rows": rows,
            "targets": [target.found(rows) for target in targets],
        }


def _unknown(workload: str) -> Callable[[Sizes], Iterator[Record]]:
    """Everything is new and is stored, durably, within the time."""

    def run(sizes: Sizes) -> Iterator[Record]:
        texts = list(dict.fromkeys(read(sizes.data, workload, sizes.limit)))
        targets = [Target(OURS, base, 0.97) for base in (ALONE, SORTED)]
        yield from _measured(
            sizes, Task(sizes.model(), [], [texts]), [*_MODELS, _ONCE, *_REUSE, others.SEMHASH_FIRST], targets, {}
        )

    return run


def _known(workload: str, times_the_model: float) -> Callable[[Sizes], Iterator[Record]]:
    """Everything is known, from a store that was closed and opened again."""

    def run(sizes: Sizes) -> Iterator[Record]:
        texts = list(dict.fromkeys(read(sizes.data, workload, sizes.limit)))
        targets = [
            Target(OURS, ALONE, times_the_model),
            Target(OURS, GPTCACHE, 10),
            Target(OURS, DISKCACHE, 3),
            Target(OURS, DISKCACHE_RAW, 3),
        ]
        yield from _measured(sizes, Task(sizes.model(), texts, [texts]), [*_MODELS, *_REUSE], targets, {})

    return run


def _off(sizes: Sizes) -> Iterator[Record]:
    """New texts for a cache whose near reuse does not pay with what it knows, and has noticed that."""
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


def _corpus(workload: str) -> Callable[[Sizes], Iterator[Record]]:
    """A corpus in its own order, in calls, from an empty store: its own redundancy decides."""

    def run(sizes: Sizes) -> Iterator[Record]:
        texts = read(sizes.data, workload, sizes.limit or STREAM)
        yield from _measured(sizes, Task(sizes.model(), [], _calls(texts)), _STREAM, [], _redundancy(texts))

    return run


def _stream(kind: str) -> Callable[[Sizes], Iterator[Record]]:
    """Texts drawn from a pool of bank queries, in calls, from an empty store."""

    def run(sizes: Sizes) -> Iterator[Record]:
        length = sizes.limit or STREAM
        pool = read(sizes.data, "banking77", max(2, length // 4))
        texts = [pool[place] for place in STREAMS[kind](len(pool), length, sizes.seed).tolist()]
        facts = {"pool": len(pool), **_redundancy(texts)}
        yield from _measured(sizes, Task(sizes.model(), [], _calls(texts)), _STREAM, [], facts)

    return run


def _calls(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[at : at + CALL] for at in range(0, len(texts), CALL)]


def _redundancy(texts: Sequence[str]) -> dict[str, Any]:
    return {"distinct": len(set(texts)), "repeated": 1 - len(set(texts)) / len(texts)}


# -- the registry -----------------------------------------------------------------------------------------------


_BARS = Bars("rows", ("name",), "per_second", "texts per second", logarithmic=True)


def _of_texts() -> Iterator[Benchmark]:
    known = "all known: hits per second beside other caches"
    new = "nothing known, storing included"
    for name, times_the_model in (("banking77", 200), ("squad", 1000)):
        needs = (WORKLOADS[name].path,)
        yield Benchmark(f"miss-{name}", f"{new}: {WORKLOADS[name].about}", needs, _unknown(name), _BARS)
        yield Benchmark(f"hit-{name}", f"{known}: {WORKLOADS[name].about}", needs, _known(name, times_the_model), _BARS)
    yield Benchmark(
        "off-sst2", "near reuse that does not pay and has gone off by itself, storing included: film sentences",
        (WORKLOADS["sst2"].path,), _off, _BARS,
    )  # fmt: skip
    for kind in STREAMS:
        about = f"bank queries drawn again and again, {kind}"
        yield Benchmark(f"stream-{kind}", about, (WORKLOADS["banking77"].path,), _stream(kind), _BARS)
    for name, workload in WORKLOADS.items():
        if name in ("banking77", "squad"):  # nothing repeats in these: they are those above
            continue
        about = f"from an empty store: {workload.about}"
        yield Benchmark(f"corpus-{name}", about, (workload.path,), _corpus(name), _BARS)


def rivals() -> list[Contender]:
    """All that take part in a benchmark of texts, whether they can or not."""
    return list(_STREAM)


def benchmarks() -> dict[str, Benchmark]:
    """All of them, by name."""
    from llmcache.bench.harness.registry import linked

    return {one.name: one for one in [*_of_texts(), *linked()]}


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name or by pattern (hit-*, all), in the order of the registry. ConfigError: a name that is none."""
    every = benchmarks()
    for name in names:
        if name != "all" and not any(fnmatchcase(one, name) for one in every):
            raise ConfigError(f"no benchmark is called {name!r}; `llmcache bench list` names them")
    return [one for one in every.values() if any(name == "all" or fnmatchcase(one.name, name) for name in names)]

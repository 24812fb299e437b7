"""Run benchmarks of the suite into a folder: one record and one plot each, written atomically."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.conditions import conditions, load
from llmcache.bench.harness.drawing import draw
from llmcache.bench.harness.files import write
from llmcache.bench.harness.suite import Benchmark, Record, Sizes
from llmcache.errors import ConfigError, LLMCacheError

NOISE = 1.25
"""Least ratio of the slowest to the quickest repeat that a record notes, since the machine was not quiet."""

BUSY = 0.1
"""Least mean number of processors busy with other processes that a record notes."""

Say = Callable[[str], None]
"""Function that prints a line of progress."""


def run(
    chosen: Sequence[Benchmark],
    sizes: Sizes,
    out: Path,
    command: str,
    *,
    again: bool = False,
    say: Say = lambda _: None,
) -> Iterator[tuple[Benchmark, Record]]:
    """Yield each benchmark with its record once written; the record has `skipped` or `failed` when it could not run.

    An existing record is yielded unchanged, with its path under `kept`, unless `again`. After every round the results
    so far are written to NAME.partial.json. ConfigError when `out` cannot be created, or a record has other settings.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be created: {error.strerror}; name another folder with --out") from None
    for benchmark in chosen:
        path = out / f"{benchmark.name}.json"
        if path.exists() and not again:
            yield benchmark, {**_kept(path, sizes), "kept": str(path)}
            continue
        if missing := benchmark.missing(sizes.data, sizes.tokenizer):
            yield benchmark, {"benchmark": benchmark.name, "skipped": missing}
            continue
        say(f"{benchmark.name}: {benchmark.about}")
        try:
            yield benchmark, _run(benchmark, sizes, path, command, say)
        except LLMCacheError as error:
            yield benchmark, {"benchmark": benchmark.name, "failed": str(error)}


def _run(benchmark: Benchmark, sizes: Sizes, path: Path, command: str, say: Say) -> Record:
    partial, before, at = path.with_suffix(".partial.json"), load(), moment()
    record: Record = {}
    for measured in benchmark.run(sizes):
        record = {
            "benchmark": benchmark.name,
            "about": benchmark.about,
            **conditions(),
            "processors": len(os.sched_getaffinity(0)),
            "command": command,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "repeats": sizes.repeats,
            "limit": sizes.limit,
            "seed": sizes.seed,
            "load": [before, load()],
            "processors_of_others": others(at, moment()),
            **measured,
        }
        write(partial, record)
        say(f"{benchmark.name}: {moment()[0] - at[0]:.0f} s{_rounds(measured, sizes)}")
    record["notes"] = notes(record)
    write(path, record)
    partial.unlink()
    plotted(benchmark, record, path, say)
    return record


def _rounds(measured: Mapping[str, Any], sizes: Sizes) -> str:
    return f", round {measured['rounds']} of {sizes.repeats}" if "rounds" in measured else ""


def _kept(path: Path, sizes: Sizes) -> Record:
    """Read the record of an earlier run. ConfigError when it is no record, or has other settings."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict) or "benchmark" not in record:
        raise ConfigError(f"{path} is no record of a benchmark; remove it, or give --again to replace it")
    if tuple(record.get(name) for name in ("repeats", "limit", "seed")) != (sizes.repeats, sizes.limit, sizes.seed):
        raise ConfigError(
            f"{path} was measured with --repeats {record.get('repeats')}, --limit {record.get('limit')} and --seed "
            f"{record.get('seed')}; give these, another --out, or --again to measure again"
        )
    return record


def plotted(benchmark: Benchmark, record: Record, path: Path, say: Say) -> None:
    """Draw NAME.png beside the record. Without matplotlib, print one line instead."""
    if benchmark.bars is None:
        return
    try:
        draw(record, benchmark.bars, path.with_suffix(".png"))
    except ConfigError as error:
        say(f"{benchmark.name}: no plot; {error}")


def moment() -> tuple[float, float, float]:
    """Read wall-clock seconds, processor seconds of all processes, and those of this one with its ended children."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    own = os.times()
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), everybody, own.user + own.system + own.children_user + own.children_system


def others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Return the mean number of processors busy with other processes (and the kernel) between two moments."""
    seconds, everybody, own = (later - earlier for earlier, later in zip(before, after, strict=True))
    return max(0.0, everybody - own) / max(seconds, 1e-3)


def notes(record: Mapping[str, Any]) -> list[str]:
    """List what a reader has to know of the machine: load of other processes, spread between repeats, or one repeat."""
    lines = []
    if record["processors_of_others"] > BUSY:
        lines.append(
            f"other processes kept {record['processors_of_others']:.1f} of {record['processors']} processors busy; "
            f"the load average was {record['load'][0]:.1f} before and {record['load'][1]:.1f} after"
        )
    if record["repeats"] == 1:
        lines.append("one repeat: nothing is known of the spread")
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else []:
        spread = row.get("slowest_of_quickest")
        if spread is not None and spread > NOISE:
            lines.append(f"{row['name']}: the slowest repeat took {spread:.2f} times the quickest")
    return lines

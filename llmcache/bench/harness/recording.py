"""Runs benchmarks of the suite into a folder: one record and one plot each, whole or not there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.conditions import conditions
from llmcache.bench.harness.drawing import draw
from llmcache.bench.harness.rounds import load
from llmcache.bench.harness.suite import Benchmark, Record, Sizes
from llmcache.errors import ConfigError, LLMCacheError

NOISE = 1.25
"""Slowest over quickest repeat from which on a record says that its machine was not quiet."""

BUSY = 0.1
"""Processors that other processes kept busy, on the mean, from which on a record says so."""

Said = Callable[[str], None]


def run(
    chosen: Sequence[Benchmark],
    sizes: Sizes,
    out: Path,
    command: str,
    *,
    again: bool = False,
    said: Said = lambda _: None,
) -> Iterator[tuple[Benchmark, Record]]:
    """Each benchmark with its record as soon as it is written; one that cannot be run has `skipped` or `failed`.

    A record that is there already is kept, `kept` in what is given, unless `again`. After every round what is done so
    far stands in NAME.partial.json.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}; name another folder with --out") from None
    for one in chosen:
        path = out / f"{one.name}.json"
        if path.exists() and not again:
            yield one, {**_kept(path, sizes), "kept": str(path)}
            continue
        if missing := one.missing(sizes.data, sizes.tokenizer):
            yield one, {"benchmark": one.name, "skipped": missing}
            continue
        said(f"{one.name}: {one.about}")
        try:
            yield one, _run(one, sizes, path, command, said)
        except LLMCacheError as error:
            yield one, {"benchmark": one.name, "failed": str(error)}


def _run(one: Benchmark, sizes: Sizes, path: Path, command: str, said: Said) -> Record:
    partial, before, at = path.with_suffix(".partial.json"), load(), moment()
    record: Record = {}
    for measured in one.run(sizes):
        record = {
            "benchmark": one.name,
            "about": one.about,
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
        said(f"{one.name}: {moment()[0] - at[0]:.0f} s{_rounds(measured, sizes)}")
    record["notes"] = notes(record)
    write(path, record)
    partial.unlink()
    plotted(one, record, path, said)
    return record


def _rounds(measured: Mapping[str, Any], sizes: Sizes) -> str:
    return f", round {measured['rounds']} of {sizes.repeats}" if "rounds" in measured else ""


def _kept(path: Path, sizes: Sizes) -> Record:
    """A record of an earlier run; ConfigError when it is none, or one of other sizes."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or "benchmark" not in found:
        raise ConfigError(f"{path} is no record of a benchmark; remove it, or give --again to write it anew")
    if tuple(found.get(name) for name in ("repeats", "limit", "seed")) != (sizes.repeats, sizes.limit, sizes.seed):
        raise ConfigError(
            f"{path} was measured with --repeats {found.get('repeats')}, --limit {found.get('limit')} and --seed "
            f"{found.get('seed')}; give these, another --out, or --again to measure it anew"
        )
    return found


def plotted(one: Benchmark, record: Record, path: Path, said: Said) -> None:
    """NAME.png beside the record; without matplotlib, one line that says so."""
    if one.bars is None:
        return
    partial = path.with_suffix(".png.partial")
    try:
        draw(record, one.bars, partial)
        os.replace(partial, path.with_suffix(".png"))
    except ConfigError as error:
        said(f"{one.name}: no plot; {error}")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """The record as JSON, moved into place when it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, default=_plain)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a record is no JSON")


def moment() -> tuple[float, float, float]:
    """Seconds of a clock, processor seconds of all processes, and those of this one and of its children that ended."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    own = os.times()
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), everybody, own.user + own.system + own.children_user + own.children_system


def others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """How many processors other processes kept busy between two moments, on the mean; the kernel's own work too."""
    seconds, everybody, own = (later - earlier for earlier, later in zip(before, after, strict=True))
    return max(0.0, everybody - own) / max(seconds, 1e-3)


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the machine: other load, spread between repeats, or no spread at all."""
    found = []
    if record["processors_of_others"] > BUSY:
        found.append(
            f"other processes kept {record['processors_of_others']:.1f} of {record['processors']} processors busy; "
            f"the load average was {record['load'][0]:.1f} before and {record['load'][1]:.1f} after"
        )
    if record["repeats"] == 1:
        found.append("one repeat: nothing is known of the spread")
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else []:
        wide = row.get("slowest_of_quickest")
        if wide is not None and wide > NOISE:
            found.append(f"{row['name']}: the slowest repeat took {wide:.2f} times the quickest")
    return found

"""Experiments in parts, each written to its record as soon as it is complete, and not measured again."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.conditions import conditions
from llmcache.bench.harness.rounds import Row
from llmcache.bench.paper.models import Made, made
from llmcache.bench.paper.texts import Workload, labelled
from llmcache.errors import ConfigError

Say: TypeAlias = Callable[[str], None]
LABELLED = {"BANKING77": "cls-banking77", "SST-2": "cls-sst2"}


@dataclass
class Work:
    """What the parts of the experiments work with. limit: at most so many known documents; a quarter of it is asked.

    repeats: rounds of what is timed. Models and texts are loaded when they are first needed.
    """

    data: Path
    models: Path
    limit: int | None = None
    repeats: int = 5
    _made: dict[str, Made] = field(default_factory=dict)

    def known(self, most: int) -> int:
        """Documents to know, of at most so many."""
        return most if self.limit is None else min(most, self.limit)

    def asked(self, most: int) -> int:
        """Documents to ask, of at most so many."""
        return most if self.limit is None else min(most, max(8, self.limit // 4))

    def made(self, name: str) -> Made:
        """A model, by its name; one at a time is held, and the real one always."""
        if name not in self._made:
            self._made = {kept: one for kept, one in self._made.items() if one.weights == "real"}
            with self.folder() as folder:
                self._made[name] = made(name, self.models, folder)
        return self._made[name]

    @cached_property
    def model(self) -> SentenceTransformer:
        """The real one."""
        return self.made("MiniLM").model

    def labelled(self, name: str, known: int, asked: int) -> Workload:
        """BANKING77 or SST-2."""
        return labelled(self.data, LABELLED[name], name).some(self.known(known), self.asked(asked))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty one for stores, removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="llmcache-paper-") as name:
            yield Path(name)


Part: TypeAlias = Callable[[Work], list[Row]]
Experiments: TypeAlias = Mapping[str, Mapping[str, Part]]


def chosen(experiments: Experiments, only: str | None) -> list[str]:
    """Names of experiments, of a list with commas between; all without one. ConfigError: there is none of a name."""
    names = [one.strip() for one in only.split(",") if one.strip()] if only else list(experiments)
    if unknown := [one for one in names if one not in experiments]:
        raise ConfigError(f"there is no experiment {unknown[0]!r}; there are: {', '.join(experiments)}")
    return names


def run(
    experiments: Experiments, names: Sequence[str], work: Work, out: Path, *, say: Say, again: bool = False
) -> list[Row]:
    """Measure what is missing below `out`, and give the records, in order.

    again: also what is there. A part that is there counts as missing when it was measured with another limit or other
    repeats. A part whose data or model is absent is left out, with the reason in the record.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for name in names:
        path = out / f"{name}.json"
        record = {**_begun(name), "parts": {} if again else _kept(path, work, say)}
        for part, measure in experiments[name].items():
            if part in record["parts"]:
                say(f"{name}: {part} is there")
                continue
            _measured(record, part, measure, work, say)
            record["complete"] = set(record["parts"]) == set(experiments[name])
            write(path, record)
        record["complete"] = set(record["parts"]) == set(experiments[name])
        write(path, record)
        records.append(record)
    return records


def _begun(name: str) -> Row:
    command = f"llmcache bench paper --data DATA --models MODELS --only {name}"
    return {"experiment": name, "command": command, "complete": False, "parts": {}, "skipped": {}}


def _measured(record: Row, part: str, measure: Part, work: Work, say: Say) -> None:
    name = record["experiment"]
    say(f"{name}: {part} ...")
    began, load = time.perf_counter(), os.getloadavg()[0]
    try:
        rows = measure(work)
    except ConfigError as error:  # data or a model is absent, or there is too little of it
        record["skipped"][part] = str(error)
        say(f"{name}: {part} is left out: {error}")
        return
    seconds = time.perf_counter() - began
    record["parts"][part] = {
        "rows": rows, "seconds": seconds, "load": [load, os.getloadavg()[0]], "limit": work.limit,
        "repeats": work.repeats, "conditions": conditions(),
    }  # fmt: skip
    say(f"{name}: {part} took {seconds:.0f} s")


def _kept(path: Path, work: Work, say: Say) -> Row:
    """Parts of an earlier record that were measured with the same settings."""
    found = read(path)
    if found is None:
        if path.exists():
            say(f"{path} is no record that can be read; it is made again")
        return {}
    return {
        part: one for part, one in found["parts"].items()
        if (one.get("limit"), one.get("repeats")) == (work.limit, work.repeats)
    }  # fmt: skip


def read(path: Path) -> Row | None:
    """A record, None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("parts"), dict) else None


def rows(record: Row) -> list[Row]:
    """The rows of all parts, in order."""
    return [row for part in record["parts"].values() for row in part["rows"]]


def write(path: Path, record: Row) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8")
    os.replace(partial, path)

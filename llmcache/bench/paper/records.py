"""Records of the experiments: each part is written when complete, and not measured again."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.conditions import conditions, load
from llmcache.bench.harness.files import write
from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.models import Made, made
from llmcache.bench.paper.texts import Workload, labelled
from llmcache.errors import ConfigError

Say: TypeAlias = Callable[[str], None]
LABELLED = {"BANKING77": "cls-banking77", "SST-2": "cls-sst2"}


@dataclass
class Work:
    """Settings, models and texts of the experiments.

    limit: most known documents; a quarter of it as queries. repeats: rounds of timed parts. Models and texts are
    loaded at first use.
    """

    data: Path
    models: Path
    limit: int | None = None
    repeats: int = 5
    _made: dict[str, Made] = field(default_factory=dict)

    def known(self, most: int) -> int:
        """Number of known documents, at most `most`."""
        return most if self.limit is None else min(most, self.limit)

    def asked(self, most: int) -> int:
        """Number of queries, at most `most`."""
        return most if self.limit is None else min(most, max(8, self.limit // 4))

    def made(self, name: str) -> Made:
        """Return a model by name. One seeded model is in memory at a time, besides the real one."""
        if name not in self._made:
            self._made = {other: model for other, model in self._made.items() if model.weights == "real"}
            with self.folder() as folder:
                self._made[name] = made(name, self.models, folder)
        return self._made[name]

    @cached_property
    def model(self) -> SentenceTransformer:
        """The model with real weights."""
        return self.made("MiniLM").model

    def labelled(self, name: str, known: int, asked: int) -> Workload:
        """Read BANKING77 or SST-2."""
        return labelled(self.data, LABELLED[name], name).some(self.known(known), self.asked(asked))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield an empty temporary folder for stores."""
        with tempfile.TemporaryDirectory(prefix="llmcache-paper-") as name:
            yield Path(name)


Part: TypeAlias = Callable[[Work], list[Row]]
Experiments: TypeAlias = Mapping[str, Mapping[str, Part]]


def chosen(experiments: Experiments, only: str | None) -> list[str]:
    """Parse a comma-separated list of experiments; all for None. ConfigError for an unknown name."""
    names = [name.strip() for name in only.split(",") if name.strip()] if only else list(experiments)
    if unknown := [name for name in names if name not in experiments]:
        raise ConfigError(f"there is no experiment {unknown[0]!r}; there are: {', '.join(experiments)}")
    return names


def run(
    experiments: Experiments, names: Sequence[str], work: Work, out: Path, *, say: Say, again: bool = False
) -> list[Row]:
    """Measure the missing parts below `out`. Returns the records, in order.

    again: measure existing parts too. A part that was measured with another limit or other repeats counts as missing. A
    part whose data or model is missing is left out, with the reason in the record.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for name in names:
        path = out / f"{name}.json"
        record = {**_new_record(name), "parts": {} if again else _existing_parts(path, work, say)}
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


def _new_record(name: str) -> Row:
    command = f"llmcache bench paper --data DATA --models MODELS --only {name}"
    return {"experiment": name, "command": command, "complete": False, "parts": {}, "skipped": {}}


def _measured(record: Row, part: str, measure: Part, work: Work, say: Say) -> None:
    name = record["experiment"]
    say(f"{name}: {part} ...")
    began, before = time.perf_counter(), load()
    try:
        rows = measure(work)
    except ConfigError as error:  # data or a model is missing, or too small
        record["skipped"][part] = str(error)
        say(f"{name}: {part} is left out: {error}")
        return
    seconds = time.perf_counter() - began
    record["parts"][part] = {
        "rows": rows, "seconds": seconds, "load": [before, load()], "limit": work.limit,
        "repeats": work.repeats, "conditions": conditions(),
    }  # fmt: skip
    say(f"{name}: {part} took {seconds:.0f} s")


def _existing_parts(path: Path, work: Work, say: Say) -> Row:
    """Read the parts of an earlier record that were measured with the same settings."""
    record = read(path)
    if record is None:
        if path.exists():
            say(f"{path} is no record that can be read; it is made again")
        return {}
    return {
        part: result for part, result in record["parts"].items()
        if (result.get("limit"), result.get("repeats")) == (work.limit, work.repeats)
    }  # fmt: skip


def read(path: Path) -> Row | None:
    """Read a record. None when it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("parts"), dict) else None


def rows(record: Row) -> list[Row]:
    """Return the rows of all parts, in order."""
    return [row for part in record["parts"].values() for row in part["rows"]]

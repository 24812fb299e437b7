"""Measurement of contenders that take turns in one process: medians, spread, ratios, differences to the model."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError

Row: TypeAlias = dict[str, Any]
"""One row of a record: names and plain values, as JSON has them."""

WARM = 256
"""Most texts of the warm-up round."""
LEAST_SECONDS = 0.2
"""Least time of a measurement that only reads: calls are repeated until it has passed, since one is below the noise."""


@dataclass(frozen=True, slots=True)
class Task:
    """Work of a measurement, the same for every contender.

    known: texts answered once beforehand. calls: texts of each timed call, repeated in each round. before: texts of
    calls that contenders with memory answer in each round before the clock starts.
    """

    model: SentenceTransformer
    known: Sequence[str]
    calls: Sequence[Sequence[str]]
    batch_size: int = 32
    before: Sequence[Sequence[str]] = ()

    def first(self, share: int | None) -> Task:
        """Cut the calls to this many texts in all, for a contender that is too slow for more."""
        if share is None or sum(map(len, self.calls)) <= share:
            return self
        calls, left = [], share
        for call in self.calls:
            calls.append(call[:left])
            left -= len(calls[-1])
            if not left:
                break
        asked = {text for call in calls for text in call}
        return replace(self, known=[text for text in self.known if text in asked], calls=calls)

    @property
    def only_reads(self) -> bool:
        """True when every text of every call is known, so that nothing is computed."""
        known = set(self.known)
        return bool(known) and all(text in known for call in self.calls for text in call)


class Opened(NamedTuple):
    """An opened contender.

    answer: texts to vectors, float32 [n, width]. computed: number of texts that the model computed so far. commit:
    makes stored vectors durable. noted: further facts for the record; whole numbers are counts so far.
    """

    answer: Callable[[Sequence[str]], Any]
    computed: Callable[[], int]
    commit: Callable[[], None] = lambda: None
    noted: Callable[[], Row] = dict


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute the vectors.

    opened: context manager that yields `Opened` for data in a folder, or the reason why the contender is unavailable.
    package: library that has to be installed. share: most texts per round, for contenders that are too slow for all;
    rates and ratios are per text, so they stay comparable. keeps: True when the contender has memory between calls.
    """

    name: str
    opened: Callable[[Task, Path], AbstractContextManager[Opened]] | str
    package: str = ""
    share: int | None = None
    keeps: bool = True

    @property
    def missing(self) -> str:
        """Reason why the contender cannot take part; empty when it can."""
        if isinstance(self.opened, str):
            return self.opened
        if self.package and find_spec(self.package) is None:
            return f"not installed: {self.package}; install llmcache[rivals]"
        return ""


@dataclass(slots=True)
class Taken:
    """Results of one contender. seconds: time for all its texts, one value per round; the rest is of the last round."""

    documents: int = 0
    seconds: list[float] = field(default_factory=list)
    computed: int = 0
    outputs: Floats32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    noted: Row = field(default_factory=dict)


def rounds(task: Task, contenders: Sequence[Contender], repeats: int) -> Iterator[list[Row]]:
    """Yield rows after each round, one per contender; ratios are to the first contender, the model alone.

    A warm-up round of at most `WARM` new texts is not counted. The contender that starts changes from round to round.
    Each contender answers the known texts once beforehand; each round works on a copy of the resulting folder.
    ConfigError when the first contender cannot take part.
    """
    able = [one for one in contenders if not one.missing]
    if not able or able[0] is not contenders[0]:
        raise ConfigError(f"{contenders[0].name} is the base of the comparison, and it cannot take part")
    texts = list(dict.fromkeys(text for call in task.calls for text in call))
    places = {text: place for place, text in enumerate(texts)}
    expected = np.asarray(task.model.encode(texts, batch_size=task.batch_size), np.float32)
    taken, reads = {one.name: Taken() for one in able}, task.only_reads
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        for turn, one in enumerate(able):
            _fill(one, task.first(one.share), Path(name) / f"known-{turn}")
        for round_ in range(repeats + 1):
            turn = round_ % len(able)
            for place in [*range(turn, len(able)), *range(turn)]:
                one, work = able[place], Path(name) / "work"
                shutil.copytree(Path(name) / f"known-{place}", work)
                asked = task.first(one.share)
                if not round_ and not reads:
                    asked = replace(asked.first(WARM), before=asked.before[:1])
                _measure(one, asked, work, taken[one.name], counted=round_ > 0)
                shutil.rmtree(work)
            if round_:
                yield [_row(one, task, contenders[0], taken, (places, expected)) for one in contenders]


def _fill(one: Contender, task: Task, folder: Path) -> None:
    folder.mkdir()
    if task.known and one.keeps and not isinstance(one.opened, str):
        with one.opened(task, folder) as opened:
            opened.answer(task.known)
            opened.commit()


def _measure(one: Contender, task: Task, folder: Path, taken: Taken, *, counted: bool) -> None:
    assert not isinstance(one.opened, str)
    reads = task.only_reads
    with one.opened(task, folder) as opened:
        for call in task.before if one.keeps else ():
            opened.answer(call)
        if task.before:
            opened.commit()
        before, noted = opened.computed(), opened.noted()
        seconds: list[float] = []
        while not seconds or (reads and sum(seconds) < LEAST_SECONDS):
            began = time.perf_counter()
            outputs = [opened.answer(call) for call in task.calls]
            if not reads:  # otherwise nothing was stored
                opened.commit()
            seconds.append(time.perf_counter() - began)
        computed = (opened.computed() - before) // len(seconds)
        noted = {name: _since(noted[name], value) for name, value in opened.noted().items()}
    if counted:
        taken.seconds.append(statistics.median(seconds))
        taken.computed, taken.documents, taken.noted = computed, sum(map(len, task.calls)), noted
        taken.outputs = np.concatenate([np.asarray(one, np.float32) for one in outputs])


def _since(before: Any, value: Any) -> Any:
    return value - before if isinstance(value, int) and not isinstance(value, bool) else value


# -- rows -----------------------------------------------------------------------------------------------------


def _row(
    one: Contender, task: Task, base: Contender, taken: dict[str, Taken], right: tuple[dict[str, int], Floats32]
) -> Row:
    if one.missing:
        return {"name": one.name, "skipped": one.missing}
    mine = taken[one.name]
    places, expected = right
    asked = [text for call in task.first(one.share).calls for text in call]
    wanted = expected[[places[text] for text in asked]]
    cosine = np.sum(mine.outputs * wanted, axis=1) / (
        np.linalg.norm(mine.outputs, axis=1) * np.linalg.norm(wanted, axis=1)
    )
    return {
        "name": one.name,
        "documents": mine.documents,
        "seconds": list(mine.seconds),
        **spread(mine.seconds),
        "per_second": mine.documents / statistics.median(mine.seconds),
        **ratios(mine, taken[base.name]),
        "computed": mine.computed,
        "difference": float(np.abs(mine.outputs - wanted).max()),
        "mean_1_minus_cosine": float(np.mean(1 - cosine)),
        **({"noted": mine.noted} if mine.noted else {}),
    }


def spread(seconds: Sequence[float]) -> Row:
    """Return median, quickest and slowest seconds, and slowest over quickest (None after a single repeat)."""
    least, most = min(seconds), max(seconds)
    return {
        "median": statistics.median(seconds),
        "quickest": least,
        "slowest": most,
        "slowest_of_quickest": most / least if len(seconds) > 1 else None,
    }


def ratios(mine: Taken, base: Taken) -> Row:
    """Return the texts per second as a multiple of the base's, round by round, and the median of these."""
    each = [
        (other / base.documents) / (own / mine.documents) for own, other in zip(mine.seconds, base.seconds, strict=True)
    ]
    return {"ratio": statistics.median(each), "ratios": each}


def times(rows: Sequence[Row], name: str, other: str) -> float | None:
    """Return the texts per second of `name` over those of `other`, median over the rounds; None when one is missing."""
    measured = {row["name"]: row for row in rows if "ratios" in row}
    if name not in measured or other not in measured:
        return None
    mine, theirs = measured[name]["ratios"], measured[other]["ratios"]
    return float(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)))


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]

"""Measurement of contenders that compute vectors of texts: rates, ratios to the model, differences to its vectors."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats32
from llmcache.bench.harness.turns import Measurement, Row, Turn, each_round, spread
from llmcache.errors import ConfigError

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


def rounds(task: Task, contenders: Sequence[Contender], repeats: int) -> Iterator[list[Row]]:
    """Yield rows after each round, one per contender; ratios are to the first contender, the model alone.

    A warm-up round of at most `WARM` new texts is not counted. Each contender answers the known texts once beforehand;
    each round works on a copy of the resulting folder. ConfigError when the first contender cannot take part.
    """
    able = [one for one in contenders if not one.missing]
    base = contenders[0].name
    if not able or able[0] is not contenders[0]:
        raise ConfigError(f"{base} is the base of the comparison, and it cannot take part")
    texts = list(dict.fromkeys(text for call in task.calls for text in call))
    vectors = np.asarray(task.model.encode(texts, batch_size=task.batch_size), np.float32)
    expected = dict(zip(texts, vectors, strict=True))
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        turns = [_turn(one, task.first(one.share), base, Path(folder) / str(place)) for place, one in enumerate(able)]
        for made in each_round(turns, repeats, keep=1):
            yield [
                {"name": one.name, "skipped": one.missing} if one.missing
                else _row(made[one.name], task.first(one.share), expected)
                for one in contenders
            ]  # fmt: skip


def _turn(one: Contender, task: Task, base: str, folder: Path) -> Turn:
    """Fill the contender's folder with the known texts. Returns its turn."""
    assert not isinstance(one.opened, str)
    opened_by, facts = one.opened, Row()
    known, work = folder / "known", folder / "work"
    known.mkdir(parents=True)
    if task.known and one.keeps:
        with opened_by(task, known) as opened:
            opened.answer(task.known)
            opened.commit()

    @contextmanager
    def prepared(number: int) -> Iterator[Callable[[], Any]]:
        few = number == 0 and not task.only_reads
        asked = replace(task.first(WARM), before=task.before[:1]) if few else task
        shutil.copytree(known, work)
        with opened_by(asked, work) as opened:
            for call in asked.before if one.keeps else ():
                opened.answer(call)
            if asked.before:
                opened.commit()
            before, noted, times = opened.computed(), opened.noted(), [0]

            def answer() -> list[Any]:
                times[0] += 1
                outputs = [opened.answer(call) for call in asked.calls]
                if not asked.only_reads:  # otherwise nothing was stored
                    opened.commit()
                return outputs

            yield answer
            facts["computed"] = (opened.computed() - before) // times[0]
            facts["noted"] = {name: _since(noted[name], value) for name, value in opened.noted().items()}
        shutil.rmtree(work)

    count = sum(map(len, task.calls))
    return Turn(one.name, count, prepared, base, LEAST_SECONDS if task.only_reads else 0.0, facts)


def _since(before: Any, value: Any) -> Any:
    return value - before if isinstance(value, int) and not isinstance(value, bool) else value


# -- rows -----------------------------------------------------------------------------------------------------


def _row(mine: Measurement, task: Task, expected: Mapping[str, Floats32]) -> Row:
    wanted = np.array([expected[text] for call in task.calls for text in call])
    given = np.concatenate([np.asarray(one, np.float32) for one in mine.outputs[-1]])
    cosine = np.sum(given * wanted, axis=1) / (np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1))
    return {
        "name": mine.name, "documents": mine.documents, "seconds": list(mine.seconds), **spread(mine.seconds),
        "per_second": mine.rate, "ratio": mine.ratio, "ratios": mine.ratios, "computed": mine.facts["computed"],
        "difference": float(np.abs(given - wanted).max()), "mean_1_minus_cosine": float(np.mean(1 - cosine)),
        **({"noted": mine.facts["noted"]} if mine.facts["noted"] else {}),
    }  # fmt: skip


def times(rows: Sequence[Row], name: str, other: str) -> float | None:
    """Return the texts per second of `name` over those of `other`, median over the rounds; None when one is missing."""
    measured = {row["name"]: row for row in rows if "ratios" in row}
    if name not in measured or other not in measured:
        return None
    mine, theirs = measured[name]["ratios"], measured[other]["ratios"]
    return float(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)))

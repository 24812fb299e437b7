"""Timing of contenders that take turns in one process, so that a noisy machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

Row: TypeAlias = dict[str, Any]
"""One row of a record: names and plain values, as JSON has them."""
Action: TypeAlias = Callable[[], Any]
_AGAIN = ("", ", again")


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender of a measurement.

    documents: number of documents (or rows, or bytes) in each round. prepared: context manager for a round, by its
    number; it yields the action to time, and what it does before and after the action is not timed. base: name of the
    contender to compare with, "" for none. least: seconds until which the action is repeated in each round, for an
    action that is too short to time once. facts: further results for the record; `prepared` may fill them.
    """

    name: str
    documents: float
    prepared: Callable[[int], AbstractContextManager[Action]]
    base: str = ""
    least: float = 0.0
    facts: Row = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Measurement:
    """Result of one contender. seconds, outputs: of each counted round. difference: the largest, to the reference."""

    name: str
    documents: float
    against: Measurement | None = None
    seconds: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    difference: float | None = None
    facts: Row = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Name of the contender to compare with, "" for none."""
        return self.against.name if self.against else ""

    @property
    def base_seconds(self) -> list[float]:
        """Seconds of the base in each round."""
        return self.against.seconds if self.against else []

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Documents per second, from the median."""
        return self.documents / self.median

    @property
    def ratios(self) -> list[float]:
        """Documents per second over those of the base, round by round."""
        return ratios(self, self.against) if self.against else []

    @property
    def ratio(self) -> float | None:
        """Median of the ratios."""
        return statistics.median(self.ratios) if self.against else None

    @property
    def ratio_of_best(self) -> float | None:
        """Ratio of the quickest rounds, which says more on a busy machine."""
        if self.against is None:
            return None
        return self.documents / self.against.documents * min(self.base_seconds) / min(self.seconds)

    def compare(self, expected: Sequence[Any]) -> None:
        """Set the largest difference of the outputs to these arrays, one for each round."""
        pairs = zip(self.outputs, expected, strict=True)
        self.difference = max(float(np.abs(np.asarray(one) - other).max()) for one, other in pairs)

    def add(self, seconds: float) -> None:
        """Add to each round its share of these seconds, such as those of one commit at the end."""
        self.seconds = [own + seconds / len(self.seconds) for own in self.seconds]

    def ratio_range(self, kind: str = "") -> Row:
        """Return the median, the least and the greatest of the ratios; `kind` begins their names."""
        each = self.ratios
        return {
            f"{kind}ratio": statistics.median(each), f"{kind}ratio_least": min(each), f"{kind}ratio_most": max(each)
        }  # fmt: skip

    def row(self, *names: str) -> Row:
        """Return these fields as a row."""
        return {name: getattr(self, name) for name in names}


def ratios(mine: Measurement, base: Measurement) -> list[float]:
    """Return the documents per second of one contender over those of another, round by round."""
    share = mine.documents / base.documents
    return [share * other / own for other, own in zip(base.seconds, mine.seconds, strict=True)]


def speed_up(mine: Measurement, base: Measurement) -> float:
    """Return the median of the ratios of two contenders."""
    return statistics.median(ratios(mine, base))


def freed(action: Action) -> Action:
    """Return an action that frees its result, which may be large, within the time."""

    def act() -> None:
        action()

    return act


def steady(action: Action) -> Callable[[int], AbstractContextManager[Action]]:
    """Return the `prepared` of an action that is the same in each round and needs no preparation."""
    return lambda _: nullcontext(action)


def each_round(
    turns: Sequence[Turn],
    repeats: int,
    *,
    warm: int = 1,
    rotating: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    over: Callable[[], bool] = lambda: False,
    keep: int | None = None,
    passes: int = 1,
) -> Iterator[dict[str, Measurement]]:
    """Yield the results so far by name after each counted round; the first `warm` rounds are not counted.

    rotating: the contender that starts changes from round to round. clock: seconds. over: True when the time is over,
    so that no further round begins; one round is always counted. keep: most outputs of a contender to keep, the latest;
    None keeps all. passes: 2 runs all contenders twice in each round; results of the second pass are those of
    "NAME, again".
    """
    made: dict[str, Measurement] = {}
    for again in _AGAIN[:passes]:
        for one in turns:
            made[one.name + again] = Measurement(one.name + again, one.documents, facts=one.facts)
            made[one.name + again].against = made.get(one.base + again)
    for number in range(warm + repeats):
        if number > warm and over():
            return
        first = number % len(turns) if rotating else 0
        for one, again in ((one, again) for again in _AGAIN[:passes] for one in (*turns[first:], *turns[:first])):
            spent: list[float] = []
            with one.prepared(number) as action:
                while not spent or sum(spent) < one.least:
                    began = clock()
                    output = action()
                    spent.append(clock() - began)
            if number >= warm:
                found = made[one.name + again]
                found.seconds.append(statistics.median(spent))
                found.outputs = [*found.outputs, output][-(keep or repeats) :]
            del output  # it may be large
        if number >= warm:
            yield made


def in_turn(turns: Sequence[Turn], repeats: int, **settings: Any) -> dict[str, Measurement]:
    """Run all rounds of `each_round` and return the results by name."""
    *_, made = each_round(turns, repeats, **settings)
    return made


def spread(seconds: Sequence[float]) -> Row:
    """Return median, quickest and slowest seconds, and slowest over quickest (None after a single repeat)."""
    least, most = min(seconds), max(seconds)
    return {
        "median": statistics.median(seconds), "quickest": least, "slowest": most,
        "slowest_of_quickest": most / least if len(seconds) > 1 else None,
    }  # fmt: skip

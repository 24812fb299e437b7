"""Damaged files of every kind: no wrong answer, no signal, no hang, no large allocation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.damage import CHANGES, KINDS, Case, damaged, files_of, make
from tests.faults import Tally

CASES, PROCESSES = 2000, 2


def test_damaged_files_give_no_wrong_answer_and_end_no_process(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def part(number: int) -> Tally:
        where = tmp_path / str(number)
        where.mkdir()
        share = CASES // PROCESSES
        return damaged(where, 1, share * number, share * (number + 1))

    tally = Tally()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for one in pool.map(part, range(PROCESSES)):
            tally += one
    assert not tally.failures, "\n".join(tally.failures[:20])
    assert sum(tally.counts.values()) == CASES
    assert all(tally.counts[f"damaged: {kind}"] == CASES // len(KINDS) for kind in KINDS)
    record_property("counts", dict(tally.counts))


def test_the_cases_are_of_every_kind_and_way_and_most_of_them_change_a_file(tmp_path: Path) -> None:
    make(tmp_path / "store")
    files = files_of(tmp_path / "store")
    cases = [Case(files, 1, number) for number in range(CASES)]
    ways = {tuple(case.title.split(", ")[:3]) for case in cases}
    assert {way[0] for way in ways} == set(KINDS)
    for change in CHANGES:
        of_this = {way[0] for way in ways if way[1] == change.__name__}
        assert of_this == set(KINDS)
    assert {way[0] for way in ways if way[2] == "fixed"} == set(KINDS) - {"FORMAT", "stat"}
    assert sum(case.changed for case in cases) > 0.9 * CASES

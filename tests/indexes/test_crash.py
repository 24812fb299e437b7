"""Faults, power losses and kills in every operation: acknowledged entries are intact afterwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import Tally, faults, interleavings, power_losses
from tests.kills import random_kills, sigkills
from tests.operations import OPERATIONS, Operation

Record = Callable[[str, object], None]

NIGHTLY = bool(os.environ.get("LLMCACHE_NIGHTLY"))
TRIALS = 60 if NIGHTLY else 30
STATES = 25 if NIGHTLY else 10
"""Crash states that are tried for each call of an operation."""

by_name = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the warnings about intended damage."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def passed(tally: Tally, record: Record) -> None:
    assert not tally.failures, "\n".join(tally.failures[:20])
    record("counts", dict(tally.counts))


@by_name
def test_a_fault_at_any_call_costs_nothing_that_was_acknowledged(operation: Operation, record_property: Record) -> None:
    passed(faults(operation), record_property)


@by_name
def test_a_power_loss_at_any_call_costs_nothing_that_was_acknowledged(
    operation: Operation, record_property: Record
) -> None:
    tally = power_losses(operation, STATES)
    assert tally.counts["crash states"] >= STATES * tally.counts["calls"]
    passed(tally, record_property)


@by_name
def test_another_writer_at_any_call_loses_nothing_and_costs_nothing(
    operation: Operation, record_property: Record
) -> None:
    passed(interleavings(operation), record_property)


def test_a_kill_at_any_call_costs_nothing_that_was_acknowledged(tmp_path: Path, record_property: Record) -> None:
    passed(sigkills(tmp_path, OPERATIONS if NIGHTLY else OPERATIONS[::2]), record_property)


def test_writers_readers_and_a_maintainer_killed_at_a_random_time_lose_nothing_that_was_acknowledged(
    tmp_path: Path, record_property: Record
) -> None:
    tally = random_kills(tmp_path, trials=TRIALS, seed=1)
    assert tally.counts["kills"] >= TRIALS * 2 * 7
    assert tally.counts["acknowledged commits"] >= TRIALS  # one in every other round
    passed(tally, record_property)

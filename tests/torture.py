"""The crash tests with larger numbers and random options, for as long as is asked.

    python -m tests.torture --minutes 30 [--seed N] [--out data/torture.json]

Every round has a seed of its own, which is printed; a round is played again by `--seed N --rounds 1`. What was counted
is printed, and written with the commit, date and machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests import damage_calibrated
from tests.damage import damaged
from tests.faults import MORE_CODES, Tally, faults, interleavings, power_losses
from tests.indexes.test_state_machine import STEPS, StoreMachine
from tests.kills import random_kills, sigkills
from tests.operations import OPERATIONS
from tests.stops import stops

ROOT = Path(__file__).parent.parent


def steps_at_random(number: int, runs: int, length: int) -> Tally:
    """Hypothesis from a seed; a failure's replay is what it prints."""
    tally = Tally()
    before = STEPS["taken"]
    options = settings(
        max_examples=runs,
        stateful_step_count=length,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with tally.trial("state-machine runs", f"seed {number}"):
        run_state_machine_as_test(seed(number)(StoreMachine), settings=options)
    tally.counts["state-machine steps"] += STEPS["taken"] - before
    return tally


def one_round(number: int, until: float) -> Tally:
    """One of each kind, with options drawn from the round's seed, in random order, until the time is up."""
    chance = random.Random(number)
    operation = chance.choice(OPERATIONS)
    where = Path(tempfile.mkdtemp(prefix="torture-"))
    places = iter(range(1000))

    def place() -> Path:
        path = where / str(next(places))
        path.mkdir()
        return path

    parts: list[Callable[[], Tally]] = [
        partial(power_losses, operation, chance.randint(25, 100), number, chance.randint(1, 10)),
        partial(faults, operation, chance.sample(MORE_CODES, 3), chance.randint(1, 8)),
        partial(interleavings, operation),
        lambda: sigkills(place(), [operation]),
        partial(random_kills, place(), chance.randint(10, 60), number),
        partial(damaged, place(), number, 0, 10 * chance.randint(20, 100)),
        partial(damage_calibrated.damaged, place(), number, 0, 10 * chance.randint(2, 20)),
        partial(stops, place(), chance.randint(5, 20), number),
        partial(steps_at_random, number, chance.randint(20, 200), chance.randint(20, 60)),
    ]
    chance.shuffle(parts)
    tally = Tally()
    try:
        for part in parts:
            if time.monotonic() < until:
                tally += part()
    finally:
        shutil.rmtree(where, ignore_errors=True)
    return tally


def commit_of_checkout() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Crash tests with larger numbers.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; each later one is one more")
    parser.add_argument("--rounds", type=int, default=None, help="stop after so many")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the counts")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    first = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    started, total, rounds = time.monotonic(), Tally(), 0
    while time.monotonic() < started + 60 * options.minutes and rounds != options.rounds:
        number = first + rounds
        sys.stdout.write(f"round {rounds}: python -m tests.torture --seed {number} --rounds 1\n")
        sys.stdout.flush()
        tally = one_round(number, started + 60 * options.minutes)
        for failure in tally.failures:
            sys.stdout.write(f"  FAILED {failure}\n")
        total += tally
        rounds += 1
    facts = {
        "command": f"python -m tests.torture --minutes {options.minutes:g} --seed {first}",
        "commit": commit_of_checkout(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "rounds": rounds,
        "counts": dict(sorted(total.counts.items())),
        "failures": len(total.failures),
    }
    text = json.dumps(facts, indent=2)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())

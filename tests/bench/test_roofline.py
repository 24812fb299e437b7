"""`llmcache bench roofline` on a tiny corpus: shares of a floor that is counted, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcache.near.neighbors.predictor import LANDMARKS
from tests.conftest import Command


def test_every_tier_is_beside_a_floor_of_what_it_moves(llmcache: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("".join(f"where is the card number {i}?\n" for i in range(40)))
    found = json.loads(llmcache("bench", "roofline", "--data", path, "--repeats", 1, "--entries", 2000, "--json").out)
    rows = {row["what"]: row for row in found["rows"]}
    layer = rows["rows of 150 x 384 float32, batches of 256"]
    assert layer["bytes"] == 2048 * 150 * 384 * 4
    assert layer["bound"] == "memory"
    predicted = rows[f"predicted outputs, {LANDMARKS} landmarks"]
    assert predicted["operations"] == 40 * 2 * (384 * 256 + 256 * LANDMARKS + LANDMARKS * 384)
    assert predicted["bound"] == "arithmetic"
    beginning = rows["beginnings of 512 tokens, GPT-2-small"]
    assert beginning["bytes"] == 8 * 512 * (12 * 2 + 1) * 768 * 4
    for row in found["rows"]:
        limit = found["copy_bytes_per_second"], found["operations_per_second"]
        assert row["floor_seconds"] == pytest.approx(max(row["bytes"] / limit[0], row["operations"] / limit[1]))
        assert row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    (near,) = found["near"]
    assert near["entries"] == near["held"] == 2000
    assert near["corrected_share"] == pytest.approx(near["corrected_milliseconds"] / near["model_milliseconds"])
    assert len(found["load"]) == 2


def test_sizes_that_make_no_sense_are_refused_in_one_line(llmcache: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("a\nb\n")
    for sizes in ("10", "many"):
        done = llmcache("bench", "roofline", "--data", path, "--entries", sizes)
        assert done.code == 2
        assert sizes in done.err
        assert len(done.err.strip().splitlines()) == 1

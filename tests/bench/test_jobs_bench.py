"""`llmcache bench jobs` on a tiny real model: complete rows, equal files, and the results of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmcache.bench.job_texts import new_tokens
from llmcache.cli.bench.app import COMMANDS
from tests.conftest import DATA, MODELS, Command

MODEL = MODELS / "stories260k-llama"
NEEDED = ("qa-squad2-dev", "qa-openbookqa", "cls-banking77")
SIZES = {
    "paragraphs": 10, "long-paragraphs": 2, "groups": 2, "classified": 10, "classified-plain": 2, "questions": 6,
    "short": 40, "long": 120, "shots": 60, "batch-size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments() -> list[Any]:
    for folder in (MODEL, *(DATA / name for name in NEEDED)):
        if not folder.exists():
            pytest.skip(f"there is no {folder}; set LLMCACHE_MODELS and LLMCACHE_DATA")
    sizes = [part for name, size in SIZES.items() for part in (f"--{name}", size)]
    return ["bench", "jobs", "--data", DATA, "--model", MODEL, *sizes]


def test_every_job_has_a_row_and_the_results_of_transformers(
    llmcache: Command, arguments: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = llmcache(*arguments, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    rows = {row["name"]: row for row in record["rows"]}
    five = "five questions a paragraph"
    assert list(rows) == [
        "first run", "same job again", "10 % changed", "generate, known 40 tokens", "score, known 40 tokens",
        "generate, known 120 tokens", "score, known 120 tokens", f"{five}, shuffled", f"{five}, sorted",
        "few-shot classification",
    ]  # fmt: skip
    for name, row in rows.items():
        assert row["documents"] > 0
        assert all(seconds > 0 for seconds in (*row["seconds"], row["open_seconds"]))
        assert row["tokens"] == row["restored"] + row["shared"] + row["computed"], name
        if name != "first run":
            assert row["ratio"] > 0
            assert len(row["seconds"]) == len(row["base_seconds"])
            assert row["computed"] >= row["needed"] if "needed" in row else row["computed"] == 0, name
        if row["asked"] is not None:
            assert row["met"] == (row["ratio"] >= row["asked"])

    (command,) = (one for one in COMMANDS if one.name == "jobs")
    for table in command.tables:
        table.show(record)
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("few-shot", "shuffled", "OpenBookQA", "by tokens", "audits"))
    assert str(dict(command.facts(record))["same job again"]).startswith("the same bytes; ")

    again = rows["same job again"]
    assert again["equal_files"]
    assert again["answers_stored"] == SIZES["paragraphs"]
    assert rows["10 % changed"]["answers_stored"] == SIZES["paragraphs"] - 1
    assert rows[f"{five}, shuffled"]["of_sorted"] == pytest.approx(1, abs=0.1)
    assert 0 < rows[f"{five}, shuffled"]["shared_share"] < 0.9

    ends = [one for one in record["exactness"] if one["name"].startswith("OpenBookQA")]
    assert [one["items"] for one in ends] == [8, 8, 8]
    for one in record["exactness"]:
        assert one["equal"] == one["prompts"], one
        assert one["difference"] is None or one["difference"] < 1e-4, one


def test_a_model_that_writes_nothing_and_too_large_sizes_are_refused(
    llmcache: Command, arguments: list[Any], model_path: str
) -> None:
    done = llmcache(*arguments, "--model", model_path)
    assert done.code == 2
    assert "is no language model with a tokenizer" in done.err
    done = llmcache(*arguments, "--paragraphs", 100_000)
    assert done.code == 2
    assert "documents of 40 tokens, and 110000 are needed" in done.err


def test_tokens_of_beginnings_count_once() -> None:
    assert new_tokens([[1, 2, 3], [1, 2, 4], [1, 2, 3]]) == 4
    assert new_tokens([[1, 2, 3], [5, 2]], known=[[1, 2, 9]]) == 3
    assert new_tokens([[1, 2]], known=[[1, 2, 3]]) == 0

"""Language-model jobs on the command line: run, plan and verify-model, and one line for what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llmcache.decoders import stored_answers
from llmcache.decoders.answer_bank import Answered, packed
from llmcache.errors import ModelMismatch
from llmcache.verification import verify_job
from tests.conftest import MODELS, Command

FOLDER = MODELS / "stories260k-llama"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="set LLMCACHE_MODELS to the folder of real small models")
RECORDS: list[dict[str, Any]] = [
    {"id": f"r{i}", "text": f"The {word} ran home.", "n": i, "own": ["so", word]}
    for i, word in enumerate(["dog", "cat", "girl", "dog", "bird"])
]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return "in.jsonl"


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_run_plan_and_run_again(llmcache: Command, corpus: str) -> None:
    job = [corpus, "--store", "s", "--task", "generate", "--template", "{n}: {text} Then", "--max-new-tokens", "4"]
    forecast = json.loads(llmcache("plan", *job, "--model", str(FOLDER), "--json").out)
    assert (forecast["documents"], forecast["stored"], forecast["computed"]) == (5, 0, 5)
    assert forecast["bytes_per_token"] > 0
    assert not Path("s").exists()
    first = llmcache("run", *job, "--model", str(FOLDER), "--out", "a.jsonl", "--json")
    assert (first.code, json.loads(first.out)["misses"]) == (0, 5)
    again = llmcache("run", *job, "--out", "b.jsonl", "--json")  # the store knows its model
    assert (again.code, json.loads(again.out)["exact"]) == (0, 5)
    assert [row["text"] for row in rows("a.jsonl")] == [row["text"] for row in rows("b.jsonl")]
    forecast = json.loads(llmcache("plan", *job, "--json").out)
    assert (forecast["stored"], forecast["computed"], forecast["new_tokens"]) == (5, 0, 0)
    assert forecast["uncached_seconds"] > forecast["seconds"] == 0
    refused = llmcache("verify-model", "-m", str(FOLDER), "-d", corpus, "--task", "generate", "--layers", "4",
                       "--template", "{text}")  # fmt: skip
    assert (refused.code, "--layers is for vectors" in refused.err) == (2, True)
    assert "answers stored" in llmcache("plan", *job).out


def test_labels_with_examples_and_own_choices(llmcache: Command, corpus: str) -> None:
    Path("few.csv").write_text('text,answer\n"The cow, ran.",cow\nThe fox sat.,fox\n')
    job = ["run", corpus, "--store", "s", "--model", str(FOLDER), "--template", "{text} Who?", "--examples", "few.csv"]
    done = llmcache(*job, "--task", "classify", "--choices-field", "own", "--out", "a.jsonl", "--no-provenance")
    assert done.code == 0, done.err
    assert all(row["label"] in record["own"] for row, record in zip(rows("a.jsonl"), RECORDS, strict=True))
    assert "tier" not in rows("a.jsonl")[0]
    done = llmcache(*job, "--task", "score", "--choice", "dog", "--choice", "cat", "--out", "b.jsonl", "--resume")
    assert done.code == 0, done.err
    assert all(len(row["log_likelihoods"]) == 2 for row in rows("b.jsonl"))


def test_a_stopped_job_says_how_to_go_on(llmcache: Command, corpus: str) -> None:
    job = ["run", corpus, "--store", "s", "--model", str(FOLDER), "--task", "generate", "--template", "{text}",
           "--max-new-tokens", "2", "--batch-size", "1", "--out", "a.jsonl", "--resume"]  # fmt: skip
    stopped = llmcache(*job, "--max-seconds", "0.000001s")
    assert stopped.code == 3
    assert not Path("a.jsonl").exists()
    assert llmcache(*job).code == 0
    assert [row["id"] for row in rows("a.jsonl")] == [record["id"] for record in RECORDS]


def test_verify_model_compares_answers(llmcache: Command, corpus: str) -> None:
    job = ["verify-model", "--model", str(FOLDER), "--data", corpus, "--template", "{text}", "--json"]
    for task in (["generate", "--max-new-tokens", "4"], ["score", "--choice", "so", "--choice", "the end"]):
        done = llmcache(*job, "--task", *task)
        assert done.code == 0, done.err
        checks = json.loads(done.out)["checks"]
        assert [(check["tier"], check["run"]) for check in checks] == [
            ("model", "re-batched"), ("answers", "cold"), ("answers", "reloaded"),
        ]  # fmt: skip
        assert checks[-1]["reused"] >= 5
        assert checks[-1]["same"]


def test_verify_model_finds_answers_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = transformers.AutoModelForCausalLM
    model = model.from_pretrained(FOLDER).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

    def other(answers: list[Answered]) -> Any:  # what is stored is not what was computed
        return packed([replace(answer, likelihoods=answer.likelihoods * np.float32(1.001)) for answer in answers])

    monkeypatch.setattr(stored_answers, "packed", other)
    job = {"task": "generate", "template": "{text}", "max_new_tokens": 3}
    with pytest.raises(ModelMismatch, match="is not what this model gives"):
        list(verify_job(model, tokenizer, RECORDS, tmp_path / "store", job))


TEMPLATE = ["--template", "{text}"]
WRONG: list[tuple[list[str], int, str]] = [
    (["--task", "translate", *TEMPLATE], 2, "task is one of"),
    (["--task", "generate"], 2, "--template"),
    (["--task", "generate", *TEMPLATE, "--template-file", "in.jsonl"], 2, "one of them"),
    (["--task", "generate", "--template-file", "none.txt"], 2, "none.txt cannot be read"),
    (["--task", "generate", "--template", "{missing}"], 1, "no field 'missing'"),
    (["--task", "generate", "--template", "{text"], 2, "brace"),
    (["--task", "generate", *TEMPLATE, "--choice", "a"], 2, "choices"),
    (["--task", "classify", *TEMPLATE, "--choice", "a", "--choice", "a"], 2, "twice"),
    (["--task", "classify", *TEMPLATE, "--choices-field", "n"], 1, "list of texts"),
    (["--task", "classify", *TEMPLATE, "--choices-field", "none"], 1, "no field 'none'"),
    (["--task", "generate", *TEMPLATE, "--set", "x"], 2, "NAME=VALUE"),
    (["--task", "generate", *TEMPLATE, "--set", "nonsense=1"], 2, "nonsense"),
    (["--task", "generate", *TEMPLATE, "--set", "num_beams=0"], 2, "refuses"),
    (["--task", "generate", *TEMPLATE, "--set", "max_new_tokens=3", "--max-new-tokens", "3"], 2, "once"),
    (["--task", "generate", *TEMPLATE, "--max-new-tokens", "100000"], 2, "leaves none"),
    (["--task", "generate", *TEMPLATE, "--chunk", "structure"], 2, "--chunk"),
    (["--task", "generate", *TEMPLATE, "--tau", "0.9"], 2, "--tau"),
    (["--task", "generate", *TEMPLATE, "--too-long", "middle"], 2, "too_long"),
    (["--task", "generate", *TEMPLATE, "--examples", "none.jsonl"], 2, "none.jsonl"),
    (["--task", "generate", *TEMPLATE, "--system", "Be kind."], 2, "chat template"),
    (["--task", "generate", *TEMPLATE, "--syntax", "mustache"], 2, "syntax"),
    (["--task", "generate", *TEMPLATE, "--out", "a.npy"], 2, ".jsonl or .parquet"),
    (["--task", "generate", *TEMPLATE, "--model", "nowhere/nothing"], 2, "cannot be loaded"),
    (TEMPLATE, 2, "--task"),
]


@pytest.mark.parametrize(("arguments", "code", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_one_line(
    llmcache: Command, corpus: str, arguments: list[str], code: int, reason: str
) -> None:
    given = ["--store", "s", "--out", "a.jsonl", *([] if "--model" in arguments else ["--model", str(FOLDER)])]
    done = llmcache("run", corpus, *given, *arguments)
    assert done.code == code, done.err
    assert reason in done.err
    assert done.err.strip().count("\n") == 0
    assert not Path("a.jsonl").exists()

"""`llmcache bench gpu` without a GPU: it runs to its end in tiny sizes. How fast anything is belongs to no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcache.bench.gpu import runner as subject
from llmcache.bench.harness.shapes import (
    SHAPES,
    sentences,
    texts,
    tiny,
)
from llmcache.errors import ConfigError
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
ABSENT = ("faiss", "typer", "rich", "matplotlib")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The module, in a process that has none of the libraries that it should do without."""
    code = (
        f"import sys, runpy; [sys.modules.__setitem__(one, None) for one in {ABSENT}]\n"
        f"sys.argv = ['gpu', *{list(arguments)!r}]\n"
        "runpy.run_module('llmcache.bench.gpu', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "found.json"
    done = run("--device", "cpu", "--tiny", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "x recomputing them" in done.stderr
    return out


def test_every_part_runs_without_a_gpu_and_without_the_libraries_of_the_command_line(result: Path) -> None:
    found = json.loads(result.read_text())
    assert list(found["parts"]) == list(subject.PARTS)
    assert all(set(part) == {"result", "seconds"} for part in found["parts"].values())
    assert found["device"] == "cpu"
    assert found["tiny"] is True
    assert found["python"]
    assert not list(result.parent.glob("*.partial"))


def test_what_is_measured_is_right_to_rounding(result: Path) -> None:
    parts = {name: part["result"] for name, part in json.loads(result.read_text())["parts"].items()}
    for name in SHAPES:
        hits, misses = parts[name]["hits"], parts[name]["misses"]
        assert {"model alone", "device memory", "pinned memory", "disk"} == set(hits)
        assert all(one["difference"] < 2e-5 and one["repeats"] == 2 for one in hits.values())
        assert misses["difference"] < 2e-5
        device, pinned, files = hits["device memory"]["answered_by"]
        assert device > 0 == pinned
        assert files == parts[name]["model"]["documents"]  # once
        assert hits["pinned memory"]["answered_by"][1] > 0
    assert {one["rows"] for one in parts["search"]} == {2_000, 5_000}
    assert all(one["difference"] < (1e-6 if one["dtype"] == "float32" else 3e-4) for one in parts["search"])
    assert [(one["entries"], one["queries"]) for one in parts["near"]] == [
        (entries, queries) for entries in (500, 1000) for queries in (1, 32, 64)
    ]
    for one in parts["near"]:
        assert one["difference"] < 1e-4
        assert one["same_neighbours"] > 0.95
        assert min(one[f"{what}_milliseconds"] for what in ("device", "host", "model")) > 0
    for one in parts["prefix"]:
        for level in ("disk", "pinned memory", "device memory"):
            assert one[level]["restored_tokens"] == 3 * one["tokens"]
            assert one[level]["relative_difference"] < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_one_line_and_exit_code_1(llmcache: Command) -> None:
    done = llmcache("bench", "gpu")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "--device cpu --tiny" in done.err
    alone = run()
    assert alone.returncode == 1
    assert alone.stderr.strip().splitlines()[-1].startswith("llmcache: torch sees no CUDA device")


def test_a_part_that_is_not_there_names_those_that_are(llmcache: Command) -> None:
    done = llmcache("bench", "gpu", "--only", "search,serach")
    assert done.code == 2
    assert "serach" in done.err
    assert "bert-base" in done.err
    with pytest.raises(ConfigError, match="no part serach"):
        subject.measured(only="serach")


def test_the_table_is_for_people_and_a_failure_leaves_the_other_parts(
    llmcache: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject, "prefixes", broken)
    out = tmp_path / "found.json"
    done = llmcache("bench", "gpu", "--device", "cpu", "--tiny", "--only", "prefix,bandwidth,minilm,near", "--out", out)
    assert done.code == 1
    for name in (
        "device memory",
        "Empty cache",
        "matrix product",
        "of the model",
        "prefix: RuntimeError: out of memory",
    ):
        assert name in done.out
    parts = json.loads(out.read_text())["parts"]
    assert parts["prefix"]["error"] == "RuntimeError: out of memory"
    assert parts["minilm"]["result"]["hits"]


def test_parts_that_no_time_is_left_for_are_left_out_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    found = subject.measured(None, minutes=0, only="bandwidth,search", device="cpu", tiny=True, say=lines.append)
    assert "result" in found["parts"]["bandwidth"]
    assert found["parts"]["search"] == {"skipped": "no time was left"}
    assert lines == ["search: no time is left"]


def test_models_of_a_shape_are_the_same_each_time_and_have_its_layers() -> None:
    shape = tiny(SHAPES["llama-1b"])
    documents = texts(5, shape.tokens, seed=0)
    one, other = (sentences(shape, "cpu", torch.float32).encode(documents) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert len(set(documents)) == 5
    model: Any = sentences(shape, "cpu", torch.float32)
    assert len(model[0].auto_model.layers) == 2
    assert {name: shape.config().num_hidden_layers for name, shape in SHAPES.items()} == {
        "minilm": 6,
        "bert-base": 12,
        "llama-1b": 16,
    }

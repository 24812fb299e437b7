"""The command line: what it prints, writes and exits with."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from sentence_transformers import SentenceTransformer

from tests.conftest import HEAR_CTRL_C, Command, Done

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [{"id": f"d{i}", "text": text} for i, text in enumerate(["one", "two", "three", "two"])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_build_warm_run_stats_inspect_do_the_main_job(
    llmcache: Command, corpus: Path, store: Path, tmp_path: Path, model: SentenceTransformer, model_path: str
) -> None:
    built = llmcache("build", corpus, "--model", model_path, "--store", store, "--json")
    assert built.code == 0
    facts = json.loads(built.out)
    assert (facts["documents"], facts["misses"], facts["exact"], facts["store"]["entries"]) == (4, 3, 1, 3)

    corpus.write_text(corpus.read_text() + json.dumps({"id": "d4", "text": "four"}) + "\n")
    warmed = json.loads(llmcache("warm", corpus, "--store", store, "--json").out)
    assert (warmed["exact"], warmed["misses"], warmed["store"]["added"]) == (4, 1, 1)

    out = tmp_path / "vectors.parquet"
    ran = json.loads(llmcache("run", corpus, "--store", store, "--out", out, "--json").out)
    assert (ran["documents"], ran["exact"], ran["misses"]) == (5, 5, 0)
    table = pyarrow.parquet.read_table(out)
    assert table["id"].to_pylist() == ["d0", "d1", "d2", "d3", "d4"]
    assert table["source"].to_pylist() == ["d0", "d1", "d2", "d1", "d4"]
    assert table["tier"].to_pylist() == ["exact"] * 5
    expected = model.encode(["one", "two", "three", "two", "four"])
    np.testing.assert_allclose(np.array(table["output"].to_pylist(), np.float32), expected, atol=1e-6)

    stats = json.loads(llmcache("stats", store, "--json").out)
    assert stats["lifetime"]["documents"] == 14
    assert stats["lifetime"]["misses"] == 4
    assert stats["banks"][0]["entries"] == 4
    shown = llmcache("stats", store)
    assert "hit rate" in shown.out
    assert "71.4 %" in shown.out

    inspected = json.loads(llmcache("inspect", store, "--json").out)
    assert inspected["namespaces"]["default"]["identity"]["name"] == model_path
    names = {file["name"] for file in inspected["namespaces"]["default"]["banks"]["output"]["files"]}
    assert names == {str(path.relative_to(store)) for sub in ("seg", "idx") for path in (store / sub).iterdir()}
    assert "model_class" in llmcache("inspect", store).out


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".jsonl"])
def test_every_output_format_holds_the_vectors_in_order(
    llmcache: Command,
    corpus: Path,
    store: Path,
    tmp_path: Path,
    model: SentenceTransformer,
    model_path: str,
    ending: str,
) -> None:
    llmcache("build", corpus, "-m", model_path, "-s", store)
    out = tmp_path / f"out{ending}"
    assert llmcache("run", corpus, "-s", store, "-o", out).code == 0
    if ending == ".parquet":
        found = np.array(pyarrow.parquet.read_table(out)["output"].to_pylist(), np.float32)
    elif ending == ".npy":
        found = np.load(out, mmap_mode="r")
        rows = [json.loads(line) for line in (tmp_path / "out.npy.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == ["d0", "d1", "d2", "d3"]
    else:
        found = np.array([json.loads(line)["output"] for line in out.read_text().splitlines()], np.float32)
    np.testing.assert_allclose(found, model.encode(["one", "two", "three", "two"]), atol=1e-6)


def test_near_matches_are_used_when_asked_for(llmcache: Command, store: Path, tmp_path: Path, model_path: str) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("How do I locate my card?\n")
    second.write_text("How do I locate my card then?\n")
    llmcache("build", first, "-m", model_path, "-s", store)
    for tau, near in (("0.8", 1), ("0.9999", 0)):
        done = llmcache("run", second, "-s", store, "-o", tmp_path / "out.jsonl", "--tau", tau, "--json")
        assert json.loads(done.out)["near"] == near
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert row["tier"] == ("near" if near else "miss")
        if near:
            assert row["source"] == "first.txt:1"
        shutil.rmtree(store)
        llmcache("build", first, "-m", model_path, "-s", store)


def test_a_dry_run_counts_and_writes_nothing(llmcache: Command, corpus: Path, store: Path, model_path: str) -> None:
    done = llmcache("build", corpus, "-m", model_path, "-s", store, "--dry-run", "--json")
    read = {"read": 4, "refused": 0, "files_skipped": 0}
    assert json.loads(done.out) == {**read, "documents": 4, "distinct": 3, "known": 0}
    assert not store.exists()
    llmcache("build", corpus, "-m", model_path, "-s", store)
    corpus.write_text(corpus.read_text() + '{"text": "four"}\n')
    before = sorted((path.name, path.stat().st_mtime_ns) for path in store.rglob("*"))
    for command in (["warm"], ["run", "-o", "never.jsonl"]):
        done = llmcache(*command, corpus, "-s", store, "--dry-run", "--json")
        assert json.loads(done.out) == {**read, "read": 5, "documents": 5, "distinct": 4, "known": 3}
    assert sorted((path.name, path.stat().st_mtime_ns) for path in store.rglob("*")) == before
    assert not Path("never.jsonl").exists()


def test_corpora_come_from_folders_gzip_and_standard_input(
    llmcache: Command, store: Path, tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "b.csv").write_text("id,body\n1,three\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"body": "four"}\n')
    done = llmcache("build", folder, "-m", model_path, "-s", store, "--text-field", "body", "--json")
    assert json.loads(done.out)["store"]["entries"] == 4
    raw = io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{"text": "five"}\n'))
    monkeypatch.setattr(sys, "stdin", raw)
    done = llmcache("warm", "-", "-s", store, "--json")
    assert json.loads(done.out)["exact"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no documents"),
        (b'{"text": "fine"}\n{"body": "x"}\n', "corpus.jsonl"),
        (b'{"text": "fine"}\nnot json\n', "2"),
        (b'{"text": "\xff\xfe"}\n', "corpus.jsonl"),
        (b'{"text": 3}\n', "corpus.jsonl"),
    ],
)
def test_a_bad_corpus_is_one_line_and_what_was_stored_stays(
    llmcache: Command, corpus: Path, store: Path, model_path: str, content: bytes, said: str
) -> None:
    llmcache("build", corpus, "-m", model_path, "-s", store)
    corpus.write_bytes(content)
    done = llmcache("build", corpus, "-m", model_path, "-s", store)
    assert done.code == 1
    one_line(done, said)
    assert json.loads(llmcache("stats", store, "--json").out)["banks"][0]["entries"] >= 3


def one_line(done: Done, *said: str) -> None:
    """The error is a single line that begins with the program's name."""
    assert done.code in {1, 2}
    assert done.err.startswith("llmcache: ")
    assert done.err.count("\n") == 1
    for part in said:
        assert part in done.err


def test_bad_lines_can_be_skipped_and_are_counted(
    llmcache: Command, corpus: Path, store: Path, model_path: str
) -> None:
    corpus.write_text(corpus.read_text() + "not json\n{}\n")
    done = llmcache("build", corpus, "-m", model_path, "-s", store, "--skip-bad", "--json")
    assert done.code == 0
    assert json.loads(done.out)["bad"] == 2
    done = llmcache("warm", corpus, "-s", store, "--skip-bad")
    assert "2 records were skipped" in done.err


def test_duplicate_ids_are_kept_and_said(llmcache: Command, store: Path, tmp_path: Path, model_path: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "x", "text": "one"}\n{"id": "x", "text": "two"}\n')
    done = llmcache("build", path, "-m", model_path, "-s", store)
    assert done.code == 0
    assert "1 documents repeat an earlier id" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["stats", "nowhere"], 1, "llmcache build"),
        (["inspect", "nowhere"], 1, "llmcache build"),
        (["warm", "c.jsonl", "-s", "nowhere"], 1, "llmcache build"),
        (["run", "c.jsonl", "-s", "nowhere", "-o", "x.npy"], 1, "llmcache build"),
        (["build", "nowhere.jsonl", "-m", "M", "-s", "S"], 1, "nowhere.jsonl"),
        (["build", "c.jsonl", "-m", "M", "-s", "S", "--index", "flatt"], 2, "ivf-flat"),
        (["build", "c.jsonl"], 2, "--model"),
        (["run", "c.jsonl", "-s", "S", "-o", "x.npy", "--tau", "high"], 2, "--tau"),
        (["nothing"], 2, "nothing"),
        (["stats"], 2, "STORE"),
        (["stats", "S", "--colour"], 2, "--colour"),
    ],
    ids=str,
)
def test_every_error_is_one_line_with_the_way_out(
    llmcache: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: str,
    arguments: list[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("c.jsonl").write_text('{"text": "one"}\n')
    done = llmcache(*[model_path if one == "M" else one for one in arguments])
    assert done.code == code
    one_line(done, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl"]


def test_a_model_that_does_not_exist_is_one_line(llmcache: Command, corpus: Path, store: Path) -> None:
    done = llmcache("build", corpus, "-m", "no/such-model", "-s", store)
    one_line(done, "no/such-model")


def test_another_model_is_refused_and_the_namespace_option_is_named(
    llmcache: Command, corpus: Path, store: Path, model_path: str, tmp_path: Path
) -> None:
    llmcache("build", corpus, "-m", model_path, "-s", store)
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    settings = other / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("256", "32"))
    done = llmcache("build", corpus, "-m", other, "-s", store)
    one_line(done, "--namespace", "max_seq_length")
    assert llmcache("build", corpus, "-m", other, "-s", store, "--namespace", "short").code == 0


def test_an_output_of_unknown_format_is_refused_before_any_work(
    llmcache: Command, corpus: Path, store: Path, model_path: str, tmp_path: Path
) -> None:
    llmcache("build", corpus, "-m", model_path, "-s", store)
    done = llmcache("run", corpus, "-s", store, "-o", tmp_path / "out.xlsx")
    one_line(done, ".parquet")


def test_the_demo_does_the_main_job(llmcache: Command, model_path: str) -> None:
    done = llmcache("demo", "--json")
    cold, warm, again = json.loads(done.out)
    assert cold["computed"] > 0.5 * cold["documents"]
    assert cold["exact"] > 0
    assert warm["exact"] > 0.5 * warm["documents"]
    assert again["computed"] == 0
    assert max(night["difference"] for night in (cold, warm, again)) < 1e-5


def test_bench_prints_ratios_beside_the_difference(llmcache: Command, tmp_path: Path, model_path: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text("".join(f"text number {i}\n" for i in range(40)))
    done = llmcache("bench", "encode", "--data", path, "--repeats", "1", "--json")
    rows = {row["name"]: row for row in json.loads(done.out)["rows"]}
    assert rows["all hit"]["documents"] == 40
    assert rows["each text 3 times"]["documents"] == 120
    assert max(row["difference"] for row in rows.values()) < 1e-5
    assert llmcache("bench", "index", "--kinds", "flat,hnsw", "--count", "2000").code == 0


def test_bench_compares_fingerprints_by_the_labels_of_neighbours(
    llmcache: Command, tmp_path: Path, model_path: str
) -> None:
    known, asked = tmp_path / "known.csv", tmp_path / "asked.csv"
    subjects = {"animal": "the dog and the cat", "money": "the bank and the account"}
    rows = [f"{text} number {i},{label}" for i in range(150) for label, text in subjects.items()]
    known.write_text("text,label\n" + "\n".join(rows) + "\n")
    asked.write_text("text,label\n" + "\n".join(f"{text} twice,{label}" for label, text in subjects.items()) + "\n")
    done = llmcache("bench", "fingerprint", "--data", known, "--asked", asked, "--json")
    rows = json.loads(done.out)["rows"]
    assert [row["fingerprint"] for row in rows] == ["mean"] * 3 + ["mean+attention"] * 3
    assert {row["agreement"] for row in rows} == {1.0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["stats", "S"],
        ["inspect", "S"],
        ["--version"],
        ["purge", "S", "--key", "0" * 32],
        ["snapshot", "verify", "S"],
        ["repair", "S"],
    ],
    ids=" ".join,
)
def test_looking_at_a_store_imports_neither_torch_nor_transformers(
    llmcache: Command, corpus: Path, store: Path, model_path: str, arguments: list[str]
) -> None:
    llmcache("build", corpus, "-m", model_path, "-s", store)
    program = (
        "import sys\n"
        "from llmcache.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as left:\n"
        "    assert not left.code\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'faiss', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    named = [str(store) if one == "S" else one for one in arguments]
    subprocess.run([sys.executable, "-c", program, *named], check=True, capture_output=True)


@contextmanager
def started(*arguments: object, first: str = "") -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which is gone at the end. first: Python lines that it runs before."""
    program = f"{HEAR_CTRL_C}{first}\nfrom llmcache.cli.main import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


SAYS_WHEN_IT_STORES = """
import sys
from llmcache.banks.writer import BankWriter
put = BankWriter.put
def noted(*arguments, **entry):
    put(*arguments, **entry)
    print("stored a batch", file=sys.stderr, flush=True)
BankWriter.put = noted
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batches", [1, 3])
def test_ctrl_c_keeps_what_was_computed_and_the_next_run_goes_on(
    llmcache: Command, store: Path, tmp_path: Path, model_path: str, batches: int
) -> None:
    path = tmp_path / "c.txt"
    path.write_text("".join(f"document {i} " + "word " * 80 + "\n" for i in range(9_000)))
    with started("build", path, "-m", model_path, "-s", store, first=SAYS_WHEN_IT_STORES) as child:
        assert child.stderr is not None
        for line in child.stderr:
            batches -= line.startswith("stored a batch")
            if not batches:
                break
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
        assert child.returncode == 130
    assert err.strip().splitlines()[-1].startswith("llmcache: stopped;")
    assert "Traceback" not in err
    stats = json.loads(llmcache("stats", store, "--json").out)
    kept = stats["banks"][0]["entries"]
    assert 0 < kept < 9_000
    lifetime = stats["lifetime"]
    assert lifetime["documents"] == lifetime["misses"], "nothing was known"
    assert kept <= lifetime["misses"] <= kept + 32, "what was asked is counted, a batch that was being stored too"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: kept // 2]))
    done = json.loads(llmcache("build", path, "-m", model_path, "-s", store, "--json").out)
    assert done["documents"] == kept // 2


@pytest.mark.timeout(900)
def test_two_builds_on_one_store_at_once_lose_nothing(
    llmcache: Command, store: Path, tmp_path: Path, model_path: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("shared\n" + "".join(f"text {name} {i}\n" for i in range(300)))
    with ExitStack() as stack:
        children = [
            stack.enter_context(started("build", tmp_path / f"{name}.txt", "-m", model_path, "-s", store))
            for name in ("a", "b")
        ]
        for child in children:
            _, err = child.communicate()
            assert child.returncode == 0, err
    for name in ("a", "b"):
        done = json.loads(llmcache("warm", tmp_path / f"{name}.txt", "-s", store, "--json").out)
        assert (done["exact"], done["misses"]) == (301, 0)


def test_the_installed_command_runs(tmp_path: Path) -> None:
    command = shutil.which("llmcache", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("llmcache is not installed in this environment; pip install -e .")
    done: Any = subprocess.run([command, "stats", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("llmcache: ")
    assert "Traceback" not in done.stderr

"""Stopped and resumed runs give, byte for byte, the file of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.checkpoints import Written
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
ENDINGS = [".parquet", ".npy", ".jsonl"]
OFTEN = CacheConfig(commit_seconds=0.05)


def corpus(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Make texts of one to 30 words; a third repeat, soon or much later; some records are no documents."""
    chance = random.Random(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        text: Any = " ".join(
            chance.choice(["card", "lost", "refund", "fee", str(i)]) for _ in range(chance.randint(1, 30))
        )
        if found and chance.random() < 0.35:
            text = found[chance.randrange(len(found))]["text"]
        if chance.random() < 0.02:
            text = None
        found.append({"id": f"d{i}" if chance.random() < 0.9 else None, "text": text})
    return found


def files_of(out: Path) -> dict[str, bytes]:
    names = [out.name, out.name + ".jsonl"]
    return {name: (out.parent / name).read_bytes() for name in names if (out.parent / name).exists()}


def uninterrupted(
    folder: Path, model: SentenceTransformer, records: Any, ending: str, **settings: Any
) -> dict[str, bytes]:
    folder.mkdir()
    settings.setdefault("batch_size", 4)
    with LLMCache.open(folder / "store", model) as cache:
        assert Pipeline(cache, **settings).write(records, folder / f"out{ending}").finished
    return files_of(folder / f"out{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_in_many_sittings_gives_the_file_of_one(
    tmp_path: Path, model: SentenceTransformer, one_thread: None, ending: str
) -> None:
    records = corpus(700)
    expected = uninterrupted(tmp_path / "whole", model, records, ending)
    out, sittings, rows = tmp_path / f"out{ending}", 0, 0
    while True:
        with LLMCache.open(tmp_path / "store", model, config=OFTEN) as cache:
            pipeline = Pipeline(cache, batch_size=4)
            written = pipeline.write(iter(records), out, resume=True, max_documents=200)
        assert written.resumed == rows
        sittings, rows = sittings + 1, written.documents
        if written.finished:
            break
        assert not out.exists()
    assert sittings >= 3
    assert files_of(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "store", *expected}
    assert written.refused == sum(one["text"] is None for one in records) == pipeline.refused
    assert written.exact + written.misses == written.documents
    if ending == ".parquet":
        assert pyarrow.parquet.ParquetFile(out).metadata.num_rows == written.documents


def test_chunks_and_documents_of_chunks_are_resumed_too(
    tmp_path: Path, model: SentenceTransformer, one_thread: None
) -> None:
    records = [f"# {i % 9}\n\n" + "Long. " * 40 * (i % 2) + "\n\n" + "Always the same. " * 15 for i in range(100)]
    for per in ("document", "chunk"):
        settings: dict[str, Any] = {"chunk": "structure", "per": per, "batch_size": 1}
        expected = uninterrupted(tmp_path / per, model, records, ".jsonl", **settings)
        out = tmp_path / f"{per}.jsonl"
        finished = False
        while not finished:
            with LLMCache.open(tmp_path / f"store-{per}", model, config=OFTEN) as cache:
                finished = Pipeline(cache, **settings).write(records, out, resume=True, max_documents=40).finished
        assert list(files_of(out).values()) == list(expected.values())


KILLED = """
import json, os, random, signal, sys, time
import torch
from sentence_transformers import SentenceTransformer
from llmcache import CacheConfig, LLMCache, Pipeline

folder, model_path, ending, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
model, chance = SentenceTransformer(model_path), random.Random(seed)
records = json.load(open(folder + "/corpus.json"))
kills, most = 0, int(sys.argv[5])

def written():
    try:
        return os.stat(folder + "/out.unfinished/journal.json").st_mtime_ns
    except FileNotFoundError:
        return None

def running():
    if child not in ended:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            ended[child] = status
    return child not in ended

ended = {}
while True:
    child = os.fork()
    if not child:
        code = 1
        try:
            with LLMCache.open(folder + "/store", model, config=CacheConfig(commit_seconds=0.03)) as cache:
                open(folder + "/ready", "w").close()
                Pipeline(cache, batch_size=1).write(records, folder + "/out" + ending, resume=True)
            code = 0
        finally:
            os._exit(code)
    while running() and not os.path.exists(folder + "/ready"):
        time.sleep(0.001)
    if kills < most:
        # at once, or after checkpoints: right after the journal was written, while the store commits, or later
        for _ in range(chance.choice([0, 1, 1, 2])):
            before = written()
            while running() and written() == before:
                time.sleep(0.0002)
        time.sleep(chance.choice([0, 0, 0.001, 0.003, 0.01, 0.1, 0.4]))
        if running():
            os.kill(child, signal.SIGKILL)
    while running():
        time.sleep(0.01)
    if os.path.exists(folder + "/ready"):
        os.unlink(folder + "/ready")
    if not os.WIFSIGNALED(ended[child]):
        print(json.dumps([os.WEXITSTATUS(ended[child]), kills]))
        break
    kills += 1
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ending", "kills"), [(".parquet", 5), (".npy", 2), (".jsonl", 2)])
def test_a_run_that_is_killed_at_random_times_gives_the_same_bytes(
    tmp_path: Path, model: SentenceTransformer, model_path: str, one_thread: None, ending: str, kills: int
) -> None:
    records = corpus(100 + 40 * kills, seed=kills)
    expected = uninterrupted(tmp_path / "whole", model, records, ending, batch_size=1)
    (tmp_path / "corpus.json").write_text(json.dumps(records))
    program = [sys.executable, "-c", KILLED, str(tmp_path), model_path, ending, str(kills), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    code, times = json.loads(done.stdout.splitlines()[-1])
    assert (code, times >= kills - 1) == (0, True), f"{times} kills: {done.stderr[-3000:]}"
    assert files_of(tmp_path / f"out{ending}") == expected
    assert not (tmp_path / "out.unfinished").exists()


def test_ctrl_c_inside_a_part_gives_up_that_part_alone(
    tmp_path: Path, model: SentenceTransformer, one_thread: None
) -> None:
    records = [one for one in corpus(700) if one["text"] is not None]
    expected = uninterrupted(tmp_path / "whole", model, records, ".npy")
    out, answered = tmp_path / "out.npy", 0

    def interrupts(more: int, computed: int) -> None:
        nonlocal answered
        answered += more
        if answered > 330:
            raise KeyboardInterrupt

    with LLMCache.open(tmp_path / "store", model) as cache, pytest.raises(KeyboardInterrupt):
        Pipeline(cache, batch_size=4, progress=interrupts).write(records, out, resume=True)
    with LLMCache.open(tmp_path / "store", model) as cache:
        assert 0 < len(cache) < 330, "whole parts were committed"
        written = Pipeline(cache, batch_size=4).write(records, out, resume=True)
    assert written.resumed == 256
    assert files_of(out) == expected


def test_a_corpus_that_raises_can_be_resumed_when_it_reads(
    tmp_path: Path, model: SentenceTransformer, one_thread: None
) -> None:
    records = corpus(600)
    expected = uninterrupted(tmp_path / "whole", model, records, ".jsonl")

    def broken() -> Iterator[dict[str, Any]]:
        yield from records[:450]
        raise OSError("the bucket is gone")

    with LLMCache.open(tmp_path / "store", model) as cache:
        pipeline = Pipeline(cache, batch_size=4)
        with pytest.raises(OSError, match="bucket"):
            pipeline.write(broken(), tmp_path / "out.jsonl", resume=True)
        written = pipeline.write(records, tmp_path / "out.jsonl", resume=True)
    assert written.resumed > 300
    assert files_of(tmp_path / "out.jsonl") == expected


@pytest.fixture
def stopped(tmp_path: Path, model: SentenceTransformer) -> Path:
    """Make a folder with a stopped run of 300 documents."""
    with LLMCache.open(tmp_path / "store", model) as cache:
        pipeline = Pipeline(cache, batch_size=2)
        assert not pipeline.write(corpus(300), tmp_path / "out.npy", resume=True, max_documents=100).finished
    return tmp_path


def resumed(folder: Path, model: Any, records: Any, name: str = "out.npy", **settings: Any) -> Written:
    settings.setdefault("batch_size", 2)
    with LLMCache.open(folder / "store", model, namespace=settings.pop("namespace", "default")) as cache:
        return Pipeline(cache, **settings).write(records, folder / name, resume=True)


def test_resuming_with_other_documents_is_one_clear_error(stopped: Path, model: SentenceTransformer) -> None:
    changed = corpus(300)
    changed[3] = {"id": "d3", "text": "changed"}
    for records in (changed, corpus(300)[1:], corpus(50), []):
        with pytest.raises(CorpusError, match=r"not those that the unfinished run in .* read; .*remove"):
            resumed(stopped, model, records)
    assert resumed(stopped, model, corpus(300)).finished, "the journal survived all of that"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "out.parquet"}, "out='.npy', now '.parquet'"),
        ({"chunk": "structure"}, "chunk='None', now 'structure'"),
        ({"batch_size": 3}, "batch_size=2, now 3"),
        ({"role": "query"}, "role=None, now 'query'"),
        ({"namespace": "other"}, "namespace='default', now 'other'"),
    ],
)
def test_resuming_with_other_settings_says_which(
    stopped: Path, model: SentenceTransformer, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match="is another one") as error:
        resumed(stopped, model, corpus(300), **change)
    assert said in str(error.value)
    assert resumed(stopped, model, corpus(300)).finished


def test_resuming_with_another_model_says_so(stopped: Path, fresh_model: SentenceTransformer) -> None:
    fresh_model.max_seq_length = 64
    with pytest.raises(ConfigError, match=r"is another one .*model="):
        resumed(stopped, fresh_model, corpus(300), namespace="short")


def test_a_journal_that_is_damaged_says_what_to_remove(stopped: Path, model: SentenceTransformer) -> None:
    folder = stopped / "out.unfinished"
    whole = (folder / "vectors.f32").read_bytes()
    (folder / "vectors.f32").write_bytes(whole[:-1])
    with pytest.raises(CorpusError, match="shorter than its journal says; remove"):
        resumed(stopped, model, corpus(300))
    (folder / "journal.json").write_text("{}")
    with pytest.raises(CorpusError, match="cannot be read as the journal"):
        resumed(stopped, model, corpus(300))


def test_a_run_at_work_cannot_be_resumed_by_another(stopped: Path, model: SentenceTransformer) -> None:
    def records() -> Iterator[dict[str, Any]]:
        yield from corpus(300)
        with pytest.raises(CorpusError, match="another run is writing"):
            resumed(stopped, model, corpus(300))

    assert resumed(stopped, model, records(), prefetch=0).finished


def test_a_run_that_is_not_resumed_begins_anew_and_says_so(
    stopped: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    with LLMCache.open(stopped / "store", model) as cache:
        written = Pipeline(cache, batch_size=2).write(corpus(300), stopped / "out.npy")
    assert (written.finished, written.resumed) == (True, 0)
    assert "is discarded" in caplog.text
    assert not (stopped / "out.unfinished").exists()


def test_a_store_that_runs_full_in_the_middle_still_gives_all_results(
    tmp_path: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = [f"text {i}" for i in range(300)]
    with LLMCache.open(tmp_path / "store", model, config=OFTEN) as cache:
        commit = cache.storing.store.commit

        def full() -> Any:
            if len(cache) > 150:
                cache.storing.store._fenced = cache.storing.store._fence(OSError(28, "No space left on device"))
                raise cache.storing.store._fenced
            return commit()

        monkeypatch.setattr(cache.storing.store, "commit", full)
        written = Pipeline(cache, batch_size=2).write(records, tmp_path / "out.npy", resume=True)
    assert written.finished
    assert "Going on without storing" in caplog.text
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.encode(records), atol=1e-6)


def test_a_long_id_reads_the_same_before_and_after_a_commit(
    tmp_path: Path, model: SentenceTransformer, one_thread: None
) -> None:
    records = [{"id": f"{i} " + "\u00e9" * 900, "text": f"text {i % 3}"} for i in range(200)]
    expected = uninterrupted(tmp_path / "whole", model, records, ".jsonl")
    with LLMCache.open(tmp_path / "store", model) as cache:
        assert not Pipeline(cache, batch_size=4).write(records, tmp_path / "out.jsonl", max_documents=5).finished
    with LLMCache.open(tmp_path / "store", model) as cache:
        Pipeline(cache, batch_size=4).write(records, tmp_path / "out.jsonl", resume=True)
    assert files_of(tmp_path / "out.jsonl") == expected


# -- the command ------------------------------------------------------------------------------------------


def test_the_command_stops_at_its_seconds_and_goes_on(
    llmcache: Command, tmp_path: Path, store: Path, model_path: str
) -> None:
    source, out = tmp_path / "c.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(200)))
    assert llmcache("run", source, "-s", store, "-m", model_path, "-o", tmp_path / "whole.parquet").code == 0
    other = tmp_path / "other"
    common = ("run", source, "-s", other, "-m", model_path, "-o", out, "--batch-size", 2)
    stopped = llmcache(*common, "--max-seconds", "0.001s", "--json")
    assert stopped.code == 3
    assert json.loads(stopped.out)["finished"] is False
    assert not out.exists()
    done = llmcache(*common, "--resume", "--json")
    assert done.code == 0
    facts = json.loads(done.out)
    assert (facts["documents"], facts["resumed"], facts["finished"]) == (200, 64, True)
    assert llmcache("run", source, "-s", other, "-o", out, "--chunk", "pages").code == 2
    assert llmcache("run", source, "-s", other, "-o", out, "--max-seconds", "soon").code == 2
    assert llmcache("run", source, "-s", other, "-o", out, "--resume", "--head", "a=b").code == 2


def test_the_command_cuts_into_chunks(llmcache: Command, tmp_path: Path, store: Path, model_path: str) -> None:
    source, out = tmp_path / "c.jsonl", tmp_path / "out.jsonl"
    text = "# One\n\n" + "A sentence. " * 40 + "\n\n# Two\n\n" + "Another one. " * 40
    source.write_text(json.dumps({"id": "d", "text": text}) + "\n")
    done = llmcache("run", source, "-s", store, "-m", model_path, "-o", out, "--chunk", "structure", "--per", "chunk")
    assert done.code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    spans = [tuple(map(int, row["id"].partition("#")[2].split("-"))) for row in rows]
    assert [text[start:end].split("\n")[0] for start, end in spans] == ["# One", "# Two"]


def test_the_command_keeps_the_store_within_its_bytes(
    llmcache: Command, tmp_path: Path, store: Path, model_path: str
) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    assert (
        llmcache("run", source, "-s", store, "-m", model_path, "-o", tmp_path / "o.npy", "--max-bytes", "3MB").code == 0
    )
    assert sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) <= 3_000_000


def test_offline_says_that_the_model_is_not_here(tmp_path: Path, store: Path) -> None:
    source = tmp_path / "c.txt"
    source.write_text("a\n")
    code = "import sys; from llmcache.cli.main import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    program = [sys.executable, "-c", code, "run", source, "-s", store, "-m", "nobody/nothing", "-o", tmp_path / "o.npy"]
    done = subprocess.run(
        [*map(str, program), "--offline"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nobody/nothing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

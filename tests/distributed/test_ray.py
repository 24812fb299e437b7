"""Several processes on one store: a local Ray cluster, compared bit for bit with a single process."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import LLMCache, Result
from llmcache.distributed.compute import open_with_workers
from llmcache.distributed.workers import Worker, WorkerConfig
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.errors import ConfigError, CorpusError, LLMCacheError, ModelMismatch, UntrustedSnapshot
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.model.encoders import Sentences
from llmcache.model.features import features
from llmcache.model.keys import key_seed, text_keys, token_keys
from tests.conftest import Command

ray = pytest.importorskip("ray", reason="install the extra 'ray' for clusters")

from llmcache.distributed.ray import CachedModel  # noqa: E402
from llmcache.distributed.ray import open as open_on_ray  # noqa: E402

# Ray closes neither all of its sockets nor all of its pipes, and warns of its own settings
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Local cluster shared by all tests of this module, since starting one takes seconds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    for one in gc.get_objects():  # Ray does not wait for its own daemons, and Python warns of that at some later moment
        if isinstance(one, subprocess.Popen):
            one.wait(30)


def facts(results: Sequence[Result]) -> list[tuple[object, ...]]:
    return [(one.id, one.tier, one.layer, one.source, one.similarity, one.output.tobytes()) for one in results]


def keys_of(path: Path) -> list[bytes]:
    """Return the keys of all live rows of a store's output bank, unordered."""
    with closing(Store.open(path)) as store:
        space = store.manifest.namespaces["default"]
        bank = store.bank("default", "output", lambda: space.banks["output"], NearChoice())
        rows = [piece.rows["key"][piece.live()] for piece in bank.pieces if isinstance(piece, Segment)]
    return [key.tobytes() for part in rows for key in part]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    """Documents with repeats in and between windows, by text and by tokens, and of lengths that make uneven batches."""
    texts = [f"note {i}: " + "the parcel is late " * (i % 7) for i in range(240)]
    texts += texts[:60] + [f"{text}  " for text in texts[60:100]] + [texts[5]] * 3
    return [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]


def test_two_workers_of_which_one_is_killed_give_what_one_process_gives(
    cluster: None, one_thread: None, documents: list[dict[str, str]], model_path: str, tmp_path: Path
) -> None:
    with LLMCache.open(tmp_path / "one", model_path) as cache:
        expected = facts(list(cache.run(documents, batch_size=8, chunk=150)))
    spread, workers = open_with_workers(tmp_path / "two", model_path, 2)
    with spread:
        first = facts(list(spread.run(documents[:150], batch_size=8, chunk=150)))
        victims = workers.pids()
        assert len(set(victims) - {os.getpid()}) == 2

        def kill(_: int, computed: int) -> None:
            if computed and victims:  # while the other parts are computed
                os.kill(victims.pop(), signal.SIGKILL)
                victims.clear()

        rest = facts(list(spread.run(documents[150:], batch_size=8, chunk=150, progress=kill)))
        assert not victims
        counted = spread.stats().counters
    assert [one[1:] for one in first + rest] == [one[1:] for one in expected]
    assert [one[0] for one in first + rest] == [one[0] for one in expected]
    assert counted.misses == 240
    keys = keys_of(tmp_path / "two")
    assert len(keys) == len(set(keys)) == 240  # commits of both workers, none lost or doubled
    assert set(keys) == set(keys_of(tmp_path / "one"))
    with LLMCache.open(
        tmp_path / "two", model_path
    ) as cache:  # by text alone: names of equal tokens were committed too
        again = list(cache.run(documents))
        assert cache.stats().counters.exact_text == 280
    assert {one.tier for one in again} == {"exact"}


def test_the_command_writes_the_same_file_with_more_workers_than_documents(
    cluster: None, one_thread: None, llmcache: Command, model_path: str, tmp_path: Path
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "text": f"text {i % 3}"}) + "\n" for i in range(5)))
    files = []
    for name, more in (("a", []), ("b", ["--engine", "ray", "--workers", "4"])):
        store, out = tmp_path / f"store-{name}", tmp_path / f"{name}.parquet"
        (tmp_path / "first.txt").write_text("text 0\n")
        assert llmcache("build", tmp_path / "first.txt", "-m", model_path, "-s", store).code == 0
        done = llmcache("run", corpus, "-s", store, "-o", out, "--json", *more)
        assert done.code == 0, done.err
        printed = [
            line for line in done.out.splitlines() if line.startswith("{")
        ]  # Ray may still tell of the kill above
        assert [json.loads(printed[0])[tier] for tier in ("exact", "misses")] == [3, 2]
        files.append(pyarrow.parquet.read_table(out))
    assert files[0].equals(files[1])


def test_a_dataset_is_mapped_by_actors_that_share_a_store(
    cluster: None, documents: list[dict[str, str]], model: SentenceTransformer, model_path: str, tmp_path: Path
) -> None:
    import ray.data

    store = tmp_path / "store"
    with LLMCache.open(store, model_path) as cache:
        list(cache.run(documents[:40]))
    before = ray.data.DataContext.get_current()
    before.enable_progress_bars = False
    arguments = {"store": str(store), "threads": 1}
    rows = (
        ray.data.from_items(documents, override_num_blocks=4)
        .map_batches(CachedModel, fn_constructor_kwargs=arguments, concurrency=2, num_cpus=0.5, batch_size=100)
        .take_all()
    )
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows) == len(documents)
    texts = [one["text"] for one in documents]
    found = np.array([by_id[one["id"]]["output"] for one in documents], np.float32)
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-6)
    assert {by_id[f"d{i}"]["tier"] for i in range(40)} == {"exact"}
    assert {by_id[f"d{i}"]["source"] for i in range(40)} == {f"d{i}" for i in range(40)}
    with closing(Store.open(store)) as opened:
        done = compact(opened, duplicates=True, small=True)
        assert done.segments > 1
    keys = keys_of(store)
    assert len(keys) == len(set(keys)) == 240
    with LLMCache.open(store) as cache:
        assert {one.tier for one in cache.run(documents)} == {"exact"}


# -- a worker, without a cluster ------------------------------------------------------------------------------


def misses_of(model: SentenceTransformer, cache: Any, texts: list[str]) -> Misses:
    sentences = Sentences(model)
    tokens = sentences.tokenise(sorted(texts, key=len, reverse=True), None, None)
    digest = cache.identity.digest
    by_text = text_keys(key_seed(digest, "text", None, None), sorted(texts, key=len, reverse=True)).view(np.uint64)
    by_token = token_keys(key_seed(digest, "tokens", None, None), tokens.key_bytes()).view(np.uint64)
    raw = features(sentences.token_embedding(), tokens.ids, "mean")
    return Misses(np.arange(len(texts)), by_text, by_token, tokens, [""] * len(texts), raw)


CALL = EncodeCall([], batch_size=4)


def test_a_part_that_is_computed_again_after_a_kill_is_stored_once(
    model: SentenceTransformer, model_path: str, store: Path
) -> None:
    with LLMCache.open(store, model_path) as cache:
        misses = misses_of(model, cache, [f"text {i} " * (i + 1) for i in range(10)])
    place = WorkerConfig(str(store), None, 1, {})
    first = Worker(place, 1).compute(misses, CALL)  # committed, but died before it returned
    second = Worker(place, 1).compute(misses, CALL)
    assert first.stored
    assert second.stored
    assert first.outputs.tobytes() == second.outputs.tobytes()
    assert len(keys_of(store)) == 10


def test_two_workers_that_store_the_same_are_made_one_by_compact(
    llmcache: Command, model: SentenceTransformer, model_path: str, store: Path
) -> None:
    texts = [f"text {i} " * (i + 1) for i in range(10)]
    with LLMCache.open(store, model_path) as cache:
        misses = misses_of(model, cache, texts)
    place = WorkerConfig(str(store), None, 1, {})
    workers = [Worker(place, 1), Worker(place, 1)]
    for worker in workers:
        worker.opened()
    outputs = [worker.compute(misses, CALL).outputs for worker in workers]
    assert len(keys_of(store)) == 20
    before = [path.name for path in store.rglob("*")]
    planned = json.loads(llmcache("compact", store, "--duplicates", "--dry-run", "--json").out)
    assert (planned["duplicates"], sorted(path.name for path in store.rglob("*"))) == (10, sorted(before))
    done = json.loads(llmcache("compact", store, "--duplicates", "--json").out)
    assert done["duplicates"] == 10
    assert len(set(keys_of(store))) == len(keys_of(store)) == 10
    assert json.loads(llmcache("compact", store, "--duplicates", "--json").out)["duplicates"] == 0
    with LLMCache.open(store) as cache:
        kept = cache.encode(sorted(texts, key=len, reverse=True))
        assert cache.stats().counters.misses == 0
    assert kept.tobytes() == outputs[1].tobytes()


def test_a_worker_with_another_model_or_an_older_store_is_refused(model_path: str, store: Path, tmp_path: Path) -> None:
    with LLMCache.open(store, model_path) as cache:
        cache.encode(["one"])
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    settings = other / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("256", "32"))
    with pytest.raises(ModelMismatch, match="max_seq_length"):
        Worker(WorkerConfig(str(store), str(other), 1, {}), 1).opened()
    with pytest.raises(UntrustedSnapshot, match="at least 99 was asked for"):
        Worker(WorkerConfig(str(store), None, 99, {}), 1).opened()


def test_a_worker_that_cannot_write_computes_all_the_same(
    model: SentenceTransformer, model_path: str, store: Path
) -> None:
    with LLMCache.open(store, model_path) as cache:
        misses = misses_of(model, cache, ["one", "three words here"])
        expected = cache.encode(["three words here", "one"])
    worker = Worker(WorkerConfig(str(store), None, 1, {}), 1)
    worker.opened().storing.store._fence(OSError(30, "Read-only file system"))
    done = worker.compute(misses, CALL)
    assert not done.stored
    np.testing.assert_allclose(done.outputs, expected, atol=1e-6)


# -- a batch of Ray Data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"body": np.array(["a"])}, "has no column 'text', only 'body'"),
        ({"text": np.array(["a", None], object)}, "row 1 of a batch has NoneType"),
        ({"text": np.array([1, 2])}, "row 0 of a batch has int"),
    ],
)
def test_a_batch_without_texts_says_what_it_has(store: Path, model_path: str, batch: Any, said: str) -> None:
    called = CachedModel(store, model_path, threads=1)
    with pytest.raises(CorpusError, match=said):
        called(batch)
    with pytest.raises(ConfigError, match='use batch_format="numpy"'):
        called([1])  # type: ignore[arg-type]


def test_every_batch_is_committed_before_it_is_given_back(store: Path, model_path: str) -> None:
    called = CachedModel(store, model_path, threads=1, text="body", output="vector")
    given = {"body": np.array(["one", "two", "one"]), "other": np.arange(3)}
    found = called(given)
    assert found["vector"].shape == (3, 384)
    assert found["tier"].tolist() == ["miss", "miss", "exact"]
    assert found["source"].tolist() == [None, None, "0"]
    assert np.isnan(found["similarity"]).tolist() == [True, True, False]
    assert found["other"] is given["other"]
    assert len(keys_of(store)) == 2
    assert called({"body": np.array([], object)})["vector"].shape == (0, 384)


# -- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--engine", "ray", "--workers", "0"], 2, "at least one worker, got 0"),
        (["--engine", "spark"], 2, "--engine is local or ray, got 'spark'"),
        (["--workers", "2"], 2, "--workers is for --engine ray"),
        (["--engine", "ray", "--head", "a=b"], 2, "--head computes in one process"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_is_one_line(
    llmcache: Command, model_path: str, store: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    corpus = tmp_path / "c.txt"
    corpus.write_text("one\n")
    llmcache("build", corpus, "-m", model_path, "-s", store)
    done = llmcache("run", corpus, "-s", store, "-o", tmp_path / "out.npy", *arguments)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert said in done.err


def test_without_ray_the_extra_is_named(
    llmcache: Command, model_path: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    corpus = tmp_path / "c.txt"
    corpus.write_text("one\n")
    llmcache("build", corpus, "-m", model_path, "-s", store)
    done = llmcache("run", corpus, "-s", store, "-o", tmp_path / "out.npy", "--engine", "ray")
    assert (done.code, done.err) == (2, "llmcache: Ray is not installed; pip install 'llmcache[ray]'\n")


def test_a_store_with_layers_and_a_store_that_is_not_there_are_refused(
    cluster: None, store: Path, tmp_path: Path, model_path: str
) -> None:
    from llmcache import CacheConfig

    with LLMCache.open(store, model_path, config=CacheConfig(layers=(4,))):
        pass
    with pytest.raises(ConfigError, match="layers='output'"):
        open_on_ray(store, workers=1)
    with pytest.raises(LLMCacheError, match="llmcache build"):
        open_on_ray(tmp_path / "nowhere", workers=1)

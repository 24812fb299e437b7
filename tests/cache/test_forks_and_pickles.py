"""Tests of a cache in other processes: forked or unpickled, it returns the model's vectors and stores new entries."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dill
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.concurrency import calls
from llmcache.errors import ConfigError, LLMCacheError
from tests import architectures, threads

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = threads.texts_of(24)
SECRET = b"a secret of more than thirty-two bytes"

PICKLES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),  # noqa: S301
    "cloudpickle": lambda cache: pickle.loads(cloudpickle.dumps(cache)),  # noqa: S301
    "dill": lambda cache: dill.loads(dill.dumps(cache)),  # noqa: S301
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.fixture
def tiny(tmp_path: Path) -> SentenceTransformer:
    return threads.tiny_sentences(tmp_path / "model")


@pytest.fixture
def name(tmp_path: Path, tiny: SentenceTransformer) -> str:
    """Return the path from which the same model is loaded."""
    return str(tmp_path / "model" / "st")


def close(given: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(given), np.asarray(expected), atol=2e-5, rtol=0)


def in_child(work: Callable[[], None]) -> int:
    """Run a function in a forked process, which ends without clean-up. Returns the exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def known(store: Path, model: Any, **keywords: Any) -> set[str]:
    """Compare all vectors of a new opening with the model's. Returns its stored texts."""
    with LLMCache.open(store, model, **keywords) as cache:
        results = list(cache.run(TEXTS))
        own: Any = cache.model
        close([result.output for result in results], own.encode(TEXTS))
    return {text for text, result in zip(TEXTS, results, strict=True) if result.tier == "exact"}


# -- pickles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["model", "name"])
@pytest.mark.parametrize("way", PICKLES)
def test_a_pickle_opens_the_store_again_with_the_same_settings(
    way: str, given: str, tiny: SentenceTransformer, name: str, store: Path
) -> None:
    config = CacheConfig(commit_seconds=7.0, layers=(1,))
    with LLMCache.open(store, tiny if given == "model" else name, config=config, namespace="mine", tau=0.99) as cache:
        expected = cache.encode(TEXTS[:8])
        cache.commit()
        with PICKLES[way](cache) as again:
            assert again is not cache
            assert (again.config, again.namespace) == (cache.config, "mine")
            results = list(again.run(TEXTS[:12]))
            assert [result.tier for result in results[:8]] == ["exact"] * 8
            close([result.output for result in results], tiny.encode(TEXTS[:12]))
        close(cache.encode(TEXTS[:8]), expected)
    assert known(store, tiny, namespace="mine", config=CacheConfig()) >= set(TEXTS[:12])


def test_a_pickle_is_small_where_the_model_was_given_by_name(name: str, store: Path) -> None:
    with LLMCache.open(store, name) as cache:
        assert len(pickle.dumps(cache)) < 4000
    with LLMCache.open(store) as cache:
        assert len(pickle.dumps(cache)) < 4000


def test_a_pickle_of_an_attached_cache_of_any_model_has_its_tokenizer_and_no_part_of_the_cache(store: Path) -> None:
    model, (ids, mask) = architectures.model("bert"), architectures.rows(9, 5)
    expected = architectures.states(model, ids, mask)
    tokenizer = threads.tiny_tokenizer()
    with LLMCache.open(store, model, tokenizer=tokenizer, config=CacheConfig(layers="all")) as cache, cache.attached():
        architectures.states(model, ids, mask)
        cache.commit()
        with pickle.loads(pickle.dumps(cache)) as again:  # noqa: S301
            assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
            assert all("forward" not in vars(part) for part in again.model.modules())
            with again.attached():
                found = architectures.states(again.model, ids, mask)
            assert again.stats().counters.layer("layer-3").hits == 2
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["secret", "key"])
def test_a_secret_is_never_in_a_pickle(kind: str, tiny: SentenceTransformer, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(0o600)
    with LLMCache.open(store, tiny, **{kind: SECRET}) as cache:  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{kind}_file="):
            pickle.dumps(cache)
        vectors = cache.encode(TEXTS[:3])
    with LLMCache.open(store, tiny, **{f"{kind}_file": file}) as cache:  # type: ignore[arg-type]
        sent = pickle.dumps(cache)
        assert SECRET not in sent
        with pickle.loads(sent) as again:  # noqa: S301
            assert [result.tier for result in again.run(TEXTS[:3])] == ["exact"] * 3
            close(again.encode(TEXTS[:3]), vectors)


def test_a_closed_cache_cannot_be_pickled(tiny: SentenceTransformer, store: Path) -> None:
    cache = LLMCache.open(store, tiny)
    cache.close()
    with pytest.raises(LLMCacheError, match="open it again"):
        pickle.dumps(cache)


# -- forks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["output", "all"])
@pytest.mark.parametrize("call", ["encode", "run", "inside attached", "commit by itself", "nothing"])
def test_a_forked_child_gives_the_models_vectors_and_keeps_what_it_computes(
    call: str, layers: Any, tiny: SentenceTransformer, store: Path
) -> None:
    expected = tiny.encode(TEXTS)
    with LLMCache.open(store, tiny, config=CacheConfig(layers=layers)) as cache:
        close(cache.encode(TEXTS[:6]), expected[:6])
        results = cache.run(TEXTS[6:18], chunk=6)
        close([next(results).output for _ in range(6)], expected[6:12])

        def work() -> None:
            if call == "encode":
                close(cache.encode(TEXTS), expected)
            elif call == "run":
                close([result.output for result in results], expected[12:18])
            elif call == "inside attached":
                with cache.attached():
                    close(tiny.encode(TEXTS[:4]), expected[:4])
                close(cache.encode(TEXTS[12:18]), expected[12:18])
            elif call == "commit by itself":
                for text, vector in zip(TEXTS[12:18], expected[12:18], strict=True):
                    close(cache.encode(text), vector)
                cache.close()

        assert in_child(work) == 0
        close(cache.encode(TEXTS[:12]), expected[:12])
    computed = {"encode": TEXTS, "nothing": TEXTS[:12]}.get(call, TEXTS[:18])
    assert known(store, tiny) >= set(computed)


def test_a_model_that_was_attached_before_a_fork_is_right_in_the_child_and_says_that_nothing_is_kept(
    store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, (ids, mask) = architectures.model("gpt2"), architectures.rows(20, 17)
    expected = architectures.states(model, ids, mask)[mask.bool()]
    with LLMCache.open(store, model, config=CacheConfig(layers="all")) as cache, cache.attached():
        architectures.states(model, ids[:1], mask[:1])

        def work() -> None:
            for _ in range(2):
                found = architectures.states(model, ids, mask)[mask.bool()]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            with cache.attached():
                found = architectures.states(model, ids, mask)[mask.bool()]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert cache.stats().counters.layer("layer-3").asked == 2

        assert in_child(work) == 0
        found = architectures.states(model, ids, mask)[mask.bool()]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_fork_in_the_middle_of_another_threads_call_leaves_no_lock_behind(
    tiny: SentenceTransformer, store: Path
) -> None:
    expected = tiny.encode(TEXTS)
    inside, go_on = threading.Event(), threading.Event()

    def progress(*_: int) -> None:
        inside.set()
        go_on.wait(60)

    with LLMCache.open(store, tiny) as cache:
        thread = threading.Thread(target=lambda: list(cache.run(TEXTS[:4], progress=progress)))
        thread.start()
        assert inside.wait(60)
        assert cache.busy
        status = in_child(lambda: close(cache.encode(TEXTS), expected))
        go_on.set()
        thread.join()
        assert status == 0
        close(cache.encode(TEXTS[:4]), expected[:4])
    assert known(store, tiny) == set(TEXTS)


def test_weights_that_change_before_a_fork_are_noticed_in_the_child(tiny: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, tiny) as cache:
        cache.encode(TEXTS)
        cache.commit()
        with torch.no_grad():
            next(tiny.parameters()).mul_(1.5)

        def work() -> None:
            with pytest.raises(LLMCacheError):
                cache.encode(TEXTS)

        assert in_child(work) == 0
        with torch.no_grad():
            next(tiny.parameters()).div_(1.5)


def test_a_child_computes_where_the_parent_had_threads(name: str, store: Path) -> None:
    program = f"""
import os, torch, numpy as np
from llmcache import LLMCache
from tests.threads import texts_of
torch.set_num_threads(2)
texts = texts_of(300)
with LLMCache.open({str(store)!r}, {name!r}) as cache:
    torch.randn(600, 600) @ torch.randn(600, 600)
    expected = cache.model.encode(texts)
    cache.encode(texts[:200])
    if (child := os.fork()) == 0:
        os._exit(0 if np.abs(cache.encode(texts) - expected).max() < 2e-5 else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)


def test_a_pickle_is_loaded_in_a_child_where_the_parent_had_threads(
    tiny: SentenceTransformer, name: str, store: Path
) -> None:
    program = f"""
import multiprocessing, torch, numpy as np
from llmcache import LLMCache
from tests.threads import texts_of
torch.set_num_threads(2)
texts = texts_of(300)
with LLMCache.open({str(store)!r}, {name!r}) as cache:
    torch.randn(600, 600) @ torch.randn(600, 600)
    expected = cache.model.encode(texts)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(cache.encode, [texts[:150], texts[150:]]).get(100)
assert np.abs(np.concatenate(found) - expected).max() < 2e-5
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=280, env=environment)
    with LLMCache.open(store, tiny) as cache:
        cache.encode(threads.texts_of(300))
        assert cache.stats().counters.misses == 0


# -- workers that are terminated ----------------------------------------------------------------------------


def waiting(cache: LLMCache, ready: Any) -> None:
    """Compute, then wait as an idle worker of a pool whose main thread does not hear a signal."""
    for text in TEXTS:
        cache.encode(text)
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # the thread that gets the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ready.set()
    multiprocessing.get_context("fork").Semaphore(0).acquire()


def test_a_worker_that_is_terminated_while_its_main_thread_waits_ends_and_keeps_what_it_computed(
    tiny: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_EACH", 0)
    monkeypatch.setattr(calls, "_SHARE", float("inf"))  # commits nothing before the end
    context = multiprocessing.get_context("fork")
    with LLMCache.open(store, tiny) as cache:
        ready = context.Event()
        worker = context.Process(target=waiting, args=(cache, ready), daemon=True)
        worker.start()
        try:
            assert ready.wait(100)
            with LLMCache.open(store, tiny) as other:
                assert len(other) == 0
            worker.terminate()
            worker.join(100)
            assert worker.exitcode == -signal.SIGTERM
        finally:
            worker.kill()
    assert known(store, tiny) == set(TEXTS)


def ending(cache: LLMCache, closes: Any, terminated: Any) -> None:
    """Compute, then end; the commit at the end begins before the signal, and goes on after it."""
    for text in TEXTS:
        cache.encode(text)
    commit = cache.commit

    def slowly() -> None:
        closes.set()
        terminated.wait()
        commit()

    cache.commit = slowly  # type: ignore[method-assign]


def test_a_worker_that_is_terminated_while_it_ends_keeps_what_it_computed(
    tiny: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_EACH", 0)
    monkeypatch.setattr(calls, "_SHARE", float("inf"))
    context = multiprocessing.get_context("fork")
    with LLMCache.open(store, tiny) as cache:
        closes, terminated = context.Event(), context.Event()
        worker = context.Process(target=ending, args=(cache, closes, terminated), daemon=True)
        worker.start()
        try:
            assert closes.wait(100)
            worker.terminate()
            terminated.set()
            worker.join(100)
            assert worker.exitcode == -signal.SIGTERM
        finally:
            worker.kill()
    assert known(store, tiny) == set(TEXTS)


def waiting_with_a_child(cache: LLMCache, ready: Any, numbers: Any) -> None:
    cache.encode(TEXTS[0])
    child = os.fork()
    if child == 0:
        ready.set()
        threading.Event().wait()
    numbers.send(child)
    numbers.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_worker_outlives_a_child_of_its_own_that_is_terminated(tiny: SentenceTransformer, store: Path) -> None:
    context = multiprocessing.get_context("fork")
    with LLMCache.open(store, tiny) as cache:
        ready, (receiver, sender) = context.Event(), context.Pipe(duplex=False)
        worker = context.Process(target=waiting_with_a_child, args=(cache, ready, sender), daemon=True)
        worker.start()
        assert ready.wait(100)
        os.kill(receiver.recv(), signal.SIGTERM)
        assert receiver.recv() == -signal.SIGTERM
        worker.join(100)
        assert worker.exitcode == 0


# -- libraries that start processes -------------------------------------------------------------------------


class Vectors(torch.utils.data.Dataset[Any]):
    """Vectors of texts, read one at a time."""

    def __init__(self, cache: LLMCache, texts: list[str]) -> None:
        self.cache, self.texts = cache, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Any:
        return self.cache.encode(self.texts[i])


_cache: LLMCache | None = None


def _vector(text: str) -> Any:
    assert _cache is not None
    return _cache.encode(text)


@pytest.mark.parametrize("library", ["DataLoader", "Pool", "datasets"])
def test_forking_libraries_get_right_vectors_and_the_store_gets_them_too(
    library: str, tiny: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.encode(TEXTS)
    with LLMCache.open(store, tiny) as cache:
        cache.encode(TEXTS[:3])
        if library == "DataLoader":
            data = Vectors(cache, TEXTS)
            loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
            found = np.concatenate([batch.numpy() for batch in loader])
        elif library == "Pool":
            monkeypatch.setattr(sys.modules[__name__], "_cache", cache)
            with multiprocessing.get_context("fork").Pool(2) as pool:  # the pool terminates its processes
                found = np.stack(pool.map(_vector, TEXTS))
        else:
            datasets = pytest.importorskip("datasets", reason="install the extra 'test' for other libraries")
            rows = datasets.Dataset.from_dict({"text": TEXTS})

            def with_vectors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
                return {"vector": list(cache.encode(batch["text"]))}

            mapped = rows.map(with_vectors, batched=True, batch_size=5, num_proc=2, new_fingerprint="vectors")
            found = np.array(mapped["vector"][:])
    close(found, expected)
    assert known(store, tiny) == set(TEXTS)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_joblib_gets_right_vectors_and_the_store_gets_them_too(
    backend: str, tiny: SentenceTransformer, name: str, store: Path
) -> None:
    joblib = pytest.importorskip("joblib", reason="install the extra 'test' for other libraries")
    parts = [TEXTS[start : start + 6] for start in range(0, 24, 6)]
    with LLMCache.open(store, name) as cache:
        with joblib.parallel_config(backend=backend, n_jobs=2):
            found = joblib.Parallel()(joblib.delayed(cache.encode)(part) for part in parts)
        close(np.concatenate(found), tiny.encode(TEXTS))
    if backend == "loky":
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(kill_workers=True)
    assert known(store, tiny) == set(TEXTS)


def test_llamaindex_works_in_several_processes_and_tells_models_apart(
    tiny: SentenceTransformer, name: str, store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_index.core", reason="install the extra 'test' for other libraries")
    from llama_index.core.ingestion import IngestionCache, IngestionPipeline
    from llama_index.core.schema import TextNode

    from llmcache.integrations.llamaindex import CachedEmbedding

    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    other = SentenceTransformer(name, device="cpu")
    pooling: Any = other[1]
    pooling.pooling_mode = "cls"
    shared = IngestionCache()
    with (
        LLMCache.open(store, name) as cache,
        LLMCache.open(tmp_path / "other", other) as third,
        LLMCache.open(tmp_path / "near", name, tau=0.9) as near,
    ):
        first = IngestionPipeline(transformations=[CachedEmbedding(cache)], cache=shared)
        found = first.run(nodes=copy.deepcopy(nodes), num_workers=2)
        close([node.embedding for node in found], tiny.encode_document(TEXTS))
        second = IngestionPipeline(transformations=[CachedEmbedding(third)], cache=shared)
        found = second.run(nodes=copy.deepcopy(nodes))
        close([node.embedding for node in found], other.encode_document(TEXTS))
        assert len({cache.vectors_id, third.vectors_id, near.vectors_id}) == 3
        with LLMCache.open(tmp_path / "again", tiny) as same:
            assert same.vectors_id == cache.vectors_id
    with LLMCache.open(store, tiny) as cache:
        cache.encode_document(TEXTS)
        assert cache.stats().counters.misses == 0


def test_langchain_has_a_namespace_that_tells_models_apart(
    tiny: SentenceTransformer, name: str, store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("langchain_core", reason="install the extra 'test' for other libraries")
    from llmcache.integrations.langchain import CachedEmbeddings

    other = SentenceTransformer(name, device="cpu")
    pooling: Any = other[1]
    pooling.pooling_mode = "cls"
    with LLMCache.open(store, tiny) as cache, LLMCache.open(tmp_path / "other", other) as second:
        embeddings = CachedEmbeddings(cache)
        assert embeddings.namespace != CachedEmbeddings(second).namespace
        again = pickle.loads(pickle.dumps(embeddings))  # noqa: S301
        assert again.namespace == embeddings.namespace
        close(again.embed_documents(TEXTS[:4]), tiny.encode_document(TEXTS[:4]))
        again.cache.close()

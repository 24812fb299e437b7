"""Tests of `LLMCache`: opening, namespaces, provenance, near matches, and errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, Document, LLMCache, Result
from llmcache.errors import (
    ConfigError,
    CorpusError,
    FaissMissing,
    FormatTooNew,
    LLMCacheError,
    ModelMismatch,
    SnapshotNotFound,
    StoreFull,
)
from llmcache.indexes.files.folder import Folder
from llmcache.model.batching import token_embedding
from tests.conftest import HEAR_CTRL_C

TODAY = [
    Document("a", "How do I locate my card?"),
    Document("b", "My card has not arrived."),
    Document("c", ""),
]


def test_every_result_says_where_it_came_from(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cold = list(cache.run(TODAY))
        again = [
            *TODAY,
            Document("d", "MY CARD has not arrived."),
            Document("e", "New."),
            Document("f", "New."),
        ]
        warm = list(cache.run(again))
    assert [(result.id, result.tier, result.layer, result.source, result.similarity) for result in cold] == [
        (name, "miss", None, None, None) for name in "abc"
    ]
    assert [(result.id, result.tier, result.layer, result.source, result.similarity) for result in warm] == [
        ("a", "exact", "output", "a", 1.0),
        ("b", "exact", "output", "b", 1.0),
        ("c", "exact", "output", "c", 1.0),
        ("d", "exact", "output", "b", 1.0),
        ("e", "miss", None, None, None),
        ("f", "exact", "output", "e", 1.0),
    ]
    for one, other in zip(cold, warm[:3], strict=True):
        np.testing.assert_array_equal(one.output, other.output)


def test_documents_may_be_texts_mappings_or_documents(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        found = list(cache.run(["one", {"id": "x", "text": "two"}, {"text": "three"}, Document("y", "four")]))
    assert [one.id for one in found] == ["0", "x", "2", "y"]
    np.testing.assert_allclose(
        np.stack([result.output for result in found]), model.encode(["one", "two", "three", "four"]), atol=1e-6
    )


@pytest.mark.parametrize("document", [3, {"body": "text"}, None, {"text": 3}])
def test_something_that_is_no_document_is_named(model: SentenceTransformer, store: Path, document: Any) -> None:
    with LLMCache.open(store, model) as cache, pytest.raises(CorpusError, match="document 1 "):
        list(cache.run(["fine", document]))


def test_a_run_is_lazy_and_reads_a_chunk_at_a_time(model: SentenceTransformer, store: Path) -> None:
    read = 0

    def documents() -> Any:
        nonlocal read
        for i in range(10):
            read += 1
            yield f"text {i}"

    with LLMCache.open(store, model) as cache:
        results = cache.run(documents(), chunk=4)
        assert read == 0
        next(results)
        assert read == 4
        assert len(list(results)) == 9


def test_an_empty_corpus_gives_no_results(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        assert list(cache.run([])) == []


def test_ids_may_repeat(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        found = list(cache.run([Document("x", "one"), Document("x", "two")]))
    assert [one.id for one in found] == ["x", "x"]
    assert not np.array_equal(found[0].output, found[1].output)


# -- near -----------------------------------------------------------------------------------------------------


def test_without_tau_nothing_but_repeats_is_reused(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(["How do I locate my card?"])
        (found,) = cache.run(["How do I locate my card??"])
    assert found.tier == "miss"


def test_a_near_hit_gives_the_neighbours_output_with_its_similarity_and_source(
    model: SentenceTransformer, store: Path
) -> None:
    with LLMCache.open(store, model, config=CacheConfig(tau=0.8)) as cache:
        stored = list(cache.run(TODAY[:2]))
        found = list(cache.run([Document("n", "How do I locate my card then?"), Document("m", "Exchange rates")]))
        again = list(cache.run([Document("n", "How do I locate my card then?")]))
        assert len(cache) == 3  # a near hit is not stored
    near, miss = found
    assert (near.tier, near.layer, near.source) == ("near", "output", "a")
    np.testing.assert_array_equal(near.output, stored[0].output)
    assert near.similarity == pytest.approx(
        cosine(model, "How do I locate my card then?", "How do I locate my card?"), abs=1e-3
    )
    assert (miss.tier, miss.source) == ("miss", None)
    np.testing.assert_allclose(miss.output, model.encode("Exchange rates"), atol=1e-6)
    assert again[0].tier == "near"


def cosine(model: SentenceTransformer, text: str, other: str) -> float:
    """Return the cosine of mean token embeddings, computed with NumPy from the model's embedding table."""
    table = token_embedding(model).detach().numpy()
    first, second = (table[model.tokenizer(words)["input_ids"]].mean(axis=0) for words in (text, other))
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_the_nearest_neighbour_is_the_one_exact_search_finds(
    model: SentenceTransformer, store: Path, queries: list[str]
) -> None:
    texts, asked = queries[:300], queries[300:360]
    table = token_embedding(model).detach().numpy()
    stored, wanted = (
        np.stack([table[model.tokenizer(text)["input_ids"]].mean(axis=0) for text in part]) for part in (texts, asked)
    )
    stored, wanted = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (stored, wanted))
    expected = wanted @ stored.T
    with LLMCache.open(store, model, config=CacheConfig(tau=0.01, projection="none")) as cache:
        list(cache.run(Document(str(i), text) for i, text in enumerate(texts)))
        for i, found in enumerate(cache.run(asked)):
            if found.tier == "near":
                assert found.source is not None
                assert expected[i, int(found.source)] >= expected[i].max() - 2e-3
                assert found.similarity == pytest.approx(expected[i].max(), abs=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "pca", "dim": 64},
        {"projection": "pca", "index": "hnsw"},
        {"projection": "pca", "index": "ivf-flat"},
        {"projection": "simhash", "dim": 256},
        {"projection": "none", "fingerprint": "mean+attention"},
    ],
    ids=str,
)
def test_every_fingerprint_and_index_finds_a_reworded_query_after_a_restart(
    model: SentenceTransformer, store: Path, queries: list[str], settings: dict[str, Any]
) -> None:
    with LLMCache.open(store, model, config=CacheConfig(**settings)) as cache:
        cache.encode(queries[:1200])
        cache.rebuild()
        before = next(iter(cache.run(["How do I locate my card, please?"]))).tier
    assert before == "miss"
    asked = [text.rstrip("?.!") + ", please" for text in queries[:100]]
    with LLMCache.open(store, model, tau=0.5) as cache:
        found = list(cache.run(asked))
        assert cache.stats().counters.near > 90
        assert cache.stats().index is not None
    for one in found:
        assert one.similarity is None or 0.5 <= one.similarity <= 1


# -- identity and settings ------------------------------------------------------------------------------------


def test_another_model_is_refused_with_both_named_and_a_fresh_namespace_is_offered(
    model: SentenceTransformer, fresh_model: SentenceTransformer, store: Path
) -> None:
    with LLMCache.open(store, model) as cache:
        kept = cache.encode(["a text"])
    fresh_model.max_seq_length = 64
    with pytest.raises(ModelMismatch, match=r"(?s)max_seq_length.*256.*64.*namespace"):
        LLMCache.open(store, fresh_model)
    with LLMCache.open(store, fresh_model, namespace="short") as cache:
        cache.encode(["a text"])
        assert cache.stats().counters.misses == 1
        cache.commit()
        assert {one.namespace for one in cache.stats().banks} == {"default", "short"}
    with LLMCache.open(store, model) as cache:
        np.testing.assert_array_equal(cache.encode(["a text"]), kept)
        assert cache.stats().counters.misses == 0


@pytest.mark.parametrize("change", ["weights", "pooling", "prompts", "dtype", "truncation"])
def test_whatever_changes_the_vectors_is_another_identity(
    model: SentenceTransformer, fresh_model: SentenceTransformer, store: Path, change: str
) -> None:
    LLMCache.open(store, model).close()
    if change == "weights":
        next(iter(fresh_model.parameters())).data[5, 5] += 1e-3
    elif change == "pooling":
        setattr(fresh_model[1], "pooling_mode", "cls")  # noqa: B010  # mypy takes it for a module
    elif change == "prompts":
        fresh_model.prompts = {"query": "query: "}
    elif change == "dtype":
        fresh_model.bfloat16()
    else:
        fresh_model.tokenizer.add_tokens(["locate"])
    with pytest.raises(ModelMismatch):
        LLMCache.open(store, fresh_model)


def test_a_store_opens_by_path_with_the_model_it_was_made_with(
    model: SentenceTransformer, model_path: str, store: Path
) -> None:
    with LLMCache.open(store, model_path) as cache:
        cold = cache.encode(["a text"])
    for same in (None, model_path, Path(model_path), model):
        with LLMCache.open(store, same) as cache:
            np.testing.assert_array_equal(cache.encode(["a text"]), cold)
            assert cache.stats().counters.misses == 0


def test_settings_are_saved_with_the_store(model: SentenceTransformer, store: Path) -> None:
    LLMCache.open(store, model, config=CacheConfig(tau=0.9, dim=64, dtype="float16")).close()
    with LLMCache.open(store, model) as cache:
        assert (cache.config.tau, cache.config.dim, cache.config.dtype) == (0.9, 64, "float16")
    with pytest.raises(ConfigError, match="dtype='float16'"):
        LLMCache.open(store, model, config=CacheConfig(dtype="int8"))
    with LLMCache.open(store, model, config=CacheConfig(dtype="float16", tau=0.8)) as cache:
        assert cache.config.tau == 0.8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": 1.0}, "0.9999"),
        ({"tau": 0.0}, "tau=None"),
        ({"index": "flatt"}, "ivf-flat"),
        ({"dim": 1}, "dim"),
        ({"projection": "simhash", "dim": 100}, "multiple of 8"),
        ({"projection": "simhash", "index": "hnsw"}, "binary-"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"device": "tpu"}, "cuda"),
        ({"commit_seconds": 0}, "above 0"),
    ],
)
def test_a_setting_that_cannot_work_says_what_can(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CacheConfig(**settings)


def test_without_faiss_the_error_names_both_extras(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcache.opening.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FaissMissing, match=r"llmcache\[cpu\].*llmcache\[gpu\]"):
        LLMCache.open(store, model)
    assert not store.exists()


# -- places that are no stores --------------------------------------------------------------------------------


def test_a_path_that_is_a_file_is_refused_and_left_alone(model: SentenceTransformer, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(SnapshotNotFound, match="is a file"):
        LLMCache.open(path, model)
    assert path.read_text() == "mine"


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SnapshotNotFound, match=r"thesis\.txt"):
        LLMCache.open(tmp_path, model)
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_store_and_no_model_names_the_command(store: Path) -> None:
    with pytest.raises(SnapshotNotFound, match="llmcache build"):
        LLMCache.open(store)
    assert not store.exists()


def test_a_newer_format_asks_for_an_upgrade(model: SentenceTransformer, store: Path) -> None:
    LLMCache.open(store, model).close()
    (store / "FORMAT").write_text(json.dumps({"magic": "llmcache", "format": 99}))
    with pytest.raises(FormatTooNew, match="format 99"):
        LLMCache.open(store, model)


def test_a_store_that_may_not_be_written_to_says_so(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(LLMCacheError, match="Read-only file system"):
        LLMCache.open(store, model)


# -- failures of the disk ------------------------------------------------------------------------------------


def test_a_full_disk_ends_storing_and_never_the_inference(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LLMCache.open(store, model) as cache:
        kept = cache.encode(["kept"])
    cache = LLMCache.open(store, model, config=CacheConfig(commit_seconds=1e-9, background=False))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Folder, "write", full)
    with caplog.at_level(logging.WARNING, "llmcache"):
        lost = cache.encode(["lost"])
        more = cache.encode(["lost", "kept", "also lost"])
    assert sum("No space left" in record.message for record in caplog.records) == 1
    np.testing.assert_allclose(more, model.encode(["lost", "kept", "also lost"]), atol=1e-6)
    np.testing.assert_array_equal(more[0], lost[0])
    np.testing.assert_array_equal(more[1], kept[0])
    assert cache.stats().counters.not_stored == 1
    with pytest.raises(StoreFull, match="free some space"):
        cache.commit()
    cache.close()
    monkeypatch.undo()
    with LLMCache.open(store, model) as cache:
        np.testing.assert_array_equal(cache.encode(["kept"]), kept)
        assert len(cache) == 1


def test_a_damaged_row_is_computed_again_and_stays_right(
    model: SentenceTransformer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"text number {i}" for i in range(20)]
    with LLMCache.open(store, model) as cache:
        cold = cache.encode(texts)
    (payload,) = (store / "seg").glob("*.seg")
    raw = bytearray(payload.read_bytes())
    raw[5 * 384 * 4 + 7] ^= 0x40
    payload.write_bytes(raw)
    for misses in (1, 0):  # the second opening reads the new copy
        with LLMCache.open(store, model) as cache:
            np.testing.assert_allclose(cache.encode(texts), cold, atol=1e-6)
            assert cache.stats().counters.misses == misses
    assert "checksums" in caplog.text


def test_stopping_in_the_middle_keeps_what_was_committed(model_path: str, store: Path) -> None:
    program = HEAR_CTRL_C + (
        "import sys\n"
        "from llmcache import CacheConfig, LLMCache\n"
        "with LLMCache.open(sys.argv[1], sys.argv[2], config=CacheConfig(commit_seconds=0.05)) as cache:\n"
        "    print('open', flush=True)\n"
        "    cache.encode([f'document {i} ' + 'word ' * 100 for i in range(100_000)])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(store), model_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    deadline = time.monotonic() + 120
    while len(list(store.glob("m-*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    child.wait(timeout=60)
    child.stdout.close()
    with LLMCache.open(store, model_path) as cache:
        kept = len(cache)
        assert kept > 0
        texts = [f"document {i} " + "word " * 100 for i in range(100_000)]
        known = int((cache._bank.find_text(_text_keys(cache, texts)) >= 0).sum())
        assert kept - 32 <= known <= kept  # the interrupted batch may be stored without text keys


def _text_keys(cache: LLMCache, texts: list[str]) -> Any:
    from llmcache.model.keys import key_seed, text_keys

    return text_keys(key_seed(cache.identity.digest, "text", None, None), texts).view(np.uint64)


def test_statistics_add_up(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(["one", "two", "two", "ONE"])
        cache.encode(["one", "three"])
        stats = cache.stats()
    counters = stats.counters
    assert counters.documents == 6
    assert counters.misses == 3
    assert (counters.exact_text, counters.repeats) == (1, 1)
    assert stats.hit_rate == pytest.approx(0.5)
    assert counters.saved_seconds > 0
    with LLMCache.open(store, model) as cache:
        assert cache.stats().counters.documents == 0
        assert cache.stats().lifetime["documents"] == 6
        assert cache.stats().banks[0].entries == 3
        assert isinstance(next(cache.run(["one"])), Result)


def test_a_cache_with_a_budget_stays_within_it_and_answers_as_without(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    most = 1 << 20
    texts = queries[:500]
    with LLMCache.open(store, model, config=CacheConfig(max_bytes=most, policy="decay")) as cache:
        for start in range(0, 500, 100):
            cache.encode(texts[start : start + 100])
            cache.commit()
            assert sum(one.stat().st_size for one in store.rglob("*") if one.is_file()) <= most
        assert 0 < len(cache) < 500
        assert cache.stats().counters.not_stored == 0
        asked = texts[:20] + texts[-20:]
        np.testing.assert_allclose(cache.encode(asked), model.encode(asked), atol=1e-5)


def test_a_budget_or_policy_that_cannot_be_is_refused() -> None:
    for wrong in ({"max_bytes": 1000}, {"max_bytes": 1e9}, {"max_bytes": True}, {"policy": "fifo"}):
        with pytest.raises(ConfigError):
            CacheConfig(**wrong)


def test_a_model_that_changes_while_the_cache_is_open_is_refused(fresh_model: SentenceTransformer, store: Path) -> None:
    trunk: Any = fresh_model.transformers_model
    weight = trunk.encoder.layer[5].output.dense.weight
    with LLMCache.open(store, fresh_model) as cache:
        before = cache.encode(["where is my card"])
        with torch.no_grad():
            weight.add_(0.01)
        for _ in range(2):
            with pytest.raises(ModelMismatch, match=r"layer\.5"):
                cache.encode(["where is my card"])
            with pytest.raises(ModelMismatch, match=r"layer\.5"):
                list(cache.run(["something else"]))
        with cache.attached() as attachment:
            inputs = cache.tokenizer(["where is my card"], return_tensors="pt")
            with torch.inference_mode():
                changed = trunk(**inputs).last_hidden_state
        with torch.inference_mode():
            assert torch.equal(changed, trunk(**inputs).last_hidden_state)
        assert attachment.entered.tolist() == [0]
        with torch.no_grad():
            weight.add_(-0.01)
    with LLMCache.open(store) as cache:
        np.testing.assert_array_equal(cache.encode(["where is my card"]), before)


def test_statistics_of_a_closed_cache_are_those_at_its_end(model: SentenceTransformer, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        cache.encode(["a", "b"])
    found = cache.stats()
    assert found.counters.misses == 2
    assert [one.entries for one in found.banks] == [2]

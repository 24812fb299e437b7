"""Tests of purges of real caches: no bank contains the document any more, and other answers stay right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.errors import ConfigError
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.store import Store
from llmcache.planning.purging import keys_of_texts, purge_documents, tokens_of_texts
from tests import small_sentences
from tests.banks.test_exact_audits import decoder, plain_tokenizer
from tests.conftest import Command

SECRET = "the archivist hides a violet kumquat under the zinc roof"
NAME = "SECRET-ID-0815"
COUNT = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_sentences.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: str) -> Iterator[SentenceTransformer]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield small_sentences.with_prompts(folder)
    torch.set_num_threads(before)


def documents() -> list[dict[str, str]]:
    found = [{"id": f"d{i}", "text": text} for i, text in enumerate(small_sentences.sentences(COUNT))]
    return [*found, {"id": NAME, "text": SECRET}]


def segments_of(path: Path) -> list[tuple[str, Segment]]:
    store = Store.open(path)
    found = [
        (name, Segment.open(store.folder, facts))
        for name, bank in store.manifest.namespaces["default"].banks.items()
        for facts in bank.segments
    ]
    assert store.manifest.generation
    return found


def traces_of(path: Path, ids: Sequence[bytes]) -> dict[str, bytes]:
    """Return the stored bytes of rows with these token ids or this document's id, by bank."""
    traces, keys = {"id": NAME.encode(), **{f"token ids {i}": one for i, one in enumerate(ids)}}, set()
    for _ in range(2):  # the second time also rows that have only the key
        for name, segment in segments_of(path):
            for row in range(len(segment)):
                tokens, own = segment.tokens(row).tobytes(), segment.rows["key"][row].tobytes()
                if name != "fitted" and (tokens in ids or segment.source(row) == NAME or own in keys):
                    keys.add(own)
                    traces[f"key {name} {row}"] = own
                    payload = bytes(segment.views(np.array([row]))[0])
                    traces[f"states {name} {row}"] = payload[len(payload) // 2 :][:24]
                    if segment.feature_width:
                        traces[f"features {name} {row}"] = segment.features()[row].tobytes()[:24]
                        traces[f"landmark {name} {row}"] = segment.features()[row].astype(np.float32).tobytes()[:24]
            for text, row_key in segment.aliases[["text", "row"]].tolist() if len(segment.aliases) else []:
                if np.asarray(row_key, np.uint64).tobytes() in keys:
                    traces[f"text key {name} {text}"] = np.asarray(text, np.uint64).tobytes()
    return traces


def found_in(places: Sequence[Path], traces: dict[str, bytes]) -> dict[str, list[str]]:
    hits: dict[str, list[str]] = {}
    for file in (file for place in places for file in place.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for kind, trace in traces.items():
            if trace in data:
                hits.setdefault(kind, []).append(file.name[-12:])
    return hits


def doomed_by(how: str, store: Store, tokens: Sequence[np.ndarray[Any, Any]]) -> Doomed:
    if how == "text":
        return Doomed("default", keys=keys_of_texts(store, "default", [SECRET]), texts=1)
    if how == "key":
        bank = store.manifest.namespaces["default"].banks["output"]
        for facts in bank.segments:
            segment = Segment.open(store.folder, facts)
            for row in range(len(segment)):
                if segment.source(row) == NAME:
                    return Doomed("default", keys=segment.rows["key"][row : row + 1].copy())
    return {"id": Doomed("default", ids=[NAME]), "source": Doomed("default", sources=["SECRET"])}[how]


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("layers", "text"),
        ("layers", "id"),
        ("float16", "key"),
        ("heads", "source"),
        ("calibrated", "text"),
        ("chunked", "id"),
    ],
)
def test_what_a_cache_stored_of_a_document_is_gone_and_others_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: SentenceTransformer, folder: str, way: str, how: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path, texts = tmp_path / "store", documents()
    expected = model.encode([text["text"] for text in texts[:-1]])
    settings: dict[str, Any] = {"layers": "all"} if way in {"layers", "heads"} else {"layers": (1,)}
    if way == "float16":
        settings["dtype"] = "float16"
    with LLMCache.open(path, model, config=CacheConfig(**settings)) as cache:
        if way == "chunked":
            pipeline = Pipeline(cache, chunk="structure", per="chunk", batch_size=2)
            assert not pipeline.write(texts[::-1], tmp_path / "out.npy", resume=True, max_documents=40).finished
        list(cache.run(texts))
        if way == "heads":
            import transformers

            torch.manual_seed(3)
            head: Any = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
            list(cache.run_heads(texts, {"label": head.eval()}))
        if way == "calibrated":
            cache.calibrate(budget=0.5, drift="beyond", limit=0.5, confidence=None)
    ids = tokens_of_texts(model, [SECRET], [None])
    traces = traces_of(path, [one.tobytes() for one in ids])
    assert set(found_in([tmp_path], traces)) >= {one for one in traces if not one.startswith(("token", "landmark"))}
    banks = {name.split()[1].partition("-")[0] for name in traces if name.startswith("key")}
    assert banks >= {"output", "layer"} | ({"head"} if way == "heads" else set())
    store = Store.open(path)
    done = purge(store, doomed_by(how, store, ids))
    store.close()
    assert done.calibrations == int(way == "calibrated")
    assert done.unfinished == int(way == "chunked")
    assert found_in([tmp_path], traces) == {}
    with LLMCache.open(path, model) as cache:
        results = list(cache.run(texts))
        np.testing.assert_allclose(
            [result.output for result in results[:-1]], expected, atol=2e-3 if way == "float16" else 1e-5
        )
        assert [result.tier for result in results] == ["exact"] * COUNT + ["miss"]
        if way == "chunked":
            assert (
                Pipeline(cache, chunk="structure", per="chunk", batch_size=2)
                .write(texts, tmp_path / "out.npy", resume=True)
                .finished
            )


def test_beginnings_of_a_prompt_and_what_was_generated_from_it_are_gone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    causal, tokenizer = decoder("llama"), plain_tokenizer()
    shared = " ".join(f"w{i}" for i in range(20))
    prompts = [f"{shared} " + " ".join(f"w{20 + 14 * i + j}" for j in range(14)) for i in range(5)]
    with LLMCache.open(tmp_path / "store", causal, tokenizer=tokenizer, config=CacheConfig(prefix_block=4)) as cache:
        expected = cache.generate(prompts, max_new_tokens=6, do_sample=False).texts
    ids = tokens_of_texts(tokenizer, [prompts[2]])
    own = ids[0][20:]
    traces = {f"token ids {at}": own[at : at + 4].tobytes() for at in range(0, 12, 4)}
    assert set(found_in([tmp_path], traces)) == set(traces)
    store = Store.open(tmp_path / "store")
    assert purge(store, Doomed("default", tokens=ids)).rows >= 3
    store.close()
    assert found_in([tmp_path], traces) == {}
    with LLMCache.open(tmp_path / "store", causal, tokenizer=tokenizer) as cache:
        assert cache.generate(prompts, max_new_tokens=6, do_sample=False).texts == expected


def test_the_command_purges_by_id_source_and_text_and_says_what_it_gave_up(
    llmcache: Command, tmp_path: Path, model: SentenceTransformer, folder: str
) -> None:
    model.save(str(tmp_path / "model"))
    corpus, path = tmp_path / "c.jsonl", tmp_path / "store"
    corpus.write_text("".join(json.dumps(one) + "\n" for one in documents()[-8:]))
    assert llmcache("build", corpus, "-s", path, "-m", tmp_path / "model").code == 0
    assert json.loads(llmcache("purge", path, "--id", NAME, "--json").out)["rows"] == 1
    assert (
        json.loads(llmcache("purge", path, "--source", "d143", "--id", "d144", "--dry-run", "--json").out)["rows"] == 2
    )
    done = llmcache("purge", path, "--source", "d14", "--source", "none of these")
    assert (done.code, "unfinished runs deleted" in done.out) == (0, True)
    (tmp_path / "t.jsonl").write_text(json.dumps(documents()[0]) + "\n")
    assert llmcache("purge", path, "--text-file", tmp_path / "t.jsonl", "--model", tmp_path / "model").code == 0
    for wrong in (
        ("--id", "a", "--text-file", "x"),
        ("--id", ""),
        ("--model", "x", "--id", "a"),
        ("--unfinished", "a.txt"),
    ):
        refused = llmcache("purge", path, *wrong)
        assert refused.code == 2
        assert len(refused.err.strip().splitlines()) == 1


def test_a_store_knows_of_a_run_from_its_begin_to_its_end(tmp_path: Path, model: SentenceTransformer) -> None:
    stat, seen = tmp_path / "store" / "stat", []

    def records() -> Iterator[dict[str, str]]:
        for one in documents()[:40]:
            seen.append([json.loads(file.read_text()) for file in stat.glob("*.run")])
            yield one

    def broken() -> Iterator[dict[str, str]]:
        yield from documents()[:20]
        raise OSError("the bucket is gone")

    known = [{"folder": str(tmp_path / "out.unfinished"), "namespace": "default"}]
    with LLMCache.open(tmp_path / "store", model) as cache:
        pipeline = Pipeline(cache, batch_size=2, prefetch=0)
        pipeline.write(records(), tmp_path / "out.npy")
        assert seen[0] == seen[-1] == known
        assert not list(stat.glob("*.run"))
        with pytest.raises(OSError, match="bucket"):
            pipeline.write(broken(), tmp_path / "out.npy")
        assert not list(stat.glob("*.run"))
        assert not pipeline.write(documents(), tmp_path / "out.npy", resume=True, max_documents=5).finished
        assert [json.loads(file.read_text()) for file in stat.glob("*.run")] == known
        assert pipeline.write(documents(), tmp_path / "out.npy", resume=True).finished
        assert not list(stat.glob("*.run"))


@pytest.mark.parametrize("how", ["texts", "ids", "sources", "keys", "nothing found", "unfinished"])
def test_documents_are_purged_from_python_by_each_name(tmp_path: Path, model: SentenceTransformer, how: str) -> None:
    path, texts = tmp_path / "store", documents()[-6:]
    with LLMCache.open(path, model, config=CacheConfig(layers="all")) as cache:
        Pipeline(cache, batch_size=2).write(texts, tmp_path / "out.npy", max_documents=2)
        entry = cache.explain(SECRET)
        list(cache.run(texts))
    key = next(
        segment.rows["key"][row].tobytes().hex()
        for name, segment in segments_of(path)
        for row in range(len(segment))
        if name == "output" and segment.source(row) == NAME
    )
    assert entry is not None
    named: dict[str, Any] = {
        "texts": {"texts": [SECRET], "reader": model}, "ids": {"ids": [NAME]}, "sources": {"sources": ["SECRET"]},
        "keys": {"keys": [key]}, "nothing found": {"ids": ["nobody"]},
        "unfinished": {"ids": [NAME], "unfinished": [tmp_path / "elsewhere.npy"]},
    }  # fmt: skip
    planned = purge_documents(path, dry_run=True, **named[how])
    done = purge_documents(path, **named[how])
    expected = 0 if how == "nothing found" else 3  # the output and the states of two layers
    assert (done.rows, planned.rows) == (expected, expected)
    with LLMCache.open(path, model) as cache:
        tiers = [result.tier for result in cache.run(texts)]
    assert tiers == ["exact"] * 5 + ["miss" if expected else "exact"]


def test_a_purge_of_nothing_or_of_texts_and_keys_is_refused(tmp_path: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(["a"])
    for wrong in ({}, {"texts": ["a"], "keys": ["0" * 32]}, {"keys": ["0"]}, {"ids": ["a"], "namespace": "none"}):
        with pytest.raises(ConfigError):
            purge_documents(tmp_path / "store", **wrong)

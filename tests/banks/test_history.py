"""History of runs: the records are right, they add up, and no result depends on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.banks.counters import Counters
from llmcache.banks.history import History, records
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.stats import runs as journal
from llmcache.indexes.stats.counters import fold
from llmcache.indexes.store import Store
from tests.conftest import Command

TEXTS = ["one", "two", "three", "two"]


def read(path: Path) -> list[journal.Record]:
    opened = Store.open(path)
    try:
        return records(opened)
    finally:
        opened.close()


def record(day: str, corpus: str = "", **counters: float) -> journal.Record:
    return {"day": day, "begin": 1.0, "end": 2.0, "corpus": corpus, "runs": 1, "counters": counters}


def test_a_run_leaves_a_record_with_its_day_corpus_and_tiers(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model) as cache:
        cache.corpus = "nightly"
        list(cache.run(TEXTS))
        list(cache.run(TEXTS))
        counters = cache.stats().counters
    (one,) = read(store)
    assert one["corpus"] == "nightly"
    assert one["namespace"] == "default"
    assert one["day"] == journal.day_of(one["begin"])
    assert one["runs"] == 1
    assert one["entries"] == 3
    assert one["bytes"] > 0
    assert one["counters"]["documents"] == 8 == counters.documents
    assert one["counters"]["misses"] == 3
    assert one["counters"]["exact_text"] == 3
    assert one["counters"]["repeats"] == 2
    assert one["counters"]["model_seconds"] == pytest.approx(counters.model_seconds)
    assert "asked" not in one  # near reuse was off


def test_corpora_and_openings_are_told_apart_and_the_same_ones_added_up(
    store: Path, model: SentenceTransformer
) -> None:
    for _ in range(2):
        with LLMCache.open(store, model) as cache:
            for name in ("a", "b"):
                cache.corpus = name
                list(cache.run(TEXTS))
    found = {one["corpus"]: one for one in read(store)}
    assert set(found) == {"a", "b"}
    assert all(one["runs"] == 2 and one["counters"]["documents"] == 8 for one in found.values())
    assert found["a"]["counters"]["misses"] == 3
    assert "misses" not in found["b"]["counters"]


def test_a_run_over_midnight_leaves_a_record_for_each_day(
    store: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr(Folder, "now", lambda self: now[0])
    with LLMCache.open(store, model) as cache:
        list(cache.run(TEXTS))
        cache.commit()
        now[0] += 86_400
        cache.commit()
        list(cache.run(["four"]))
    days = [(one["day"], one["counters"]["documents"]) for one in read(store)]
    assert days == [("2027-01-15", 4), ("2027-01-16", 1)]


def test_similarities_are_counted_for_those_asked_and_those_reused(store: Path, model: SentenceTransformer) -> None:
    near, far = "How do I locate my card then?", "completely different words about mountains"
    with LLMCache.open(store, model, tau=0.8) as cache:
        list(cache.run(["How do I locate my card?"]))
        found = list(cache.run([near, far]))
    assert [one.tier for one in found] == ["near", "miss"]
    (one,) = read(store)
    assert sum(one["asked"]) == 3  # the first document had no entry to compare with
    assert sum(one["near"]) == 1
    assert found[0].similarity is not None
    assert one["near"][int(found[0].similarity * journal.BINS)] == 1


def test_an_opening_that_asks_nothing_leaves_nothing(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model):
        pass
    assert list((store / "stat").iterdir()) == []
    assert read(store) == []


def test_a_record_that_cannot_be_written_is_no_error(
    store: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmcache.banks.history.write_journal", full)
    with LLMCache.open(store, model) as cache:
        assert len(list(cache.run(TEXTS))) == 4
    assert read(store) == []
    assert len(LLMCache.open(store, model)) == 3


def test_a_store_without_records_still_opens_and_has_none(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(TEXTS))
    for path in (store / "stat").glob("*.runs"):
        path.unlink()
    assert read(store) == []
    with LLMCache.open(store, model) as cache:
        assert [one.tier for one in cache.run(TEXTS)] == ["exact"] * 4


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"day": 3}', b'{"day": "yesterday"}', b"[" * 100_000, b"null",
        b'{"day": "2026-01-01", "day": "2026-01-02"}',
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_passed_over(store: Path, line: bytes) -> None:
    opened = Store.open(store, create=True)
    try:
        good = json.dumps(record("2026-01-05", documents=3)).encode()
        (store / "stat" / f"{'a' * 32}.runs").write_bytes(line + b"\n" + good + b"\n")
        (found,) = records(opened)
        assert found["counters"] == {"documents": 3}
    finally:
        opened.close()


def test_what_is_odd_in_a_record_is_left_out() -> None:
    odd = {
        "day": "2026-01-05", "corpus": "c" * 1000, "namespace": 7, "runs": -1, "begin": float("inf"), "entries": "many",
        "counters": {"documents": 3, "misses": -2, "near": None, "exact": True}, "asked": [1, 2], "near": [0.5] * 50,
        "other": {"deep": [1]},
    }  # fmt: skip
    assert journal.checked(odd) == {"day": "2026-01-05", "corpus": "c" * 200, "counters": {"documents": 3}}


def test_many_records_keep_the_newest_and_stay_below_their_bound(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store", create=True)
    days = [f"{year}-01-{day:02}" for year in range(1900, 2000) for day in range(1, 29)]
    journal.write_journal(
        folder, "a" * 32, [{**record(day, "x" * 150, documents=1), "end": i} for i, day in enumerate(days)]
    )
    assert folder.size(journal.journal_name("a" * 32)) < 1 << 20
    found = journal.read_journals(folder, ["a" * 32])
    assert found[-1]["day"] == days[-1]
    assert 500 <= len(found) <= 1000
    folder.close()


def test_folding_adds_the_records_of_old_writers_up(tmp_path: Path) -> None:
    opened = Store.open(tmp_path / "store", create=True)
    for writer in ("a" * 32, "b" * 32):
        journal.write_journal(opened.folder, writer, [record("2026-01-05", documents=3, misses=1)])
        (tmp_path / "store" / "stat" / f"{writer}.json").write_text('{"documents": 3}')
    fold(opened.folder, ["a" * 32, "b" * 32], "c" * 32)
    assert sorted(name for name in opened.folder.names("stat")) == [f"{'c' * 32}.json", f"{'c' * 32}.runs"]
    (one,) = records(opened)
    assert one["counters"] == {"documents": 6, "misses": 2}
    assert one["runs"] == 2
    # a fold that was killed before it removed the old files counts nothing twice
    journal.write_journal(opened.folder, "a" * 32, [record("2026-01-05", documents=3)])
    assert [one["counters"]["documents"] for one in records(opened)] == [6]
    opened.close()


def test_gc_makes_old_records_one(store: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        with LLMCache.open(store, model) as cache:
            list(cache.run(TEXTS))
    opened = Store.open(store)
    later = opened.folder.now() + 7200
    monkeypatch.setattr(Folder, "now", lambda self: later)
    assert gc(opened).folded == 3
    assert len(list((store / "stat").glob("*.runs"))) == 1
    (one,) = records(opened)
    assert (one["runs"], one["counters"]["documents"]) == (3, 12)
    opened.close()


def test_evictions_are_recorded_whoever_makes_them(llmcache: Command, store: Path, model: SentenceTransformer) -> None:
    texts = [f"document number {i}" for i in range(1200)]
    with LLMCache.open(store, model, config=CacheConfig(max_bytes=1 << 20, commit_seconds=1e-3)) as cache:
        cache.encode(texts[:600], batch_size=300)
        cache.encode(texts[600:], batch_size=300)
    evicted = sum(one.get("evicted_rows", 0) for one in read(store))
    opened = Store.open(store)
    kept = sum(one.live for one in opened.manifest.namespaces["default"].banks["output"].segments)
    opened.close()
    stored = len(texts) - int(sum(one["counters"].get("not_stored", 0) for one in read(store)))
    assert evicted == stored - kept > 0
    done = llmcache("evict", store, "--max-bytes", "300KB", "--json")
    assert done.code == 0
    assert sum(one.get("evicted_rows", 0) for one in read(store)) == evicted + json.loads(done.out)["rows"]


def test_purging_a_namespace_takes_the_records_along_and_purging_a_text_does_not(
    llmcache: Command, store: Path, tmp_path: Path, model: SentenceTransformer
) -> None:
    with LLMCache.open(store, model) as cache:
        cache.corpus = "secret project"
        list(cache.run(TEXTS))
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n")
    assert llmcache("purge", store, "--text-file", texts).code == 0
    assert [one["corpus"] for one in read(store)] == ["secret project"]
    assert llmcache("purge", store, "--namespace", "default").code == 0
    assert read(store) == []


def test_a_forecast_is_kept_with_the_run_it_was_for(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(["something before"]))
        plan = cache.plan(TEXTS)
        list(cache.run(TEXTS))
        compared = cache.compared(plan)
        assert (compared.documents, compared.computed) == (4, 3)
    (one,) = read(store)
    assert one["forecast"]["hit_rate"] == 0.25 == one["forecast"]["forecast_hit_rate"]


def test_similarities_that_are_not_numbers_are_near_to_nothing(store: Path) -> None:
    opened, counters = Store.open(store, create=True), Counters()
    history = History(opened, counters)
    history.similar(np.array([np.nan, -np.inf, -0.5, 1.0, 1.2]), np.array([False, False, False, True, True]))
    counters.documents = 5
    history.write()
    (one,) = records(opened)
    opened.close()
    assert (one["asked"][0], one["asked"][-1], sum(one["asked"])) == (3, 2, 5)
    assert one["near"][-1] == sum(one["near"]) == 2

"""Tests of plans: counts, agreement with the run, and no side effects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from llmcache import CacheConfig, LLMCache
from llmcache.encoding import compute as backend
from llmcache.errors import CorpusError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.model import batching as computing
from llmcache.model.tokens import TokenRows
from llmcache.planning import cost_model as costs
from llmcache.planning import forecast as planning
from llmcache.planning.advice import (
    RunContext,
    RunForecast,
    advised,
    bytes_of,
)
from llmcache.planning.cost_model import Cost, in_full_batches, recorded
from llmcache.planning.plan import Plan
from llmcache.planning.survey import Folding, Sample
from tests.conftest import Command


def files(store: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in store.rglob("*"))


def planned_and_run(cache: LLMCache, texts: Sequence[str]) -> tuple[Plan, list[str]]:
    plan = cache.plan(texts)
    return plan, [result.tier for result in cache.run(texts)]


# -- counts ---------------------------------------------------------------------------------------------------


def test_repeats_and_known_documents_are_counted_as_the_run_finds_them(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(queries[:100]))
        asked = queries[50:200] + queries[150:200]
        plan, tiers = planned_and_run(cache, asked)
    assert plan.documents == len(asked) == 200
    assert plan.in_store == sum(one in set(queries[:100]) for one in asked)
    assert plan.repeats >= 50
    assert plan.computed == pytest.approx(tiers.count("miss"), abs=3)
    assert plan.in_store + plan.in_store_by_tokens + plan.repeats + plan.near + plan.computed == plan.documents
    assert plan.hit_rate == 1 - plan.computed / plan.documents


def test_what_the_tokenizer_does_not_tell_apart_is_a_repeat(store: Path, model: SentenceTransformer) -> None:
    asked = ["Where is my card?", "where is my CARD?", "  Where  is my card? ", "Where is my cards?"]
    with LLMCache.open(store, model) as cache:
        plan, tiers = planned_and_run(cache, asked)
    assert sorted(tiers[:3]) == ["exact", "exact", "miss"]  # the run may compute any of them
    assert tiers[3] == "miss"
    assert (plan.repeats, plan.computed) == (2, 2)


def test_a_stored_document_in_another_spelling_is_found_by_its_tokens(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(queries[:100]))
        plan, tiers = planned_and_run(cache, [one.upper() for one in queries[:80]] + queries[100:120])
    assert tiers.count("exact") == 80
    assert plan.in_store == 0
    assert plan.in_store_by_tokens == pytest.approx(80, abs=2)


def test_long_documents_that_begin_alike_are_repeats_where_the_model_reads_no_further(
    store: Path, model: SentenceTransformer
) -> None:
    words = [f"word{i}" for i in range(4000)]
    same, other = " ".join(words[:2000]), " ".join(words[2000:])
    asked = [same, same + " and an end that nobody reads", other, same[:200] + " but " + other]
    with LLMCache.open(store, model) as cache:
        plan, tiers = planned_and_run(cache, asked)
    assert sorted(tiers[:2]) == ["exact", "miss"]
    assert tiers[2:] == ["miss", "miss"]
    assert (plan.repeats, plan.computed) == (1, 3)
    assert plan.tokens == 4 * 256


def test_a_prompt_and_a_role_make_other_documents(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(["one", "two"], role="query"))
        assert cache.plan(["one", "two"], role="query").in_store == 2
        assert cache.plan(["one", "two"]).in_store == 0
        assert cache.plan(["one", "two"], role="query", prompt="say: ").in_store == 0


def test_near_matches_at_tau_are_forecast_from_a_sample(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    with LLMCache.open(store, model, tau=0.9) as cache:
        list(cache.run(queries[:400]))
        plan, tiers = planned_and_run(cache, queries[400:700])
    assert plan.near / 300 == pytest.approx(tiers.count("near") / 300, abs=0.03 + 2 * plan.margin)
    assert "tau 0.9" in plan.near_from
    assert 0 < plan.near < 300
    assert plan.drift is None  # not measured
    assert any(one.about == "tau" and "calibrate" in one.why for one in plan.advice)


def test_a_calibrated_store_forecasts_near_matches_with_their_drift(
    store: Path, model: SentenceTransformer, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_FEWEST", 1 << 30)  # else a slow moment would cause lookups
    with LLMCache.open(store, model) as cache:
        mixed = Random(0).sample(queries, 900)  # shuffled, since the file is ordered by label
        outputs = cache.encode(mixed[:600])
        head = LogisticRegression(max_iter=200).fit(outputs, np.argmax(outputs[:, :8], axis=1))
        calibration = cache.calibrate(budget=0.05, head=head)
        plan, tiers = planned_and_run(cache, mixed[600:])
    assert plan.near / 300 == pytest.approx(tiers.count("near") / 300, abs=0.15)
    assert plan.near_from.startswith("as calibrated on")
    assert plan.bound is not None
    assert plan.drift is not None
    assert plan.drift <= plan.bound <= calibration.bound <= 0.05


# -- time -----------------------------------------------------------------------------------------------------


def test_the_cost_of_a_document_is_fitted_to_its_length() -> None:
    tokens = np.array([5, 10, 20, 40, 80, 160])
    seconds = 0.001 + 0.0002 * tokens + 1e-7 * tokens**2
    cost = Cost.fit(tokens, seconds, "probed")
    np.testing.assert_allclose(
        cost(np.array([7, 100])), 0.001 + 0.0002 * np.array([7, 100]) + 1e-7 * np.array([49, 1e4])
    )
    assert Cost.fit(np.array([10]), np.array([0.02]), "probed")(np.array([20])) == pytest.approx(0.04)
    falling = Cost.fit(np.array([10, 20, 30]), np.array([0.03, 0.02, 0.01]), "probed")
    assert (falling(np.arange(1, 100)) >= 0).all()


def test_the_recorded_cost_adds_up_to_what_the_model_took(
    store: Path, model: SentenceTransformer, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a simulated model with 1 ms per document and 0.1 ms per token, so that machine load does not matter."""

    def compute(model: Any, rows: TokenRows, *others: Any, **named: Any) -> Iterator[Any]:
        for done in real(model, rows, *others, **named):
            yield replace(done, seconds=float((0.001 + 0.0001 * rows.lengths[done.chosen]).sum()))

    real = computing.compute
    monkeypatch.setattr(backend, "compute", compute)
    with LLMCache.open(store, model) as cache:
        assert recorded(cache._bank) is None
        list(cache.run(queries[:200]))
        cache.commit()
        cost = recorded(cache._bank)
        assert cost is not None
        lengths = np.array([len(one) for one in model.tokenizer(queries[:200])["input_ids"]])
        assert cost(lengths).sum() == pytest.approx(cache.stats().counters.model_seconds, rel=0.02)
        assert cache.plan(queries[200:300]).cost_from.startswith("recorded")


def test_a_plan_says_what_the_run_would_cost_without_a_cache(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    with LLMCache.open(store, model) as cache:
        list(cache.run(queries[:100]))
        known = cache.plan(queries[:100])
        fresh = cache.plan(queries[100:200])
    assert known.computed == 0 == known.model_seconds
    assert known.seconds < 0.1 * known.uncached_seconds
    assert fresh.seconds >= fresh.model_seconds > 0


# -- what it leaves behind ------------------------------------------------------------------------------------


def test_planning_writes_nothing_into_a_store(
    llmcache: Command, store: Path, tmp_path: Path, model_path: str, corpus: Path
) -> None:
    assert llmcache("plan", corpus, "-s", store, "-m", model_path, "--json").code == 0
    assert not store.exists()
    llmcache("build", corpus, "-m", model_path, "-s", store)
    before = files(store)
    done = llmcache("plan", corpus, "-s", store, "--tau", "0.9", "-o", tmp_path / "plan.json")
    assert done.code == 0
    assert "to compute" in done.out
    assert "advice: tau" in done.out
    assert llmcache("plan", corpus, "-s", store, "-m", model_path, "--namespace", "other").code == 0
    assert files(store) == before


def test_a_run_says_how_far_its_plan_was_off(
    llmcache: Command, store: Path, tmp_path: Path, model_path: str, corpus: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.npy"
    llmcache("plan", corpus, "-s", store, "-m", model_path, "-o", plan)
    built = json.loads(llmcache("build", corpus, "-m", model_path, "-s", store, "--plan", plan, "--json").out)
    assert built["plan"]["hit_rate"] == built["plan"]["forecast_hit_rate"] == 0.25
    llmcache("plan", corpus, "-s", store, "-o", plan)
    done = llmcache("run", corpus, "-s", store, "-o", out, "--plan", plan)
    assert "forecast 100.0% hits, was 100.0%; " in done.out
    ran = json.loads(llmcache("run", corpus, "-s", store, "-o", out, "--plan", plan, "--json").out)
    assert ran["plan"]["points"] == 0
    assert ran["plan"]["forecast_documents"] == 4
    assert "forecast" in llmcache("warm", corpus, "-s", store, "--plan", plan).out


def test_a_plan_that_is_read_again_is_the_same(store: Path, model: SentenceTransformer, tmp_path: Path) -> None:
    with LLMCache.open(store, model) as cache:
        plan = cache.plan(["one", "two", "one"])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert Plan.read(path) == plan
    assert str(plan.compared(4, 1, 2.0)).endswith("(planned for 3 documents, met 4)")


# -- bytes and advice -----------------------------------------------------------------------------------------

BANK = BankFacts("float32", 384, 1, 384)


def around(**given: object) -> RunContext:
    config = CacheConfig(**given.pop("settings", {}))  # type: ignore[arg-type]  # shortens the call
    facts = {
        "model": "m",
        "namespace": "default",
        "layers": 6,
        "hidden": 384,
        "store_bytes": 0,
        "free": 1 << 40,
        **given,
    }
    return RunContext(config=config, **facts)  # type: ignore[arg-type]


def amounts(**given: object) -> RunForecast:
    facts = {"documents": 1000, "computed": 800, "known": 0, "tokens": 20_000, "hit_rate": 0.2, "uncached": 10.0,
             "saved": 2.0, "near": 0.0, **given}  # fmt: skip
    return RunForecast(**facts)  # type: ignore[arg-type]


def test_the_bytes_forecast_are_those_that_a_run_writes(
    store: Path, model: SentenceTransformer, queries: list[str]
) -> None:
    with LLMCache.open(store, model) as cache:
        plan = cache.plan(queries[:400])
        list(cache.run(queries[:400]))
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert plan.total_bytes == pytest.approx(size, rel=0.1)


def test_layers_and_dtype_are_advised_by_the_bytes_they_take() -> None:
    output, layers = (bytes_of(amounts(), BANK, around(settings=one))[0] for one in ({}, {"layers": "all"}))
    assert layers - output > 800 * 6 * 20 * 384 * 4
    said = {one.about: one for one in advised(amounts(), BANK, around(free=output - 1))}
    assert said["dtype"].value == "float16"
    assert said["layers"].value == "output"
    said = {one.about: one for one in advised(amounts(), BANK, around(settings={"max_bytes": 1 << 20}))}
    assert "evicted" in said["dtype"].why
    assert {one.about: one.value for one in advised(amounts(hit_rate=0.0), BANK, around())}[
        "cache"
    ] == "only for later runs"
    assert {one.about: one.value for one in advised(amounts(known=10**6), BANK, around())}["index"].startswith("ivf")


def test_a_sample_is_drawn_evenly_from_a_stream() -> None:
    counts = np.zeros(1000)
    for seed in range(200):
        sample, random = Sample(50), np.random.default_rng(seed)
        for start in range(0, 1000, 100):
            sample.offer([str(i) for i in range(start, start + 100)], random)
        assert len(sample.texts) == 50
        counts[[int(str(one)) for one in sample.texts]] += 1
    assert counts.sum() == 200 * 50
    assert np.abs(counts.reshape(10, 100).sum(axis=1) - 1000).max() < 150


def test_a_fold_keeps_apart_what_a_tokenizer_keeps_apart(model: SentenceTransformer) -> None:
    fold = Folding(model.tokenizer, 256, None)
    assert fold("A  b") == fold("a b ")
    assert fold("a b") != fold("ab")
    assert Folding(None, None, None)("A  b") == "A  b"


# -- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(llmcache: Command, store: Path, tmp_path: Path, model_path: str, corpus: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{no json\n")
    one = tmp_path / "one.txt"
    one.write_text("one document\n")
    made = tmp_path / "made"
    llmcache("build", corpus, "-m", model_path, "-s", made)
    for arguments, code, said in (
        ((empty, "-s", store, "-m", model_path), 1, "there are no documents"),
        ((tmp_path / "none.jsonl", "-s", store, "-m", model_path), 1, "does not exist"),
        ((broken, "-s", made), 1, "broken.jsonl line 1"),
        ((corpus, "-s", store), 2, "name the model"),
        ((corpus, "-s", store, "-m", tmp_path / "nowhere"), 2, "cannot be loaded"),
        ((corpus, "-s", made, "-o", tmp_path / "no" / "plan.json"), 2, "cannot be written"),
        ((corpus, "-s", made, "--tau", "7"), 2, "tau is a cosine"),
        ((corpus, "-s", made, "--namespace", "other"), 2, "no namespace"),
    ):
        done = llmcache("plan", *arguments)
        assert (done.code, done.err.count("\n"), said in done.err) == (code, 1, True), done
    assert not store.exists()
    alone = json.loads(llmcache("plan", one, "-s", made, "--json").out)
    assert (alone["documents"], alone["computed"], alone["hit_rate"]) == (1, 1, 0.0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 99, "advice": []}', "\x00"])
def test_a_file_that_is_no_plan_is_refused(
    llmcache: Command, tmp_path: Path, corpus: Path, store: Path, model_path: str, content: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    done = llmcache("build", corpus, "-m", model_path, "-s", store, "--plan", path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert not store.exists()


def test_documents_that_are_none_stop_a_plan(store: Path, model: SentenceTransformer) -> None:
    with LLMCache.open(store, model) as cache:
        with pytest.raises(CorpusError, match="no documents"):
            cache.plan([])
        with pytest.raises(CorpusError, match="document 0 has no field 'text'"):
            cache.plan([{"id": "a"}])
        list(cache.run(["one"]))
        assert cache.plan(["one"]).hit_rate == 1.0


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "two", "three", "two"]))
    return path


def test_what_a_batch_takes_for_itself_is_spread_over_a_full_one() -> None:
    """Batches of n rows take 4.8 ms plus 1.08 ms per row."""
    eight, two = (4.8 + 1.08 * n for n in (8, 2))
    assert in_full_batches(8, eight, 2, two, 32) == pytest.approx(4.8 / 32 + 1.08)
    assert in_full_batches(8, 8.0, 2, 2.0, 32) == pytest.approx(1.0), "nothing for itself"
    assert in_full_batches(8, 8.0, 2, 9.0, 32) == pytest.approx(8.0 / 32), "the small one met a busy moment"


@pytest.mark.parametrize(("slower", "forecast", "source"), [(1.3, 1.0, "recorded"), (3.0, 3.0, "recorded, scaled")])
def test_a_busy_moment_is_not_taken_for_another_machine(
    monkeypatch: pytest.MonkeyPatch, slower: float, forecast: float, source: str
) -> None:
    known = Cost(0.0, 0.001, 0.0, "recorded")
    monkeypatch.setattr(
        costs, "_probe", lambda _, rows, chosen, role: (slower * sum(float(known(rows.lengths[i])) for i in chosen), [])
    )
    rows = TokenRows({"input_ids": [np.zeros(n, np.int32) for n in (100, 200)]}, {})
    model: Any = SimpleNamespace(token_embedding=lambda: torch.zeros(1), matrices=False)
    found, _ = costs.probed(model, rows, rows.lengths, 32, lambda _: 0.0, known)
    assert float(found(np.array(150))) == pytest.approx(forecast * 0.15)
    assert found.source.startswith(source)

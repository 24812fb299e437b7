"""Near reuse within a budget, with the real model: calibrate, save, answer, audit and explain."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.near.neighbors.predictor import Predictor
from tests.conftest import DATA, Command

KNOWN, ASKED = 700, 200


@pytest.fixture(scope="module")
def asks(queries: list[str]) -> list[str]:
    """Return the queries shuffled: they are sorted by intent, so later ones would be other traffic."""
    return [queries[i] for i in np.random.default_rng(0).permutation(len(queries))]


@pytest.fixture(scope="module")
def warm(model: SentenceTransformer, asks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store with the first queries."""
    path = tmp_path_factory.mktemp("warm") / "store"
    with LLMCache.open(path, model) as cache:
        cache.encode(asks[:KNOWN])
    return path


@pytest.fixture
def known(warm: Path, store: Path) -> Path:
    shutil.copytree(warm, store)
    return store


def test_within_a_budget_neighbours_answer_and_the_promise_is_kept_on_other_documents(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    asked = asks[KNOWN : KNOWN + ASKED]
    true = np.asarray(model.encode(asked))
    with LLMCache.open(known, model) as cache:
        found = cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        assert found.threshold is not None
        assert found.expected < found.bound <= 0.05
        assert 0 < found.hits < 1
        assert found.samples == KNOWN
    with LLMCache.open(known, model) as cache:  # in another opening, with the saved calibration
        assert cache.calibration == found
        results = list(cache.run(asked))
    near = np.array([one.tier == "near" for one in results])
    outputs = np.array([one.output for one in results])
    assert near.mean() == pytest.approx(found.hits, abs=0.12)
    cosine = (outputs * true).sum(axis=1)
    assert (1 - cosine[near] > 0.25).sum() / len(asked) < 2 * 0.05
    np.testing.assert_allclose(outputs[~near], true[~near], atol=1e-5)
    for one in (one for one in results if one.tier == "near"):
        assert one.similarity is not None
        assert one.source
        assert not one.audited
    np.testing.assert_allclose(np.linalg.norm(outputs, axis=1), 1, atol=1e-5)


def test_who_asks_for_exact_reuse_gets_the_models_own_results_from_a_calibrated_store(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    asked = asks[KNOWN : KNOWN + 40]
    with LLMCache.open(known, model) as cache:
        cache.calibrate(budget=0.2, drift="beyond", limit=0.3)
    with LLMCache.open(known, model, config=CacheConfig(reuse="exact")) as cache:
        assert {one.tier for one in cache.run(asked)} == {"miss"}
        np.testing.assert_allclose(cache.encode(asked), model.encode(asked), atol=1e-5)


def test_opening_a_calibrated_store_predicts_for_no_entry(
    model: SentenceTransformer, known: Path, asks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLMCache.open(known, model) as cache:
        cache.calibrate(budget=0.2, drift="beyond", limit=0.3)
    predicted: list[int] = []
    real = Predictor.__call__

    def noted(self: Predictor, features: np.ndarray[Any, Any]) -> Any:
        predicted.append(len(features))
        return real(self, features)

    monkeypatch.setattr(Predictor, "__call__", noted)
    with LLMCache.open(known, model, config=CacheConfig(recalibrate=False)) as cache:
        list(cache.run(asks[KNOWN : KNOWN + 5]))
    assert predicted == [1, 5], "one row to see what the predictor gives, and the documents asked"


def test_near_results_are_neither_stored_nor_given_as_exact(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    asked = asks[KNOWN : KNOWN + 60]
    with LLMCache.open(known, model, config=CacheConfig(audit_share=0)) as cache:
        cache.calibrate(budget=0.2, drift="beyond", limit=0.3)
        before = len(cache)
        near = sum(one.tier == "near" for one in cache.run(asked))
        assert near > 0
        assert len(cache) == before + len(asked) - near
        assert sum(one.tier == "near" for one in cache.run(asked)) <= near, "only more is known by now"


def test_a_document_is_answered_near_once_and_computed_and_stored_when_it_is_asked_again(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    asked = asks[KNOWN : KNOWN + 60]
    with LLMCache.open(known, model, config=CacheConfig(audit_share=0)) as cache:
        cache.calibrate(budget=0.2, drift="beyond", limit=0.3)
        text = asked[next(i for i, one in enumerate(cache.run(asked)) if one.tier == "near")]
        assert "asked again" in cache.explain(text).why
        (again,), (stored,) = cache.run([text]), cache.run([text])
        assert (again.tier, stored.tier) == ("miss", "exact")
        np.testing.assert_allclose(again.output, np.asarray(model.encode([text]))[0], atol=1e-5)
    with LLMCache.open(known, model, config=CacheConfig(audit_share=0)) as cache:
        text = next(one for one in asked if cache.explain(one).tier == "near")
        assert "near" not in {one.tier for one in cache.run([text, text])}, "one answer would be given twice"


def test_audits_recompute_a_share_and_switch_off_what_exceeds_the_budget(
    model: SentenceTransformer, known: Path, asks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = asks[KNOWN : KNOWN + ASKED]
    with LLMCache.open(known, model, config=CacheConfig(audit_share=1.0)) as cache:
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        results = list(cache.run(asked[:80]))
        assert {one.tier for one in results} == {"miss"}, "every near hit is recomputed"
        assert cache.stats().counters.audits == sum(one.audited for one in results) > 0
        assert cache.near_is_off == ""
        reuse: Any = cache._execution.reuse
        reuse.audits.thresholds[:], reuse._guard = -1e9, None  # accept everything
        reuse._judge = replace(reuse._judge, drift=lambda one, other: (1 - (one * other).sum(1) > 0.05).astype(float))
        with caplog.at_level(logging.WARNING, "llmcache"):
            list(cache.run(asked[80:]))
        assert "calibrate again" in cache.near_is_off
        assert "near reuse is off" in caplog.text
        list(cache.run(asks[KNOWN + ASKED : KNOWN + ASKED + 20]))
        assert cache.stats().counters.near == 0


def test_a_head_decides_what_drift_is(model: SentenceTransformer, known: Path, asks: list[str]) -> None:
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression

    outputs = np.asarray(model.encode(asks[:KNOWN]))
    groups = KMeans(6, n_init=1, random_state=0).fit_predict(outputs)
    head = LogisticRegression(max_iter=60).fit(outputs, groups)
    asked = asks[KNOWN : KNOWN + ASKED]
    with LLMCache.open(known, model) as cache:
        found = cache.calibrate(asked, budget=0.05, head=head)
        assert found.samples == ASKED
        assert found.threshold is not None
        with pytest.raises(ConfigError, match="in the cache"):
            cache.calibrate(asked, budget=0.05, head=head)
        other = asks[KNOWN + ASKED : KNOWN + 2 * ASKED]
        given = np.array([one.output for one in cache.run(other)])
    flips = head.predict(given) != head.predict(np.asarray(model.encode(other)))
    assert flips.mean() <= 2 * 0.05


def test_numbers_that_differ_are_refused_unless_the_guard_is_off(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    text = "I was charged a fee of 15 pounds on my account"
    for guard, tier in ((True, "miss"), (False, "near")):
        with LLMCache.open(known, model, config=CacheConfig(audit_share=0)) as cache:
            cache.encode([text])
            cache.calibrate(budget=0.9, drift="cosine", guard=guard)
            found = cache.explain(text.replace("15", "35"))
            assert found.tier == tier
            assert ("guard" in found.why) == guard
            assert found.neighbours[0].text is not None
            assert "15" in found.neighbours[0].text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": -0.1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.01, "confidence": 1.0}, "confidence"),
        ({"budget": 0.01, "drift": "label", "head": None}, "head="),
        ({"budget": 0.01, "drift": "label", "head": lambda one: np.full(len(one), np.nan)}, "NaN"),
        ({"budget": 0.01, "drift": "label", "head": lambda one: np.zeros(3)}, "one row per output"),
        ({"budget": 0.01, "drift": "label", "head": lambda one: np.zeros(len(one), int)}, "one label"),
        ({"budget": 0.01, "drift": "likeness"}, "drift is one of"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_error_and_change_nothing(
    model: SentenceTransformer, known: Path, settings: dict[str, Any], said: str
) -> None:
    with LLMCache.open(known, model) as cache:
        with pytest.raises(ConfigError, match=said):
            cache.calibrate(**{"drift": "beyond", **settings})
        assert cache.calibration is None


def test_a_budget_of_nothing_and_too_few_documents_leave_near_reuse_off_and_say_so(
    model: SentenceTransformer, known: Path, store: Path, tmp_path: Path
) -> None:
    with LLMCache.open(known, model) as cache:
        assert cache.calibrate(budget=0, drift="cosine").threshold is None
        few = cache.calibrate(budget=0.001, drift="beyond")
        assert few.threshold is None
        assert few.needed == 2995 - KNOWN
        assert "more are needed" in cache.near_is_off
        assert {one.tier for one in cache.run(["something quite new", "and another"])} == {"miss"}
        assert cache.stats().counters.near_asked == 0  # no look-ups while near reuse is off
    with LLMCache.open(tmp_path / "empty", model) as cache, pytest.raises(ConfigError, match="too few"):
        cache.calibrate(budget=0.01, drift="cosine")


def test_a_sample_that_breaks_off_leaves_the_calibration_as_it_was(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    def broken() -> Any:
        yield asks[KNOWN]
        raise RuntimeError("the disk with the sample is gone")

    with LLMCache.open(known, model) as cache:
        found = cache.calibrate(budget=0.2, drift="beyond", limit=0.3)
        with pytest.raises(RuntimeError, match="is gone"):
            cache.calibrate(broken(), budget=0.1, drift="beyond")
        assert cache.calibration == found
        assert cache.near_is_off == ""


def test_an_entry_that_led_astray_is_in_quarantine_until_a_recomputation_agrees(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    asked = asks[KNOWN : KNOWN + ASKED]
    quiet = CacheConfig(audit_share=0, recalibrate=False)
    with LLMCache.open(known, model, config=quiet) as cache:
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        hit = next(one for one in cache.run(asked) if one.tier == "near")
    text = asked[int(hit.id)]
    with LLMCache.open(known, model, config=quiet) as cache:
        assert cache.explain(text).tier == "near"
        reuse: Any = cache._execution.reuse
        row = int(reuse.look_up(*_of(cache, text)).rows[0])
        reuse._bank.audit(np.array([row]), np.array([1.0], np.float32))
    with LLMCache.open(known, model, config=quiet) as cache:  # another opening reads the audit results
        told = cache.explain(text)
        assert told.tier == "miss"
        assert "quarantine" in told.why
        assert ("quarantine", False) in told.gates
        (again,) = cache.run([text])
        assert (again.tier, again.audited) == ("miss", True)
        assert again.output == pytest.approx(np.asarray(model.encode([text]))[0], abs=1e-5)
        reuse = cache._execution.reuse
        reuse.refresh()
        assert row not in reuse._divergent.tolist(), "the recomputation agreed"
        assert reuse.audits.bounds[0].count == 0, "it was not drawn by chance and says nothing about the others"


def _of(cache: LLMCache, text: str) -> Any:
    from llmcache.model.features import features

    execution = cache._execution
    tokens = execution.keys_of(text, None, None)[2]
    return features(execution.embedding, tokens.ids, "mean"), tokens.ids, [text]


def test_what_audits_found_is_kept_between_openings_until_somebody_calibrates_again(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    with LLMCache.open(known, model, config=CacheConfig(audit_share=1.0, recalibrate=False)) as cache:
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        reuse: Any = cache._execution.reuse
        reuse.audits.observe(100, np.full(50, 1e9), np.full(50, 1e9), np.ones(50))
        reuse._tighten("for the test")
        reuse.changed = True
    with LLMCache.open(known, model) as cache:
        assert "calibrate again" in cache.near_is_off
        assert (cache.stats().near[0].state, cache.stats().near[0].why) == ("off", cache.near_is_off)
        assert {one.tier for one in cache.run(asks[KNOWN : KNOWN + 50])} == {"miss"}
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        assert cache.near_is_off == ""
        assert cache.stats().near[0].state == "on"


def test_a_budget_of_accuracy_is_kept_by_the_right_answers(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression

    outputs = np.asarray(model.encode(asks[: KNOWN + ASKED]))
    answers = KMeans(5, n_init=1, random_state=0).fit(outputs[:KNOWN]).predict(outputs)
    head = LogisticRegression(max_iter=200).fit(outputs[:KNOWN], answers[:KNOWN])
    with LLMCache.open(known, model, config=CacheConfig(audit_share=0.5)) as cache:
        found = cache.calibrate(
            asks[:KNOWN], truth=answers[:KNOWN], budget=0.03, drift="accuracy", head=head, confidence=None
        )
        assert found.threshold is not None
        assert found.tolerated > found.expected, "audits count every change, also for the better"
        results = list(cache.run(asks[KNOWN : KNOWN + ASKED]))
        near = np.array([one.tier == "near" for one in results])
        assert near.mean() > 0.2
        given = head.predict(np.array([one.output for one in results]))
        drop = np.mean(head.predict(outputs[KNOWN:]) == answers[KNOWN:]) - np.mean(given == answers[KNOWN:])
        assert drop <= 0.03 + 2 * np.sqrt(0.03 / ASKED), "within what chance allows so few documents"
        for wrong, part in (({"truth": answers[:3]}, "3 right answers for"), ({}, "needs the right answers")):
            with pytest.raises(ConfigError, match=part):
                cache.calibrate(asks[:KNOWN], budget=0.03, drift="accuracy", head=head, **wrong)


def test_a_function_of_ones_own_decides_and_has_to_be_given_again(
    model: SentenceTransformer, known: Path, asks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def far(computed: Any, reused: Any) -> Any:
        return (np.abs(computed - reused).max(axis=1) > 0.1).astype(float)

    with LLMCache.open(known, model) as cache:
        found = cache.calibrate(budget=0.05, drift=far)
        assert (found.drift, found.threshold is not None) == ("own", True)
    with LLMCache.open(known, model, drift=far, config=CacheConfig(audit_share=0)) as cache:
        true = np.asarray(model.encode(asks[KNOWN : KNOWN + ASKED]))
        results = list(cache.run(asks[KNOWN : KNOWN + ASKED]))
        near = np.array([one.tier == "near" for one in results])
        assert near.any()
        assert far(true, np.array([one.output for one in results]))[near].sum() / ASKED <= 0.05
    with caplog.at_level(logging.WARNING, "llmcache"), LLMCache.open(known, model) as cache:
        assert cache.calibration is None
    assert "give it with drift=" in caplog.text


def test_a_cache_that_has_doubled_is_calibrated_again_in_the_background(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    more = asks[KNOWN : 2 * KNOWN]
    with LLMCache.open(known, model, config=CacheConfig(reuse="exact")) as cache:
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        first = saved(cache)
        cache.encode(more)
    with LLMCache.open(known, model) as cache:
        assert cache.calibration is not None
        assert cache.calibration.entries == KNOWN
        list(cache.run(asks[2 * KNOWN : 2 * KNOWN + 20]))
        reuse: Any = cache._execution.reuse
        reuse._refitting.wait()
        list(cache.run(asks[2 * KNOWN + 20 : 2 * KNOWN + 40]))
        assert cache.calibration.entries >= 2 * KNOWN
        assert cache.calibration.budget == 0.05
        newer = cache.calibration
    with LLMCache.open(known, model) as cache:
        assert cache.calibration == newer
        assert saved(cache)["fitted"] != first["fitted"], "it has another version"


def saved(cache: LLMCache) -> Any:
    return cache._store.manifest.namespaces["default"].config["calibration"]


def test_predictions_are_kept_with_the_store_and_those_of_an_older_version_are_not(
    model: SentenceTransformer, known: Path, asks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcache.near.neighbors.predictor import Predictor

    asked = asks[KNOWN : KNOWN + 60]
    predict, rows = Predictor.__call__, []

    def counted(self: Predictor, features: Any) -> Any:
        rows.append(len(features))
        return predict(self, features)

    quiet = CacheConfig(audit_share=0, recalibrate=False)
    with LLMCache.open(known, model, config=quiet) as cache:
        cache.calibrate(budget=0.05, drift="beyond", limit=0.25)
        old = [cache.explain(text).as_dict() for text in asked[:20]]
    with LLMCache.open(known, model, config=quiet) as cache:
        monkeypatch.setattr(Predictor, "__call__", counted)
        assert [cache.explain(text).as_dict() for text in asked[:20]] == old
        assert max(rows) == 1, "only what is asked is predicted"
        banks = {one.layer for one in cache.stats().banks if one.layer.startswith("distilled-")}
        assert len(banks) == 1
        cache.encode(asked)
        cache.calibrate(budget=0.05, drift="beyond", limit=0.3)
        cache.explain("Is my new card on its way to me?")
    with LLMCache.open(known, model) as cache:
        new = {one.layer for one in cache.stats().banks if one.layer.startswith("distilled-")}
        assert len(new) == 1
        assert not new & banks


def test_documents_unlike_those_it_was_calibrated_on_are_noticed_and_the_budget_is_still_kept(
    model: SentenceTransformer, known: Path, asks: list[str]
) -> None:
    path = DATA / "cls-snips" / "train.tsv"
    if not path.exists():
        pytest.skip(f"SNIPS is not at {path}; set LLMCACHE_DATA to the folder that holds cls-snips")
    others = [line.partition("\t")[2] for line in path.read_text("utf-8").splitlines()]
    random = np.random.default_rng(0)
    mixed = [*asks[KNOWN : KNOWN + 1000], *random.choice(others, 1000, replace=False).tolist()]
    mixed = [mixed[i] for i in random.permutation(2000)]
    with LLMCache.open(known, model, config=CacheConfig(recalibrate=False)) as cache:
        budget = 0.02
        assert cache.calibrate(budget=budget, drift="beyond", limit=0.25).threshold is not None
        true, noticed, beyond = np.asarray(model.encode(mixed)), None, 0
        for start in range(0, 2000, 250):
            results = list(cache.run(mixed[start : start + 250]))
            for place, one in enumerate(results, start):
                beyond += one.tier == "near" and 1 - float(one.output @ true[place]) > 0.25
            if noticed is None and cache.stats().near[0].why:
                noticed = start + 250
        assert noticed is not None
        assert noticed < 2000
        assert beyond / 2000 <= 2 * budget
        assert "less similar" in cache.stats().near[0].why or cache.near_is_off


def test_the_logits_of_a_head_are_reused_within_a_budget_of_their_own(
    model: SentenceTransformer, store: Path, asks: list[str]
) -> None:
    head = classifier(model)
    known, asked = asks[:KNOWN], asks[KNOWN : KNOWN + ASKED]
    with LLMCache.open(store, model) as cache:
        true = np.array([row["topic"].output for row in cache.run_heads([*known, *asked], {"topic": head})])[KNOWN:]
    with LLMCache.open(store.with_name("other"), model, config=CacheConfig(audit_share=0)) as cache:
        list(cache.run_heads(known, {"topic": head}))
        found = cache.calibrate(budget=0.1, drift="label", head=lambda logits: logits, of=head)
        assert found.threshold is not None
        rows = [row["topic"] for row in cache.run_heads(asked, {"topic": head})]
        near = np.array([one.tier == "near" for one in rows])
        assert near.any()
        given = np.array([one.output for one in rows])
        assert np.mean(given.argmax(1) != true.argmax(1)) <= 0.1
        assert given[~near] == pytest.approx(true[~near], abs=1e-4)
        assert cache.calibration is None, "that of the embeddings is another one"
        (report,) = cache.stats().near
        assert report.bank.startswith("head-")
    with LLMCache.open(store.with_name("other"), model, config=CacheConfig(audit_share=0)) as cache:
        again = [row["topic"].tier for row in cache.run_heads(asked, {"topic": head})]
        assert again.count("near") == near.sum()


def classifier(model: SentenceTransformer) -> Any:
    """Create a BERT classifier on the trunk of the model, with its own head."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    trunk: Any = model.transformers_model
    found: Any = BertForSequenceClassification(trunk.config)
    found.bert.load_state_dict(trunk.state_dict(), strict=False)
    found.classifier.weight.data.normal_(0, 0.5)
    return found.eval()


def test_calibrate_and_explain_on_the_command_line(
    llmcache: Command, known: Path, asks: list[str], tmp_path: Path
) -> None:
    done = llmcache("calibrate", "-s", known, "--budget", "0.1", "--limit", "0.3", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == KNOWN
    assert "near reuse" in llmcache("calibrate", "-s", known, "--budget", "0.1", "--drift", "cosine").out
    said = json.loads(llmcache("explain", known, asks[0], "--json").out)
    assert (said["tier"], said["similarity"]) == ("exact", 1.0)
    assert json.loads(llmcache("explain", known, "Is my new card on its way?", "--json").out)["threshold"] is not None
    for arguments, part in (
        (["--budget", "2"], "budget"),
        (["--budget", "0.1", "--drift", "label"], "head="),
        (["--budget", "0.1", "--drift", "label", "--head", tmp_path / "none.npz"], "no head"),
        (["--budget", "0.1", "--drift", "near"], "drift is one of"),
    ):
        done = llmcache("calibrate", "-s", known, *arguments)
        assert done.code == 2, done.err
        assert part in done.err
        assert len(done.err.strip().splitlines()) == 1

"""The paper's experiments, tiny: every number against another way to it."""

from __future__ import annotations

import gzip
import json
import os
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from llmcache import CacheConfig, LLMCache
from llmcache.bench.harness.datasets import OPENBOOKQA, openbook_questions
from llmcache.bench.harness.turns import Row
from llmcache.bench.paper import (
    accuracy,
    fingerprints,
    memory,
    records,
    tables,
    texts,
)
from llmcache.bench.paper import eviction as evictions
from llmcache.bench.paper import layer_hits as layerwise
from llmcache.bench.paper import thresholds as taus
from llmcache.bench.paper.decoders import decoders, first_token, prefix_representatives
from llmcache.bench.paper.experiments import EXPERIMENTS
from llmcache.bench.paper.latency import LOWEST, check, latency, layer_taus
from llmcache.bench.paper.models import (
    REAL,
    SHAPES,
    Made,
    agreement,
    decisions,
    seeded,
)
from llmcache.bench.paper.plots import plot
from llmcache.bench.paper.records import Work
from llmcache.bench.paper.texts import Workload
from llmcache.errors import ConfigError
from llmcache.indexes.eviction.policies import POLICIES
from llmcache.model.batching import token_embedding
from tests.conftest import DATA, MODELS, Command
from tests.readme_figures import paper_page

TINY: dict[str, dict[str, Any]] = {
    "BERT-base": {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "DistilBERT": {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64},
    "GPT-2-small": {"n_layer": 3, "n_embd": 32, "n_head": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Small models of the three shapes, with the real tokenizers."""
    if not (MODELS / "tok-bert-base-uncased").exists():
        pytest.skip(f"the tokenizers are not at {MODELS}; set LLMCACHE_MODELS to the folder that holds them")
    folder = tmp_path_factory.mktemp("models")
    return {name: seeded(shape.smaller(**TINY[name]), MODELS, folder) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def data() -> Path:
    if not (DATA / "qa-squad2-dev").exists():
        pytest.skip(f"the data sets are not at {DATA}; set LLMCACHE_DATA to the folder that holds them")
    return DATA


@pytest.fixture(scope="module")
def films(data: Path) -> Workload:
    """Film sentences with two labels."""
    return texts.labelled(data, "cls-sst2", "SST-2").some(260, 40)


# -- texts --------------------------------------------------------------------------------------------------


def test_nothing_that_is_asked_is_known_letter_for_letter(data: Path) -> None:
    for workload in (one for read in texts.READERS.values() for one in (read(data), read(data).whole(50, 8))):
        assert workload.known
        assert workload.asked
        assert not set(workload.known) & set(workload.asked)
        assert len(workload.known) == len(workload.known_labels)
        assert len(workload.asked) == len(workload.asked_labels)


def test_questions_that_are_asked_stand_behind_paragraphs_that_are_known(data: Path) -> None:
    workload = texts.squad(data)
    known = {text.partition("\nQuestion: ")[0] for text in workload.known}
    assert all(text.partition("\nQuestion: ")[0] in known for text in workload.asked)
    assert all(len(text.split()) <= texts.LONGEST for text in known)
    fewer = workload.whole(50, 10)
    assert len(fewer.known) <= 50
    assert len(fewer.asked) == 10
    assert set(fewer.asked_labels) <= set(fewer.known_labels)
    with pytest.raises(ConfigError, match="10 documents to ask are too few for a warm-up and 10 rounds"):
        check(fewer, 10)
    with gzip.open(data / "qa-squad2-dev" / "dev-v2.0.json.gz", "rt", encoding="utf-8") as file:
        every = {one["context"] for article in json.load(file)["data"] for one in article["paragraphs"]}
    assert known <= every


def test_windows_are_running_text_of_one_article(data: Path) -> None:
    workload = texts.wikitext(data)
    with gzip.open(data / "text-wikitext2-valid" / "valid.txt.gz", "rt", encoding="utf-8") as file:
        running = " ".join(file.read().split())
    assert len(set(workload.known_labels)) == 60
    for text in (workload.known[0], workload.known[100], workload.asked[-1]):
        assert len(text.split()) == texts.WINDOW
        assert text in running or " = " in running  # a heading may stand between two paragraphs of a window
    assert workload.known[0] in running


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no qa-squad2-dev/dev-v2\.0\.json\.gz; --data names its folder"):
        texts.squad(tmp_path)
    with pytest.raises(ConfigError, match="has no cls-sst2"):
        texts.labelled(tmp_path, "cls-sst2", "SST-2")
    with pytest.raises(ConfigError, match="has no tok-gpt2; --models names"):
        seeded(SHAPES["GPT-2-small"], tmp_path, tmp_path)


# -- latency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_rule_and_a_cache_of_final_outputs_hit_alike_and_answer_alike(
    made: dict[str, Made], data: Path, name: str, tmp_path: Path
) -> None:
    workload = texts.squad(data).whole(40, 6)
    rows = {row["method"]: row for row in latency(made[name], workload, tmp_path / "caches", rounds=2)}
    alone, fixed, rule = rows["NoCache"], rows["DocCache"], rows[tables.RULE]
    assert alone["hits"] == 0
    assert alone["agreement"] == alone["ratio"] == 1
    assert fixed["hits"] == rule["hits"] > 0.5
    assert fixed["agreement"] == rule["agreement"] <= 1
    assert rule["cosine_of_hits"] > 1e-6, "a neighbour's answer is another question's"
    assert fixed["cosine_of_hits"] == pytest.approx(rule["cosine_of_hits"], abs=1e-4)
    assert sum(rule["layer_hits"].values()) == pytest.approx(rule["hits"])
    assert max(row["difference_of_computed"] for row in rows.values()) < 1e-4
    assert all(row["again_hits"] == 1 for one, row in rows.items() if one not in ("NoCache", "LLMCache, ours"))
    assert ("LLMCache, ours" in rows) == (name != "GPT-2-small")
    assert not (tmp_path / "caches").exists(), "stores are large"


def test_hits_are_those_that_can_be_counted_from_the_fingerprints(
    made: dict[str, Made], data: Path, tmp_path: Path
) -> None:
    one = made["BERT-base"]
    workload = texts.openbookqa(data).whole(36, 9)
    rows = {row["method"]: row for row in latency(one, workload, tmp_path / "caches", rounds=2)}
    embedding = token_embedding(one.model).detach().numpy()

    def prints(some: list[str]) -> np.ndarray[Any, Any]:
        ids = [one.model.tokenizer(text)["input_ids"] for text in some]
        means = np.array([embedding[row].mean(axis=0) for row in ids]).astype(np.float16).astype(np.float64)
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))

    size = rows["NoCache"]["documents"] // 2
    asked = workload.asked[: 3 * size]
    known = [*workload.known, *asked[:size]]  # the warm-up is stored where it did not hit; its round counts for none
    nearest = (prints(asked[size:]) @ prints(known).T).max(axis=1)
    of_known = (prints(asked[size:]) @ prints(workload.known).T).max(axis=1)
    expected = float((of_known >= LOWEST).mean())
    assert expected <= rows["DocCache"]["hits"] <= float((nearest >= LOWEST).mean()) + 1 / len(nearest)


def test_taus_rise_from_the_lowest_layer_to_the_deepest() -> None:
    assert layer_taus((2, 5, 8, 11)) == {2: 0.82, 5: 0.84, 8: 0.86, 11: 0.88}


def test_a_decoder_with_restored_beginnings_gives_its_own_logits(
    made: dict[str, Made], data: Path, tmp_path: Path
) -> None:
    decoder = made["GPT-2-small"]
    workload = texts.squad(data).whole(20, 6)
    kept, ours = decoders(decoder, workload, tmp_path / "store", rounds=1)
    assert kept["method"] == "KV-Cache"
    assert kept["agreement"] == 1
    assert ours["agreement"] == 1
    assert ours["difference_of_computed"] < 1e-4
    assert 0.3 < ours["restored_tokens"] < 1
    vectors = decoder.model.encode(workload.asked[:3])
    states = vectors @ decoder.decoder.lm_head.weight.detach().numpy().T
    ids = [decoder.model.tokenizer(text)["input_ids"] for text in workload.asked[:3]]
    np.testing.assert_allclose(states, first_token(decoder.decoder, ids, use_cache=False), atol=1e-4)


def test_beginnings_that_are_asked_come_first_and_once() -> None:
    same = "x" * 60
    assert prefix_representatives(["a", same + "1", "b", same + "2"], [same + "3"], 2) == [same + "1", "a"]


def test_decisions_are_those_of_a_linear_classifier_over_standardised_outputs(made: dict[str, Made]) -> None:
    outputs = np.random.default_rng(0).standard_normal((100, 12)).astype(np.float32) * 3 + 5
    head = decisions(made["BERT-base"], outputs)
    matrix = np.random.default_rng(0).standard_normal((8, 12))
    expected = ((outputs - outputs.mean(axis=0)) / outputs.std(axis=0)) @ matrix.T
    np.testing.assert_array_equal(head(outputs).argmax(axis=1), expected.argmax(axis=1))
    assert agreement(head, outputs, outputs).all()


# -- layers -------------------------------------------------------------------------------------------------


def test_states_are_the_means_of_what_the_layers_give(model: SentenceTransformer) -> None:
    asked = ["a short one", "and one that is a good deal longer than that", "x"]
    states = layerwise.pooled_states(Made(REAL, "real", model), asked, size=2)
    assert states.shape == (6, 3, 384)
    last = states[-1] / np.linalg.norm(states[-1], axis=1, keepdims=True)
    np.testing.assert_allclose(last, model.encode(asked), atol=1e-5)


def test_hits_of_a_layer_are_those_that_can_be_counted(model: SentenceTransformer, films: Workload) -> None:
    workload = films.some(40, 16)
    one = Made(REAL, "real", model)
    rows = layerwise.layer_hits(one, workload)
    known, asked = (layerwise.pooled_states(one, some) for some in (workload.known, workload.asked))
    for row in rows:
        mine, theirs = (
            part[row["layer"]] / np.linalg.norm(part[row["layer"]], axis=1, keepdims=True) for part in (known, asked)
        )
        similarity = (theirs @ mine.T).max(axis=1)
        clear = np.abs(similarity - layerwise.TAU) > 1e-3
        assert abs(row["state_hits"] - (similarity >= layerwise.TAU).mean()) <= (~clear).mean()
    hits = [row["input_hits"] for row in rows]
    assert hits == sorted(hits, reverse=True), "one similarity against a tau that rises"


# -- accuracy, tau, fingerprints ----------------------------------------------------------------------------


def test_accuracy_is_that_of_sklearn_on_what_a_cache_gives(
    model: SentenceTransformer, films: Workload, tmp_path: Path
) -> None:
    films = films.some(80, 24)
    rows = accuracy.accuracy(model, accuracy.with_head(films, "label"), films, tmp_path)
    by = {row["method"]: row for row in rows}
    known, asked = model.encode(films.known), model.encode(films.asked)
    head = LogisticRegression(C=10, max_iter=60).fit(known, films.known_labels)
    assert by["NoCache"]["accuracy"] == pytest.approx(accuracy_score(films.asked_labels, head.predict(asked)))
    assert by["ours, exact only"]["drop"] == by["ours, exact only"]["hits"] == 0
    assert by["ours, exact only"]["again_hits"] == 1
    row = by["the paper's rule, tau 0.82"]
    with LLMCache.open(tmp_path / "own", model, config=CacheConfig(tau=0.82)) as cache:
        cache.encode(films.known)
        results = list(cache.run(films.asked))
    given = head.predict(np.array([one.output for one in results]))
    assert row["hits"] == pytest.approx(np.mean([one.tier == "near" for one in results]))
    assert row["accuracy"] == pytest.approx(accuracy_score(films.asked_labels, given))
    assert row["drop"] == pytest.approx(by["NoCache"]["accuracy"] - row["accuracy"])
    assert {one["tau"] for one in rows if "tau" in one} == set(accuracy.TAUS)
    ours = by["ours, calibrated"]
    assert ours["hits"] == 0
    assert "80 entries are too few to learn from" in ours["reason"]


def test_choices_of_openbookqa_are_scored_by_their_nearest_fact(model: SentenceTransformer, data: Path) -> None:
    work = Work(data, MODELS, limit=32, repeats=1)
    work._made[REAL] = Made(REAL, "real", model)
    rows = accuracy.parts()["OpenBookQA"](work)
    questions = openbook_questions(data / OPENBOOKQA)
    questions = [questions[i] for i in texts.spread(len(questions), 16)]
    every = texts.openbook_facts(data)
    facts = model.encode([every[i] for i in texts.spread(len(every), 64)])
    right = 0
    for stem, choices, place in questions:
        vectors = model.encode([f"{stem} {one}" for one in choices])
        right += int((vectors @ facts.T).max(axis=1).argmax() == place)
    assert rows[0]["questions"] == 16
    assert rows[0]["accuracy"] == pytest.approx(right / 16)


def test_fewer_documents_hit_as_tau_rises(model: SentenceTransformer, films: Workload, tmp_path: Path) -> None:
    values = (0.5, 0.85, 0.98)
    rows = taus.taus(model, films.some(60, 24), tmp_path, 2, values)
    assert [row["tau"] for row in rows] == list(values)
    hits = [row["hits"] for row in rows]
    assert hits[0] > hits[-1]
    assert all(one >= other - 0.05 for one, other in pairwise(hits)), "misses are stored on the way"
    assert all(row["flips"] <= row["hits"] for row in rows)
    assert rows[-1]["drop"] == pytest.approx(0, abs=rows[-1]["flips"])


def test_every_fingerprint_is_measured_on_documents_it_was_not_fitted_on(
    model: SentenceTransformer, films: Workload
) -> None:
    rows = fingerprints.fingerprints(model, films, repeats=1)
    assert [row["fingerprint"].split()[0] for row in rows] == ["PCA", "SimHash", "none,", "distilled", "PCA", "SimHash"]
    assert all(0 <= row["flips"] <= row["hits"] <= 1 and row["us"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="fitted on 256 documents or more, there are 100"):
        fingerprints.fingerprints(model, films.some(100, 10))


def test_the_lowest_tau_keeps_its_budget_and_no_lower_one_does() -> None:
    random = np.random.default_rng(0)
    similarity = random.choice(np.linspace(0, 1, 60), 400).astype(np.float32)
    wrong = random.random(400) < 0.3 * (1 - similarity)
    tau = fingerprints.lowest_tau(similarity, wrong, 0.02)
    shares = {one: (wrong & (similarity >= one)).sum() / 400 for one in np.unique(similarity)}
    assert tau == pytest.approx(min(one for one in shares if all(shares[o] <= 0.02 for o in shares if o >= one)))
    assert fingerprints.lowest_tau(similarity, np.ones(400, np.bool_), 0.0) == np.inf


# -- memory, eviction ---------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_folder_and_hits_do_not_depend_on_what_is_kept(
    model: SentenceTransformer, films: Workload, tmp_path: Path
) -> None:
    workload = films.some(24, 8)
    rows = memory.memory(model, workload, tmp_path)
    assert len(rows) == len(memory.KEPT) * len(memory.SHARES)
    for count in {row["known"] for row in rows}:
        assert len({row["hits"] for row in rows if row["known"] == count}) == 1
    (largest,) = (row for row in rows if row["kept"] == "output, float32" and row["known"] == 24)
    with LLMCache.open(tmp_path / "own", model) as cache:
        cache.encode(workload.known)
        cache.rebuild()
    own = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(tmp_path / "own") for name in names)
    assert largest["bytes"] == pytest.approx(own, rel=0.05), "four commits take a little more than one"
    by = {row["kept"]: row for row in rows if row["known"] == 24}
    assert by["all layers, float32"]["bytes"] > 10 * by["output, float32"]["bytes"]
    assert by["output, float32"]["difference"] < 1e-6 < by["output, int8"]["difference"] < 0.05
    assert not (tmp_path / "store").exists()


def test_a_replay_under_lru_hits_as_an_ordered_dict_does() -> None:
    n, budget = 200, 40
    docs = evictions.Documents(
        np.ones(n, np.int64), np.ones(n), np.zeros((n, n), np.float32), np.zeros((n, n), np.bool_),
        np.zeros((n, n), np.float32),
    )  # fmt: skip
    requests = evictions.stream(n, 3000)
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for one in requests.tolist():
        if one in held:
            hits += 1
            held.move_to_end(one)
            continue
        held[one] = None
        if len(held) > budget:
            held.popitem(last=False)
    found = evictions.replay(docs, requests, "lru", budget)
    assert found["hits"] == found["exact"] == hits / 3000
    bound = evictions.best_possible(docs, requests, budget)
    assert all(evictions.replay(docs, requests, one, budget)["hits"] <= bound for one in POLICIES)
    everything = evictions.replay(docs, requests, "lru", n)
    assert everything["hits"] == (3000 - len(np.unique(requests))) / 3000 == evictions.best_possible(docs, requests, n)


def test_in_a_replay_a_similar_document_answers_and_audits_tell_which_is_wrong() -> None:
    similarity = np.array([[0, 0.9, 0.5], [0.9, 0, 0.5], [0.5, 0.5, 0]], np.float32)
    wrong = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]], np.bool_)
    docs = evictions.Documents(np.ones(3, np.int64), np.ones(3), similarity, wrong, wrong.astype(np.float32))
    found = evictions.replay(docs, np.array([0, 1, 0, 2, 1]), "lru", 10, tau=0.85)
    assert (found["exact"], found["near"], found["wrong"], found["wrong_of_near"]) == (0.2, 0.4, 0.4, 1.0)


def test_a_store_is_never_larger_than_its_budget(model: SentenceTransformer, films: Workload, tmp_path: Path) -> None:
    rows = evictions.in_a_store(model, films.some(30, 1), tmp_path, 60, 1 << 20, call=30)
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert all(0 < row["largest"] <= row["budget"] for row in rows)
    distinct = len(np.unique(evictions.stream(30, 60)))
    assert all(row["hits"] == pytest.approx(1 - distinct / 60) for row in rows), "all of them fit"


# -- records, page, command ---------------------------------------------------------------------------------


def test_what_is_recorded_is_not_measured_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def part(name: str) -> records.Part:
        def measure(work: Work) -> list[Row]:
            asked.append(name)
            if name == "broken" and len(asked) < 3:
                raise KeyboardInterrupt
            return [{"name": name}]

        return measure

    experiments = {"one": {name: part(name) for name in ("first", "broken")}}
    work, lines = Work(tmp_path, tmp_path, repeats=1), list[str]()
    with pytest.raises(KeyboardInterrupt):
        records.run(experiments, ["one"], work, tmp_path, say=lines.append)
    kept = records.read(tmp_path / "one.json")
    assert kept is not None
    assert (list(kept["parts"]), kept["complete"]) == (["first"], False)
    records.run(experiments, ["one"], work, tmp_path, say=lines.append)
    (record,) = records.run(experiments, ["one"], work, tmp_path, say=lines.append)
    assert asked == ["first", "broken", "broken"]
    assert record["complete"]
    assert records.rows(record) == [{"name": "first"}, {"name": "broken"}]
    records.run(experiments, ["one"], work, tmp_path, say=lines.append, again=True)
    records.run(experiments, ["one"], Work(tmp_path, tmp_path, repeats=2), tmp_path, say=lines.append)
    assert asked[3:] == ["first", "broken"] * 2, "asked for, and with other repeats"
    (tmp_path / "one.json").write_text("{")
    records.run(experiments, ["one"], work, tmp_path, say=lines.append)
    assert any("no record that can be read" in line for line in lines)


def test_a_part_without_data_is_left_out_with_the_reason(llmcache: Command, tmp_path: Path, model_path: str) -> None:
    out = tmp_path / "out"
    done = llmcache(
        "bench", "paper", "--data", tmp_path, "--models", tmp_path, "--only", "tau", "--out", out, "--json"
    )  # fmt: skip
    assert done.code == 0
    (record,) = json.loads(done.out)["records"]
    assert not record["complete"]
    assert set(record["skipped"]) == {"BANKING77", "SST-2"}
    assert "has no cls-sst2; --data names" in done.err


def test_an_experiment_that_is_not_there_is_named(llmcache: Command, tmp_path: Path) -> None:
    done = llmcache("bench", "paper", "--data", tmp_path, "--models", tmp_path, "--only", "tau,speed")
    assert done.code == 2
    assert "there is no experiment 'speed'; there are: latency, layers" in done.err


def test_the_command_writes_a_record_a_figure_and_a_table(llmcache: Command, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="install the extra 'plot' for figures")
    arguments = ("bench", "paper", "--data", data, "--models", MODELS, "--limit", 32, "--repeats", 1, "--out", tmp_path)
    done = llmcache(*arguments, "--only", "memory")
    assert done.code == 0
    assert "| output, float32 |" in done.out
    record = records.read(tmp_path / "memory.json")
    assert record is not None
    assert record["complete"]
    assert (tmp_path / "memory.png").stat().st_size > 1000
    part = record["parts"]["BANKING77"]
    assert {"commit", "torch", "threads"} <= set(part["conditions"])
    assert (part["limit"], part["repeats"]) == (32, 1)
    again = llmcache(*arguments, "--only", "memory")
    assert "memory: BANKING77 is there" in again.err


def test_the_page_is_what_the_records_say() -> None:
    found = paper_page.recorded()
    if not found:
        pytest.skip("no record is in data/bench/paper yet: llmcache bench paper --out data/bench/paper")
    lines: list[str] = []
    assert paper_page.main(["--check"], lines.append) == 0, lines


def test_a_page_gets_its_tables_from_records_and_says_what_is_not_recorded() -> None:
    text = "a\n<!-- begin tau -->\nold\n<!-- end tau -->\n<!-- begin memory -->\n<!-- end memory -->\nz\n"
    row = {
        "data": "D", "tau": 0.8, "hits": 0.5, "flips": 0.1, "wrong_of_hits": 0.2, "drop": 0.01, "ratio": 2.0,
        "ratio_least": 1.5, "ratio_most": 2.5,
    }  # fmt: skip
    filled = paper_page.filled(text, {"tau": {"parts": {"D": {"rows": [row]}}}})
    assert "| 0.80 | 50.0 % | 10.0 % | 20.0 % | +1.0 | 2.00 (1.50-2.50) |" in filled
    assert "Not recorded yet: `llmcache bench paper --data DATA --models MODELS --only memory`." in filled
    assert paper_page.filled(filled, {"tau": {"parts": {"D": {"rows": [row]}}}}) == filled
    claimed = paper_page.claims({"tau": [row, {**row, "tau": 0.9, "drop": 0.0, "hits": 0.2}]})
    assert "D: from 0.90 on (20.0 % hits)" in claimed
    assert claimed.count("not recorded") >= 8


def test_every_experiment_has_a_table_a_figure_and_its_place_on_the_page() -> None:
    from llmcache.bench.paper.plots import DRAWN

    names = {found[2] for found in paper_page._BLOCK.finditer(paper_page.PAGE.read_text(encoding="utf-8"))}
    assert set(EXPERIMENTS) == set(tables.BLOCKS) == set(DRAWN) == names - {"claims", "conditions"}


def test_a_figure_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="install the extra 'plot' for figures")
    rows = [{"kept": "output", "bytes": 10, "hits": 0.5}]
    with pytest.raises(ConfigError, match="cannot be drawn"):
        plot({"experiment": "memory", "parts": {"a": {"rows": rows}}}, tmp_path / "nowhere" / "figure.png")

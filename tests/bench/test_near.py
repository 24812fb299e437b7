"""The measurement of near reuse, on small labelled sets."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache.bench.competitors.gptcache_rule import rivals
from llmcache.bench.harness.datasets import labelled_texts
from llmcache.bench.near import Labelled, exact_kernel_ridge, measure, recall, summary
from llmcache.bench.reusing import reusing
from llmcache.errors import ConfigError
from tests.near.test_correction import entries


def labelled(n: int, seed: int = 0) -> Labelled:
    found = entries(n, seed)
    return Labelled(found, np.where(found.outputs[:, 0] > 0, "yes", "no"))


def test_every_method_is_measured_on_documents_that_nothing_was_fitted_on() -> None:
    known, asked = labelled(560), labelled(300, seed=1)
    rows = list(measure(known, asked, seeds=2, budget=0.05, exact=False))
    methods = {row["method"] for row in rows}
    assert methods == {
        "paper: PCA, tau picked on test",
        "corrected, similarity",
        "corrected, consensus",
        "corrected, gate",
        "corrected, accuracy drop",
        "plain, consensus",
    }
    means = {(one["method"], one["drift_is"]): one for one in summary(rows)}
    gate, paper = means["corrected, gate", "label"], means["paper: PCA, tau picked on test", "label"]
    assert gate["seeds"] == 2
    assert (
        gate["worst_drift"] >= gate["drift"] == np.mean([r["drift"] for r in rows if r["method"] == "corrected, gate"])
    )
    assert gate["hits"] > paper["hits"]
    assert all(0 <= row["hits"] <= 1 and 0 <= row["drift"] <= row["hits"] for row in rows)


def test_recall_counts_the_true_neighbours_that_are_found_again() -> None:
    vectors = np.eye(12, dtype=np.float32)
    queries = np.arange(12, 0, -1, dtype=np.float32)[None]
    moved = vectors.copy()
    moved[0] = -moved[0]
    assert recall(queries, vectors, vectors, k=4) == 1
    assert recall(queries, moved, vectors, k=4) == 0.75


def test_exact_kernel_ridge_has_every_entry_as_a_landmark() -> None:
    known = entries(200)
    assert len(exact_kernel_ridge(known).landmarks) == 200


def test_labelled_texts_are_read_in_the_forms_they_come_in(tmp_path: Path) -> None:
    for ending, content in (
        ("csv", 'text,category\n"one, two",a\nthree,b\n'),
        ("tsv", "a\tone, two\nb\tthree\n"),
        ("txt", "a one, two\nb three\n"),
    ):
        folder = tmp_path / ending
        folder.mkdir()
        for part in ("train", "test"):
            (folder / f"{part}.{ending}").write_text(content, encoding="utf-8")
        assert labelled_texts(folder) == ([("one, two", "a"), ("three", "b")],) * 2
    with gzip.open(tmp_path / "test.csv.gz", "wt", encoding="utf-8") as file:
        file.write('"1","title","text"\n' * 8)
    train, test = labelled_texts(tmp_path)
    assert (train, test) == ([("title. text", "1")] * 6, [("title. text", "1")] * 2)
    with pytest.raises(ConfigError, match="no train and test"):
        labelled_texts(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def folder(queries: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries with the kind of question as their label."""
    path = tmp_path_factory.mktemp("labelled")
    chosen = [queries[i] for i in np.random.default_rng(0).permutation(len(queries))[:900]]
    kind = {"how": "how", "why": "why", "what": "what", "can": "can"}
    for name, texts in (("train", chosen[:700]), ("test", chosen[700:])):
        with (path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([text, kind.get(text.split()[0].lower(), "other")] for text in texts)
    return path


def test_a_run_end_to_end_is_compared_with_the_model_alone(model: SentenceTransformer, folder: Path) -> None:
    (row,) = reusing(model, folder, drift="label", budget=0.05, confidence=0.9, repeats=1)
    assert row["flips"] <= row["hits"] <= 1
    assert row["largest_difference_of_computed"] < 1e-5, "what is computed is the model's own"
    assert row["ratio"] > row["with_first"] > 0
    assert len(row["ratios"]) == len(row["state"]) == 1


def test_rules_are_compared_on_the_same_fingerprints(model: SentenceTransformer, folder: Path) -> None:
    rows = {row["method"]: row for row in rivals(model, folder, budget=0.05)}
    ours, guarded = rows["ours: corrected, gate"], rows["ours: corrected, gate, field guard"]
    fixed = rows["fixed 0.8 on the same fingerprints (GPTCache's rule)"]
    many = rows["final outputs, as many hits as ours"]
    assert all(row["wrong"] <= row["hits"] <= row["asked"] == 200 for row in rows.values())
    assert many["hits"] >= ours["hits"] >= 0
    assert ours["wrong_of_all"] <= 0.05 + 0.03
    assert guarded["wrong_of_all"] <= 0.05 + 0.03
    assert fixed["hits"] > 0

"""Corrected reuse against loops over documents; evidence, gates and cross-fitting."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from llmcache.errors import ConfigError
from llmcache.near.calibration.crossfit import ask, cross_fit, held_out_voting, unseen
from llmcache.near.calibration.drift import DriftMeasure, cosine_drift, label_drift
from llmcache.near.neighbors.correction import (
    DECIDED,
    EVIDENCE,
    TEMPERATURE,
    Mixed,
    Voting,
    choose_voting,
    corrected,
    decided,
    evidence,
    jaccard,
    mixtures,
    unit_norm,
    units,
    weights,
)
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import Entries, HostNeighborIndex
from llmcache.near.neighbors.linear_head import LinearHead
from tests.near.test_predictor import documents

Floats = NDArray[np.float32]


def batch(n: int = 6, k: int = 4, out: int = 5) -> tuple[Floats, Floats, Floats, Floats]:
    random = np.random.default_rng(0)
    outputs, predictions = (random.standard_normal((n, k, out)).astype(np.float32) for _ in range(2))
    similarity = np.sort(random.uniform(0, 1, (n, k)).astype(np.float32), axis=1)[:, ::-1]
    return random.standard_normal((n, out)).astype(np.float32), units(outputs), predictions, similarity


def entries(n: int, seed: int = 0) -> Entries:
    features, outputs = documents(n, seed)
    return Entries(features, outputs, [np.arange(seed, seed + 5, dtype=np.int32)] * n)


def test_the_result_is_the_weighted_outputs_moved_by_what_differs() -> None:
    predicted, outputs, predictions, similarity = batch()
    found = corrected(predicted, outputs, predictions, similarity, 0.1, 0.6)
    for i in range(len(predicted)):
        raw = np.exp(similarity[i] / 0.1)
        weight = raw / raw.sum()
        moved = weight @ outputs[i] + 0.6 * (predicted[i] - weight @ predictions[i])
        np.testing.assert_allclose(found[i], moved / np.linalg.norm(moved), rtol=1e-4)


def test_one_neighbour_and_no_strength_is_plain_reuse() -> None:
    predicted, outputs, predictions, similarity = batch(k=1)
    np.testing.assert_allclose(
        corrected(predicted, outputs, predictions, similarity, strength=0), outputs[:, 0], rtol=1e-5
    )


def test_a_repeat_of_an_entry_gets_about_its_output_back() -> None:
    known = entries(800)
    found = HostNeighborIndex.fit(known).look_up(known.take(np.arange(20)))
    np.testing.assert_array_equal(found.nearest, np.arange(20))
    assert cosine_drift(known.outputs[:20], found.results).max() < 0.1


def test_neighbours_that_are_missing_weigh_nothing() -> None:
    similarity = np.array([[0.9, 0.8, -np.inf], [-np.inf, -np.inf, -np.inf]])
    part = weights(similarity, 0.05)
    np.testing.assert_allclose(part[0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2)), 0], rtol=1e-5)
    np.testing.assert_array_equal(part[1], 0)


def test_outputs_that_are_not_unit_vectors_are_not_normalised() -> None:
    predicted, outputs, predictions, similarity = batch()
    assert unit_norm(outputs[:, 0])
    assert not unit_norm(2 * outputs[:, 0])
    found = corrected(predicted, outputs, predictions, similarity, unit=False)
    np.testing.assert_allclose(units(found), corrected(predicted, outputs, predictions, similarity), rtol=1e-4)
    assert not unit_norm(found)


@pytest.mark.parametrize(("temperature", "strength"), [(0, 0.5), (-1, 0.5), (0.1, -0.1), (0.1, 1.1), (np.nan, 0.5)])
def test_settings_that_cannot_work_are_refused(temperature: float, strength: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Voting(temperature, strength)


def test_evidence_names_what_it_says() -> None:
    predicted, outputs, predictions, similarity = batch()
    tokens = [np.arange(3)] * 6, [np.arange(7)] * 6
    seen = evidence(predicted, outputs, predictions, similarity, tokens, np.tile([1.0, 4, 2], (6, 1)))
    column = dict(zip(EVIDENCE + DECIDED, seen.T, strict=True))
    agree = np.einsum("nd,nkd->nk", outputs[:, 0], outputs[:, 1:4])
    np.testing.assert_allclose(column["dissimilarity"], np.log(1 - similarity[:, 0] + 1e-6), rtol=1e-4)
    np.testing.assert_allclose(column["margin"], similarity[:, 0] - similarity[:, 1], rtol=1e-4)
    np.testing.assert_allclose(column["consensus"], agree.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(column["least_consensus"], agree.min(axis=1), rtol=1e-4, atol=1e-5)
    for i in range(6):
        raw = np.exp(similarity[i] / TEMPERATURE)
        weight, apart = raw / raw.sum(), outputs[i] - predictions[i]
        own = weight @ np.square(apart).sum(axis=1)
        moved = np.square(predicted[i] - weight @ predictions[i]).sum()
        vote = np.linalg.norm(weight @ (outputs[i] / np.linalg.norm(outputs[i], axis=1, keepdims=True)))
        expected = np.log(moved), np.log(own), np.square(weight @ apart).sum() / own, vote
        given = [column[name][i] for name in ("shift", "residual", "coherence", "vote")]
        np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(column["length"], np.log(0.5), rtol=1e-4)
    np.testing.assert_allclose(column["overlap"], 3 / 7, rtol=1e-4)
    np.testing.assert_allclose(column["gap"], 2)
    np.testing.assert_allclose(column["gap_per_error"] ** 2 * np.exp(column["residual"]), 4, rtol=1e-3)


def test_a_row_that_lacks_neighbours_is_trusted_by_no_gate() -> None:
    predicted, outputs, predictions, similarity = batch()
    similarity = similarity.copy()
    similarity[2, 3] = -np.inf
    seen = evidence(predicted, outputs, predictions, similarity, ([np.arange(3)] * 6, [np.arange(3)] * 6))
    assert np.isneginf(safety(seen)).tolist() == [False, False, True, False, False, False]


def test_similarities_above_one_by_rounding_are_one() -> None:
    predicted, outputs, predictions, _ = batch(k=1)
    tokens = [np.arange(3)] * 6, [np.arange(3)] * 6
    seen = evidence(predicted, outputs, predictions, np.full((6, 1), 1.00001), tokens)
    assert np.isfinite(seen).all()


def test_a_single_neighbour_agrees_with_itself() -> None:
    predicted, outputs, predictions, similarity = batch(k=1)
    seen = evidence(predicted, outputs, predictions, similarity, ([np.arange(3)] * 6, [np.arange(3)] * 6))
    assert np.isfinite(seen).all()
    np.testing.assert_array_equal(seen[:, EVIDENCE.index("consensus")], 1)


def test_token_overlap_counts_distinct_tokens() -> None:
    one = [np.array([1, 2, 2, 3]), np.array([], np.int64)]
    np.testing.assert_allclose(jaccard(one, [np.array([2, 3, 4]), np.array([], np.int64)]), [0.5, 0])
    random = np.random.default_rng(0)
    sizes = random.integers(0, 9, (2, 200))
    many, others = ([random.integers(0, 30, size).astype(np.int32) for size in side] for side in sizes)
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(many, others, strict=True)]
    np.testing.assert_allclose(jaccard(many, others), [len(a & b) / max(1, len(a | b)) for a, b in pairs], rtol=1e-6)
    highest = [np.array([2**31 - 1, 0], np.int32)]
    np.testing.assert_array_equal(jaccard(highest * 3, highest * 3), 1)


def test_means_that_are_known_give_the_same_as_those_that_are_not() -> None:
    _, outputs, predictions, similarity = near = batch()
    tokens = [np.arange(3)] * 6, [np.arange(7)] * 6
    mixed = mixtures(outputs, predictions, similarity, 0.1)
    np.testing.assert_array_equal(corrected(*near, 0.1, 0.6, mixed=mixed), corrected(*near, 0.1, 0.6))
    np.testing.assert_array_equal(evidence(*near, tokens, None, 0.1, mixed), evidence(*near, tokens, None, 0.1))
    swapped = corrected(*near, 0.1, 0.6, mixed=Mixed(mixed[1], mixed[0]))
    assert (swapped != corrected(*near, 0.1, 0.6)).any()


def test_a_head_decides_as_clearly_as_its_best_two_scores_differ() -> None:
    np.testing.assert_allclose(decided(np.array([[0.1, 3, 1], [2, 2, 2]], np.float32)), [2, 0])
    np.testing.assert_allclose(decided(np.array([-1.5, 0.5], np.float32)), [1.5, 0.5])
    np.testing.assert_allclose(decided(np.ones((2, 1), np.float32)), 0)


def test_voting_is_chosen_by_what_comes_nearest_to_the_true_outputs() -> None:
    predicted, outputs, predictions, similarity = batch(400)
    wanted = corrected(predicted, outputs, predictions, similarity, 0.1, 0.5)
    assert choose_voting(predicted, outputs, predictions, similarity, wanted) == Voting(0.1, 0.5)
    assert 0 <= held_out_voting(entries(700)).strength <= 1


# -- gates --------------------------------------------------------------------------------------------------


def test_a_hit_is_safer_by_what_the_head_decides_beside_the_expected_error() -> None:
    predicted, outputs, predictions, similarity = batch()
    scores = np.random.default_rng(1).standard_normal((6, 3))
    seen = evidence(predicted, outputs, predictions, similarity, ([np.arange(3)] * 6, [np.arange(3)] * 6), scores)
    best = np.sort(scores, axis=1)
    expected = (best[:, -1] - best[:, -2]) / np.sqrt(1 - similarity[:, 0] + 1e-6)
    np.testing.assert_allclose(safety(seen), np.log(expected), rtol=1e-4)
    blind = safety(seen[:, : len(EVIDENCE)])
    np.testing.assert_array_equal(np.argsort(blind), np.argsort(similarity[:, 0]))


@pytest.mark.parametrize("volume", [1e-4, 0.05, 20.0])
def test_the_order_of_hits_does_not_depend_on_how_loud_a_head_is(volume: float) -> None:
    near = batch()
    scores = np.random.default_rng(1).standard_normal((6, 3)) + 3 * np.eye(6, 3)
    tokens = [np.arange(3)] * 6, [np.arange(3)] * 6
    once, twice = (safety(evidence(*near, tokens, factor * scores)) for factor in (1.0, volume))
    np.testing.assert_allclose(twice - once, np.log(volume), atol=1e-4)


def test_evidence_of_other_columns_is_refused() -> None:
    with pytest.raises(ConfigError, match="columns"):
        safety(np.zeros((3, 4)))


def test_what_has_no_neighbour_is_never_trusted() -> None:
    seen = np.zeros((2, len(EVIDENCE)))
    seen[0, 3], seen[1, 0] = np.nan, np.inf
    assert safety(seen).tolist() == [-np.inf, -np.inf]


def test_a_linear_head_is_pictured_exactly_and_another_one_by_its_labels() -> None:
    outputs = documents(500)[1]
    for classes in (2, 4):
        labels = np.argmax(outputs[:, :classes], axis=1)
        head = LogisticRegression(C=10).fit(outputs, labels)
        exact, learned = LinearHead.of(head), LinearHead.fit(outputs, head.predict(outputs))
        assert exact is not None
        assert learned is not None
        np.testing.assert_array_equal(exact(outputs).argmax(axis=1), head.predict(outputs))
        assert (learned(outputs).argmax(axis=1) == head.predict(outputs)).mean() > 0.95
    assert LinearHead.of(lambda given: given) is None
    assert LinearHead.fit(outputs, np.zeros(500)) is None


# -- cross-fitting ------------------------------------------------------------------------------------------


def judge_of(known: Entries) -> DriftMeasure:
    head = LogisticRegression().fit(known.outputs, known.outputs[:, 0] > 0)
    return DriftMeasure(label_drift(head), LinearHead.of(head))


def test_no_entry_is_looked_up_among_its_own_fold() -> None:
    known = entries(400)
    held = cross_fit(known, lambda rows: judge_of(known.take(rows)), folds=4)
    assert (held.fold != held.fold[held.found.nearest]).all()
    assert np.bincount(held.fold).tolist() == [100] * 4
    assert set(np.unique(held.drift)) <= {0.0, 1.0}


def test_the_judge_is_asked_for_with_the_other_folds_rows_only() -> None:
    known, seen = entries(300), []

    def asked(rows: NDArray[np.int64]) -> DriftMeasure:
        seen.append(rows)
        return DriftMeasure(cosine_drift)

    held = cross_fit(known, asked, folds=3)
    for number, rows in enumerate(seen):
        np.testing.assert_array_equal(rows, np.flatnonzero(held.fold != number))
    np.testing.assert_allclose(held.drift, cosine_drift(known.outputs, held.found.results), atol=1e-6)


def test_cross_fitted_drift_foretells_that_of_new_documents() -> None:
    known, asked = entries(900), entries(900, seed=1)
    judge = DriftMeasure(cosine_drift)
    held, real = cross_fit(known, lambda rows: judge), ask(HostNeighborIndex.fit(known), asked, judge)
    assert held.drift.mean() == pytest.approx(real.drift.mean(), rel=0.25)
    safe, shaky = np.array_split(np.argsort(-real.score), 2)
    assert real.drift[safe].mean() < real.drift[shaky].mean()


def test_identical_documents_can_be_cross_fitted() -> None:
    one = entries(1)
    same = one.take(np.zeros(200, np.int64))
    held = cross_fit(same, lambda rows: DriftMeasure(cosine_drift))
    np.testing.assert_allclose(held.drift, 0, atol=1e-6)


def test_too_few_entries_cannot_be_cross_fitted() -> None:
    with pytest.raises(ConfigError, match="70 entries in 5 folds"):
        cross_fit(entries(70), lambda rows: DriftMeasure(cosine_drift))


def test_a_sample_is_taken_without_what_the_cache_holds() -> None:
    keys = np.arange(12, dtype=np.uint64).reshape(6, 2)
    np.testing.assert_array_equal(unseen(keys, keys[[0, 3]]), [1, 2, 4, 5])
    with pytest.raises(ConfigError, match="all 6 documents"):
        unseen(keys, keys)

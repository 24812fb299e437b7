"""Prediction of outputs from features, against scikit-learn's exact solutions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from llmcache.errors import ConfigError
from llmcache.near.neighbors import predictor
from llmcache.near.neighbors.predictor import (
    Predictor,
    fit,
    kernel,
    projected,
)

Floats = NDArray[np.float32]


def documents(n: int, seed: int = 0, width: int = 12, out: int = 5) -> tuple[Floats, Floats]:
    """Return features, and unit outputs that are a smooth nonlinear function of the features."""
    law = np.random.default_rng(7)
    one, two = law.standard_normal((width, 16)), law.standard_normal((16, out))
    features = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    outputs = np.tanh(features @ one / 4) @ two
    return features, (outputs / np.linalg.norm(outputs, axis=1, keepdims=True)).astype(np.float32)


def cosine(one: Floats, other: Floats) -> float:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).mean())


def test_the_kernel_is_that_of_scikit_learn() -> None:
    from sklearn.metrics.pairwise import rbf_kernel

    points, others = documents(30)[0], documents(20, seed=1)[0]
    np.testing.assert_allclose(kernel(points, others, 0.1), rbf_kernel(points, others, gamma=0.1), rtol=1e-4)


def test_with_every_entry_a_landmark_it_is_exact_kernel_ridge() -> None:
    features, outputs = documents(600)
    fitted = fit(features, outputs, landmarks=600)
    points, asked = (projected(one, fitted.mean, fitted.matrix) for one in (features, documents(50, seed=1)[0]))
    exact = KernelRidge(alpha=fitted.penalty, kernel="rbf", gamma=fitted.gamma).fit(points, outputs - fitted.offset)
    expected = exact.predict(asked) + fitted.offset
    assert fitted.kind == "kernel"
    np.testing.assert_allclose(fitted(documents(50, seed=1)[0]), expected, atol=5e-3)


def test_without_landmarks_it_is_ridge_regression() -> None:
    features, outputs = documents(300)
    fitted = fit(features, outputs)
    points = projected(features, fitted.mean, fitted.matrix)
    expected = Ridge(alpha=fitted.penalty, fit_intercept=False).fit(points, outputs - fitted.offset).predict(points)
    assert fitted.kind == "ridge"
    np.testing.assert_allclose(fitted(features), expected + fitted.offset, atol=1e-4)


def test_the_kernel_predicts_curved_outputs_better_than_ridge_and_knows_how_well() -> None:
    features, outputs = documents(2000)
    asked, wanted = documents(500, seed=1)
    curved, straight = fit(features, outputs), fit(features, outputs, landmarks=0)
    assert cosine(curved(asked), wanted) > cosine(straight(asked), wanted) + 0.01
    assert curved.held_out == pytest.approx(cosine(curved(asked), wanted), abs=0.02)


def test_fewer_landmarks_than_entries_come_close(monkeypatch: pytest.MonkeyPatch) -> None:
    features, outputs = documents(2000)
    asked, wanted = documents(300, seed=1)
    few, many = fit(features, outputs, landmarks=400), fit(features, outputs, landmarks=2000)
    assert few.landmarks.shape[0] == 400
    assert cosine(few(asked), wanted) > cosine(many(asked), wanted) - 0.02
    monkeypatch.setattr(predictor, "FIT_ROWS", 700)
    bounded = fit(features, outputs, landmarks=2000)
    assert (len(bounded.landmarks), bounded.entries) == (700, 2000)


def test_a_batch_gives_what_single_documents_give() -> None:
    features, outputs = documents(1200)
    fitted = fit(features, outputs, landmarks=200)
    np.testing.assert_allclose(fitted(features)[[3, 1100]], fitted(features[[3, 1100]]), atol=1e-5)


def test_fingerprints_keep_the_neighbours_of_the_predictions() -> None:
    features, outputs = documents(1200, out=96)
    fitted = fit(features, outputs, landmarks=300)
    predicted = fitted(features)
    prints = fitted.fingerprints(predicted)
    np.testing.assert_allclose(np.linalg.norm(prints, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.basis.T @ fitted.basis, np.eye(64), atol=1e-5)
    whole = predicted / np.linalg.norm(predicted, axis=1, keepdims=True)
    best, found = ((one @ one.T - 2 * np.eye(1200)).argmax(axis=1) for one in (whole, prints))
    assert (best == found).mean() > 0.99


def test_it_comes_back_from_a_file_without_pickle() -> None:
    features, outputs = documents(800)
    fitted = fit(features, outputs, landmarks=64)
    file = io.BytesIO()
    np.savez(file, **fitted.to_arrays())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        again = Predictor.from_arrays(dict(stored))
    np.testing.assert_array_equal(again(features), fitted(features))
    assert (again.gamma, again.penalty, again.entries, again.held_out) == (
        fitted.gamma,
        fitted.penalty,
        fitted.entries,
        fitted.held_out,
    )


def test_damaged_arrays_are_refused() -> None:
    arrays = fit(*documents(100)).to_arrays()
    with pytest.raises(ConfigError, match="weights"):
        Predictor.from_arrays({name: one for name, one in arrays.items() if name != "weights"})
    with pytest.raises(ConfigError, match="do not fit"):
        Predictor.from_arrays({**arrays, "weights": arrays["weights"][:-1]})
    with pytest.raises(ConfigError, match="not finite"):
        Predictor.from_arrays({**arrays, "mean": np.full(12, np.nan, np.float32)})


def test_identical_documents_are_predicted_as_what_they_gave() -> None:
    features, outputs = np.ones((700, 8), np.float32), np.tile(np.array([[0.6, 0.8]], np.float32), (700, 1))
    np.testing.assert_allclose(fit(features, outputs)(features[:3]), outputs[:3], atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 63])
def test_too_few_entries_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"got {n}"):
        fit(*documents(n))


def test_numbers_that_are_not_finite_and_features_of_another_width_are_refused() -> None:
    features, outputs = documents(100)
    outputs[3, 0] = np.nan
    with pytest.raises(ConfigError, match="not finite"):
        fit(features, outputs)
    fitted = fit(*documents(100))
    with pytest.raises(ConfigError, match=r"fitted to \[n, 12\]"):
        fitted(features[:, :4])

"""Calibration from a budget to a threshold, on synthetic entries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from llmcache.near.calibration.calibrate import calibrated
from llmcache.near.calibration.head_fitting import refit_linear
from llmcache.near.neighbors.gate import safety
from llmcache.near.neighbors.index import HostNeighborIndex
from llmcache.near.neighbors.linear_head import LinearHead
from tests.near.test_correction import entries


class Loud:
    """A linear head with scaled logits and unchanged decisions; calibration fits it again in every fold."""

    def __init__(self, volume: float) -> None:
        weights = np.random.default_rng(5).standard_normal((3, entries(8).outputs.shape[1]))
        self.coef_, self.intercept_, self.classes_ = volume * weights, np.zeros(3), np.arange(3)

    def predict(self, outputs: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray((outputs @ self.coef_.T).argmax(axis=1))


def test_how_loud_a_head_decides_changes_neither_the_hits_calibrated_nor_those_given() -> None:
    known, asked = entries(600), entries(400, seed=1)
    given = []
    for volume in (0.05, 1.0, 50.0):
        head = Loud(volume)
        found, fitted = calibrated(known, None, None, None, budget=0.1, head=head, guarded=False)
        assert found.threshold is not None
        looked_up = HostNeighborIndex(known, fitted.predictor, found.voting).look_up(asked, LinearHead.of(head))
        hits = float((safety(looked_up.evidence) >= found.threshold).mean())
        assert abs(hits - found.hits) < 0.12, "what was calibrated is what is given"
        given.append(hits)
    assert max(given) - min(given) < 0.12


def test_a_classifier_is_fitted_again_with_its_own_settings() -> None:
    random = np.random.default_rng(0)
    outputs = random.standard_normal((300, 8)).astype(np.float32)
    answers = (outputs[:, 0] + 0.5 * random.standard_normal(300) > 0).astype(int)
    head = LogisticRegression(C=1e-3).fit(outputs[:100], answers[:100])
    again = refit_linear(head, outputs, answers)
    expected = LogisticRegression(C=1e-3).fit(outputs, answers)
    assert again is not None
    np.testing.assert_allclose(again.weights[1], expected.coef_[0], rtol=1e-4)
    plain = refit_linear(None, outputs, answers)
    assert plain is not None
    assert np.abs(plain.weights).max() > 5 * np.abs(again.weights).max(), "that of nobody has a weak penalty"

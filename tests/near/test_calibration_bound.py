"""The bound of near reuse, on documents of a known distribution: live look-ups work exactly as calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from llmcache.banks.pace import LEAST_DOCUMENTS, Pace
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.store import Store
from llmcache.near.calibration.calibrate import Calibration, FittedModels
from llmcache.near.calibration.recalibration import GROWN, grown
from llmcache.near.calibration_store import CalibrationStore
from llmcache.near.marks import FieldDigests
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.near_matches import TAKEN
from llmcache.near.neighbors.predictor import KERNEL, fit
from llmcache.near.repeats import NearAnswers
from tests.calibration_trials import SCOPE, Documents, Trial, answered, law, put, trials
from tests.near.test_predictor import documents

TRIALS = 96
CERTAIN = 0.999
"""A bound that holds in 95 of 100 calibrations fails this test in one of 1,000 draws of the trials."""
SETTINGS = ((70, 0.05), (160, 0.02), (160, 0.05), (300, 0.01))
LAWS = {"few drift": law(0.03, 24.0, classes=2), "some": law(0.1)}


def exceeding_at_most(count: int) -> int:
    """Return the most calibrations that exceed their budget, at a rate of one in twenty and confidence CERTAIN."""
    return int(binom.ppf(CERTAIN, count, 0.05))


@pytest.fixture(scope="module")
def of_samples() -> Sequence[Trial]:
    return list(trials(LAWS, TRIALS, sample=True, drift="label", settings=SETTINGS, large=(), fresh=2000))


def test_at_most_one_calibration_of_twenty_by_a_sample_exceeds_its_budget(of_samples: Sequence[Trial]) -> None:
    assert sum(one.exceeds() for one in of_samples) <= exceeding_at_most(TRIALS)
    assert sum(one.calibrated_hits > 0 for one in of_samples) > TRIALS / 2, "near reuse is on in most of them"
    assert sum(1 <= one.drifted <= 7 for one in of_samples) > TRIALS / 8, "among them samples with hardly any drift"


def test_hits_given_are_those_that_were_measured_on_a_sample(of_samples: Sequence[Trial]) -> None:
    given, measured = (np.mean([getattr(one, name) for one in of_samples]) for name in ("hits", "calibrated_hits"))
    assert given == pytest.approx(measured, abs=0.04)


def test_the_budget_is_kept_over_requests_of_very_different_popularity(of_samples: Sequence[Trial]) -> None:
    assert sum(one.exceeds("requests_once") for one in of_samples) <= exceeding_at_most(TRIALS)
    for one in of_samples:
        assert one.requests_once <= one.drift + 1e-12, "each document is wrong at most once, and asked at least once"


@pytest.mark.parametrize(("drift", "sample"), [("label", False), ("cosine", False), ("cosine", True)])
def test_at_most_one_calibration_of_twenty_exceeds_its_budget(drift: str, sample: bool) -> None:
    count = TRIALS // 2
    found = list(trials(LAWS, count, sample=sample, drift=drift, settings=SETTINGS, large=(), fresh=2000, seed=5000))
    assert sum(one.exceeds() for one in found) <= exceeding_at_most(count)
    assert sum(one.calibrated_hits > 0 for one in found) > count / 2


# -- the entries that answer --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(tmp_path / "store", create=True)) as opened:
        opened.declare("default", {}, {})
        yield opened


class Cache:
    """A bank with documents and its near reuse."""

    def __init__(self, store: Store, entries: int, seed: int, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig(audit_share=0.0)
        self.store, self._draw, self._random = store, LAWS["some"], np.random.default_rng(seed)
        first = self.draw(entries)
        facts = BankFacts("float32", first.outputs.shape[1], 1, first.features.shape[1])
        self.bank: Bank = store.bank("default", "output", lambda: facts, self.config.near)
        put(self.bank, first)
        self.near = CalibrationStore(store, "default", self.config, "output", self.bank, FieldDigests())

    def draw(self, n: int) -> Documents:
        return self._draw(self._random, n)

    def calibrate(self, known: NDArray[np.int64] | None, **settings: Any) -> Calibration:
        settings = {"budget": 0.1, "drift": "label", "head": self.draw(1).head, "guarded": False, **settings}
        return self.near.calibrate(known, SCOPE, commit=self.store.commit, **settings)

    def saved(self) -> NearMatcher:
        reuse = self.near.saved()
        assert reuse is not None
        return reuse


@pytest.mark.parametrize(("entries", "sample"), [(140, 70), (160, 160), (200, 600)])
def test_a_sample_answers_nobody_that_it_was_measured_without(store: Store, entries: int, sample: int) -> None:
    cache = Cache(store, entries, seed=entries)
    known = cache.bank.near.live()
    put(cache.bank, cache.draw(sample))
    found = cache.calibrate(known)
    assert (found.entries, found.samples, found.size) == (entries, sample, entries + sample)
    put(cache.bank, cache.draw(50))  # in the same second, and later
    asked = cache.draw(400)
    near = cache.saved().look_up(asked.features.astype(np.float32), asked.tokens, [""] * len(asked.tokens))
    assert (near.gate == TAKEN).any()
    rows, _ = cache.saved().neighbours(asked.features.astype(np.float32), asked.tokens)
    assert set(rows.ravel().tolist()) <= set(known.tolist())
    assert answered(cache.saved(), asked, "label")[0].mean() == pytest.approx(found.hits, abs=0.15)


@pytest.mark.parametrize("factor", [1, 3])
def test_a_sample_as_large_as_the_cache_is_not_thrown_away_by_a_calibration_without_it(
    store: Store, factor: int
) -> None:
    cache = Cache(store, 140, seed=3, config=CacheConfig(recalibrate=True))
    known = cache.bank.near.live()
    put(cache.bank, cache.draw(140 * factor))
    found = cache.calibrate(known)
    reuse, size = cache.saved(), len(cache.bank)
    reuse.select_for_lookup(1)
    assert reuse._refitting is None
    assert not grown(found, GROWN * size - 1)
    assert grown(found, GROWN * size), "from then on it is made again"


def test_every_entry_that_a_new_calibration_measured_answers_after_it(store: Store) -> None:
    cache = Cache(store, 140, seed=4, config=CacheConfig(recalibrate=True, audit_share=0.0))
    cache.calibrate(None)
    put(cache.bank, cache.draw(150))
    reuse = cache.saved()
    reuse.select_for_lookup(1)
    assert reuse._refitting is not None
    reuse._refitting.wait()
    reuse.select_for_lookup(1)
    reuse.refresh()
    assert sorted(reuse._rows.tolist()) == sorted(cache.bank.near.live().tolist())
    assert reuse.calibration.entries == reuse.calibration.size == 290


def test_which_entries_answer_comes_back_from_arrays_bit_for_bit() -> None:
    keys = np.sort(np.random.default_rng(0).integers(0, 2**64, 100, np.uint64))
    arrays = FittedModels(fit(*documents(70)), None, keys).to_arrays()
    stored = {name: one.astype(np.float32) for name, one in arrays.items()}
    again = FittedModels.from_arrays(stored).answering
    assert again is not None
    np.testing.assert_array_equal(again, keys)


@pytest.mark.parametrize("rule", [None, 1, 3])
def test_a_calibration_of_another_version_is_refused_with_what_to_do(store: Store, rule: int | None) -> None:
    raw = Cache(store, 140, seed=5).calibrate(None).to_json()
    assert Calibration.from_json(raw).to_json() == raw
    other = {name: value for name, value in raw.items() if name != "rule"} | ({"rule": rule} if rule else {})
    with pytest.raises(ConfigError, match="llmcache calibrate"):
        Calibration.from_json(other)


@pytest.mark.parametrize("n", [KERNEL // 2, KERNEL + 20, 2 * KERNEL])
def test_predictors_of_folds_are_of_the_kind_and_setting_of_the_one_that_answers(n: int) -> None:
    features, outputs = documents(n)
    whole = fit(features, outputs)
    part = fit(features[: n * 4 // 5], outputs[: n * 4 // 5], like=whole)
    assert part.kind == whole.kind
    assert part.gamma == whole.gamma
    assert part.penalty == pytest.approx(whole.penalty * (n * 4 // 5) / n)


# -- repeats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 5, None])
def test_no_document_is_answered_near_for_more_requests_than_allowed(most: int | None) -> None:
    random, answers, given = np.random.default_rng(0), NearAnswers(most), np.zeros(300, np.int64)
    for _ in range(200):
        asked, copies = np.unique(random.zipf(1.3, 64) % 300, return_counts=True)
        keys = np.stack([asked, asked + 1], axis=1).astype(np.uint64)
        allowed = answers.allowed(keys, copies)
        expected = np.ones(len(asked), np.bool_) if most is None else given[asked] + copies <= most
        np.testing.assert_array_equal(allowed, expected)
        answers.add(keys[allowed], copies[allowed])
        given[asked[allowed]] += copies[allowed]
    assert most is None or given.max() == most


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_a_number_of_near_answers_below_one_is_refused(repeats: Any) -> None:
    with pytest.raises(ConfigError, match="near_repeats"):
        CacheConfig(near_repeats=repeats)


# -- seconds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("seconds", "pays"), [(1e-9, False), (1.0, True)])
def test_whether_near_reuse_pays_is_decided_by_seconds_of_this_machine_whatever_was_recorded(
    store: Store, factor: float, seconds: float, pays: bool
) -> None:
    cache = Cache(store, 140, seed=6)
    cost, cache.bank.cost = cache.bank.cost, None  # type: ignore[method-assign, assignment]
    cache.bank.cost = lambda rows: factor * cost(rows)  # type: ignore[method-assign]
    cache.calibrate(None)
    probes = []

    def probe() -> tuple[int, float]:
        probes.append(1)
        return 10, 10 * seconds

    reuse = cache.saved()
    reuse.pace = Pace(probe)
    for _ in range(30):
        reuse.paid(64, given=64, spent=1e-3, audited=0)
    assert (reuse.stands_aside == "") == pays
    assert len(probes) == 1, "the model is asked once, when there is something to decide"


def test_the_pace_is_that_of_batches_that_this_opening_computed() -> None:
    pace = Pace(lambda: (1, 1.0))
    pace.observe(LEAST_DOCUMENTS - 1, 10, 100.0)
    assert not pace.known
    assert pace.seconds(10) == 0
    pace.observe(32, 1000, 2.0)
    pace.measure()
    assert pace.seconds(500) == pytest.approx(1.0), "nothing is computed again where something was measured"
    for _ in range(2000):
        pace.observe(32, 1000, 4.0)
    assert pace.seconds(500) == pytest.approx(2.0, rel=0.01), "what was long ago counts little"


def test_stored_settings_of_a_calibration_name_how_many_entries_there_were(store: Store) -> None:
    found = Cache(store, 140, seed=7).calibrate(None)
    assert (found.entries, found.size) == (140, 140)
    assert grown(replace(found, size=0), GROWN * 140)

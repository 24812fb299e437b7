"""Documents unlike the calibration sample raise an alarm; documents like the sample do not."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.search.projection import fit_pca
from llmcache.near.monitoring.distribution_shift import DistributionShift
from tests.conftest import DATA

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Floats = NDArray[np.floating]


def similarities(seed: int, count: int) -> Floats:
    return np.random.default_rng(seed).beta(8, 2, count)


def noticed(watch: DistributionShift, live: Floats) -> int:
    for end in range(5, len(live) + 1, 5):
        watch.observe(live[end - 5 : end])
        if watch.raised:
            return end
    return len(live) + 1


@pytest.mark.parametrize("count", [100, 1000])
def test_the_same_traffic_raises_no_alarm(count: int) -> None:
    false = 0
    for seed in range(300):
        watch = DistributionShift.fitted(similarities(seed, count), tolerance=0.0)
        watch.observe(similarities(1000 + seed, 2000))
        false += watch.raised
    assert false <= 3


def test_traffic_that_finds_nearer_entries_raises_no_alarm() -> None:
    watch = DistributionShift.fitted(similarities(0, 500))
    watch.observe(np.sqrt(similarities(1, 5000)))
    assert not watch.raised


def test_half_of_the_traffic_far_away_is_noticed_within_a_hundred_documents() -> None:
    for seed in range(50):
        live = similarities(seed, 2000)
        live[np.random.default_rng(seed).random(2000) < 0.5] *= 0.5
        assert noticed(DistributionShift.fitted(similarities(99, 400)), live) <= 100


def test_a_change_after_a_long_quiet_is_noticed() -> None:
    watch = DistributionShift.fitted(similarities(0, 400))
    watch.observe(similarities(1, 20_000))
    assert not watch.raised
    assert noticed(watch, similarities(2, 1000) * 0.5) <= 100


def test_the_reason_names_the_shares() -> None:
    watch = DistributionShift.fitted(similarities(0, 400))
    watch.observe(similarities(1, 300) * 0.4)
    assert watch.raised
    assert watch.documents == 300
    assert "of 300 documents are less similar to their nearest entry than" in watch.reason()


def test_what_was_saved_as_json_goes_on_where_it_was() -> None:
    watch = DistributionShift.fitted(similarities(0, 400))
    watch.observe(similarities(1, 333) * 0.9)
    again = DistributionShift.restored(json.loads(json.dumps(watch.state())))
    for each in (watch, again):
        each.observe(similarities(2, 100) * 0.8)
    assert again.state() == watch.state()
    assert again.reason() == watch.reason()


def test_documents_in_one_call_or_one_by_one_are_the_same() -> None:
    at_once, single = DistributionShift.fitted(similarities(0, 400)), DistributionShift.fitted(similarities(0, 400))
    live = similarities(1, 200) * 0.9
    at_once.observe(live)
    for one in live:
        single.observe([one])
    assert at_once.documents == single.documents
    assert at_once.raised == single.raised


def test_identical_similarities_raise_no_alarm_and_missing_ones_are_far() -> None:
    watch = DistributionShift.fitted(np.ones(200))
    watch.observe(np.ones(1000))
    assert not watch.raised
    watch.observe([np.nan] * 50)
    assert watch.raised


def test_a_sample_too_small_says_how_many_it_takes() -> None:
    with pytest.raises(ConfigError, match="at least 100 documents, got 99"):
        DistributionShift.fitted(similarities(0, 99))


def nearest(queries: Floats, entries: Floats) -> Floats:
    best: Floats = (queries @ entries.T).max(axis=1)
    return best


@pytest.fixture(scope="module")
def vectors(model: SentenceTransformer) -> dict[str, Floats]:
    """Return features of 4,000 queries of BANKING77 and of 4,000 of SNIPS, in random order."""
    from llmcache.model.batching import token_embedding
    from llmcache.model.features import features
    from llmcache.model.tokens import tokenise

    banking, snips = DATA / "cls-banking77" / "train.csv", DATA / "cls-snips" / "train.tsv"
    if not (banking.exists() and snips.exists()):
        pytest.skip(f"cls-banking77 and cls-snips are not in {DATA}; set LLMCACHE_DATA to the folder that holds them")
    with banking.open(newline="", encoding="utf-8") as file:
        texts = {"banking": [row["text"] for row in csv.DictReader(file)]}
    with snips.open(encoding="utf-8") as file:
        texts["snips"] = [line.rstrip("\n").split("\t")[1] for line in file]
    found = {}
    for name, every in texts.items():
        some = [every[place] for place in np.random.default_rng(0).permutation(len(every))[:4000]]
        found[name] = features(token_embedding(model), tokenise(model, some, None, None).ids, "mean")
    return found


@pytest.mark.parametrize(("ours", "theirs"), [("banking", "snips"), ("snips", "banking")])
def test_half_banking_half_snips_after_calibrating_on_one_is_noticed(
    vectors: dict[str, Floats], ours: str, theirs: str
) -> None:
    projection = fit_pca(vectors[ours][:2000], 128)
    projected = np.asarray(projection.apply(vectors[ours]), np.float64)
    entries, sample, live = projected[:2000], projected[2000:3000], projected[3000:]
    same = DistributionShift.fitted(nearest(sample, entries))
    same.observe(nearest(live, entries))
    assert not same.raised
    others = np.asarray(projection.apply(vectors[theirs][:1000]), np.float64)
    mixed = np.concatenate([live, others])[np.random.default_rng(1).permutation(2000)]
    assert noticed(DistributionShift.fitted(nearest(sample, entries)), nearest(mixed, entries)) <= 200

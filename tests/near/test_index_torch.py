"""Near look-ups on a device, compared with the host."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcache import CacheConfig, LLMCache
from llmcache.encoding.answers import NEAR
from llmcache.encoding.call import EncodeCall
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.indexes.search.bank_index import half
from llmcache.model.batching import token_embedding
from llmcache.model.features import features, features_on
from llmcache.near.neighbors import index_torch as ondevice
from llmcache.near.neighbors.correction import (
    DECIDED,
    EVIDENCE,
    Voting,
    units,
)
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, rounded
from llmcache.near.neighbors.index_torch import DeviceMemory
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.near_matches import TAKEN
from llmcache.near.neighbors.predictor import fit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [200, 900])
def test_predictions_and_fingerprints_are_those_of_the_host(device: str, count: int) -> None:
    random = np.random.default_rng(0)
    raw = half(random.standard_normal((count, 30)))
    outputs = units(np.tanh(raw.astype(np.float32) @ random.standard_normal((30, 16))))
    predictor = fit(raw, outputs, landmarks=300)
    assert predictor.kind == ("kernel" if count == 900 else "ridge")
    asked = half(random.standard_normal((77, 30)))
    on_device = predictor.regression.on(device)
    predicted = on_device(torch.from_numpy(asked).to(device))
    np.testing.assert_allclose(predicted.cpu().numpy(), predictor(asked), atol=2e-5)
    np.testing.assert_allclose(
        on_device.fingerprints(predicted).cpu().numpy(), predictor.fingerprints(predictor(asked)), atol=1e-4
    )
    assert on_device(torch.from_numpy(asked[:0]).to(device)).shape == (0, 16)


@pytest.mark.parametrize("fingerprint", ["mean", "mean+attention"])
def test_features_on_the_device_of_the_embedding_are_those_of_numpy(fingerprint: str) -> None:
    embedding = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    tokens = [np.array([1, 2, 3], np.int32), np.array([7], np.int32), np.array([3, 3, 4, 9], np.int32)]
    found = features_on(embedding, tokens, fingerprint)
    np.testing.assert_array_equal(found.numpy(), features(embedding, tokens, fingerprint))
    if fingerprint == "mean":
        expected = np.stack([embedding.numpy()[one].mean(axis=0) for one in tokens])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert features_on(embedding, [], fingerprint).shape == (0, found.shape[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_bank_finds_the_same_for_tensors_as_for_arrays(
    fresh_model: SentenceTransformer, queries: list[str], tmp_path: Path, device: str
) -> None:
    model = fresh_model.to(device)
    config = CacheConfig(index="torch", device="cuda" if device == "cuda" else "cpu")
    with LLMCache.open(tmp_path / "s", model, config=config) as cache:
        cache.encode(queries[:80])
        tokens = [np.array(ids, np.int32) for ids in cache.tokenizer(queries[80:120])["input_ids"]]
        bank, raw = cache._bank, features_on(token_embedding(model), tokens, "mean")
        rows, similarity = bank.nearest(raw, 3)
        expected = bank.nearest(raw.cpu().numpy(), 3)
        np.testing.assert_array_equal(rows[:, 0], expected[0][:, 0])
        np.testing.assert_allclose(similarity, expected[1], atol=1e-5)
        assert bank.near.takes_tensors == (device == "cuda")


# -- calibrated near reuse ----------------------------------------------------------------------------------

KNOWN, ASKED = 900, 300


@pytest.fixture(scope="module")
def asks(queries: list[str]) -> list[str]:
    """Return the queries shuffled, since they are sorted by intent."""
    return [queries[i] for i in np.random.default_rng(0).permutation(len(queries))]


@pytest.fixture(scope="module")
def embedded(model: SentenceTransformer, asks: list[str]) -> Entries:
    """Return stored and asked queries with their all-MiniLM-L6-v2 outputs; features are not rounded."""
    texts = asks[: KNOWN + ASKED]
    tokenizer: Any = model.tokenizer
    tokens = [np.array(ids, np.int32) for ids in tokenizer(texts)["input_ids"]]
    return Entries(features(token_embedding(model), tokens, "mean"), np.asarray(model.encode(texts)), tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["no head", "a linear head", "logits"])
def test_matches_among_real_queries_are_those_of_the_host(embedded: Entries, device: str, kind: str) -> None:
    known, asked = embedded.take(np.arange(KNOWN)), embedded.take(np.arange(KNOWN, KNOWN + ASKED))
    known = Entries(half(known.features), known.outputs, known.tokens)
    random = np.random.default_rng(1)
    head = LinearHead(random.standard_normal((7, 384)).astype(np.float32), np.linspace(0, 0.6, 7, dtype=np.float32))
    scores: Any = {"no head": None, "a linear head": head, "logits": lambda outputs: outputs}[kind]
    predictor, voting = fit(known.features, known.outputs, landmarks=500), Voting(0.05, 0.75)
    kept = rounded(predictor(known.features))
    expected = HostNeighborIndex(known, predictor, voting, kind="flat", predictions=kept).match(
        asked.features, asked.tokens, scores
    )
    raw = torch.from_numpy(asked.features).to(device)
    # a number predicted on the device may round to the neighbouring float16
    for given, predictions, apart in ((raw, kept, 2e-5), (asked.features, kept, 2e-5), (raw, None, 2e-4)):
        there = DeviceMemory(known, predictor, voting, device, predictions=predictions)
        found = there.match(given, asked.tokens, scores)
        assert isinstance(found.results, torch.Tensor)
        assert found.results.device.type == device
        # the eighth neighbour by fingerprint may differ when two are equally near
        assert (found.neighbours == expected.neighbours).mean() > 0.99
        same = (found.neighbours == expected.neighbours).all(axis=1)
        assert same.mean() > 0.97
        np.testing.assert_allclose(found.similarities[same], expected.similarities[same], atol=apart)
        np.testing.assert_allclose(found.results.cpu().numpy()[same], expected.results[same], atol=apart)
        columns = len(EVIDENCE) + (0 if scores is None else len(DECIDED))
        assert found.evidence.shape == (ASKED, columns)
        # logarithms of small numbers amplify rounding
        np.testing.assert_allclose(found.evidence[same], expected.evidence[same], atol=5e-3, rtol=1e-3)
    rows, similarity = there.nearest(raw, asked.tokens)
    np.testing.assert_array_equal(rows, found.neighbours)
    np.testing.assert_array_equal(similarity, found.similarities)
    none = there.match(raw[:0], [], scores)
    assert none.results.shape == (0, 384)
    assert (none.neighbours.shape, none.evidence.shape) == ((0, 8), (0, columns))


@pytest.mark.parametrize("device", DEVICES)
def test_entries_of_two_bytes_are_held_so_and_predictions_that_are_known_are_taken(
    embedded: Entries, device: str
) -> None:
    known = embedded.take(np.arange(200))
    outputs = half(known.outputs).astype(np.float32)
    known = Entries(half(known.features), outputs, known.tokens)
    predictor = fit(known.features, outputs)
    wrong = half(np.roll(predictor(known.features), 1, axis=0)).astype(np.float32)
    host = HostNeighborIndex(known, predictor, Voting(), kind="flat", predictions=wrong)
    for one in (known.features, outputs):
        one.flags.writeable = False  # like arrays mapped from a file
    there = DeviceMemory(known, predictor, Voting(), device, predictions=wrong, dtype=torch.float16)
    assert there._stored.outputs.dtype == torch.float16
    asked = embedded.take(np.arange(300, 360))
    expected, found = (one.match(asked.features, asked.tokens) for one in (host, there))
    assert isinstance(found.results, torch.Tensor)
    np.testing.assert_array_equal(found.neighbours[:, 0], expected.neighbours[:, 0])
    np.testing.assert_allclose(found.results.cpu().numpy(), expected.results, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_caller_computes_in_changes_nothing(embedded: Entries, device: str) -> None:
    known = embedded.take(np.arange(200))
    known = Entries(half(known.features), known.outputs, known.tokens)
    there = DeviceMemory(known, fit(known.features, known.outputs), Voting(), device)
    asked = embedded.take(np.arange(300, 340))
    expected = there.match(asked.features, asked.tokens)
    with torch.autocast(device, torch.bfloat16):
        found = there.match(asked.features, asked.tokens)
    assert isinstance(found.results, torch.Tensor)
    assert found.results.dtype == torch.float32
    np.testing.assert_array_equal(found.evidence, expected.evidence)


@pytest.fixture(scope="module")
def calibrated(model: SentenceTransformer, asks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a calibrated store with the first queries."""
    path = tmp_path_factory.mktemp("calibrated") / "store"
    with LLMCache.open(path, model) as cache:
        cache.encode(asks[:KNOWN])
        assert cache.calibrate(budget=0.2, drift="beyond", limit=0.3).threshold is not None
    return path


def opened_there(
    monkeypatch: pytest.MonkeyPatch, path: Path, model: SentenceTransformer, device: str, **settings: Any
) -> LLMCache:
    """Open the store with near look-ups on the device. The CPU counts as a device."""
    monkeypatch.setattr(ondevice, "_DEVICES", ("cpu", "cuda"))
    config: Any = CacheConfig(device="cuda" if device == "cuda" else "cpu", recalibrate=False, **settings)
    return LLMCache.open(path, model.to(device), config=config)


def raw_of(cache: LLMCache, texts: list[str]) -> tuple[NDArray[np.float32], list[NDArray[np.int32]], list[str]]:
    tokens = [np.array(ids, np.int32) for ids in cache.tokenizer(texts)["input_ids"]]
    return features(cache._execution.embedding, tokens, "mean"), tokens, texts


@pytest.mark.parametrize("device", DEVICES)
def test_a_calibrated_cache_decides_on_the_device_as_on_the_host(
    fresh_model: SentenceTransformer, calibrated: Path, asks: list[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    asked = asks[KNOWN : KNOWN + ASKED]
    with LLMCache.open(calibrated, fresh_model.to(device), config=CacheConfig(recalibrate=False)) as cache:
        on_host: Any = cache._execution.reuse
        assert on_host.place is None
        expected = on_host.look_up(*raw_of(cache, asked))
    with opened_there(monkeypatch, calibrated, fresh_model, device) as cache:
        reuse: Any = cache._execution.reuse
        assert reuse.place.type == device
        found = reuse.look_up(*raw_of(cache, asked))
        assert isinstance(reuse.refresh(), DeviceMemory)
        assert cache.explain(asked[0]).as_dict()["neighbours"]
    assert 0.1 < (expected.gate == TAKEN).mean() < 1
    # a score equal to the threshold may fall to either side
    near_threshold = np.abs(expected.score - reuse.audits.threshold) < 0.02
    assert near_threshold.mean() < 0.05
    np.testing.assert_array_equal(found.gate[~near_threshold], expected.gate[~near_threshold])
    np.testing.assert_allclose(found.score, expected.score, atol=0.02)
    assert (found.rows == expected.rows).mean() > 0.99
    np.testing.assert_allclose(found.closest, expected.closest, atol=1e-5)
    both = (found.gate == TAKEN) & (expected.gate == TAKEN)
    assert isinstance(found.given(both), torch.Tensor)
    np.testing.assert_allclose(found.on_host(both), expected.on_host(both), atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_near_and_exact_hits_and_misses_of_a_batch_stay_on_the_device(
    fresh_model: SentenceTransformer,
    calibrated: Path,
    asks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    memory: int,
) -> None:
    mixed = [*asks[KNOWN - 20 : KNOWN + 150], *asks[KNOWN : KNOWN + 10]]
    for name in ("host", "device"):
        shutil.copytree(calibrated, tmp_path / name)
    quiet = {"audit_share": 0.0, "recalibrate": False, "near_repeats": None}
    with LLMCache.open(tmp_path / "host", fresh_model.to(device), config=CacheConfig(**quiet)) as cache:  # type: ignore[arg-type]
        expected = list(cache.run(mixed))
    with opened_there(
        monkeypatch, tmp_path / "device", fresh_model, device, audit_share=0.0, device_bytes=memory, near_repeats=None
    ) as cache:
        answers = cache._execution.answers(EncodeCall(mixed, tensor=True))
        assert isinstance(answers, DeviceAnswers)
        assert answers.there[answers.tier == NEAR].all()
        assert answers.there.all() == (memory > 0), "what was read from the files goes there at the end"
        tiers = np.array(["miss", "exact", "near"])[answers.tier]
        assert {"miss", "exact", "near"} == set(tiers.tolist())
        same = tiers == np.array([one.tier for one in expected])
        assert same.mean() > 0.98
        outputs = answers.vectors()
        assert outputs.device.type == device
        theirs = np.stack([one.output for one in expected])
        np.testing.assert_allclose(outputs.cpu().numpy()[same], theirs[same], atol=2e-4)
        near = answers.tier == NEAR
        assert all(one.source for one, hit in zip(expected, near & same, strict=True) if hit)
        assert np.isfinite(answers.consensus[near]).all()
        again = cache.encode(mixed[:60], convert_to_tensor=True)
        assert (again.device.type, again.dtype) == (device, torch.float32)
        np.testing.assert_allclose(again.cpu().numpy()[same[:60]], theirs[:60][same[:60]], atol=2e-4)
        arrays = cache.encode(mixed[:60])  # a call that wants arrays on the host
        np.testing.assert_allclose(arrays, again.cpu().numpy(), atol=1e-5)


def test_near_hits_of_the_host_are_among_tensors_that_come_from_memory(
    model: SentenceTransformer, calibrated: Path, asks: list[str], tmp_path: Path
) -> None:
    shutil.copytree(calibrated, tmp_path / "s")
    asked = asks[KNOWN - 20 : KNOWN + 100]
    config = CacheConfig(audit_share=0, recalibrate=False, device_bytes=1 << 20)
    with LLMCache.open(tmp_path / "s", model, config=config) as cache:
        assert cache._execution.reuse is not None
        assert cache._execution.reuse.place is None
        answers = cache._execution.answers(EncodeCall(asked, tensor=True))
        assert isinstance(answers, DeviceAnswers)
        near = answers.tier == NEAR
        assert near.any()
        assert (answers.there == ~near).all()
        outputs = answers.vectors().numpy()
        np.testing.assert_array_equal(outputs[near], answers.outputs[near])
        np.testing.assert_allclose(outputs[~near], model.encode([asked[i] for i in np.flatnonzero(~near)]), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_audits_judge_what_was_found_on_the_device(
    fresh_model: SentenceTransformer,
    calibrated: Path,
    asks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    shutil.copytree(calibrated, tmp_path / "s")
    asked = asks[KNOWN : KNOWN + 100]
    with opened_there(monkeypatch, tmp_path / "s", fresh_model, device, audit_share=1.0) as cache:
        found = cache.encode(asked, convert_to_tensor=True)
        counters = cache.stats().counters
        assert counters.audits > 10
        assert counters.near == 0
        assert counters.audited_drift <= 0.5 * counters.audits
        expected = fresh_model.encode(asked, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_entries_that_no_device_can_hold_are_looked_up_on_the_host_and_that_is_said(
    model: SentenceTransformer, calibrated: Path, asks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with LLMCache.open(calibrated, model, config=CacheConfig(recalibrate=False)) as cache:
        reuse: Any = cache._execution.reuse
        raw, tokens, texts = raw_of(cache, asks[KNOWN : KNOWN + 20])
        expected = reuse.look_up(raw, tokens, texts)
        reuse.place = torch.device("cuda")
        found = reuse.look_up(torch.from_numpy(raw), tokens, texts)
        np.testing.assert_array_equal(found.results, expected.results)
        np.testing.assert_array_equal(found.gate, expected.gate)
        assert isinstance(reuse.refresh(), HostNeighborIndex)
        reuse.refresh()
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert [("900 entries" in one.message, "on the host" in one.message) for one in warnings] == [(True, True)]

"""What is computed on a device beside the same on the host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from llmcache import CacheConfig, LLMCache
from llmcache.computing import token_embedding
from llmcache.correction import units
from llmcache.fingerprint import features, features_on
from llmcache.indexes.neighbours import half
from llmcache.ondevice import DevicePredictor
from llmcache.predictor import fit

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
    on_device = DevicePredictor(predictor, device)
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

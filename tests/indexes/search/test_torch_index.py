"""Tests of the exact search in torch against FAISS' flat index, with deleted rows, and without FAISS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from llmcache import CacheConfig, LLMCache
from llmcache.config import Index
from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.search import torch_index as subject
from llmcache.indexes.search import vector_index as vectors
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.search.projection import Projection, fit_pca, fit_simhash
from llmcache.indexes.search.vector_index import VectorIndex, choose_kind
from tests.indexes.search.test_vector_index import clustered, near, unit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ROOT = Path(__file__).parents[3]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use many small blocks of rows and queries, none of them full."""
    monkeypatch.setattr(subject, "_SCORES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(subject, "_QUERIES", 30)


@pytest.mark.parametrize("k", [1, 8, 100])
def test_it_finds_what_a_flat_index_of_faiss_finds(small_blocks: None, k: int) -> None:
    rows = clustered(9_001, 48, 200, seed=1)
    queries = np.concatenate([near(rows, 70), clustered(30, 48, 200, seed=2)])
    expected = VectorIndex.build(rows, kind="flat").nearest(queries, k)
    ids, similarity = VectorIndex.build(rows, kind="torch").nearest(queries, k)
    np.testing.assert_allclose(similarity, expected[1], atol=1e-6)
    differ = ids != expected[0]  # only where two similarities are equal but for rounding
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), rows[ids].astype(np.float64))
    other = np.einsum("qd,qkd->qk", queries.astype(np.float64), rows[expected[0]].astype(np.float64))
    assert np.abs(exact - other)[differ].max(initial=0) < 1e-6
    assert differ.mean() < 0.01


def test_half_precision_finds_the_same_but_for_its_rounding(small_blocks: None) -> None:
    rows = clustered(9_001, 48, 200, seed=1)
    queries = near(rows, 100)
    expected = VectorIndex.build(rows, kind="flat").nearest(queries, 1)
    ids, similarity = VectorIndex.build(rows, kind="torch-fp16").nearest(queries, 1)
    np.testing.assert_allclose(similarity, expected[1], atol=2e-4)
    assert (ids == expected[0]).mean() > 0.98


def test_of_equal_rows_the_first_comes_first(small_blocks: None) -> None:
    rows = np.tile(np.eye(8, dtype=np.float32), (1000, 1))
    ids, similarity = VectorIndex.build(rows, kind="torch").nearest(np.eye(8, dtype=np.float32), 2000)
    assert (similarity[:, :1000] == 1).all()
    assert (similarity[:, 1000:] == 0).all()
    np.testing.assert_array_equal(ids[:, :1000], np.arange(1000) * 8 + np.arange(8)[:, None])


def test_rows_that_were_buried_are_never_given_and_not_kept(small_blocks: None) -> None:
    rows = clustered(5_000, 16, 50, seed=1)
    index = VectorIndex.build(rows[:4_500], kind="torch")
    dead = np.arange(0, 4_500, 3)
    index.mark_deleted(dead)
    index.add(rows[4_500:])
    live = np.setdiff1d(np.arange(5_000), dead)
    ids, similarity = index.nearest(rows[:200], 5)
    expected = np.sort(rows[:200] @ rows[live].T, axis=1)[:, :-6:-1]
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    assert not np.isin(ids, dead).any()
    again = VectorIndex.from_bytes(index.to_bytes(), kind="torch", dim=16, count=5_000)
    assert (again.nearest(rows[:1], 5_000)[1] == 0).sum() >= len(dead)
    index.mark_deleted(live)
    ids, similarity = index.nearest(rows[:3], 2)
    assert (ids == -1).all()
    assert np.isneginf(similarity).all()


def test_numbers_that_are_not_finite_are_damage() -> None:
    data = bytearray(VectorIndex.build(clustered(20, 16, 5, seed=1), kind="torch").to_bytes())
    data[-4:] = np.float32(np.inf).tobytes()
    with pytest.raises(SnapshotDamaged, match="finite"):
        VectorIndex.from_bytes(bytes(data), kind="torch", dim=16, count=20)


def test_auto_on_a_gpu_that_faiss_does_not_see_is_the_search_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vectors, "_faiss_on_gpu", lambda: False)
    vectors._log_torch_search_once.cache_clear()
    caplog.set_level("INFO", "llmcache")
    kinds = [choose_kind(n, device="cuda") for n in (10, 100_000, 10_000_000)]
    assert kinds == ["torch", "torch", "torch-fp16"]
    assert choose_kind(10, binary=True, device="cuda") == "binary-flat"
    assert len([one for one in caplog.records if "exact search in torch" in one.message]) == 1
    monkeypatch.setattr(vectors, "_faiss_on_gpu", lambda: True)
    assert choose_kind(100_000, device="cuda") == "ivf-flat"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_torch_does_not_see_is_an_error_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="torch sees none; use device 'cpu'"):
        VectorIndex.build(clustered(20, 16, 5, seed=1), kind="torch", device="cuda")


@pytest.mark.parametrize("kind", ["flat", "torch"])
def test_tensors_are_answered_as_arrays_are(kind: str) -> None:
    rows = clustered(3_000, 32, 60, seed=1)
    index, queries = VectorIndex.build(rows, kind=kind), near(rows, 50)
    ids, similarity = index.nearest_on(torch.from_numpy(queries), 4)
    expected = index.nearest(queries, 4)
    np.testing.assert_array_equal(ids.numpy(), expected[0])
    np.testing.assert_array_equal(similarity.numpy(), expected[1])
    with pytest.raises(ValueError, match="32"):
        index.nearest_on(torch.zeros(2, 31), 1)


def test_features_are_rounded_and_projected_on_a_device_as_on_the_host() -> None:
    raw = np.random.default_rng(0).standard_normal((700, 24)).astype(np.float32) * 3 + 1
    raw[3], raw[4, 0], raw[5, 1] = 0, np.inf, np.nan
    rounded = half(raw)
    found = subject.half(torch.from_numpy(raw))
    np.testing.assert_array_equal(found.numpy(), rounded)
    for projection in (Projection.none(24), fit_pca(raw[6:], 8)):
        vectors_ = subject.Projected(projection, "cpu")(found)
        assert vectors_.dtype == torch.float32
        np.testing.assert_allclose(vectors_.numpy(), projection.apply(rounded), atol=1e-6)
    with pytest.raises(ConfigError, match="pca"):
        subject.Projected(fit_simhash(24, 64), "cpu")


def test_a_cache_answers_the_same_with_either_exact_index(
    model: SentenceTransformer, queries: list[str], tmp_path: Path
) -> None:
    found = {}
    kinds: tuple[Index, ...] = ("flat", "torch")
    for kind in kinds:
        with LLMCache.open(tmp_path / kind, model, config=CacheConfig(index=kind, tau=0.8)) as cache:
            for _ in cache.run(queries[:250]):
                continue
            cache.commit()
            found[kind] = [(one.tier, one.similarity) for one in cache.run(queries[250:330])]
            assert cache.stats().index == kind
        with LLMCache.open(tmp_path / kind, model) as cache:  # from the file
            cache.encode(queries[330:334])
            assert cache.stats().banks[0].index == kind
    tiers = [[tier for tier, _ in one] for one in found.values()]
    assert tiers[0] == tiers[1]
    assert 4 < tiers[0].count("near") < 78
    for (_, one), (_, other) in zip(*found.values(), strict=True):
        assert one is None or one == pytest.approx(other, abs=1e-5)


def test_without_faiss_a_cache_works_by_the_search_in_torch(model_path: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["faiss"] = None
from llmcache import CacheConfig, LLMCache
from llmcache.config import Index
from llmcache.errors import FaissMissing
try:
    LLMCache.open({str(tmp_path / "none")!r}, {model_path!r})
except FaissMissing as error:
    assert "index='torch'" in str(error), error
texts = ["a cat sat on the mat", "the dog ran home", "stocks fell sharply today"]
with LLMCache.open({str(tmp_path / "store")!r}, {model_path!r}, config=CacheConfig(index="torch", tau=0.7)) as cache:
    cache.encode(texts)
with LLMCache.open({str(tmp_path / "store")!r}) as cache:
    found = [one.tier for one in cache.run([texts[0], "a cat sat on a mat"])]
    print(found, cache.stats().index)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("['exact', 'near'] torch")


@pytest.mark.gpu
@CUDA
class TestOnGpu:
    @pytest.mark.parametrize("kind", ["torch", "torch-fp16"])
    def test_a_gpu_answers_like_the_cpu(self, kind: str) -> None:
        rows = clustered(70_001, 64, 500, seed=1)
        queries: Any = near(rows, 300)
        rows = unit(rows)
        expected = VectorIndex.build(rows, kind="torch").nearest(queries, 8)
        index = VectorIndex.build(rows, kind=kind, device="cuda")
        ids, similarity = index.nearest(queries, 8)
        np.testing.assert_allclose(similarity, expected[1], atol=1e-5 if kind == "torch" else 3e-4)
        assert (ids[:, 0] == expected[0][:, 0]).mean() > 0.98
        on_device = index.nearest_on(torch.from_numpy(queries).cuda(), 8)
        assert on_device[0].device.type == "cuda"
        np.testing.assert_array_equal(on_device[0].cpu().numpy(), ids)

    def test_tf32_does_not_touch_it(self) -> None:
        rows = clustered(5_000, 64, 50, seed=1)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            _, similarity = VectorIndex.build(rows, kind="torch", device="cuda").nearest(rows[:50], 1)
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        np.testing.assert_allclose(similarity, 1, atol=1e-5)

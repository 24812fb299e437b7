"""Tests of projections against NumPy, and with damaged bytes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, FormatTooNew, SnapshotDamaged
from llmcache.indexes.search.projection import Projection, fit_pca, fit_simhash


def some_features(n: int = 600, width: int = 24, seed: int = 0) -> NDArray[np.float32]:
    """Return correlated features of unequal spread and nonzero mean."""
    random = np.random.default_rng(seed)
    spread = np.geomspace(3, 0.05, width)
    turn = np.linalg.qr(random.standard_normal((width, width)))[0]
    return np.asarray((random.standard_normal((n, width)) * spread) @ turn + 2, np.float32)


def every_kind(width: int = 24) -> list[Projection]:
    features = some_features(width=width)
    return [Projection.none(width), fit_pca(features, 8), fit_simhash(features, 64, seed=3)]


def test_no_projection_gives_the_features_at_unit_norm() -> None:
    features = some_features()
    vectors = Projection.none(24).apply(features)
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-6, atol=1e-7)


def test_pca_agrees_with_the_singular_values_of_numpy() -> None:
    features = some_features()
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    deviation = singular[:8] / np.sqrt(len(features) - 1)
    expected = centred @ directions[:8].T / np.sqrt(deviation)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = fit_pca(features, 8).apply(features)
    signs = np.sign((vectors * expected).sum(axis=0))
    np.testing.assert_allclose(vectors, expected * signs, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_half_whitening_leaves_each_component_the_root_of_its_deviation() -> None:
    features = some_features()
    projection = fit_pca(features, 8)
    components = (features - projection.mean) @ projection.matrix
    singular = np.linalg.svd(features - projection.mean, compute_uv=False)[:8]
    np.testing.assert_allclose(components.std(axis=0, ddof=1), np.sqrt(singular / np.sqrt(599)), rtol=1e-6)


def test_fitting_twice_gives_the_same_bytes() -> None:
    assert fit_pca(some_features(), 8).to_bytes() == fit_pca(some_features(), 8).to_bytes()
    assert fit_simhash(24, 64, seed=5).to_bytes() == fit_simhash(24, 64, seed=5).to_bytes()
    assert fit_simhash(24, 64, seed=5).to_bytes() != fit_simhash(24, 64, seed=6).to_bytes()


def test_the_signs_of_components_do_not_depend_on_chance() -> None:
    matrix = fit_pca(some_features(), 8).matrix
    largest = matrix[np.abs(matrix).argmax(axis=0), np.arange(8)]
    assert (largest > 0).all()


def test_pca_keeps_no_more_components_than_the_features_have() -> None:
    random = np.random.default_rng(1)
    flat = (random.standard_normal((400, 5)) @ random.standard_normal((5, 32)) + 1).astype(np.float32)
    assert fit_pca(flat, 16).dim == 5
    assert fit_pca(some_features(width=24), 100).dim == 24
    assert fit_pca(some_features(n=256, width=300), 300).dim <= 255


def test_too_few_features_for_a_pca_say_how_many_there_are_and_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"at least 256 features, got 255"):
        fit_pca(some_features(n=255), 8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_features_that_are_all_alike_have_no_components(value: float) -> None:
    with pytest.raises(ConfigError, match="are equal"):
        fit_pca(np.full((300, 16), value, np.float32), 8)


def test_simhash_packs_the_signs_of_the_projected_features() -> None:
    features = some_features()
    projection = fit_simhash(features, 64, seed=3)
    codes: NDArray[Any] = projection.apply(features)
    signs = (features.astype(np.float64) - features.astype(np.float64).mean(axis=0)) @ projection.matrix > 0
    assert codes.dtype == np.uint8
    assert codes.shape == (600, 8)
    for bit in range(64):
        np.testing.assert_array_equal((codes[:, bit // 8] & np.uint8(1 << bit % 8)) > 0, signs[:, bit])


def test_equal_bits_of_simhash_estimate_the_angle() -> None:
    random = np.random.default_rng(2)
    pair = random.standard_normal((2, 24)).astype(np.float32)
    a, b = fit_simhash(24, 8192).apply(pair)
    differing = np.unpackbits(a ^ b).mean()
    cosine = pair[0] @ pair[1] / np.prod(np.linalg.norm(pair, axis=1))
    assert np.cos(np.pi * differing) == pytest.approx(cosine, abs=0.05)


def test_a_zero_feature_is_a_zero_vector() -> None:
    for projection in every_kind()[:2]:
        features = some_features(n=3)
        features[1] = 0
        vectors = projection.apply(features)
        assert not vectors[1].any()
        np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2]], axis=1), 1, atol=1e-6)


def test_the_mean_feature_projects_to_no_nan() -> None:
    projection = fit_pca(np.concatenate([np.eye(16), -np.eye(16)] * 10).astype(np.float32), 8)
    assert np.isfinite(projection.apply(np.zeros((2, 16), np.float32))).all()
    assert np.isfinite(projection.apply(projection.mean.astype(np.float32)[None])).all()


def test_similarity_does_not_depend_on_the_length_of_an_unprojected_feature() -> None:
    features = some_features()
    projection = Projection.none(24)
    np.testing.assert_allclose(projection.apply(features * 1000), projection.apply(features), atol=1e-6)


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, np.finfo(np.float32).tiny])
def test_extreme_but_finite_features_give_unit_vectors(value: np.float32) -> None:
    for projection in every_kind()[:2]:
        vectors = projection.apply(np.full((1, 24), value, np.float32))
        np.testing.assert_allclose(np.linalg.norm(vectors), 1, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_not_finite_is_refused_by_its_row(value: float) -> None:
    features = some_features(n=3000)
    features[2500, 7] = value
    for projection in every_kind():
        with pytest.raises(ValueError, match="row 2500 "):
            projection.apply(features)
    with pytest.raises(ValueError, match="row 2500 "):
        fit_pca(features, 8)
    with pytest.raises(ValueError, match="row 2500 "):
        fit_simhash(features, 64)


def test_features_of_another_shape_or_type_are_refused() -> None:
    for projection in every_kind():
        wrongs: list[NDArray[Any]] = [np.zeros((2, 23), np.float32), np.zeros(24, np.float32)]
        for wrong in (*wrongs, np.zeros((2, 24), np.int64), np.zeros((2, 24), np.float64)):
            with pytest.raises(ValueError, match="expected features"):
                projection.apply(wrong)


def test_no_features_give_no_vectors() -> None:
    shapes = [projection.apply(np.zeros((0, 24), np.float32)).shape for projection in every_kind()]
    assert shapes == [(0, 24), (0, 8), (0, 8)]


def test_float16_features_and_the_same_numbers_in_float32_project_alike() -> None:
    stored = some_features().astype(np.float16)
    for projection in every_kind():
        np.testing.assert_array_equal(projection.apply(stored), projection.apply(stored.astype(np.float32)))


def test_a_feature_projects_alike_alone_and_in_a_batch() -> None:
    features = some_features(n=5000)
    for projection in every_kind():
        together = projection.apply(features)[2046:2050]
        alone = np.concatenate([projection.apply(features[i : i + 1]) for i in range(2046, 2050)])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-7)


def test_a_projection_survives_its_bytes() -> None:
    for projection in every_kind():
        again = Projection.from_bytes(projection.to_bytes())
        assert (again.kind, again.width, again.dim, again.seed) == (
            projection.kind,
            projection.width,
            projection.dim,
            projection.seed,
        )
        assert again.to_bytes() == projection.to_bytes()
        np.testing.assert_array_equal(again.apply(some_features()), projection.apply(some_features()))


def test_a_truncated_or_longer_projection_is_damaged() -> None:
    for projection in every_kind():
        data = projection.to_bytes()
        for length in {*range(0, len(data), 7), len(data) - 1}:
            with pytest.raises(SnapshotDamaged):
                Projection.from_bytes(data[:length])
        with pytest.raises(SnapshotDamaged, match="bytes, found"):
            Projection.from_bytes(data + b"\0")


def test_a_flipped_bit_in_the_header_is_damage_or_another_seed() -> None:
    for projection in every_kind():
        data = projection.to_bytes()
        for bit in range(8 * 28):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            if bit // 8 >= 20:  # the seed, which no answer depends on
                assert Projection.from_bytes(bytes(flipped)).seed != projection.seed
            else:
                with pytest.raises(SnapshotDamaged):
                    Projection.from_bytes(bytes(flipped))


def test_a_later_version_asks_for_an_upgrade() -> None:
    data = bytearray(Projection.none(4).to_bytes())
    data[8:10] = struct.pack("<H", 2)
    with pytest.raises(FormatTooNew, match="upgrade"):
        Projection.from_bytes(bytes(data))


def test_huge_sizes_in_a_header_allocate_nothing() -> None:
    for kind in (1, 2):
        header = struct.pack("<8sHHIIQ", b"LLMCPROJ", 1, kind, 2**32 - 8, 2**32 - 8, 0)
        with pytest.raises(SnapshotDamaged, match="found 28"):
            Projection.from_bytes(header)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_damage(value: float) -> None:
    data = bytearray(fit_pca(some_features(), 8).to_bytes())
    data[-8:] = struct.pack("<d", value)
    with pytest.raises(SnapshotDamaged, match="NaN or infinity"):
        Projection.from_bytes(bytes(data))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        fit_simhash(24, 60)
    with pytest.raises(ConfigError, match="seed"):
        fit_simhash(24, 64, seed=-1)
    with pytest.raises(ConfigError, match="at least 1"):
        fit_pca(some_features(), 0)
    with pytest.raises(ConfigError, match="choose one of"):
        Projection(kind="umap", width=4, dim=4)
    with pytest.raises(ConfigError, match="keeps the width"):
        Projection(kind="none", width=4, dim=3)
    with pytest.raises(ConfigError, match="mean and matrix"):
        Projection(kind="pca", width=4, dim=3)

"""Projection of raw features to the vectors of an index: unit vectors, or sign bits along random directions."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, FormatTooNew, SnapshotDamaged

_KINDS = ("none", "pca", "simhash")  # the position of a kind is its number in a file
_LEAST = 256  # minimum features to fit a PCA
_BLOCK = 2048  # rows per block, so that float64 copies stay small

# Little-endian: magic, version, kind, width, dim, seed. Then mean and matrix, float64, row by row.
_HEADER = struct.Struct("<8sHHIIQ")
_MAGIC = b"LLMCPROJ"
_VERSION = 1


def _zeros(*shape: int) -> NDArray[np.float64]:
    return np.zeros(shape, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """Projection of features to vectors, made by `none`, `fit_pca` or `fit_simhash`.

    kind: "none", features at unit norm. "pca", principal components, each divided by the square root of its
        standard deviation, at unit norm. "simhash", sign bits along random directions.
    width: components of a feature. dim: components of a vector, or bits of a code.
    seed: of simhash's directions, 0 otherwise. Informational only, since the directions are stored.
    mean: float64 [width], subtracted first; empty for "none". matrix: float64 [width, dim]; empty for "none".

    Callers must round stored and query features in the same way. A feature stored as float16 and the same feature as a
    float32 query give vectors of similarity below 1, and sometimes different sign bits.
    """

    kind: str
    width: int
    dim: int
    seed: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: _zeros(0), repr=False)
    matrix: NDArray[np.float64] = field(default_factory=lambda: _zeros(0, 0), repr=False)

    def __post_init__(self) -> None:
        flaw = _flaw(self.kind, self.width, self.dim, self.seed)
        if flaw:
            raise ConfigError(flaw)
        shapes = _shapes(self.kind, self.width, self.dim)
        if (self.mean.shape, self.matrix.shape) != shapes:
            raise ConfigError(f"expected mean and matrix {shapes}, got {self.mean.shape}, {self.matrix.shape}")

    @classmethod
    def none(cls, width: int) -> Projection:
        """Return the projection that only scales features to unit norm."""
        return cls(kind="none", width=width, dim=width)

    def apply(self, features: NDArray[np.floating]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Project features.

        features: float32 or float16 [n, width], not normalised.
        Returns a copy: float32 [n, dim], unit L2 norm, or for simhash uint8 [n, dim / 8], first bit lowest.
        A feature of zeros, or one that projects to zero, gives a zero vector, similar to nothing. For simhash it has a
        code like any other.
        ValueError when features have another width, NaN or infinity.
        """
        features = _checked(features, self.width)
        packed = self.kind == "simhash"
        vectors = np.empty((len(features), self.dim // 8 if packed else self.dim), np.uint8 if packed else np.float32)
        for start in range(0, len(features), _BLOCK):
            block = features[start : start + _BLOCK].astype(np.float64)
            _check_finite(block, start)
            vectors[start : start + _BLOCK] = self._bits(block) if packed else self._units(block)
        return vectors

    def _bits(self, block: NDArray[np.float64]) -> NDArray[np.uint8]:
        return np.packbits((block - self.mean) @ self.matrix > 0, axis=1, bitorder="little")

    def _units(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        silent = ~block.any(axis=1)
        if self.kind == "pca":
            block = (block - self.mean) @ self.matrix
            block[silent] = 0
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        return block / np.where(norms > 0, norms, 1)

    def to_bytes(self) -> bytes:
        """Serialise the projection, for `from_bytes`; a few hundred kilobytes."""
        header = _HEADER.pack(_MAGIC, _VERSION, _KINDS.index(self.kind), self.width, self.dim, self.seed)
        return header + self.mean.astype("<f8").tobytes() + self.matrix.astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Projection:
        """Deserialise the result of `to_bytes`. SnapshotDamaged for invalid bytes, FormatTooNew for a later version."""
        data = memoryview(data).cast("B")
        kind, width, dim, seed = _header(data)
        shapes = _shapes(kind, width, dim)
        sizes = [int(np.prod(shape, dtype=object)) for shape in shapes]  # exact: damaged factors may be huge
        expected = _HEADER.size + 8 * sum(sizes)
        if len(data) != expected:
            raise SnapshotDamaged(f"a {kind} projection {width} -> {dim} has {expected} bytes, found {len(data)}")
        numbers = np.frombuffer(data, "<f8", offset=_HEADER.size).astype(np.float64)
        if not np.isfinite(numbers).all():
            raise SnapshotDamaged("a projection has finite numbers, found NaN or infinity")
        mean, matrix = numbers[: sizes[0]], numbers[sizes[0] :].reshape(shapes[1])
        return cls(kind=kind, width=width, dim=dim, seed=seed, mean=mean, matrix=matrix)


def fit_pca(features: NDArray[np.floating], dim: int) -> Projection:
    """Fit a PCA with at most `dim` components, fewer if the features have fewer.

    features: float32 or float16 [n, width], n >= 256.
    ConfigError for too few features, or all equal. ValueError for NaN or infinity.
    """
    features = _checked(features, features.shape[-1])
    if len(features) < _LEAST:
        raise ConfigError(
            f"a PCA needs at least {_LEAST} features, got {len(features)}; use 'none' until there are more"
        )
    if dim < 1:
        raise ConfigError(f"dim is the number of components, at least 1, got {dim}")
    mean = _mean(features)
    variances, directions = np.linalg.eigh(_covariance(features, mean))
    variances, directions = variances[::-1], directions[:, ::-1]  # largest first
    # smaller variances are rounding errors of float16 or float32 features, or of the sums above
    floor = max(1e-10 * variances[0], 1e-14 * float(mean @ mean))
    kept = min(dim, len(features) - 1, int((variances > floor).sum()))
    if kept < 1:
        raise ConfigError(f"all {len(features)} features are equal, so they have no components; use 'none'")
    directions = directions[:, :kept]
    # the sign of an eigenvector is arbitrary and differs between LAPACKs, so make its largest entry positive
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(kept)])
    # Half-whitening. Without whitening the first components dominate the others; with full whitening the last
    # components, mostly noise, have the same weight as the first.
    matrix = directions / variances[:kept] ** 0.25
    return Projection(kind="pca", width=len(mean), dim=kept, mean=mean, matrix=np.ascontiguousarray(matrix))


def fit_simhash(features_or_width: NDArray[np.floating] | int, bits: int = 256, seed: int = 0) -> Projection:
    """Make a SimHash projection: sign bits along `bits` random directions, relative to the mean of the features.

    features_or_width: float32 or float16 [n, width], or only the width, for the mean 0. bits: a multiple of 8.
    seed: below 2^64. ConfigError for an invalid number of bits. ValueError for NaN or infinity in the features.
    """
    if isinstance(features_or_width, int):
        width, mean = features_or_width, _zeros(features_or_width)
    else:
        features = _checked(features_or_width, features_or_width.shape[-1])
        width, mean = features.shape[1], _mean(features)
    flaw = _flaw("simhash", width, bits, seed)
    if flaw:
        raise ConfigError(flaw)
    matrix = np.random.default_rng(seed).standard_normal((width, bits))
    return Projection(kind="simhash", width=width, dim=bits, seed=seed, mean=mean, matrix=matrix)


def _shapes(kind: str, width: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of mean and matrix."""
    return ((0,), (0, 0)) if kind == "none" else ((width,), (width, dim))


def _flaw(kind: str, width: int, dim: int, seed: int) -> str | None:
    """Describe what is invalid in these parameters; None if they are valid."""
    if kind not in _KINDS:
        return f"no projection of kind {kind!r}; choose one of: {', '.join(_KINDS)}"
    if not 0 < width < 2**32 or not 0 < dim < 2**32:
        return f"width and dim of a projection are positive, got {width} and {dim}"
    if kind == "none" and dim != width:
        return f"projection 'none' keeps the width {width}, got dim {dim}"
    if kind == "pca" and dim > width:
        return f"a PCA of features of width {width} has at most {width} components, got dim {dim}"
    if kind == "simhash" and dim % 8:
        return f"simhash packs its bits into bytes: use a multiple of 8, got {dim}"
    if not 0 <= seed < 2**64:
        return f"a seed lies in [0, 2^64), got {seed}"
    return None


def _header(data: memoryview) -> tuple[str, int, int, int]:
    """Parse a header. Returns kind, width, dim and seed. SnapshotDamaged or FormatTooNew when it is invalid."""
    if len(data) < _HEADER.size:
        raise SnapshotDamaged(f"a projection has at least {_HEADER.size} bytes, found {len(data)}")
    magic, version, number, width, dim, seed = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise SnapshotDamaged(f"expected {_MAGIC!r} to begin a projection, found {magic!r}")
    if version > _VERSION:
        raise FormatTooNew(f"this projection has version {version}, this LLMCache reads {_VERSION}; upgrade llmcache")
    if version != _VERSION or number >= len(_KINDS):
        raise SnapshotDamaged(f"a projection has version {_VERSION} and kind 0 to 2, found {version} and {number}")
    flaw = _flaw(_KINDS[number], width, dim, seed)
    if flaw:
        raise SnapshotDamaged(flaw)
    return _KINDS[number], width, dim, seed


def _checked(features: NDArray[np.floating], width: int) -> NDArray[np.floating]:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != width or features.dtype not in (np.float16, np.float32):
        raise ValueError(f"expected features float32 or float16 [n, {width}], got {features.dtype} {features.shape}")
    return features


def _check_finite(block: NDArray[np.float64], start: int) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise ValueError(f"row {start + int(np.argmin(finite))} of the features holds NaN or infinity")


def _mean(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the mean, float64 [width]; zeros if there are no features."""
    total = _zeros(features.shape[1])
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK].astype(np.float64)
        _check_finite(block, start)
        total += block.sum(axis=0)
    return total / max(1, len(features))


def _covariance(features: NDArray[np.floating], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the covariance, float64 [width, width]."""
    total = _zeros(len(mean), len(mean))
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK] - mean
        total += block.T @ block
    return total / (len(features) - 1)

"""Outputs predicted from features: ridge regression for few entries, kernel ridge with landmarks (Nystroem) for more.

Fitted on a cache's own entries. The unit vector of a prediction is the distilled fingerprint, and the difference of two
predictions is how far the output of one document is to be moved for another (`llmcache.near.neighbors.correction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, eigh, solve_triangular

from llmcache.errors import ConfigError

LEAST = 64
"""Entries below which nothing is fitted."""
KERNEL = 512
"""Entries from which on the kernel is worth its time; below, ridge."""
LANDMARKS = 3072
FIT_ROWS = 20_000
"""Entries that are fitted to, drawn by chance from more."""

DIM = 64
"""Components of a fingerprint. What is found by it is put into order by the whole predictions."""

_COMPONENTS = 256
_TRIED_ROWS, _TRIED_LANDMARKS = 4096, 768  # what a setting is judged by
_WIDTHS = (0.25, 0.5, 1.0, 2.0)
_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_JITTER = 1e-5
_BLOCK = 2048  # rows whose kernel is held at once: 25 MB; smaller products of matrices keep two cores less busy

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """Features to outputs. Made by `fit`.

    mean: float32 [width], subtracted from features; matrix: float32 [width, components]. landmarks: float32
    [landmarks, components], none for ridge. weights: float32 [landmarks or components, out]. offset: float32 [out].
    basis: float32 [out, dim], directions of the outputs, orthonormal, for `fingerprints`.
    gamma: of the kernel exp(-gamma d^2), 0 for ridge. penalty: regularisation that was chosen.
    entries: how many entries there were; held_out: mean cosine to the outputs of entries that were kept apart.
    """

    mean: Floats = field(repr=False)
    matrix: Floats = field(repr=False)
    landmarks: Floats = field(repr=False)
    weights: Floats = field(repr=False)
    offset: Floats = field(repr=False)
    basis: Floats = field(repr=False)
    gamma: float
    penalty: float
    entries: int
    held_out: float
    _exponents: Floats = field(init=False, repr=False)  # points to exponents of the kernel: one product of matrices

    def __post_init__(self) -> None:
        width, components = self.matrix.shape if self.matrix.ndim == 2 else (-1, -1)
        rows = len(self.landmarks) or components
        seen = (self.mean.shape, self.landmarks.shape[1:], self.weights.shape, self.offset.ndim, self.basis.shape[:1])
        if seen != ((width,), (components,), (rows, len(self.offset)), 1, (len(self.offset),)):
            raise ConfigError(f"the arrays of a predictor do not fit each other: {seen}, a matrix {width, components}")
        if not all(np.isfinite(one).all() for one in self.to_arrays().values()):
            raise ConfigError("a predictor holds numbers that are not finite; fit it again")
        squares = self.gamma * np.einsum("ij,ij->i", self.landmarks, self.landmarks)
        columns = [2 * self.gamma * self.landmarks, -squares[:, None], np.full((len(squares), 1), -self.gamma)]
        object.__setattr__(self, "_exponents", np.ascontiguousarray(np.hstack(columns).T, np.float32))

    @property
    def kind(self) -> str:
        """ "kernel" or "ridge"."""
        return "kernel" if len(self.landmarks) else "ridge"

    def __call__(self, features: NDArray[np.floating]) -> Floats:
        """Predicted outputs, float32 [n, out], of raw features [n, width] rounded as the stored ones are."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ConfigError(f"features are {features.shape}, the predictor was fitted to [n, {len(self.mean)}]")
        predicted = np.empty((len(features), len(self.offset)), np.float32)
        for start in range(0, len(features), _BLOCK):
            part = projected(features[start : start + _BLOCK], self.mean, self.matrix)
            if len(self.landmarks):
                squares = np.einsum("ij,ij->i", part, part)[:, None]
                part = np.hstack([part, np.ones_like(squares), squares]) @ self._exponents
                np.exp(part, out=part)
            predicted[start : start + _BLOCK] = part @ self.weights
        predicted += self.offset
        return predicted

    def fingerprints(self, predicted: Floats) -> Floats:
        """What an index of predicted outputs holds and is asked for: unit vectors, float32 [n, dim]."""
        short = predicted @ self.basis
        return np.asarray(short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-30), np.float32)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything as plain arrays, for a file without pickle."""
        scalars = np.array([self.gamma, self.penalty, self.entries, self.held_out], np.float64)
        return {
            "mean": self.mean, "matrix": self.matrix, "landmarks": self.landmarks, "weights": self.weights,
            "offset": self.offset, "basis": self.basis, "scalars": scalars,
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Predictor:
        """The inverse of `to_arrays`. ConfigError: arrays are missing or do not fit."""
        names = ("mean", "matrix", "landmarks", "weights", "offset", "basis")
        missing = sorted({*names, "scalars"} - set(arrays))
        if missing or arrays["scalars"].shape != (4,):
            raise ConfigError(f"these are not the arrays of a predictor: {missing or 'scalars'} missing; fit it again")
        gamma, penalty, entries, held_out = (float(one) for one in arrays["scalars"].astype(np.float64))
        plain = {name: np.ascontiguousarray(arrays[name], np.float32) for name in names}
        return cls(**plain, gamma=gamma, penalty=penalty, entries=int(entries), held_out=held_out)


def kernel(one: Floats, other: Floats, gamma: float) -> Floats:
    """exp(-gamma d^2) of every pair, float32 [n, m], of float32 [n, components] and [m, components]."""
    values = one @ other.T
    values *= 2 * gamma
    values -= gamma * np.einsum("ij,ij->i", one, one)[:, None]
    values -= gamma * np.einsum("ij,ij->i", other, other)[None]
    np.minimum(values, 0, out=values)
    np.exp(values, out=values)
    return values


def fit(
    features: NDArray[np.floating],
    outputs: NDArray[np.floating],
    *,
    landmarks: int = LANDMARKS,
    seed: int = 0,
    like: Predictor | None = None,
) -> Predictor:
    """A predictor of outputs from features; width of the kernel and penalty are chosen on entries kept apart.

    features: [n, width], raw, rounded as they are stored. outputs: [n, out]. landmarks: at most so many; each costs
    memory and time at every look-up. Bounded in time: at most 20,000 entries are used. like: a predictor whose kind,
    kernel width and penalty (for each entry) are taken, so that similarities by both are on one scale.
    ConfigError: fewer than 64 entries, or numbers that are not finite.
    """
    n = len(features)
    if n < LEAST or len(outputs) != n:
        raise ConfigError(f"a predictor is fitted to at least {LEAST} entries, got {n} and {len(outputs)} outputs")
    random = np.random.default_rng(seed)
    chosen = random.permutation(n)[:FIT_ROWS]
    raw, wanted = np.asarray(features[chosen], np.float32), np.asarray(outputs[chosen], np.float32)
    if not (np.isfinite(raw).all() and np.isfinite(wanted).all()):
        raise ConfigError("features or outputs hold numbers that are not finite; leave those entries out")
    mean, matrix = components(raw)
    points = projected(raw, mean, matrix)
    scale = median_square(points[:1024])
    plain = n < KERNEL or scale == 0 or not landmarks
    if like is None:
        gamma, penalty, held_out = _setting(points, wanted, (0.0,) if plain else tuple(one / scale for one in _WIDTHS))
    else:
        plain = not len(like.landmarks)
        gamma, held_out = like.gamma, like.held_out
        penalty = like.penalty * min(n, FIT_ROWS) / min(like.entries, FIT_ROWS)
    centres = points[:0] if plain else points[: min(landmarks, len(points))]
    weights, offset = _solve(points, wanted, centres, gamma, penalty)
    return Predictor(
        mean=mean, matrix=matrix, landmarks=centres, weights=weights, offset=offset, basis=directions(wanted),
        gamma=gamma, penalty=penalty, entries=n, held_out=held_out,
    )  # fmt: skip


# -- fitting ------------------------------------------------------------------------------------------------


def components(features: Floats) -> tuple[Floats, Floats]:
    """Mean, and principal components each divided by the square root of its standard deviation."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    variance, vectors = eigh(centred.T @ centred / len(features))
    kept = np.argsort(-variance)[:_COMPONENTS]
    kept = kept[variance[kept] > 1e-10 * max(float(variance.max()), 1e-30)]
    if not len(kept):
        kept = np.array([len(variance) - 1])
    matrix = vectors[:, kept]
    if variance.max() > 0:
        matrix = matrix / np.maximum(variance[kept], 1e-30) ** 0.25
    return mean.astype(np.float32), np.ascontiguousarray(matrix, np.float32)


def directions(outputs: Floats) -> Floats:
    """The first `DIM` directions of outputs at unit norm, float32 [out, dim]; their mean counts as one."""
    unit = outputs / np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-30)
    vectors = eigh((unit.T @ unit).astype(np.float64))[1]
    return np.ascontiguousarray(vectors[:, ::-1][:, :DIM], np.float32)


def projected(features: NDArray[np.floating], mean: Floats, matrix: Floats) -> Floats:
    """float32 [n, components], of features [n, width]."""
    return np.asarray((features.astype(np.float32) - mean) @ matrix, np.float32)


def median_square(points: Floats) -> float:
    """Median squared distance of two of the points."""
    norms = np.einsum("ij,ij->i", points, points)
    squares = norms[:, None] + norms[None] - 2 * points @ points.T
    return float(max(np.median(squares[np.triu_indices(len(points), 1)]), 0.0))


def _setting(points: Floats, outputs: Floats, gammas: tuple[float, ...]) -> tuple[float, float, float]:
    """Kernel width and penalty with the least squared error on a fifth of the entries, and the mean cosine there."""
    points, outputs = points[:_TRIED_ROWS], outputs[:_TRIED_ROWS]
    cut = len(points) - len(points) // 5
    best = (np.inf, 0.0, 0.0, 0.0)
    for gamma in gammas:
        centres = points[: min(_TRIED_LANDMARKS, cut)] if gamma else points[:0]
        mapped, _ = _mapped(points, centres, gamma)
        offset = outputs[:cut].mean(axis=0)
        values, vectors = eigh((mapped[:cut].T @ mapped[:cut]).astype(np.float64))
        right = vectors.T @ (mapped[:cut].T @ (outputs[:cut] - offset))
        turned = mapped[cut:] @ vectors
        for penalty in _PENALTIES:
            predicted = turned @ (right / (np.maximum(values, 0) + penalty)[:, None]) + offset
            error = float(np.square(predicted - outputs[cut:]).mean())
            if error < best[0]:
                best = (error, gamma, penalty, _mean_cosine(predicted, outputs[cut:]))
    return best[1:]


def _mapped(points: Floats, centres: Floats, gamma: float) -> tuple[Floats, NDArray[np.float64] | None]:
    """Points in a space whose inner product is the kernel's as seen from the landmarks, and the way there."""
    if not len(centres):
        return points, None
    root = cholesky(kernel(centres, centres, gamma).astype(np.float64) + _JITTER * np.eye(len(centres)), lower=True)
    inverse = solve_triangular(root, np.eye(len(root)), lower=True).T
    return kernel(points, centres, gamma) @ inverse.astype(np.float32), inverse


def _solve(points: Floats, outputs: Floats, centres: Floats, gamma: float, penalty: float) -> tuple[Floats, Floats]:
    mapped, way = _mapped(points, centres, gamma)
    offset = outputs.mean(axis=0)
    gram = (mapped.T @ mapped).astype(np.float64)
    gram[np.diag_indices(len(gram))] += penalty
    weights = cho_solve(cho_factor(gram, lower=True), mapped.T @ (outputs - offset))
    return (weights if way is None else way @ weights).astype(np.float32), offset


def _mean_cosine(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean((one * other).sum(axis=1) / np.maximum(norms, 1e-30)))

"""Predict outputs from features: ridge regression for few entries, Nystroem kernel ridge regression for more.

The predictor is fitted on the cache's own entries. The unit vector of a prediction is the distilled fingerprint. The
difference of two predictions corrects the output of one document for another (`llmcache.near.neighbors.correction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, eigh, solve_triangular

from llmcache.arrays import Array, Floats, Floats32, namespace, single
from llmcache.errors import ConfigError
from llmcache.near.neighbors.correction import inner, units

if TYPE_CHECKING:
    from torch import Tensor, device

LEAST = 64
"""Least number of entries to fit a predictor."""
KERNEL = 512
"""Least number of entries for kernel ridge regression; below, plain ridge regression is used."""
LANDMARKS = 3072
"""Default for the most landmarks of the kernel."""
FIT_ROWS = 20_000
"""Most entries used in a fit; more are sampled at random."""

DIM = 64
"""Components of a fingerprint. Neighbours found by fingerprint are re-ranked by their full predictions."""

_COMPONENTS = 256
_TRIED_ROWS, _TRIED_LANDMARKS = 4096, 768  # most rows and landmarks in the search for kernel width and penalty
_WIDTHS = (0.25, 0.5, 1.0, 2.0)
_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_JITTER = 1e-5
_BLOCK = 2048  # rows per block: 25 MB of kernel; smaller matrix products use two cores less well


@dataclass(frozen=True, slots=True, eq=False)
class Regression(Generic[Array]):
    """Arrays by which a predictor maps features to outputs: NumPy arrays on the host, or tensors on one device.

    exponents: maps [point, 1, |point|^2] to the exponents of the kernel in one product, float32
    [components + 2, landmarks]; None for ridge regression. The other fields are those of `Predictor`.
    """

    mean: Array
    matrix: Array
    exponents: Array | None
    weights: Array
    offset: Array
    basis: Array

    def __call__(self, features: Any) -> Array:
        """Predict outputs, float32 [n, out]. features: [n, width], rounded to float16, where the arrays are."""
        starts = range(0, max(1, len(features)), _BLOCK)
        blocks = [self._predicted(features[start : start + _BLOCK]) for start in starts]
        joined: Array = blocks[0] if len(blocks) == 1 else namespace(blocks[0]).concatenate(blocks)
        return joined

    def _predicted(self, features: Any) -> Array:
        points, xp = projected(features, self.mean, self.matrix), namespace(self.mean)
        if self.exponents is not None:
            squares = inner(points, points)[:, None]
            points = xp.hstack([points, xp.ones_like(squares), squares]) @ self.exponents
            xp.exp(points, out=points)
        predicted: Array = points @ self.weights
        predicted += self.offset
        return predicted

    def fingerprints(self, predicted: Array) -> Array:
        """Return the fingerprints of predicted outputs [n, out]: unit vectors, float32 [n, dim]."""
        return units(predicted @ self.basis)

    def on(self, place: device | str) -> Regression[Tensor]:
        """Copy the arrays to a device."""
        import torch

        names = ("mean", "matrix", "exponents", "weights", "offset", "basis")
        given = {name: getattr(self, name) for name in names}
        there: dict[str, Any] = {
            name: None if array is None else torch.tensor(array, device=place) for name, array in given.items()
        }
        return Regression(**there)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """A fitted map from features to outputs; created by `fit`.

    mean: subtracted from features, float32 [width]. matrix: projects them, float32 [width, components].
    landmarks: float32 [landmarks, components]; none for ridge regression.
    weights: float32 [landmarks or components, out]. offset: float32 [out].
    basis: orthonormal directions of the outputs for `fingerprints`, float32 [out, dim].
    gamma: of the kernel exp(-gamma d^2); 0 for ridge regression. penalty: the chosen regularisation.
    entries: number of entries at the fit. held_out: mean cosine to the true outputs on held-out entries.
    ConfigError when the arrays do not fit each other or are not finite.
    """

    mean: Floats32 = field(repr=False)
    matrix: Floats32 = field(repr=False)
    landmarks: Floats32 = field(repr=False)
    weights: Floats32 = field(repr=False)
    offset: Floats32 = field(repr=False)
    basis: Floats32 = field(repr=False)
    gamma: float
    penalty: float
    entries: int
    held_out: float
    regression: Regression[Floats32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        width, components = self.matrix.shape if self.matrix.ndim == 2 else (-1, -1)
        rows = len(self.landmarks) or components
        seen = (self.mean.shape, self.landmarks.shape[1:], self.weights.shape, self.offset.ndim, self.basis.shape[:1])
        if seen != ((width,), (components,), (rows, len(self.offset)), 1, (len(self.offset),)):
            raise ConfigError(f"the arrays of a predictor do not fit each other: {seen}, a matrix {width, components}")
        if not all(np.isfinite(array).all() for array in self.to_arrays().values()):
            raise ConfigError("a predictor has numbers that are not finite; fit it again")
        exponents = None
        if len(self.landmarks):
            squares = self.gamma * np.einsum("ij,ij->i", self.landmarks, self.landmarks)
            columns = [2 * self.gamma * self.landmarks, -squares[:, None], np.full((len(squares), 1), -self.gamma)]
            exponents = np.ascontiguousarray(np.hstack(columns).T, np.float32)
        arrays = Regression(self.mean, self.matrix, exponents, self.weights, self.offset, self.basis)
        object.__setattr__(self, "regression", arrays)

    @property
    def kind(self) -> str:
        """Kind of the regression, "kernel" or "ridge"."""
        return "kernel" if len(self.landmarks) else "ridge"

    def __call__(self, features: Floats) -> Floats32:
        """Predict outputs, float32 [n, out].

        features: [n, width], rounded to float16 as the stored ones are. ConfigError when their width differs.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ConfigError(f"features are {features.shape}, the predictor was fitted to [n, {len(self.mean)}]")
        return self.regression(features)

    def fingerprints(self, predicted: Floats32) -> Floats32:
        """Return the fingerprints of predicted outputs [n, out]: unit vectors, float32 [n, dim]."""
        return self.regression.fingerprints(predicted)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return all fields as plain arrays by name, for storage without pickle."""
        scalars = np.array([self.gamma, self.penalty, self.entries, self.held_out], np.float64)
        return {
            "mean": self.mean, "matrix": self.matrix, "landmarks": self.landmarks, "weights": self.weights,
            "offset": self.offset, "basis": self.basis, "scalars": scalars,
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Predictor:
        """Rebuild a predictor from `to_arrays`. ConfigError when arrays are missing or do not fit."""
        names = ("mean", "matrix", "landmarks", "weights", "offset", "basis")
        missing = sorted({*names, "scalars"} - set(arrays))
        if missing or arrays["scalars"].shape != (4,):
            raise ConfigError(f"these are not the arrays of a predictor: {missing or 'scalars'} missing; fit it again")
        gamma, penalty, entries, held_out = (float(scalar) for scalar in arrays["scalars"].astype(np.float64))
        plain = {name: np.ascontiguousarray(arrays[name], np.float32) for name in names}
        return cls(**plain, gamma=gamma, penalty=penalty, entries=int(entries), held_out=held_out)


def kernel(one: Floats32, other: Floats32, gamma: float) -> Floats32:
    """Return exp(-gamma d^2) of every pair of points, float32 [n, m].

    one: float32 [n, components]. other: float32 [m, components].
    """
    values = one @ other.T
    values *= 2 * gamma
    values -= gamma * np.einsum("ij,ij->i", one, one)[:, None]
    values -= gamma * np.einsum("ij,ij->i", other, other)[None]
    np.minimum(values, 0, out=values)
    np.exp(values, out=values)
    return values


def fit(
    features: Floats,
    outputs: Floats,
    *,
    landmarks: int = LANDMARKS,
    seed: int = 0,
    like: Predictor | None = None,
) -> Predictor:
    """Fit a predictor; kernel width and penalty are chosen on held-out entries.

    features: [n, width], rounded to float16 as the stored ones are. outputs: [n, out].
    landmarks: most landmarks; each one costs memory and time at every look-up.
    like: a predictor whose kind, kernel width and penalty per entry are reused, so that the similarities of both
        predictors are on one scale.
    Time is bounded, since at most 20,000 entries are used.
    ConfigError when there are fewer than 64 entries, or features or outputs are not finite.
    """
    n = len(features)
    if n < LEAST or len(outputs) != n:
        raise ConfigError(f"a predictor is fitted to at least {LEAST} entries, got {n} and {len(outputs)} outputs")
    random = np.random.default_rng(seed)
    chosen = random.permutation(n)[:FIT_ROWS]
    raw, wanted = np.asarray(features[chosen], np.float32), np.asarray(outputs[chosen], np.float32)
    if not (np.isfinite(raw).all() and np.isfinite(wanted).all()):
        raise ConfigError("features or outputs have numbers that are not finite; leave those entries out")
    mean, matrix = components(raw)
    points = projected(raw, mean, matrix)
    scale = median_square(points[:1024])
    ridge = n < KERNEL or scale == 0 or not landmarks
    if like is None:
        gammas = (0.0,) if ridge else tuple(width / scale for width in _WIDTHS)
        gamma, penalty, held_out = _choose_setting(points, wanted, gammas)
    else:
        ridge = not len(like.landmarks)
        gamma, held_out = like.gamma, like.held_out
        penalty = like.penalty * min(n, FIT_ROWS) / min(like.entries, FIT_ROWS)
    centres = points[:0] if ridge else points[: min(landmarks, len(points))]
    weights, offset = _solve(points, wanted, centres, gamma, penalty)
    return Predictor(
        mean=mean, matrix=matrix, landmarks=centres, weights=weights, offset=offset, basis=directions(wanted),
        gamma=gamma, penalty=penalty, entries=n, held_out=held_out,
    )  # fmt: skip


# -- fitting ------------------------------------------------------------------------------------------------


def components(features: Floats32) -> tuple[Floats32, Floats32]:
    """Return the mean of features, and their principal components divided by the root of their standard deviation."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    variance, vectors = eigh(centred.T @ centred / len(features))
    largest = np.argsort(-variance)[:_COMPONENTS]
    largest = largest[variance[largest] > 1e-10 * max(float(variance.max()), 1e-30)]
    if not len(largest):
        largest = np.array([len(variance) - 1])
    matrix = vectors[:, largest]
    if variance.max() > 0:
        matrix = matrix / np.maximum(variance[largest], 1e-30) ** 0.25
    return mean.astype(np.float32), np.ascontiguousarray(matrix, np.float32)


def directions(outputs: Floats32) -> Floats32:
    """Return the first `DIM` principal directions of unit-norm outputs, float32 [out, dim], without centring."""
    unit = outputs / np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-30)
    vectors = eigh((unit.T @ unit).astype(np.float64))[1]
    return np.ascontiguousarray(vectors[:, ::-1][:, :DIM], np.float32)


def projected(features: Any, mean: Array, matrix: Array) -> Array:
    """Project features, an array or tensor [n, width] of any floating dtype, to float32 [n, components]."""
    points: Array = (single(features) - mean) @ matrix
    return points


def median_square(points: Floats32) -> float:
    """Return the median squared distance between two points."""
    norms = np.einsum("ij,ij->i", points, points)
    squares = norms[:, None] + norms[None] - 2 * points @ points.T
    return float(max(np.median(squares[np.triu_indices(len(points), 1)]), 0.0))


def _choose_setting(points: Floats32, outputs: Floats32, gammas: tuple[float, ...]) -> tuple[float, float, float]:
    """Return gamma and penalty with the least squared error on a held-out fifth, and the mean cosine there."""
    points, outputs = points[:_TRIED_ROWS], outputs[:_TRIED_ROWS]
    cut = len(points) - len(points) // 5
    best = (np.inf, 0.0, 0.0, 0.0)
    for gamma in gammas:
        centres = points[: min(_TRIED_LANDMARKS, cut)] if gamma else points[:0]
        mapped, _ = _mapped(points, centres, gamma)
        offset = outputs[:cut].mean(axis=0)
        values, vectors = eigh((mapped[:cut].T @ mapped[:cut]).astype(np.float64))
        targets = vectors.T @ (mapped[:cut].T @ (outputs[:cut] - offset))
        rotated = mapped[cut:] @ vectors
        for penalty in _PENALTIES:
            predicted = rotated @ (targets / (np.maximum(values, 0) + penalty)[:, None]) + offset
            error = float(np.square(predicted - outputs[cut:]).mean())
            if error < best[0]:
                best = (error, gamma, penalty, _mean_cosine(predicted, outputs[cut:]))
    return best[1:]


def _mapped(points: Floats32, centres: Floats32, gamma: float) -> tuple[Floats32, NDArray[np.float64] | None]:
    """Return the Nystroem features of points, and the matrix from kernel values to them (None for ridge)."""
    if not len(centres):
        return points, None
    root = cholesky(kernel(centres, centres, gamma).astype(np.float64) + _JITTER * np.eye(len(centres)), lower=True)
    inverse = solve_triangular(root, np.eye(len(root)), lower=True).T
    return kernel(points, centres, gamma) @ inverse.astype(np.float32), inverse


def _solve(
    points: Floats32, outputs: Floats32, centres: Floats32, gamma: float, penalty: float
) -> tuple[Floats32, Floats32]:
    """Solve the regression. Returns weights on the landmarks (or components, for ridge) and the offset."""
    mapped, from_kernel = _mapped(points, centres, gamma)
    offset = outputs.mean(axis=0)
    gram = (mapped.T @ mapped).astype(np.float64)
    gram[np.diag_indices(len(gram))] += penalty
    weights = cho_solve(cho_factor(gram, lower=True), mapped.T @ (outputs - offset))
    return (weights if from_kernel is None else from_kernel @ weights).astype(np.float32), offset


def _mean_cosine(one: Floats, other: Floats) -> float:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean((one * other).sum(axis=1) / np.maximum(norms, 1e-30)))

"""Near look-ups on a device: predict outputs, search neighbours, correct the results, compute their evidence.

The NumPy counterparts are `llmcache.near.neighbors.predictor`, `llmcache.near.neighbors.correction` and
`llmcache.near.neighbors.index.HostNeighborIndex`. Results differ from theirs only by float32 rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.banks.device_cache import tensor_of
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Rows
from llmcache.indexes.search.torch_index import Matrix, half, in_full, usable
from llmcache.near.neighbors.correction import EVIDENCE, NEIGHBOURS, Voting, likeness, unit_norm
from llmcache.near.neighbors.index import Entries, Matches, Scores, Tokens
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import Predictor

_DEVICES = ("cuda",)  # elsewhere NumPy and FAISS are as fast
_BLOCK = 4096  # rows per block: bounds the kernel matrix [rows, landmarks]
_QUERIES = {
    "cpu": 512,
    "cuda": 2048,
}  # documents per block: bounds several arrays [documents, 8, out]
_TINY = 1e-6
_OF_TOKENS = EVIDENCE.index("length")  # first of the token columns, which the host computes


def place_of(config: CacheConfig, embedding: Tensor) -> torch.device | None:
    """Choose the device for near look-ups: that of the model's embeddings, if the settings ask for it.

    Returns None for the host.
    """
    device = embedding.device
    return device if device.type == config.device and device.type in _DEVICES else None


class DevicePredictor:
    """A `Predictor` with its arrays on a device."""

    def __init__(self, predictor: Predictor, device: torch.device | str) -> None:
        names = ("mean", "matrix", "landmarks", "weights", "offset", "basis")
        arrays = {name: torch.tensor(getattr(predictor, name), device=device) for name in names}
        self._mean, self._matrix, self._landmarks = (arrays[name] for name in names[:3])
        self._weights, self._offset, self._basis = (arrays[name] for name in names[3:])
        self._gamma = predictor.gamma

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Predict outputs, float32 [n, out]. features: [n, width], rounded to float16 as the stored ones are."""
        points = (features.float() - self._mean) @ self._matrix
        if not len(self._landmarks):
            return points @ self._weights + self._offset
        blocks = [self._kernel(points[at : at + _BLOCK]) @ self._weights for at in range(0, len(points), _BLOCK)]
        return torch.cat([points.new_empty((0, len(self._offset))), *blocks]) + self._offset

    def _kernel(self, points: Tensor) -> Tensor:
        """Return exp(-gamma d^2) to every landmark, [n, landmarks]. d^2 from products is clamped at 0."""
        squares = (
            points.square().sum(1, keepdim=True) + self._landmarks.square().sum(1) - 2 * points @ self._landmarks.T
        )
        return torch.exp(-self._gamma * squares.clamp(min=0))

    @torch.inference_mode()
    def fingerprints(self, predicted: Tensor) -> Tensor:
        """Return unit vectors of predicted outputs [n, out], float32 [n, dim]."""
        short = predicted @ self._basis
        unit: Tensor = short / short.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return unit


class DeviceMemory:
    """Entries in device memory: outputs, predictions, and an exact index over the fingerprints.

    An entry with 384 numbers takes 2.6 kB: outputs in float32 (in two bytes per number if the store has such a dtype),
    predictions in float16, fingerprints in float32. Token ids stay on the host.
    """

    def __init__(
        self,
        entries: Entries,
        predictor: Predictor,
        voting: Voting,
        device: torch.device | str,
        *,
        predictions: Floats32 | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the entries to the device.

        predictions: of the entries, `rounded`; None to compute them. dtype: of the outputs in device memory.
        ConfigError when there is no such device or there are no entries. RuntimeError when its memory is too small.
        """
        if not len(entries):
            raise ConfigError("there are no entries to search; fill the cache first")
        self.device, self.voting = usable(str(device)), voting
        self._predictor = DevicePredictor(predictor, self.device)
        self._tokens, self._unit = entries.tokens, unit_norm(entries.outputs)
        self._outputs = _to_device(entries.outputs, self.device, dtype)
        self._predictions = torch.empty(entries.outputs.shape, dtype=torch.float16, device=self.device)
        self._norms = torch.empty(len(entries), device=self.device)
        self._index = Matrix(predictor.basis.shape[1], torch.float32, str(self.device))
        self._head: tuple[LinearHead, Tensor, Tensor] | None = None
        with in_full(self.device):
            for start in range(0, len(entries), _BLOCK):
                block = slice(start, start + _BLOCK)
                if predictions is None:
                    predicted = half(self._predictor(_to_device(np.asarray(entries.features[block]), self.device)))
                else:
                    predicted = _to_device(predictions[block], self.device, torch.float16)
                self._predictions[block] = predicted
                self._norms[block] = predicted.float().norm(dim=1).clamp(min=1e-30)
                self._index.add(self._predictor.fingerprints(predicted.float()))

    @torch.inference_mode()
    def match(self, features: Floats32 | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """See `NeighborIndex`. Results stay on the device; the other fields come to the host block by block."""
        with in_full(self.device):
            predicted, rows = self._nearest(features)
            size = _QUERIES.get(self.device.type, 512)
            blocks = [slice(start, start + size) for start in range(0, max(1, len(predicted)), size)]
            columns = [self._corrected(predicted[block], rows[block], tokens[block], scores) for block in blocks]
        results, *others = zip(*columns, strict=True)
        return Matches(torch.cat(results), *(np.concatenate(column) for column in others))

    @torch.inference_mode()
    def nearest(self, features: Floats32 | Tensor, tokens: Tokens) -> tuple[Rows, Floats32]:
        """See `NeighborIndex`."""
        with in_full(self.device):
            _, _, similarity, rows = self._ordered(*self._nearest(features))
        return rows.cpu().numpy(), similarity.cpu().numpy()

    def _nearest(self, features: Floats32 | Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions of the documents, and positions int64 [n, k] of the nearest entries by fingerprint."""
        raw = features if isinstance(features, Tensor) else _to_device(features, self.device)
        predicted = self._predictor(half(raw.to(self.device)))
        k = min(NEIGHBOURS, len(self._tokens))
        return predicted, self._index.search_on(self._predictor.fingerprints(predicted), k)[1].clamp(min=0)

    def _ordered(self, predicted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return outputs, predictions, similarity and rows of the neighbours, sorted by cosine of full predictions."""
        unit = predicted / predicted.norm(dim=1, keepdim=True).clamp(min=1e-30)
        predictions = self._predictions[rows].float()
        similarity = torch.bmm(predictions, unit[:, :, None])[..., 0] / self._norms[rows]
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
        predictions = predictions.gather(1, order[:, :, None].expand_as(predictions))
        return self._outputs[rows].float(), predictions, similarity, rows

    def _corrected(
        self, predicted: Tensor, rows: Tensor, tokens: Tokens, scores: Scores | None
    ) -> tuple[Tensor, Rows, Floats32, Floats32]:
        """Return the fields of `Matches` for one block of documents."""
        outputs, predictions, similarity, rows = self._ordered(predicted, rows)
        host_rows = rows.cpu().numpy()  # copied first: the device computes the rest while the host compares tokens
        results = corrected(predicted, outputs, predictions, similarity, self.voting, unit=self._unit)
        logits = None if scores is None else self._scored(scores, results)
        device_columns = evidence(predicted, outputs, predictions, similarity, logits, self.voting.temperature)
        token_columns = np.stack(likeness(tokens, [self._tokens[row] for row in host_rows[:, 0].tolist()]), axis=1)
        k = rows.shape[1]
        joined = torch.cat([similarity, device_columns], 1).cpu().numpy()  # one transfer
        columns = [joined[:, k : k + _OF_TOKENS], token_columns, joined[:, k + _OF_TOKENS :]]
        return results, host_rows, joined[:, :k], np.concatenate(columns, axis=1)

    def _scored(self, scores: Scores, results: Tensor) -> Tensor:
        """Return the logits of a head: a linear head runs on the device, any other on the host."""
        if not isinstance(scores, LinearHead):
            return _to_device(np.asarray(scores(results.cpu().numpy()), np.float32), self.device)
        if self._head is None or self._head[0] is not scores:
            self._head = scores, _to_device(scores.weights, self.device), _to_device(scores.offset, self.device)
        _, weights, offset = self._head
        return results @ weights.T + offset


# -- tensor versions of `llmcache.near.neighbors.correction` -------------------------------------------------


def corrected(
    predicted: Tensor, outputs: Tensor, predictions: Tensor, similarity: Tensor, voting: Voting, *, unit: bool
) -> Tensor:
    """Compute the results of a batch like `correction.corrected`, float32 [n, out]."""
    weight = torch.softmax(similarity / voting.temperature, dim=1)
    results = _mixed(weight, outputs) + voting.strength * (predicted - _mixed(weight, predictions))
    return results / results.norm(dim=1, keepdim=True).clamp(min=1e-30) if unit else results


def evidence(
    predicted: Tensor,
    outputs: Tensor,
    predictions: Tensor,
    similarity: Tensor,
    scores: Tensor | None,
    temperature: float,
) -> Tensor:
    """Compute the columns of `correction.evidence` except the token columns ("length", "overlap").

    Returns float32 [n, columns].
    """
    weight = torch.softmax(similarity / temperature, dim=1)
    norms = outputs.norm(dim=2).clamp(min=1e-30)
    agreement = torch.ones_like(similarity[:, :1])
    if outputs.shape[1] > 1:
        agreement = torch.bmm(outputs[:, 1:4], outputs[:, 0, :, None])[..., 0] / (norms[:, 1:4] * norms[:, :1])
    residuals = outputs - predictions
    residual = (weight * residuals.square().sum(2)).sum(1)
    shift = (predicted - _mixed(weight, predictions)).square().sum(1)
    columns = [
        ((1 - similarity[:, 0]).clamp(min=0) + _TINY).log(),
        similarity[:, 0] - similarity[:, min(1, similarity.shape[1] - 1)],
        ((1 - similarity.mean(1)).clamp(min=0) + _TINY).log(),
        agreement.mean(1),
        agreement.amin(1),
        _mixed(weight / norms, outputs).norm(dim=1),
        (shift + _TINY).log(),
        (residual + _TINY).log(),
        _mixed(weight, residuals).square().sum(1) / (residual + _TINY),
    ]
    if scores is not None:
        gap = _decided(scores)
        columns += [gap, (gap + 0.05).log(), gap / (residual + _TINY).sqrt()]
    return torch.stack(columns, dim=1)


def _mixed(weight: Tensor, vectors: Tensor) -> Tensor:
    """Return weighted sums [n, out] of vectors [n, k, out] with weights [n, k]."""
    return torch.bmm(weight[:, None], vectors)[:, 0]


def _decided(scores: Tensor) -> Tensor:
    """Return the margin like `correction.decided`: best score minus second best, float32 [n]."""
    if scores.ndim == 1:
        return scores.abs()
    if scores.shape[1] < 2:
        return torch.zeros_like(scores[:, 0])
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _to_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor_of(array).to(device, dtype)

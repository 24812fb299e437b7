"""Calibrated near reuse on a device: predictions, the search for neighbours, corrected results and their evidence.

The same over arrays are `llmcache.near.neighbors.predictor`, `llmcache.near.neighbors.correction` and
`llmcache.near.neighbors.index.HostNeighborIndex`; what they give differs by the rounding of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.device_cache import tensor_of
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.indexes.search.torch_index import (
    Matrix,
    half,
    in_full,
    usable,
)
from llmcache.near.neighbors.correction import (
    EVIDENCE,
    NEIGHBOURS,
    Voting,
    likeness,
    unit_norm,
)
from llmcache.near.neighbors.index import Entries, Matches, Scores, Tokens
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import Predictor

_DEVICES = ("cuda",)  # on which near reuse looks up; on the host numpy and FAISS are as quick
_BLOCK = 4096  # rows at a time: the kernel to all landmarks is [rows, landmarks]
_ASKED = {
    "cpu": 512,
    "cuda": 2048,
}  # documents whose neighbours are looked at together: [documents, 8, out] several times
_TINY = 1e-6
_OF_TOKENS = EVIDENCE.index("length")  # the place of what the host adds

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def place_of(config: CacheConfig, embedding: Tensor) -> torch.device | None:
    """Where near reuse looks up: where the model's embeddings are, if the settings say so. None: on the host."""
    there = embedding.device
    return there if there.type == config.device and there.type in _DEVICES else None


class DevicePredictor:
    """The arrays of a `Predictor` on a device."""

    def __init__(self, predictor: Predictor, device: torch.device | str) -> None:
        names = ("mean", "matrix", "landmarks", "weights", "offset", "basis")
        arrays = {name: torch.tensor(getattr(predictor, name), device=device) for name in names}
        self._mean, self._matrix, self._landmarks = (arrays[name] for name in names[:3])
        self._weights, self._offset, self._basis = (arrays[name] for name in names[3:])
        self._gamma = predictor.gamma

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Predicted outputs, float32 [n, out], of raw features [n, width] rounded as the stored ones are."""
        points = (features.float() - self._mean) @ self._matrix
        if not len(self._landmarks):
            return points @ self._weights + self._offset
        parts = [self._kernel(points[at : at + _BLOCK]) @ self._weights for at in range(0, len(points), _BLOCK)]
        return torch.cat([points.new_empty((0, len(self._offset))), *parts]) + self._offset

    def _kernel(self, points: Tensor) -> Tensor:
        """exp(-gamma d^2) to every landmark, by the product, whose rounding never lets d^2 fall below 0."""
        squares = (
            points.square().sum(1, keepdim=True) + self._landmarks.square().sum(1) - 2 * points @ self._landmarks.T
        )
        return torch.exp(-self._gamma * squares.clamp(min=0))

    @torch.inference_mode()
    def fingerprints(self, predicted: Tensor) -> Tensor:
        """Unit vectors of predicted outputs, float32 [n, dim]."""
        short = predicted @ self._basis
        unit: Tensor = short / short.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return unit


class DeviceMemory:
    """`crossfit.Memory` on a device: entries' outputs, their predictions and an exact index over their fingerprints.

    Of entries of 384 numbers 2.6 kB each: outputs in float32 (half where the store holds two bytes), predictions
    in float16, fingerprints in float32. Token ids stay on the host.
    """

    def __init__(
        self,
        entries: Entries,
        predictor: Predictor,
        voting: Voting,
        device: torch.device | str,
        *,
        predictions: Floats | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """predictions: of the entries, `rounded`, where known. dtype: that of the store, in which outputs are held.

        ConfigError: there is no such device, or there are no entries. RuntimeError: it has not so much memory.
        """
        if not len(entries):
            raise ConfigError("there are no entries to look among; fill the cache first")
        self.device, self.voting = usable(str(device)), voting
        self._predictor = DevicePredictor(predictor, self.device)
        self._tokens, self._unit = entries.tokens, unit_norm(entries.outputs)
        self._outputs = _there(entries.outputs, self.device, dtype)
        self._predictions = torch.empty(entries.outputs.shape, dtype=torch.float16, device=self.device)
        self._norms = torch.empty(len(entries), device=self.device)
        self._index = Matrix(predictor.basis.shape[1], torch.float32, str(self.device))
        self._head: tuple[LinearHead, Tensor, Tensor] | None = None
        with in_full(self.device):
            for start in range(0, len(entries), _BLOCK):
                part = slice(start, start + _BLOCK)
                if predictions is None:
                    known = half(self._predictor(_there(np.asarray(entries.features[part]), self.device)))
                else:
                    known = _there(predictions[part], self.device, torch.float16)
                self._predictions[part] = known
                self._norms[part] = known.float().norm(dim=1).clamp(min=1e-30)
                self._index.add(self._predictor.fingerprints(known.float()))

    @torch.inference_mode()
    def match(self, features: Floats | Tensor, tokens: Tokens, scores: Scores | None = None) -> Matches:
        """See `crossfit.Neighbourhood`. The results are on the device; the rest comes to the host block by block."""
        with in_full(self.device):
            predicted, rows = self._nearest(features)
            size = _ASKED.get(self.device.type, 512)
            parts = [slice(start, start + size) for start in range(0, max(1, len(predicted)), size)]
            found = [self._judged(predicted[part], rows[part], tokens[part], scores) for part in parts]
        results, *others = zip(*found, strict=True)
        return Matches(torch.cat(results), *(np.concatenate(one) for one in others))

    @torch.inference_mode()
    def nearest(self, features: Floats | Tensor, tokens: Tokens) -> tuple[Rows, Floats]:
        """See `crossfit.Neighbourhood`."""
        with in_full(self.device):
            _, _, similarity, rows = self._ordered(*self._nearest(features))
        return rows.cpu().numpy(), similarity.cpu().numpy()

    def _nearest(self, features: Floats | Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of the documents, and rows int64 [n, k] of the nearest entries by their fingerprints."""
        raw = features if isinstance(features, Tensor) else _there(features, self.device)
        predicted = self._predictor(half(raw.to(self.device)))
        most = min(NEIGHBOURS, len(self._tokens))
        return predicted, self._index.search_on(self._predictor.fingerprints(predicted), most)[1].clamp(min=0)

    def _ordered(self, predicted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """outputs, predictions, similarity and rows of the neighbours, the nearest by whole predictions first."""
        unit = predicted / predicted.norm(dim=1, keepdim=True).clamp(min=1e-30)
        predictions = self._predictions[rows].float()
        similarity = torch.bmm(predictions, unit[:, :, None])[..., 0] / self._norms[rows]
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
        predictions = predictions.gather(1, order[:, :, None].expand_as(predictions))
        return self._outputs[rows].float(), predictions, similarity, rows

    def _judged(
        self, predicted: Tensor, rows: Tensor, tokens: Tokens, scores: Scores | None
    ) -> tuple[Tensor, Rows, Floats, Floats]:
        """What `Matches` has of a block of documents."""
        outputs, predictions, similarity, rows = self._ordered(predicted, rows)
        numbers = rows.cpu().numpy()  # now: the device goes on with the rest while the host looks at the tokens
        results = corrected(predicted, outputs, predictions, similarity, self.voting, unit=self._unit)
        given = None if scores is None else self._scored(scores, results)
        seen = evidence(predicted, outputs, predictions, similarity, given, self.voting.temperature)
        of_tokens = np.stack(likeness(tokens, [self._tokens[row] for row in numbers[:, 0].tolist()]), axis=1)
        k = rows.shape[1]
        together = torch.cat([similarity, seen], 1).cpu().numpy()
        columns = [together[:, k : k + _OF_TOKENS], of_tokens, together[:, k + _OF_TOKENS :]]
        return results, numbers, together[:, :k], np.concatenate(columns, axis=1)

    def _scored(self, scores: Scores, results: Tensor) -> Tensor:
        """Logits of a head. One that is linear is asked on the device, any other on the host."""
        if not isinstance(scores, LinearHead):
            return _there(np.asarray(scores(results.cpu().numpy()), np.float32), self.device)
        if self._head is None or self._head[0] is not scores:
            self._head = scores, _there(scores.weights, self.device), _there(scores.offset, self.device)
        _, weights, offset = self._head
        return results @ weights.T + offset


# -- `llmcache.near.neighbors.correction` of tensors ---------------------------------------------------------


def corrected(
    predicted: Tensor, outputs: Tensor, predictions: Tensor, similarity: Tensor, voting: Voting, *, unit: bool
) -> Tensor:
    """`correction.corrected`: results for a batch, float32 [n, out]."""
    part = torch.softmax(similarity / voting.temperature, dim=1)
    found = _mixed(part, outputs) + voting.strength * (predicted - _mixed(part, predictions))
    return found / found.norm(dim=1, keepdim=True).clamp(min=1e-30) if unit else found


def evidence(
    predicted: Tensor,
    outputs: Tensor,
    predictions: Tensor,
    similarity: Tensor,
    scores: Tensor | None,
    temperature: float,
) -> Tensor:
    """The columns of `correction.evidence` but for those of tokens, "length" and "overlap"; float32 [n, columns]."""
    part = torch.softmax(similarity / temperature, dim=1)
    norms = outputs.norm(dim=2).clamp(min=1e-30)
    agree = torch.ones_like(similarity[:, :1])
    if outputs.shape[1] > 1:
        agree = torch.bmm(outputs[:, 1:4], outputs[:, 0, :, None])[..., 0] / (norms[:, 1:4] * norms[:, :1])
    residuals = outputs - predictions
    own = (part * residuals.square().sum(2)).sum(1)
    moved = (predicted - _mixed(part, predictions)).square().sum(1)
    columns = [
        ((1 - similarity[:, 0]).clamp(min=0) + _TINY).log(),
        similarity[:, 0] - similarity[:, min(1, similarity.shape[1] - 1)],
        ((1 - similarity.mean(1)).clamp(min=0) + _TINY).log(),
        agree.mean(1),
        agree.amin(1),
        _mixed(part / norms, outputs).norm(dim=1),
        (moved + _TINY).log(),
        (own + _TINY).log(),
        _mixed(part, residuals).square().sum(1) / (own + _TINY),
    ]
    if scores is not None:
        gap = _decided(scores)
        columns += [gap, (gap + 0.05).log(), gap / (own + _TINY).sqrt()]
    return torch.stack(columns, dim=1)


def _mixed(part: Tensor, vectors: Tensor) -> Tensor:
    """Weighted sums, [n, out], of vectors [n, k, out] by weights [n, k]."""
    return torch.bmm(part[:, None], vectors)[:, 0]


def _decided(scores: Tensor) -> Tensor:
    """`correction.decided`: best score less the second best, float32 [n]."""
    if scores.ndim == 1:
        return scores.abs()
    if scores.shape[1] < 2:
        return torch.zeros_like(scores[:, 0])
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _there(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor_of(array).to(device, dtype)

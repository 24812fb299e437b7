"""Near look-ups on a device: predict outputs, search neighbours, correct the results, compute their evidence.

Only the search, the tables of the entries and the transfers are here: the rest is that of
`llmcache.near.neighbors.index.HostNeighborIndex`, on tensors. Results differ from its own only by float32 rounding.
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
from llmcache.near.neighbors.correction import (
    NEIGHBOURS,
    Voting,
    corrected,
    evidence_of_vectors,
    mixtures,
    unit_norm,
    with_likeness,
)
from llmcache.near.neighbors.index import Entries, Matches, Scores, Stored, Tokens
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import Predictor

_DEVICES = ("cuda",)  # elsewhere NumPy and FAISS are faster
_BLOCK = 4096  # entries per block while they are copied
_QUERIES = {
    "cpu": 512,
    "cuda": 2048,
}  # documents per block: bounds several arrays [documents, 8, out]


def place_of(config: CacheConfig, embedding: Tensor) -> torch.device | None:
    """Choose the device for near look-ups: that of the model's embeddings, if the settings ask for it.

    Returns None for the host.
    """
    device = embedding.device
    return device if device.type == config.device and device.type in _DEVICES else None


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
        self._predictor = predictor.regression.on(self.device)
        self._tokens, self._unit = entries.tokens, unit_norm(entries.outputs)
        self._stored = Stored(
            _to_device(entries.outputs, self.device, dtype),
            torch.empty(entries.outputs.shape, dtype=torch.float16, device=self.device),
            torch.empty(len(entries), device=self.device),
        )
        self._index = Matrix(predictor.basis.shape[1], torch.float32, str(self.device))
        self._head: tuple[LinearHead, Tensor, Tensor] | None = None
        with in_full(self.device):
            for start in range(0, len(entries), _BLOCK):
                block = slice(start, start + _BLOCK)
                if predictions is None:
                    predicted = half(self._predictor(_to_device(np.asarray(entries.features[block]), self.device)))
                else:
                    predicted = _to_device(predictions[block], self.device, torch.float16)
                self._stored.predictions[block] = predicted
                self._stored.norms[block] = predicted.float().norm(dim=1).clamp(min=1e-30)
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
            _, _, similarity, rows = self._stored.ordered(*self._nearest(features))
        return rows.cpu().numpy(), similarity.cpu().numpy()

    def _nearest(self, features: Floats32 | Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions of the documents, and positions int64 [n, k] of the nearest entries by fingerprint."""
        raw = features if isinstance(features, Tensor) else _to_device(features, self.device)
        predicted = self._predictor(half(raw.to(self.device)))
        k = min(NEIGHBOURS, len(self._tokens))
        return predicted, self._index.search_on(self._predictor.fingerprints(predicted), k)[1].clamp(min=0)

    def _corrected(
        self, predicted: Tensor, rows: Tensor, tokens: Tokens, scores: Scores | None
    ) -> tuple[Tensor, Rows, Floats32, Floats32]:
        """Return the fields of `Matches` for one block of documents."""
        outputs, predictions, similarity, rows = self._stored.ordered(predicted, rows)
        host_rows = rows.cpu().numpy()  # copied first: the device computes the rest while the host compares tokens
        temperature, strength = self.voting.temperature, self.voting.strength
        near = predicted, outputs, predictions, similarity
        mixed = mixtures(outputs, predictions, similarity, temperature)
        results = corrected(*near, temperature, strength, unit=self._unit, mixed=mixed)
        logits = None if scores is None else self._scored(scores, results)
        columns = evidence_of_vectors(*near, logits, temperature, mixed)
        k = rows.shape[1]
        joined = torch.cat([similarity, columns], 1).cpu().numpy()  # one transfer
        best = [self._tokens[row] for row in host_rows[:, 0].tolist()]
        return results, host_rows, joined[:, :k], with_likeness(joined[:, k:], tokens, best)

    def _scored(self, scores: Scores, results: Tensor) -> Tensor:
        """Return the logits of a head: a linear head runs on the device, any other on the host."""
        if not isinstance(scores, LinearHead):
            return _to_device(np.asarray(scores(results.cpu().numpy()), np.float32), self.device)
        if self._head is None or self._head[0] is not scores:
            self._head = scores, _to_device(scores.weights, self.device), _to_device(scores.offset, self.device)
        _, weights, offset = self._head
        return results @ weights.T + offset


def _to_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return tensor_of(array).to(device, dtype)

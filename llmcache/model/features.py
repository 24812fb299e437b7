"""Raw features of documents, from which fingerprints are projected.

A feature vector is the mean of a document's token embeddings: a look-up and a sum, without any layer of the model. The
banks store it raw, and compress it to a fingerprint by a projection (`llmcache.indexes.search.projection`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from llmcache.arrays import Floats32

_BATCH = 256


def feature_width(embedding: Tensor, fingerprint: str) -> int:
    """Return the length of a feature vector. embedding: [vocabulary, width]."""
    return int(embedding.shape[1]) * (2 if fingerprint == "mean+attention" else 1)


def features(embedding: Tensor, tokens: Sequence[NDArray[np.int32]], fingerprint: str) -> Floats32:
    """Compute the raw features of documents.

    embedding: [vocabulary, width], any float dtype and device. tokens: one array of token ids per document, not empty.
    fingerprint: "mean" or "mean+attention". Returns float32 [n, feature width], on the host.
    """
    return features_on(embedding, tokens, fingerprint).cpu().numpy()


@torch.inference_mode()
def features_on(embedding: Tensor, tokens: Sequence[NDArray[np.int32]], fingerprint: str) -> Tensor:
    """Like `features`, but returns a tensor on the device of the embedding."""
    if not tokens:
        return torch.zeros((0, feature_width(embedding, fingerprint)), device=embedding.device)
    ids = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(embedding.device)
    lengths = [len(row) for row in tokens]
    starts = torch.tensor([0, *np.cumsum(lengths[:-1]).tolist()], device=embedding.device)
    mean = embedding_bag(ids, embedding, starts, mode="mean").float()
    if fingerprint == "mean":
        return mean
    vectors = torch.split(embedding[ids].float(), lengths)
    weighted = torch.stack([_attended(row) for row in vectors])
    # both halves at unit length, so that they have the same weight in a distance
    return torch.cat([normalize(mean, dim=1), normalize(weighted, dim=1)], dim=1)


def _attended(vectors: Tensor) -> Tensor:
    """Return the mean of token embeddings, weighted by the attention each receives: [tokens, width] -> [width].

    The attention is softmax(E E^T / sqrt(width)), where E are the embeddings scaled to length sqrt(width): that of an
    attention layer whose projections are the identity. It needs no layer of the model, and works for every model with
    token embeddings.
    """
    if not len(vectors):
        return vectors.new_zeros(vectors.shape[1])
    width = vectors.shape[1]
    unit = normalize(vectors, dim=1) * width**0.25
    attention = torch.softmax(unit @ unit.T, dim=1)
    return attention.mean(dim=0) @ vectors

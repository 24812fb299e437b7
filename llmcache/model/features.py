"""From inputs to the raw features that fingerprints are made of.

A feature vector is the mean of a document's token embeddings: a look-up and a sum, no layer of the model. The banks
store it raw, and compress it to a fingerprint by a projection (`llmcache.indexes.search.projection`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

_BATCH = 256


def feature_width(embedding: Tensor, fingerprint: str) -> int:
    """Numbers in one feature vector. embedding: [vocabulary, width]."""
    return int(embedding.shape[1]) * (2 if fingerprint == "mean+attention" else 1)


def features(embedding: Tensor, tokens: Sequence[NDArray[np.int32]], fingerprint: str) -> NDArray[np.float32]:
    """Raw features of some documents.

    embedding: [vocabulary, width], any float dtype and device. tokens: one array of token ids per document, not empty.
    Returns float32 [n, feature width], on the host.
    """
    return features_on(embedding, tokens, fingerprint).cpu().numpy()


@torch.inference_mode()
def features_on(embedding: Tensor, tokens: Sequence[NDArray[np.int32]], fingerprint: str) -> Tensor:
    """The same on the device of the embedding."""
    if not tokens:
        return torch.zeros((0, feature_width(embedding, fingerprint)), device=embedding.device)
    ids = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(embedding.device)
    lengths = [len(one) for one in tokens]
    starts = torch.tensor([0, *np.cumsum(lengths[:-1]).tolist()], device=embedding.device)
    mean = embedding_bag(ids, embedding, starts, mode="mean").float()
    if fingerprint == "mean":
        return mean
    vectors = torch.split(embedding[ids].float(), lengths)
    drawn = torch.stack([_attended(one) for one in vectors])
    # both halves at unit length: the two views of a document then weigh the same
    return torch.cat([normalize(mean, dim=1), normalize(drawn, dim=1)], dim=1)


def _attended(vectors: Tensor) -> Tensor:
    """Mean of token embeddings, each weighted by the attention it draws from the others: [tokens, width] -> [width].

    The attention is softmax(E E^T / sqrt(width)) over the unit-length embeddings E times sqrt(width): what an attention
    layer computes when its projections are the identity. It needs no layer of the model, and works for every model
    that has token embeddings.
    """
    if not len(vectors):
        return vectors.new_zeros(vectors.shape[1])
    width = vectors.shape[1]
    unit = normalize(vectors, dim=1) * width**0.25
    attention = torch.softmax(unit @ unit.T, dim=1)
    return attention.mean(dim=0) @ vectors

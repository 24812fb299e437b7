"""Models of sentence-transformers as the executor runs them: vectors, scores of pairs, sparse and token vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.document import PAIR_FIELDS, TextFields
from llmcache.indexes.format.rows import Keys
from llmcache.model.batching import Model, token_embedding
from llmcache.model.keys import Seed, pair_keys, text_keys
from llmcache.model.tokens import TokenRows, batch, tokenise

Encoder: TypeAlias = SentenceTransformer | CrossEncoder | SparseEncoder | MultiVectorEncoder
"""Model of sentence-transformers with one output per document or pair."""
ENCODERS = (SentenceTransformer, CrossEncoder, SparseEncoder, MultiVectorEncoder)


class _Encoder:
    """Base of the models here: tokenisation and inputs are those of the sentence-transformers model."""

    matrices = False

    def __init__(self, model: BaseModel) -> None:
        self._model: Any = model

    @property
    def module(self) -> Module:
        module: Module = self._model
        return module

    def tokenise(self, texts: Sequence[Any], prompt: str | None, role: str | None) -> TokenRows:
        return tokenise(self._model, texts, prompt, role)

    def keys(self, seed: Seed, texts: Sequence[Any]) -> Keys:
        return text_keys(seed, texts).view(np.uint64)

    def comparable(self, outputs: list[Floats32]) -> list[Floats32]:
        return outputs

    def token_embedding(self) -> torch.Tensor:
        return token_embedding(self._model)

    @property
    def limit(self) -> int | None:
        """Tokens of a text that the model reads; None: all."""
        limit: int | None = self._model.max_seq_length
        return limit

    def _features(self, rows: TokenRows, chosen: Sequence[int], role: str | None, **settings: Any) -> dict[str, Any]:
        """Run the model on the chosen rows; returns its outputs by name."""
        self._model.eval()
        inputs = batch(self._model.tokenizer, self._model.device, rows, chosen)
        features: dict[str, Any] = self._model(inputs, **({"task": role} if role else {}), **settings)
        return features


class Sentences(_Encoder):
    """A SentenceTransformer, whose outputs are sentence embeddings."""

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> torch.Tensor:
        vectors: torch.Tensor = self._features(rows, chosen, role)["sentence_embedding"]
        return vectors


class PairScores(_Encoder):
    """A CrossEncoder, whose outputs are the logits of ordered pairs of texts, before any activation."""

    def keys(self, seed: Seed, texts: Sequence[Any]) -> Keys:
        return pair_keys(seed, texts).view(np.uint64)

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> torch.Tensor:
        scores: torch.Tensor = self._features(rows, chosen, role)["scores"]
        return scores.reshape(len(chosen), -1)

    def comparable(self, outputs: list[Floats32]) -> list[Floats32]:
        """Return logits beside a constant 1: the rounding of a logit near zero is that of the larger terms it sums."""
        return [np.append(logits, np.float32(1)) for logits in outputs]


class SparseVectors(_Encoder):
    """A SparseEncoder, whose outputs are matrices of two columns: dimensions that are not zero, and their values.

    Dimensions are stored as float32, which is exact below 16,777,216.
    """

    matrices = True

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> list[torch.Tensor]:
        settings = {"max_active_dims": self._model.max_active_dims} if limits_inside(self._model) else {}
        dense: torch.Tensor = self._features(rows, chosen, role, **settings)["sentence_embedding"]
        places = dense.nonzero()
        entries = torch.stack([places[:, 1].float(), dense[places[:, 0], places[:, 1]].float()], 1)
        sizes: Any = dense.count_nonzero(1).tolist()
        return list(torch.split(entries, sizes))

    def comparable(self, outputs: list[Floats32]) -> list[Floats32]:
        """Return dense vectors: rounding may decide whether a dimension is zero."""
        highest = max((int(entries[:, 0].max(initial=-1)) for entries in outputs), default=-1)
        width = max(self._model.get_embedding_dimension() or 0, highest + 1)
        return list(dense_rows(outputs, width))


class TokenVectors(_Encoder):
    """A MultiVectorEncoder or SentenceTransformer, whose outputs are the vectors of a document's tokens."""

    matrices = True

    def vectors(self, rows: TokenRows, chosen: Sequence[int], role: str | None) -> list[torch.Tensor]:
        features = self._features(rows, chosen, role)
        states, mask = features["token_embeddings"], features["attention_mask"].bool()
        if isinstance(self._model, MultiVectorEncoder):
            return [state[visible] for state, visible in zip(states, mask, strict=True)]
        # as `SentenceTransformer.encode` does: up to the last token that is no padding
        ends = [int(visible.nonzero().max()) + 1 if visible.any() else 1 for visible in mask]
        return [state[:end] for state, end in zip(states, ends, strict=True)]


def dense_rows(rows: Sequence[Floats32], width: int) -> Floats32:
    """Return sparse rows as a table, float32 [n, width]. rows: pairs of a dimension and its value, [entries, 2]."""
    table = np.zeros((len(rows), width), np.float32)
    for place, entries in zip(table, rows, strict=True):
        place[entries[:, 0].astype(np.int64)] = entries[:, 1]
    return table


def limits_inside(model: Any) -> bool:
    """Return whether a SparseEncoder limits its active dimensions inside the model, not only in its output."""
    return "max_active_dims" in model.get_model_kwargs()


def text_fields(model: Module) -> TextFields:
    """Return the default names of the text fields of a model's documents: two for the pairs of a CrossEncoder."""
    return PAIR_FIELDS if isinstance(model, CrossEncoder) else "text"


def encoder(model: BaseModel) -> Model:
    """Return a model of sentence-transformers as one that the executor runs."""
    if isinstance(model, CrossEncoder):
        return PairScores(model)
    if isinstance(model, SparseEncoder):
        return SparseVectors(model)
    return TokenVectors(model) if isinstance(model, MultiVectorEncoder) else Sentences(model)

"""Small models of every kind of sentence-transformers, of two seeded layers over characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling

from tests.small_sentences import WIDTH, with_prompts

PROMPTS = {"query": "query: ", "document": "passage: "}


def sentence_transformer(folder: str) -> SentenceTransformer:
    return with_prompts(folder)


def cross_encoder(folder: str, labels: int = 1) -> CrossEncoder:
    torch.manual_seed(1)  # of the new head
    model: Any = CrossEncoder(folder, num_labels=labels, device="cpu")
    with torch.no_grad():
        model.transformers_model.classifier.weight.mul_(20)  # scores that differ
    made: CrossEncoder = model
    return made


def sparse_encoder(folder: str) -> SparseEncoder:
    """A model of the SPLADE kind: the largest logit of each token of the vocabulary."""
    torch.manual_seed(2)
    modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling()]
    return SparseEncoder(modules=modules, prompts=dict(PROMPTS), device="cpu")


def sparse_auto_encoder(folder: str) -> SparseEncoder:
    """A model that keeps the largest dimensions inside its forward pass."""
    torch.manual_seed(2)
    modules = [Transformer(folder), Pooling(WIDTH), SparseAutoEncoder(WIDTH, hidden_dim=128, k=8)]
    return SparseEncoder(modules=modules, prompts=dict(PROMPTS), device="cpu")


def multi_vector_encoder(folder: str) -> MultiVectorEncoder:
    torch.manual_seed(3)
    return MultiVectorEncoder(folder, prompts=dict(PROMPTS), device="cpu")


MAKERS: dict[str, Callable[[str], Any]] = {
    "SentenceTransformer": sentence_transformer,
    "CrossEncoder": cross_encoder,
    "SparseEncoder": sparse_encoder,
    "MultiVectorEncoder": multi_vector_encoder,
}

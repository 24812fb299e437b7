"""Hit rate per layer, in two readings: one fingerprint with a tau per layer, and the state of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.latency import layer_taus
from llmcache.bench.paper.models import Made, agreement, decisions
from llmcache.bench.paper.texts import Workload
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.search.projection import Projection, fit_pca
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.model.batching import token_embedding
from llmcache.model.features import features
from llmcache.model.tokens import batch, tokenise

TAU = 0.85
"""Threshold for states: the middle of the paper's range."""
LEAST = 256
"""Fewest known documents for a PCA."""
DIM = 128


def layer_hits(made: Made, workload: Workload) -> list[Row]:
    """Measure hits and wrong hits of each layer. Returns one row per layer.

    hits: share of the queries whose nearest known document is at similarity >= tau. input: by the fingerprint of the
    input, which is available before any layer runs; tau rises with the layer within the paper's range. state: by the
    mean state after the layer, which has to be computed first, at one tau for all layers. Each layer is looked up with
    its own state, regardless of hits before. wrong: the nearest document's output, the mean of its last states, gets
    another decision than the query's own.
    """
    known, asked = (pooled_states(made, texts) for texts in (workload.known, workload.asked))
    outputs, own = known[-1], asked[-1]
    head = decisions(made, outputs)
    inputs = nearest(*(_input_features(made, texts) for texts in (workload.known, workload.asked)))
    taus = layer_taus(range(made.layers))
    rows = []
    for layer in range(made.layers):
        row: Row = {
            "model": made.name, "weights": made.weights, "data": workload.name, "layer": layer, "of": made.layers,
            "known": len(workload.known), "asked": len(workload.asked),
        }  # fmt: skip
        of_state = nearest(known[layer], asked[layer])
        for name, (places, similarity), tau in (("input", inputs, taus[layer]), ("state", of_state, TAU)):
            hit = similarity >= tau
            wrong = hit & ~agreement(head, own, outputs[places])
            row |= {
                f"{name}_tau": tau, f"{name}_hits": float(hit.mean()), f"{name}_wrong": float(wrong.mean()),
                f"{name}_wrong_of_hits": float(wrong.sum() / hit.sum()) if hit.any() else None,
                f"{name}_similarity": float(np.median(similarity)),
            }  # fmt: skip
        rows.append(row)
    return rows


@torch.inference_mode()
def pooled_states(made: Made, texts: Sequence[str], size: int = 32) -> Floats32:
    """Compute the mean state of each document after each layer, float32 [layers, n, width]."""
    model = made.model
    trunk = model.transformers_model
    assert trunk is not None
    tokens = tokenise(model, list(texts), None, None)
    order = np.argsort(-tokens.lengths, kind="stable")
    pooled: Floats32 | None = None
    for start in range(0, len(order), size):
        chosen = order[start : start + size].tolist()
        inputs = batch(model.tokenizer, model.device, tokens, chosen)
        states = trunk(**{name: inputs[name] for name in tokens.fields}, output_hidden_states=True).hidden_states[1:]
        mask = inputs["attention_mask"][..., None].float()
        means = torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states]).float().cpu().numpy()
        if pooled is None:
            pooled = np.zeros((len(means), len(texts), means.shape[2]), np.float32)
        pooled[:, chosen] = means
    assert pooled is not None
    return pooled


def _input_features(made: Made, texts: Sequence[str]) -> Floats32:
    return features(token_embedding(made.model), tokenise(made.model, list(texts), None, None).ids, "mean")


def projection(known: Floats32, dim: int = DIM) -> Projection:
    """Fit a PCA as banks do, or no projection where there are too few features."""
    return fit_pca(known, min(dim, known.shape[1])) if len(known) >= LEAST else Projection.none(known.shape[1])


def nearest(known: Floats32, asked: Floats32) -> tuple[NDArray[np.int64], Floats32]:
    """Find the nearest known features of each query. Returns indices int64 [n], and similarities.

    Features are rounded as banks store them, and compressed by a PCA fitted to the known ones.
    """
    entries, queries = (half(each).astype(np.float32) for each in (known, asked))
    pca = projection(entries)
    places, similarity = VectorIndex.build(pca.apply(entries), kind="flat").nearest(pca.apply(queries), 1)
    return places[:, 0], similarity[:, 0]

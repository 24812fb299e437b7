"""Measurement of calibrated near look-ups on a device, beside those on the host and beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.bench.harness.device import Device, spread
from llmcache.bench.harness.shapes import SHAPES, WORDS, sentences, tiny
from llmcache.bench.harness.turns import Row, speed_up
from llmcache.model.batching import token_embedding
from llmcache.model.encoders import Sentences
from llmcache.model.features import features, features_on
from llmcache.model.tokens import TokenRows
from llmcache.near.neighbors.correction import Voting, units
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, NeighborIndex, rounded
from llmcache.near.neighbors.index_torch import DeviceMemory
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.predictor import LANDMARKS, Predictor, directions, median_square

_TOKENS = 12  # of a query
_BATCHES = (1, 32, 256)
_CLASSES = 77  # of the linear head


def near(device: Device) -> Iterator[Row]:
    """Measure queries of 12 tokens on MiniLM's shape among 20,000 and 200,000 entries, on the device and on the host.

    A look-up computes features, predictions, neighbours, corrected results and evidence. The model alone is measured in
    the same rounds. Entries lie around other queries, with random outputs. Milliseconds are per query. difference: the
    largest, of the device's results to the host's. same_neighbours: share of queries with equal neighbours.
    """
    shape = replace(tiny(SHAPES["minilm"]) if device.tiny else SHAPES["minilm"], tokens=_TOKENS)
    model = sentences(shape, device.name, device.dtype)
    random = np.random.default_rng(7)
    drawn = [random.integers(4, WORDS, _TOKENS).astype(np.int32) for _ in range(64 if device.tiny else 4096)]
    queries = Sentences(model).tokenise(["w0"], None, None).like(drawn[: max(_BATCHES)])
    for number, count in enumerate((500, 1000) if device.tiny else (20_000, 200_000)):
        if number and device.over:
            return
        for row in _looked_up(Sentences(model), token_embedding(model), drawn, queries, count, device):
            device.say(f"near look-up of {row['queries']} among {count:,}: {row['of_model']:.1%} of the model's time")
            yield row


def _looked_up(
    model: Sentences,
    embedding: torch.Tensor,
    drawn: list[NDArray[np.int32]],
    queries: TokenRows,
    count: int,
    device: Device,
) -> Iterator[Row]:
    random, out = np.random.default_rng(count), int(embedding.shape[1])
    raw, like = features(embedding, drawn, "mean"), random.integers(0, len(drawn), count)
    predictor = _predictor(raw, out)
    kept = rounded(predictor(raw)[like] + random.standard_normal((count, out), np.float32) / np.float32(10))
    outputs = units(random.standard_normal((count, out), np.float32))
    entries = Entries(raw[like].astype(np.float16), outputs, [drawn[i] for i in like.tolist()])
    head = LinearHead(random.standard_normal((_CLASSES, out), np.float32), np.zeros(_CLASSES, np.float32))
    there = DeviceMemory(entries, predictor, Voting(), device.name, predictions=kept)
    host = HostNeighborIndex(entries, predictor, Voting(), "torch", kept)

    def matched(memory: NeighborIndex, tokens: list[NDArray[np.int32]]) -> Any:
        return memory.match(features_on(embedding, tokens, "mean"), tokens, head)

    @torch.inference_mode()
    def computed(batch: int) -> torch.Tensor:
        return model.vectors(queries, range(batch), None)

    for batch in sorted({min(batch, len(queries.ids)) for batch in _BATCHES}):
        tokens = list(queries.ids[:batch])
        actions = {
            "model": lambda batch=batch: computed(batch),
            "device": lambda tokens=tokens: matched(there, tokens),
            "host": lambda tokens=tokens: matched(host, tokens),
        }
        made = device.rounds(actions, 3 if device.tiny else 20, warm=3)
        one, other = matched(there, tokens), matched(host, tokens)
        yield {
            "entries": count, "queries": batch, "tokens": _TOKENS,
            **{name: spread(each.seconds) for name, each in made.items()},
            **{f"{name}_milliseconds": 1000 * each.median / batch for name, each in made.items()},
            "of_model": 1 / speed_up(made["device"], made["model"]),
            "times_as_fast_as_host": speed_up(made["device"], made["host"]),
            "difference": float(np.abs(one.results.cpu().numpy() - other.results).max()),
            "same_neighbours": float((one.neighbours == other.neighbours).all(axis=1).mean()),
        }  # fmt: skip


def _predictor(raw: NDArray[np.float32], out: int) -> Predictor:
    """Create a kernel predictor of the usual size on the features of these documents, with random weights."""
    random, width = np.random.default_rng(4), raw.shape[1]
    matrix = random.standard_normal((width, min(width, 256)), np.float32)
    mean = raw.mean(axis=0)
    landmarks = (raw[:LANDMARKS] - mean) @ matrix
    weights = random.standard_normal((len(landmarks), out), np.float32) / np.float32(np.sqrt(len(landmarks)))
    return Predictor(
        mean=mean, matrix=matrix, landmarks=landmarks, weights=weights, offset=np.zeros(out, np.float32),
        basis=directions(random.standard_normal((2 * out, out), np.float32)),
        gamma=1 / median_square(landmarks[:512]), penalty=0.1, entries=len(raw), held_out=0.9,
    )  # fmt: skip

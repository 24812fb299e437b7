"""Measurement of a model on a device, alone and with outputs stored in device memory, pinned memory and on disk."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from llmcache.bench.harness.device import Device, spread
from llmcache.bench.harness.shapes import Shape, sentences, texts, tiny
from llmcache.bench.harness.turns import Action, Row, Turn, speed_up
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig

_BATCH = 256
_LEVELS = {"device memory": {"device_bytes": 1 << 28}, "pinned memory": {"pinned_bytes": 1 << 28}, "disk": {}}


def tiers(shape: Shape, device: Device) -> Iterator[tuple[str, Any]]:
    """Yield results by name: with all documents stored, for each level, and with none stored, beside the model alone.

    Documents come in calls of 8 batches to `encode(convert_to_tensor=True)`, so that results are on the device. disk:
    the store's files, in the page cache. rows: 256 stored outputs gathered, without texts and keys.
    """
    shape, batches, repeats = (tiny(shape), 1, 2) if device.tiny else (shape, 8, 7)
    batch = 16 if device.tiny else _BATCH
    model = sentences(shape, device.name, device.dtype)
    known = texts(batches * batch, shape.tokens, seed=1)
    yield (
        "model",
        {"shape": shape.name, "sizes": shape.sizes, "dtype": str(device.dtype).removeprefix("torch."),
         "batch": batch, "documents": len(known), "tokens": shape.tokens},
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="llmcache-gpu-") as folder, ExitStack() as stack:
        with LLMCache.open(Path(folder) / "known", model, config=_config(device)) as cache:
            cache.encode(known, batch_size=batch)
        caches = {
            name: stack.enter_context(LLMCache.open(Path(folder) / "known", model, config=_config(device, **settings)))
            for name, settings in _LEVELS.items()
        }
        hits = _hits(model, caches, known, batch, device, repeats)
        yield "hits", hits
        device.say(f"{shape.name}: device memory gives {hits['device memory']['times_as_fast']:,.1f} x the model")
        yield "rows", {name: _gathered(cache, batch, device) for name, cache in caches.items()}
        empty = stack.enter_context(LLMCache.open(Path(folder) / "empty", model, config=_config(device)))
        misses = _misses(model, empty, (batches * batch, shape.tokens, batch), device, repeats)
        yield "misses", misses
        device.say(f"{shape.name}: all misses take {misses['overhead']:+.1%} of the model's time more")


def _config(device: Device, **settings: int) -> CacheConfig:
    # measure every level, also where it does not pay
    return CacheConfig(index="torch", device="cuda" if device.cuda else "cpu", stand_aside=False, **settings)  # type: ignore[arg-type]


def _hits(
    model: SentenceTransformer,
    caches: dict[str, LLMCache],
    known: Sequence[str],
    batch: int,
    device: Device,
    repeats: int,
) -> Row:
    def encoded(by: Any) -> Callable[[], torch.Tensor]:
        return lambda: by.encode(known, batch_size=batch, convert_to_tensor=True)

    actions = {"model alone": encoded(model), **{name: encoded(cache) for name, cache in caches.items()}}
    made = device.rounds(actions, repeats, warm=2)
    expected = made["model alone"].outputs[-1].float()
    rows = {
        name: {
            **spread(one.seconds), "documents_per_second": len(known) / one.median, "times_as_fast": one.ratio,
            "difference": float((one.outputs[-1].float() - expected).abs().max()),
        }
        for name, one in made.items()
    }  # fmt: skip
    for name, cache in caches.items():
        counters = cache.levels.counters if cache.levels else None
        rows[name]["answered_by"] = None if counters is None else [counters.device, counters.pinned, counters.files]
    return rows


def _gathered(cache: LLMCache, batch: int, device: Device) -> Row:
    """Measure one batch of stored rows, from their level to a tensor on the device."""
    bank, random = cache._bank, np.random.default_rng(0)
    rows = random.permutation(bank.pieces.rows)[:batch]
    take: Callable[[], Any]
    if cache.levels is None:
        take = lambda: torch.from_numpy(np.asarray(bank.read(rows).values)).to(device.name)  # noqa: E731
    else:
        levels = cache.levels
        take = lambda: levels.gather(rows)  # noqa: E731
    made = device.rounds({"": take}, 3 if device.tiny else 30, warm=3)[""]
    size = batch * bank.facts.width * device.dtype.itemsize
    return {**spread(made.seconds), "bytes": size, "bytes_per_second": size / made.median}


def _misses(
    model: SentenceTransformer, cache: LLMCache, sizes: tuple[int, int, int], device: Device, repeats: int
) -> Row:
    """Measure new documents in each round. The model alone comes first or last in turn."""
    count, tokens, batch = sizes
    commits: list[float] = []

    @contextmanager
    def prepared(who: Any, number: int) -> Iterator[Action]:
        fresh = texts(count, tokens, seed=100 + number)
        yield lambda: who.encode(fresh, batch_size=batch, convert_to_tensor=True)
        if who is cache:
            began = device.clock()
            cache.commit()
            commits.append(device.clock() - began)

    turns = [Turn("model alone", count, partial(prepared, model)), Turn("cache", count, partial(prepared, cache))]
    made = device.in_turn(turns, repeats, keep=None)
    alone, cached, counters = made["model alone"], made["cache"], cache.stats().counters
    commits = commits[-len(cached.seconds) :]  # the first round warms up
    whole = [base / (own + commit) for base, own, commit in zip(alone.seconds, cached.seconds, commits, strict=True)]
    pairs = zip(alone.outputs, cached.outputs, strict=True)
    return {
        "model alone": spread(alone.seconds), "cache": spread(cached.seconds), "commit": spread(commits),
        "overhead": 1 / speed_up(cached, alone) - 1, "overhead_with_commit": 1 / statistics.median(whole) - 1,
        "difference": max(float((one.float() - other.float()).abs().max()) for one, other in pairs),
        "model_seconds": counters.model_seconds, "cache_seconds": counters.overhead_seconds,
    }  # fmt: skip

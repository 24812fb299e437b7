"""Latency of decoders: transformers' keys and values within a request, and ours, restored from other requests."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.bench.harness.rounds import Row
from llmcache.bench.paper.latency import BATCH, Answered, closed, times, with_commit
from llmcache.bench.paper.models import Made
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.decoders.generation import padded

WRITTEN = 8
"""Tokens that are written for the row of keys and values; before the first one they save nothing."""
FEW = 4
"""Prompts of a round of it, since without keys and values each token costs a whole pass."""
BEGINNINGS = 96
"""Known prompts whose keys and values are stored: one for each beginning."""
_ALIKE = 60  # characters that two prompts share when they begin alike


def decoders(made: Made, workload: Workload, folder: Path, rounds: int = 5) -> list[Row]:
    """Rows "KV-Cache" and "LLMCache, ours", each with a base of its own in the same rounds."""
    tokenizer: Any = made.model.tokenizer
    asked = [tokenizer(text)["input_ids"] for text in workload.asked]
    known = [tokenizer(text)["input_ids"] for text in beginnings(workload.known, workload.asked)]
    facts = {
        "model": made.name, "weights": made.weights, "data": workload.name,
        "tokens": float(np.mean([len(one) for one in asked])),
    }  # fmt: skip
    try:
        rows = [_keys_and_values(made.decoder, asked, min(rounds, 3)), _ours(made, known, asked, folder, rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{**facts, **one} for one in rows]


def beginnings(known: Sequence[str], asked: Sequence[str], most: int = BEGINNINGS) -> list[str]:
    """One known text for each beginning, at most so many; those that an asked text begins with come first."""
    wanted = {text[:_ALIKE] for text in asked}
    first: dict[str, str] = {}
    for text in known:
        first.setdefault(text[:_ALIKE], text)
    return sorted(first.values(), key=lambda text: text[:_ALIKE] not in wanted)[:most]


def _keys_and_values(decoder: Any, asked: Sequence[list[int]], rounds: int) -> Row:
    """Greedy writing with and without keys and values of the request's own tokens."""

    def written(rows: Sequence[list[int]], use: bool) -> Answered:
        ids, mask = padded(rows, 0, "cpu")
        began = time.perf_counter()
        with torch.inference_mode():
            found = decoder.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False,
                use_cache=use, pad_token_id=0,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        return Answered(seconds, found[:, ids.shape[1] :].numpy(), [""] * len(rows), [""] * len(rows))

    size = max(1, min(FEW, len(asked) // (rounds + 1)))
    plain, kept = _in_turn([lambda rows: written(rows, False), lambda rows: written(rows, True)], asked, size, rounds)
    same = np.concatenate([one.outputs == other.outputs for one, other in zip(plain, kept, strict=True)])
    return {
        "method": "KV-Cache", "documents": size * rounds, "rounds": rounds, "written": WRITTEN,
        "ms": _milliseconds(kept), "base_ms": _milliseconds(plain), **times("", kept, plain),
        "agreement": float(same.all(axis=1).mean()), "hits": 0.0,
    }  # fmt: skip


def _ours(made: Made, known: Sequence[list[int]], asked: Sequence[list[int]], folder: Path, rounds: int) -> Row:
    """Until the first token, with the keys and values of known beginnings restored."""
    decoder = made.decoder
    size = max(1, min(BATCH, len(asked) // (rounds + 1)))
    cache = LLMCache.open(folder, decoder, tokenizer=made.model.tokenizer)
    counters, shares = cache.stats().counters.prefix, []

    def restored(rows: Sequence[list[int]]) -> Answered:
        tokens, computed = counters.tokens, counters.computed
        with cache.attached():
            answered = plain(rows, use_cache=True)
        shares.append(1 - (counters.computed - computed) / max(1, counters.tokens - tokens))
        return answered

    def plain(rows: Sequence[list[int]], use_cache: bool = False) -> Answered:
        began = time.perf_counter()
        outputs = first_token(decoder, rows, use_cache=use_cache)
        return Answered(time.perf_counter() - began, outputs, [""] * len(rows), [""] * len(rows))

    for at in range(0, len(known), size):
        restored(known[at : at + size])
    cache.commit()
    base, mine, base_again, again = _in_turn([plain, restored, plain, restored], asked, size, rounds)
    commit = closed(cache)
    mine = with_commit(mine, commit)
    given, own = (np.concatenate([one.outputs for one in part]) for part in (mine, base))
    return {
        "method": "LLMCache, ours", "documents": size * rounds, "rounds": rounds, "known": len(known),
        "ms": _milliseconds(mine), "base_ms": _milliseconds(base), **times("", mine, base),
        **times("again_", again, base_again), "commit_seconds": commit,
        "restored_tokens": float(np.mean(shares[-2 * rounds :: 2])),
        "agreement": float((given.argmax(axis=1) == own.argmax(axis=1)).mean()),
        "difference_of_computed": float(np.abs(given - own).max()),
    }  # fmt: skip


def _in_turn(
    actions: Sequence[Callable[[Sequence[list[int]]], Answered]], asked: Sequence[list[int]], size: int, rounds: int
) -> list[list[Answered]]:
    """What each action gave in each round; the first batch of `asked` warms up and is left out."""
    found: list[list[Answered]] = [[] for _ in actions]
    for turn in range(rounds + 1):
        batch = asked[turn * size : (turn + 1) * size]
        for place, action in enumerate(actions):
            answered = action(batch)
            if turn:
                found[place].append(answered)
    return found


def first_token(decoder: Any, rows: Sequence[list[int]], *, use_cache: bool) -> NDArray[np.float32]:
    """Logits of the token that comes next, float32 [n, vocabulary]; rows are padded on the left."""
    ids, mask = padded(rows, 0, "cpu")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        found = decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1
        )
    logits: NDArray[np.float32] = found.logits[:, 0].float().numpy()
    return logits


def _milliseconds(part: Sequence[Answered]) -> float:
    return 1e3 * statistics.median(one.seconds / len(one.tiers) for one in part)

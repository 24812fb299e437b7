"""Latency of decoders: transformers' key/value cache within a request, and prefixes restored from other requests."""

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
"""Tokens generated for the row KV-Cache, which saves nothing before the first token."""
FEW = 4
"""Prompts per round of KV-Cache, since without keys and values each token costs a whole pass."""
PREFIXES = 96
"""Most known prompts whose keys and values are stored: one per prefix."""
_PREFIX = 60  # leading characters that identify a prefix


def decoders(made: Made, workload: Workload, folder: Path, rounds: int = 5) -> list[Row]:
    """Measure the rows "KV-Cache" and "LLMCache, ours", each with its own base in the same rounds."""
    tokenizer: Any = made.model.tokenizer
    asked = [tokenizer(text)["input_ids"] for text in workload.asked]
    known = [tokenizer(text)["input_ids"] for text in prefix_representatives(workload.known, workload.asked)]
    facts = {
        "model": made.name, "weights": made.weights, "data": workload.name,
        "tokens": float(np.mean([len(one) for one in asked])),
    }  # fmt: skip
    try:
        rows = [_keys_and_values(made.decoder, asked, min(rounds, 3)), _ours(made, known, asked, folder, rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{**facts, **one} for one in rows]


def prefix_representatives(known: Sequence[str], asked: Sequence[str], most: int = PREFIXES) -> list[str]:
    """Select one known text per prefix, at most `most`; prefixes of queries come first."""
    wanted = {text[:_PREFIX] for text in asked}
    first: dict[str, str] = {}
    for text in known:
        first.setdefault(text[:_PREFIX], text)
    return sorted(first.values(), key=lambda text: text[:_PREFIX] not in wanted)[:most]


def _keys_and_values(decoder: Any, asked: Sequence[list[int]], rounds: int) -> Row:
    """Measure greedy generation with and without the request's own key/value cache."""

    def written(rows: Sequence[list[int]], use: bool) -> Answered:
        ids, mask = padded(rows, 0, "cpu")
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = decoder.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False,
                use_cache=use, pad_token_id=0,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        return Answered(seconds, tokens[:, ids.shape[1] :].numpy(), [""] * len(rows), [""] * len(rows))

    size = max(1, min(FEW, len(asked) // (rounds + 1)))
    plain, kept = _in_turn([lambda rows: written(rows, False), lambda rows: written(rows, True)], asked, size, rounds)
    same = np.concatenate([one.outputs == other.outputs for one, other in zip(plain, kept, strict=True)])
    return {
        "method": "KV-Cache", "documents": size * rounds, "rounds": rounds, "written": WRITTEN,
        "ms": _milliseconds(kept), "base_ms": _milliseconds(plain), **times("", kept, plain),
        "agreement": float(same.all(axis=1).mean()), "hits": 0.0,
    }  # fmt: skip


def _ours(made: Made, known: Sequence[list[int]], asked: Sequence[list[int]], folder: Path, rounds: int) -> Row:
    """Measure the time until the first token, with stored prefixes restored."""
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
    """Run the actions in turn. Returns their results per round; the first batch of `asked` warms up."""
    answers: list[list[Answered]] = [[] for _ in actions]
    for turn in range(rounds + 1):
        batch = asked[turn * size : (turn + 1) * size]
        for place, action in enumerate(actions):
            answered = action(batch)
            if turn:
                answers[place].append(answered)
    return answers


def first_token(decoder: Any, rows: Sequence[list[int]], *, use_cache: bool) -> NDArray[np.float32]:
    """Compute next-token logits, float32 [n, vocabulary]; rows are padded on the left."""
    ids, mask = padded(rows, 0, "cpu")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        output = decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1
        )
    logits: NDArray[np.float32] = output.logits[:, 0].float().numpy()
    return logits


def _milliseconds(part: Sequence[Answered]) -> float:
    return 1e3 * statistics.median(answered.seconds / len(answered.tiers) for answered in part)

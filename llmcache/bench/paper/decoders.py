"""Latency of decoders: transformers' key/value cache within a request, and prefixes restored from other requests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.bench.harness.turns import Action, Row, Turn, in_turn
from llmcache.bench.paper.latency import BATCH, closed
from llmcache.bench.paper.models import Made
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.decoders.prompts import padded

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
    size = max(1, min(FEW, len(asked) // (rounds + 1)))

    def written(use: bool, number: int) -> AbstractContextManager[Action]:
        ids, mask = padded(asked[number * size : (number + 1) * size], 0, "cpu")

        def write() -> NDArray[np.int64]:
            with torch.inference_mode():
                tokens = decoder.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN,
                    do_sample=False, use_cache=use, pad_token_id=0,
                )  # fmt: skip
            return tokens[:, ids.shape[1] :].numpy()  # type: ignore[no-any-return]

        return nullcontext(write)

    turns = [Turn("plain", size, partial(written, False)), Turn("kept", size, partial(written, True), "plain")]
    made = in_turn(turns, rounds, rotating=False)
    plain, kept = made["plain"], made["kept"]
    same = np.concatenate(plain.outputs) == np.concatenate(kept.outputs)
    return {
        "method": "KV-Cache", "documents": size * rounds, "rounds": rounds, "written": WRITTEN,
        "ms": 1e3 / kept.rate, "base_ms": 1e3 / plain.rate, **kept.ratio_range(),
        "agreement": float(same.all(axis=1).mean()), "hits": 0.0,
    }  # fmt: skip


def _ours(made: Made, known: Sequence[list[int]], asked: Sequence[list[int]], folder: Path, rounds: int) -> Row:
    """Measure the time until the first token, with stored prefixes restored."""
    decoder = made.decoder
    size = max(1, min(BATCH, len(asked) // (rounds + 1)))
    cache = LLMCache.open(folder, decoder, tokenizer=made.model.tokenizer)
    counters, shares = cache.stats().counters.prefix, []

    def plain(number: int) -> AbstractContextManager[Action]:
        batch = asked[number * size : (number + 1) * size]
        return nullcontext(lambda: first_token(decoder, batch, use_cache=False))

    @contextmanager
    def restored(number: int) -> Iterator[Action]:
        batch, tokens, computed = asked[number * size : (number + 1) * size], counters.tokens, counters.computed
        with cache.attached():
            yield lambda: first_token(decoder, batch, use_cache=True)
        shares.append(1 - (counters.computed - computed) / max(1, counters.tokens - tokens))

    with cache.attached():
        for at in range(0, len(known), size):
            first_token(decoder, known[at : at + size], use_cache=True)
    cache.commit()
    turns = [Turn("plain", size, plain), Turn("restored", size, restored, "plain")]
    found = in_turn(turns, rounds, rotating=False, passes=2)
    base, mine = found["plain"], found["restored"]
    commit = closed(cache)
    mine.add(commit)
    given, own = (np.concatenate(one.outputs) for one in (mine, base))
    return {
        "method": "LLMCache, ours", "documents": size * rounds, "rounds": rounds, "known": len(known),
        "ms": 1e3 / mine.rate, "base_ms": 1e3 / base.rate, **mine.ratio_range(),
        **found["restored, again"].ratio_range("again_"), "commit_seconds": commit,
        "restored_tokens": float(np.mean(shares[-2 * rounds :: 2])),
        "agreement": float((given.argmax(axis=1) == own.argmax(axis=1)).mean()),
        "difference_of_computed": float(np.abs(given - own).max()),
    }  # fmt: skip


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

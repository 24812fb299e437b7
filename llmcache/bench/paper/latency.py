"""Latency experiment: each model on each corpus, alone, with a cache of final outputs, the paper's rule, and ours."""

from __future__ import annotations

import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from llmcache import snapshot
from llmcache.arrays import Floats32
from llmcache.bench.harness.turns import Action, Measurement, Row, Turn, in_turn
from llmcache.bench.paper.models import Made, agreement, decisions
from llmcache.bench.paper.texts import Workload
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.model.tokens import tokenise
from llmcache.near.calibration.drift import cosine_drift
from llmcache.near.neighbors.linear_head import LinearHead

ALONE = "NoCache"
BATCH = 16
"""Documents of a round, in one call."""
LOWEST, HIGHEST = 0.82, 0.88
"""The paper's range of tau: for the lowest and the deepest layer."""
BUDGET = 0.02
"""Share of all results whose decision may change, for ours. With some 500 known documents and confidence 0.95, a budget
of 0.5 % cannot be shown to hold: that takes 598 documents without a single change.
"""
CONFIDENCE = 0.95


def closed(cache: LLMCache) -> float:
    """Commit and close a cache. Returns the seconds of the commit."""
    began = time.perf_counter()
    cache.commit()
    seconds = time.perf_counter() - began
    cache.close()
    return seconds


def layer_taus(layers: Sequence[int], lowest: float = LOWEST, highest: float = HIGHEST) -> dict[int, float]:
    """Return a tau per layer, rising evenly from the lowest to the deepest."""
    return dict(zip(layers, np.linspace(lowest, highest, len(layers)).round(4).tolist(), strict=True))


def latency(made: Made, workload: Workload, folder: Path, rounds: int = 5) -> list[Row]:
    """Measure all contenders on a workload. Returns one row each.

    workload: its queries are cut into a warm-up and `rounds` batches. Each contender answers each round in turn, in
    rotating order, and then a second time ("again"). Ratios are to the model alone on the same documents in the same
    round. Storing is in the time; the commit, which comes once at the end as in a pipeline, is shared by the rounds.
    """
    check(workload, rounds)
    try:
        warm_seconds, known = _warm(made, workload.known, folder / "layers")
        head = decisions(made, known)
        size = max(1, min(BATCH, len(workload.asked) // (rounds + 1)))
        batches = [workload.asked[at : at + size] for at in range(0, size * (rounds + 1), size)]
        caches = _caches(made, head, folder)
        try:

            def asked(cache: LLMCache | None, number: int) -> AbstractContextManager[Action]:
                if cache is None:
                    return nullcontext(lambda: made.model.encode(batches[number], batch_size=BATCH))
                return nullcontext(lambda: list(cache.run(batches[number], batch_size=BATCH)))

            everybody = {ALONE: (None, ""), **caches}
            turns = [Turn(name, size, partial(asked, cache), ALONE) for name, (cache, _) in everybody.items()]
            played = in_turn(turns, rounds, passes=2)
        finally:
            commits = {name: closed(cache) for name, (cache, _) in caches.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokens = float(tokenise(made.model, workload.asked, None, None).lengths.mean())
    facts = {
        "model": made.name, "weights": made.weights, "data": workload.name, "known": len(workload.known),
        "tokens": tokens, "documents": size * rounds, "rounds": rounds, "warm_ms": 1e3 * warm_seconds,
    }  # fmt: skip
    for name, commit in commits.items():
        played[name].add(commit)
    return [
        {**facts, "note": note, **_row(name, played, head), "commit_seconds": commits.get(name, 0.0)}
        for name, (_, note) in everybody.items()
    ]


def check(workload: Workload, rounds: int) -> None:
    """Raise ConfigError when there are too few documents for the rounds and a warm-up."""
    if len(workload.asked) <= rounds:
        raise ConfigError(
            f"{len(workload.asked)} documents to ask are too few for a warm-up and {rounds} rounds; raise --limit or "
            "lower --repeats"
        )


def _warm(made: Made, known: Sequence[str], folder: Path) -> tuple[float, Floats32]:
    """Fill a store with states and outputs of the known documents. Returns seconds per document, and the outputs."""
    began = time.perf_counter()
    with LLMCache.open(folder, made.model, config=_rule(made)) as cache:
        outputs = np.asarray(cache.encode(list(known), batch_size=2 * BATCH), np.float32)
    return (time.perf_counter() - began) / max(1, len(known)), outputs


def _rule(made: Made) -> CacheConfig:
    return CacheConfig(layers=made.banked, reuse="layer", layer_tau=layer_taus(made.banked), stand_aside=False)


def _caches(made: Made, head: LinearHead, folder: Path) -> dict[str, tuple[LLMCache, str]]:
    """Open the caches on copies of one warm store. Returns cache and remark by name.

    DocCache uses the lowest tau, so its outputs equal the rule's. Only ours suspends reuse that does not pay; the
    paper's rule does not.
    """
    for name in ("outputs", "ours"):
        snapshot.save(folder / "layers", folder / name)
    fixed = LLMCache.open(folder / "outputs", made.model, config=CacheConfig(tau=LOWEST, stand_aside=False))
    rule = LLMCache.open(folder / "layers", made.model, config=_rule(made))
    caches = {"DocCache": (fixed, ""), "LLMCache, the paper's rule": (rule, "")}
    if made.decoder is None:
        ours = LLMCache.open(folder / "ours", made.model, config=CacheConfig(recalibrate=False))
        try:
            note = ours.calibrate(budget=BUDGET, confidence=CONFIDENCE, head=head).reason
        except ConfigError as error:  # too few documents: near reuse stays off
            note = str(error)
        caches["LLMCache, ours"] = (ours, note)
    return caches


def _row(name: str, played: Mapping[str, Measurement], head: LinearHead) -> Row:
    mine, again = played[name], played[f"{name}, again"]
    computed = np.concatenate(played[ALONE].outputs)
    given, tiers, layers = _results(mine)
    hit, near = np.array([tier != "miss" for tier in tiers]), np.array([tier == "near" for tier in tiers])
    same = agreement(head, computed, given)
    drift = cosine_drift(computed, given)
    spent = [1e3 * seconds / mine.documents for seconds in mine.seconds]
    return {
        "method": name, "ms": statistics.median(spent), "ms_rounds": spent, **mine.ratio_range(),
        **again.ratio_range("again_"), "hits": float(hit.mean()), "near": float(near.mean()),
        "layer_hits": {one: count / len(layers) for one, count in sorted(Counter(layers).items()) if one},
        "agreement": float(same.mean()), "agreement_of_hits": float(same[hit].mean()) if hit.any() else None,
        "cosine_of_hits": float(drift[hit].mean()) if hit.any() else None,
        "difference_of_computed": float(np.abs(computed - given)[~near].max(initial=0)),
        "again_hits": float(np.mean([tier != "miss" for tier in _results(again)[1]])),
    }  # fmt: skip


def _results(found: Measurement) -> tuple[Floats32, list[str], list[str]]:
    """Return the outputs [n, width], tiers and layers of all rounds; layers are "" where nothing was reused."""
    if found.name.startswith(ALONE):
        outputs = np.concatenate(found.outputs)
        return outputs, ["miss"] * len(outputs), [""] * len(outputs)
    results = [result for part in found.outputs for result in part]
    return (
        np.array([one.output for one in results]),
        [one.tier for one in results],
        [one.layer or "" for one in results],
    )

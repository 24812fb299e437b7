"""Measurements of decoders: prompts with a paragraph before the question, and multiple choice, on real texts.

Contenders take turns batch by batch in one process, so that a noisy machine meets them alike; look-up, restoring,
storing and committing are inside the time.
"""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmcache.bench.competitors.transformers_prefix import Kept
from llmcache.decoders.generation import padded, score
from llmcache.decoders.kv_buffer import shape_of
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

Clock: TypeAlias = Callable[[], float]
"""Seconds: time.perf_counter, or time.process_time on a machine that others use too (with one thread)."""


@dataclass(slots=True)
class TimedRun:
    """Seconds of each batch, and what came out. commit: seconds for all batches together, on top."""

    name: str
    seconds: list[float] = field(default_factory=list)
    outputs: list[NDArray[np.float64]] = field(default_factory=list)
    commit: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)

    def times(self, base: TimedRun) -> tuple[float, float]:
        """How many times as fast as `base`: median over the batches, and over all of it with the commit."""
        share = self.commit / max(1, len(self.seconds))
        each = [one / (own + share) for one, own in zip(base.seconds, self.seconds, strict=True)]
        return statistics.median(each), sum(base.seconds) / (sum(self.seconds) + self.commit)

    def report(self, base: TimedRun) -> dict[str, Any]:
        """Plain numbers for printing and for JSON."""
        median, whole = self.times(base)
        largest = max(float(np.abs(one).max()) for one in base.outputs)
        apart = max(float(np.abs(one - other).max()) for one, other in zip(self.outputs, base.outputs, strict=True))
        return {
            "name": self.name,
            "batches": len(self.seconds),
            "seconds": round(sum(self.seconds) + self.commit, 3),
            "commit_seconds": round(self.commit, 3),
            "times_as_fast_median": round(median, 2),
            "times_as_fast_overall": round(whole, 2),
            "relative_difference": apart / largest,
            **{name: round(value, 3) for name, value in self.counters.items()},
        }


@contextmanager
def attached(trunk: Any, prefixes: PrefixCache) -> Iterator[None]:
    """Let the trunk's forward be that of `prefixes`."""
    original, names = trunk.forward, tuple(signature(trunk.forward).parameters)

    def forward(*args: Any, **call: Any) -> Any:
        return prefixes.forward(original, {**dict(zip(names, args, strict=False)), **call})

    trunk.forward = forward
    try:
        yield
    finally:
        del trunk.forward


class _Cached:
    """A model with a prefix tier whose store is in a folder."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._trunk: nn.Module = model.get_decoder()
        self.store = Store.open(folder, create=True)
        if self.store.namespace("bench") is None:
            self.store.declare("bench", {}, {}, "")
        bank = self.store.bank("bench", "prefix", lambda: shape_of(self._trunk).facts, NearChoice(index="flat"))
        self.prefixes = PrefixCache(self._trunk, bank, b"bench", Bank.put)

    def attached(self) -> Any:
        return attached(self._trunk, self.prefixes)

    def commit(self, clock: Clock) -> float:
        began = clock()
        self.store.commit()
        return clock() - began


def _timed(to: TimedRun, clock: Clock, action: Callable[[], NDArray[np.float64]]) -> None:
    began = clock()
    output = action()
    to.seconds.append(clock() - began)
    to.outputs.append(output)


def prefill(
    model: Any, tokenizer: Any, requests: Sequence[tuple[str, str]], *, rows: int = 8, clock: Clock = time.perf_counter
) -> list[dict[str, Any]]:
    """Keys, values and next-token logits of (paragraph, question) prompts, until the first token could be written.

    plain: transformers, with its own key/value cache for each request. first pass: an empty store; questions about one
    paragraph are in one batch where they fit. known paragraphs: the store, reopened, has each paragraph from its
    first question, the others ask anew (the first ones are left out for all three). repeated: all prompts are known.
    kept by the caller: transformers' own reuse of a beginning, in memory, with no paragraph kept before and with all.
    """
    plain, first, known, again = map(TimedRun, ("plain", "first pass", "known paragraphs", "repeated"))
    own = [TimedRun("kept by the caller, first pass"), TimedRun("kept by the caller, known paragraphs")]
    groups = [list(group) for _, group in groupby(requests, key=lambda one: one[0])]
    seen = [group[0] for group in groups]
    asked = [one for group in groups for one in group[1:]]

    def logits(batch: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        ids, mask = padded(
            [tokenizer(f"{text}\nQuestion: {asks}\nAnswer:")["input_ids"] for text, asks in batch], 0, "cpu"
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            found = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        return found.logits[:, 0].double().numpy()  # type: ignore[no-any-return]

    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        cold, warm = _Cached(model, Path(folder) / "cold"), _Cached(model, Path(folder) / "warm")
        for at in range(0, len(seen), rows):
            with warm.attached():
                logits(seen[at : at + rows])
        warm.store.commit()
        warm.store.close()
        warm = _Cached(model, Path(folder) / "warm")
        kept = [Kept(model, tokenizer), Kept(model, tokenizer)]
        for text, _ in seen:
            kept[1].keep(f"{text}\nQuestion:")
        for at in range(0, len(asked), rows):
            batch = asked[at : at + rows]
            _timed(plain, clock, lambda batch=batch: logits(batch))  # type: ignore[misc]
            prompts = [(f"{text}\nQuestion:", f" {asks}\nAnswer:") for text, asks in batch]
            for one, keeper in zip(own, kept, strict=True):
                _timed(one, clock, lambda keeper=keeper: keeper.logits(prompts).double().numpy())  # type: ignore[misc]  # noqa: B023
            for cached, contenders in ((cold, (first,)), (warm, (known, again))):
                for one in contenders:
                    with cached.attached():
                        before = asdict(cached.prefixes.counters)
                        _timed(one, clock, lambda batch=batch: logits(batch))  # type: ignore[misc]
                    _add(one, before, asdict(cached.prefixes.counters))
        first.commit, known.commit = cold.commit(clock), warm.commit(clock)
        cold.store.close()
        warm.store.close()
    return [one.report(plain) for one in (plain, first, known, again, *own)]


def _add(to: TimedRun, before: dict[str, float], after: dict[str, float]) -> None:
    for name, value in after.items():
        to.counters[name] = to.counters.get(name, 0) + value - before[name]


def choices(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    rows: int = 32,
    clock: Clock = time.perf_counter,
) -> list[dict[str, Any]]:
    """Log-likelihoods of the choices of (stem, choices): `score` alone, with an empty store, and with all known."""
    plain, first, again = map(TimedRun, ("plain", "first pass", "repeated"))
    per_batch = max(1, rows // max(len(some) for _, some in questions))
    questions = sorted(questions, key=lambda one: -len(one[0]))  # all contenders get batches of like length
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        cached = _Cached(model, Path(folder) / "choices")
        for at in range(0, len(questions), per_batch):
            stems, some = zip(*questions[at : at + per_batch], strict=True)

            def totals(stems: Any = stems, some: Any = some, **more: Any) -> NDArray[np.float64]:
                return score(model, tokenizer, stems, some, batch_size=rows, **more).total

            _timed(plain, clock, totals)
            for one in (first, again):
                before = asdict(cached.prefixes.counters)
                _timed(one, clock, lambda totals=totals: totals(attached=cached.attached))  # type: ignore[misc]
                _add(one, before, asdict(cached.prefixes.counters))
        first.commit = cached.commit(clock)
        cached.store.close()
    reports = [one.report(plain) for one in (plain, first, again)]
    chosen = [np.concatenate([one.argmax(1) for one in each.outputs]) for each in (plain, first, again)]
    for report, mine in zip(reports, chosen, strict=True):
        report["same_choices"] = int((mine == chosen[0]).sum())
        report["questions"] = len(mine)
    return reports


# -- real texts, and a model of the right shape -------------------------------------------------------------


def gpt2_small(tokenizer_folder: Path) -> tuple[Any, Any]:
    """A model of GPT-2-small's shape with seeded weights, for speed and exactness only; and GPT-2's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    if not any((tokenizer_folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        raise ConfigError(
            f"{tokenizer_folder} has no vocab.json or tokenizer.json; give the folder of GPT-2's tokenizer"
        )
    return model.eval(), GPT2Tokenizer.from_pretrained(tokenizer_folder)


def squad(folder: Path, paragraphs: int, questions: int) -> list[tuple[str, str]]:
    """(paragraph, question), up to `questions` for each of `paragraphs` that are spread over the file."""
    with gzip.open(folder / "dev-v2.0.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    every = [one for article in articles for one in article["paragraphs"] if len(one["qas"]) > 1]
    chosen = every[:: max(1, len(every) // paragraphs)][:paragraphs]
    return [(one["context"], asked["question"]) for one in chosen for asked in one["qas"][:questions]]


def openbookqa(folder: Path, count: int) -> list[tuple[str, list[str]]]:
    """(stem, four choices), each with its leading space."""
    lines = (folder / "test_original_form.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line][:count]
    return [
        (row["question"]["stem"], [f" {one['text']}" for one in row["question"]["choices"]])
        if isinstance(row.get("question"), dict)
        else (row["question_stem"], [f" {one}" for one in row["choices"]["text"]])
        for row in rows
    ]

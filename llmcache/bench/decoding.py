"""Measurement of decoders: prompts with a paragraph before the question, and multiple choice, on real texts.

Contenders take turns batch by batch in one process, so that a noisy machine affects all alike. Look-up, restoring,
storing and committing are in the time.
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
"""Clock in seconds: time.perf_counter, or time.process_time on a busy machine (with one thread)."""


@dataclass(slots=True)
class TimedRun:
    """Times and outputs of one contender. seconds: of each batch. commit: seconds of one commit for all batches."""

    name: str
    seconds: list[float] = field(default_factory=list)
    outputs: list[NDArray[np.float64]] = field(default_factory=list)
    commit: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)

    def times(self, base: TimedRun) -> tuple[float, float]:
        """Return the speed-up over `base`: median over the batches, and over all batches with the commit."""
        share = self.commit / max(1, len(self.seconds))
        each = [theirs / (own + share) for theirs, own in zip(base.seconds, self.seconds, strict=True)]
        return statistics.median(each), sum(base.seconds) / (sum(self.seconds) + self.commit)

    def report(self, base: TimedRun) -> dict[str, Any]:
        """Return plain numbers for tables and JSON."""
        median, whole = self.times(base)
        largest = max(float(np.abs(output).max()) for output in base.outputs)
        difference = max(
            float(np.abs(output - other).max()) for output, other in zip(self.outputs, base.outputs, strict=True)
        )
        return {
            "name": self.name,
            "batches": len(self.seconds),
            "seconds": round(sum(self.seconds) + self.commit, 3),
            "commit_seconds": round(self.commit, 3),
            "times_as_fast_median": round(median, 2),
            "times_as_fast_overall": round(whole, 2),
            "relative_difference": difference / largest,
            **{name: round(value, 3) for name, value in self.counters.items()},
        }


@contextmanager
def attached(trunk: Any, prefixes: PrefixCache) -> Iterator[None]:
    """Replace the trunk's forward by that of `prefixes` inside the block."""
    original, names = trunk.forward, tuple(signature(trunk.forward).parameters)

    def forward(*args: Any, **call: Any) -> Any:
        return prefixes.forward(original, {**dict(zip(names, args, strict=False)), **call})

    trunk.forward = forward
    try:
        yield
    finally:
        del trunk.forward


class _Cached:
    """A model with a prefix cache whose store is in a folder."""

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


def _time(run: TimedRun, clock: Clock, action: Callable[[], NDArray[np.float64]]) -> None:
    began = clock()
    output = action()
    run.seconds.append(clock() - began)
    run.outputs.append(output)


def prefill(
    model: Any, tokenizer: Any, requests: Sequence[tuple[str, str]], *, rows: int = 8, clock: Clock = time.perf_counter
) -> list[dict[str, Any]]:
    """Measure prefill of (paragraph, question) prompts: keys, values and next-token logits.

    plain: transformers with its own key/value cache for each request. first pass: an empty store; questions about one
    paragraph share a batch where they fit. known paragraphs: a reopened store that has each paragraph from its first
    question; first questions are left out for all contenders. repeated: all prompts are stored. kept by the caller:
    transformers' own prefix reuse, in memory, with no paragraph stored beforehand and with all.
    """
    plain, first, known, again = map(TimedRun, ("plain", "first pass", "known paragraphs", "repeated"))
    own = [TimedRun("kept by the caller, first pass"), TimedRun("kept by the caller, known paragraphs")]
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request[0])]
    seen = [group[0] for group in groups]
    asked = [request for group in groups for request in group[1:]]

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
            _time(plain, clock, lambda batch=batch: logits(batch))  # type: ignore[misc]
            prompts = [(f"{text}\nQuestion:", f" {asks}\nAnswer:") for text, asks in batch]
            for run, keeper in zip(own, kept, strict=True):
                _time(run, clock, lambda keeper=keeper: keeper.logits(prompts).double().numpy())  # type: ignore[misc]  # noqa: B023
            for cached, contenders in ((cold, (first,)), (warm, (known, again))):
                for run in contenders:
                    with cached.attached():
                        before = asdict(cached.prefixes.counters)
                        _time(run, clock, lambda batch=batch: logits(batch))  # type: ignore[misc]
                    _add_counters(run, before, asdict(cached.prefixes.counters))
        first.commit, known.commit = cold.commit(clock), warm.commit(clock)
        cold.store.close()
        warm.store.close()
    return [run.report(plain) for run in (plain, first, known, again, *own)]


def _add_counters(run: TimedRun, before: dict[str, float], after: dict[str, float]) -> None:
    for name, value in after.items():
        run.counters[name] = run.counters.get(name, 0) + value - before[name]


def choices(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    rows: int = 32,
    clock: Clock = time.perf_counter,
) -> list[dict[str, Any]]:
    """Measure log-likelihoods of (stem, choices): `score` alone, with an empty store, and with all stems stored."""
    plain, first, again = map(TimedRun, ("plain", "first pass", "repeated"))
    per_batch = max(1, rows // max(len(some) for _, some in questions))
    questions = sorted(
        questions, key=lambda question: -len(question[0])
    )  # so that rows of a batch have similar lengths
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        cached = _Cached(model, Path(folder) / "choices")
        for at in range(0, len(questions), per_batch):
            stems, some = zip(*questions[at : at + per_batch], strict=True)

            def totals(stems: Any = stems, some: Any = some, **more: Any) -> NDArray[np.float64]:
                return score(model, tokenizer, stems, some, batch_size=rows, **more).total

            _time(plain, clock, totals)
            for run in (first, again):
                before = asdict(cached.prefixes.counters)
                _time(run, clock, lambda totals=totals: totals(attached=cached.attached))  # type: ignore[misc]
                _add_counters(run, before, asdict(cached.prefixes.counters))
        first.commit = cached.commit(clock)
        cached.store.close()
    reports = [run.report(plain) for run in (plain, first, again)]
    chosen = [np.concatenate([totals.argmax(1) for totals in run.outputs]) for run in (plain, first, again)]
    for report, mine in zip(reports, chosen, strict=True):
        report["same_choices"] = int((mine == chosen[0]).sum())
        report["questions"] = len(mine)
    return reports


# -- real texts, and a model of GPT-2-small's shape ----------------------------------------------------------


def gpt2_small(tokenizer_folder: Path) -> tuple[Any, Any]:
    """Create a model of GPT-2-small's shape with seeded weights, for speed and exactness only; load GPT-2's tokenizer.

    ConfigError when the folder has no tokenizer.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    if not any((tokenizer_folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        raise ConfigError(
            f"{tokenizer_folder} has no vocab.json or tokenizer.json; give the folder of GPT-2's tokenizer"
        )
    return model.eval(), GPT2Tokenizer.from_pretrained(tokenizer_folder)


def squad(folder: Path, paragraphs: int, questions: int) -> list[tuple[str, str]]:
    """Read (paragraph, question) pairs, up to `questions` for each of `paragraphs` drawn evenly from the file."""
    with gzip.open(folder / "dev-v2.0.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    every = [paragraph for article in articles for paragraph in article["paragraphs"] if len(paragraph["qas"]) > 1]
    chosen = every[:: max(1, len(every) // paragraphs)][:paragraphs]
    return [(part["context"], asked["question"]) for part in chosen for asked in part["qas"][:questions]]


def openbookqa(folder: Path, count: int) -> list[tuple[str, list[str]]]:
    """Read (stem, four choices), each choice with a leading space."""
    lines = (folder / "test_original_form.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line][:count]
    return [
        (row["question"]["stem"], [f" {choice['text']}" for choice in row["question"]["choices"]])
        if isinstance(row.get("question"), dict)
        else (row["question_stem"], [f" {choice}" for choice in row["choices"]["text"]])
        for row in rows
    ]

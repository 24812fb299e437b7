"""Measurement of decoders: prompts with a paragraph before the question, and multiple choice, on real texts.

Contenders take turns batch by batch in one process, so that a noisy machine affects all alike. Look-up, restoring,
storing and committing are in the time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmcache.bench.competitors.transformers_prefix import Kept
from llmcache.bench.harness.datasets import openbook_questions, squad_paragraphs
from llmcache.bench.harness.turns import Action, Measurement, Row, Turn, in_turn, speed_up
from llmcache.decoders.kv_buffer import shape_of
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.decoders.prompts import padded
from llmcache.decoders.scoring import score
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

Clock: TypeAlias = Callable[[], float]
"""Clock in seconds: time.perf_counter, or time.process_time on a busy machine (with one thread)."""


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

    @contextmanager
    def counted(self, facts: Row, action: Action) -> Iterator[Action]:
        """Add what the prefix cache counts during an action to the facts."""
        before = asdict(self.prefixes.counters)
        yield action
        for name, value in asdict(self.prefixes.counters).items():
            facts[name] = facts.get(name, 0) + value - before[name]

    def close(self, clock: Clock) -> float:
        """Commit and close the store. Returns the seconds of the commit."""
        began = clock()
        self.store.commit()
        seconds = clock() - began
        self.store.close()
        return seconds


def _report(run: Measurement, base: Measurement, commit: float = 0.0) -> Row:
    """Return the row of one contender over all batches.

    commit: seconds of one commit for all batches, of which each batch gets an equal share.
    """
    largest = max(float(np.abs(output).max()) for output in base.outputs)
    run.compare(base.outputs)
    run.add(commit)
    assert run.difference is not None
    return {
        "name": run.name, "batches": len(run.seconds), "seconds": round(sum(run.seconds), 3),
        "commit_seconds": round(commit, 3),
        "times_as_fast_median": round(speed_up(run, base), 2),
        "times_as_fast_overall": round(sum(base.seconds) / sum(run.seconds), 2),
        "relative_difference": run.difference / largest,
        **{name: round(value, 3) for name, value in run.facts.items()},
    }  # fmt: skip


def prefill(
    model: Any, tokenizer: Any, requests: Sequence[tuple[str, str]], *, rows: int = 8, clock: Clock = time.perf_counter
) -> list[Row]:
    """Measure prefill of (paragraph, question) prompts: keys, values and next-token logits.

    plain: transformers with its own key/value cache for each request. first pass: an empty store; questions about one
    paragraph share a batch where they fit. known paragraphs: a reopened store that has each paragraph from its first
    question; first questions are left out for all contenders. repeated: all prompts are stored. kept by the caller:
    transformers' own prefix reuse, in memory, with no paragraph stored beforehand and with all.
    """
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
        warm.close(clock)
        warm = _Cached(model, Path(folder) / "warm")
        kept = {name: Kept(model, tokenizer) for name in ("first pass", "known paragraphs")}
        for text, _ in seen:
            kept["known paragraphs"].keep(f"{text}\nQuestion:")
        batches = [asked[at : at + rows] for at in range(0, len(asked), rows)]

        def by_caller(name: str, number: int) -> AbstractContextManager[Action]:
            prompts = [(f"{text}\nQuestion:", f" {asks}\nAnswer:") for text, asks in batches[number]]
            return nullcontext(lambda: kept[name].logits(prompts).double().numpy())

        @contextmanager
        def by_cache(cached: _Cached, facts: Row, number: int) -> Iterator[Action]:
            with cached.attached(), cached.counted(facts, lambda: logits(batches[number])) as action:
                yield action

        turns = [Turn("plain", rows, lambda number: nullcontext(lambda: logits(batches[number])))]
        for name, cached in (("first pass", cold), ("known paragraphs", warm), ("repeated", warm)):
            facts: Row = {}
            turns.append(Turn(name, rows, partial(by_cache, cached, facts), facts=facts))
        turns += [Turn(f"kept by the caller, {name}", rows, partial(by_caller, name)) for name in kept]
        made = in_turn(turns, len(batches), warm=0, rotating=False, clock=clock)
        commits = {"first pass": cold.close(clock), "known paragraphs": warm.close(clock)}
    return [_report(run, made["plain"], commits.get(name, 0.0)) for name, run in made.items()]


def choices(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    rows: int = 32,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """Measure log-likelihoods of (stem, choices): `score` alone, with an empty store, and with all stems stored."""
    size = max(1, rows // max(len(some) for _, some in questions))
    ordered = sorted(questions, key=lambda question: -len(question[0]))  # rows of a batch have similar lengths
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]

    def totals(number: int, **more: Any) -> NDArray[np.float64]:
        stems, some = zip(*batches[number], strict=True)
        return score(model, tokenizer, stems, some, batch_size=rows, **more).total

    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as folder:
        cached = _Cached(model, Path(folder) / "choices")

        def by_cache(facts: Row, number: int) -> AbstractContextManager[Action]:
            return cached.counted(facts, lambda: totals(number, attached=cached.attached))

        turns = [Turn("plain", size, lambda number: nullcontext(lambda: totals(number)))]
        for name in ("first pass", "repeated"):
            facts: Row = {}
            turns.append(Turn(name, size, partial(by_cache, facts), facts=facts))
        made = in_turn(turns, len(batches), warm=0, rotating=False, clock=clock)
        commits = {"first pass": cached.close(clock)}
    chosen = {name: np.concatenate([output.argmax(1) for output in run.outputs]) for name, run in made.items()}
    return [
        _report(run, made["plain"], commits.get(name, 0.0))
        | {"same_choices": int((chosen[name] == chosen["plain"]).sum()), "questions": len(questions)}
        for name, run in made.items()
    ]


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


def squad(path: Path, paragraphs: int, questions: int) -> list[tuple[str, str]]:
    """Read (paragraph, question) pairs, up to `questions` for each of `paragraphs` drawn evenly from the file."""
    every = [paragraph for paragraph in squad_paragraphs(path) if len(paragraph["qas"]) > 1]
    chosen = every[:: max(1, len(every) // paragraphs)][:paragraphs]
    return [(part["context"], asked["question"]) for part in chosen for asked in part["qas"][:questions]]


def openbookqa(path: Path, count: int) -> list[tuple[str, list[str]]]:
    """Read (stem, four choices), each choice with a leading space."""
    return [(stem, [f" {choice}" for choice in choices]) for stem, choices, _ in openbook_questions(path)[:count]]

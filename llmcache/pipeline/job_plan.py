"""Forecast of a language-model job: what is stored, what is shared, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmcache import units
from llmcache.pipeline.batches import DocumentBatch

_SAMPLE_TOKENS = 1024  # most prompt tokens that are computed to measure the model
_STEPS = 2  # steps of generation that are measured


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """Forecast of one job.

    documents: records with a prompt. refused: records without one. stored: prompts whose answer is stored. repeats:
    other prompts that equal an earlier one. computed: prompts that the model answers.
    prompt_tokens: of the prompts that the model answers, each choice counted. restored: of these, stored keys and
    values. shared: of the others, tokens that another prompt of the same window computes. new_tokens: the rest, which
    are computed. generated: most tokens that are generated.
    bytes_per_token: that are stored for a computed token. new_bytes: of all, without answers.
    seconds, uncached_seconds: of the job with and without the cache, by a sample of prompts that was computed.
    """

    documents: int
    refused: int
    stored: int
    repeats: int
    computed: int
    prompt_tokens: int
    restored: int
    shared: int
    new_tokens: int
    generated: int
    bytes_per_token: int
    new_bytes: int
    seconds: float
    uncached_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def __repr__(self) -> str:
        lines = [
            f"JobPlan({units.count(self.documents)} documents: {units.count(self.stored)} answers stored, "
            f"{units.count(self.repeats)} repeats, {units.count(self.computed)} to compute",
            f"{units.count(self.new_tokens)} of {units.count(self.prompt_tokens)} prompt tokens to compute, "
            f"{units.count(self.restored)} restored, {units.count(self.shared)} shared",
            f"{units.duration(self.seconds)}, without the cache {units.duration(self.uncached_seconds)}; "
            f"{units.size(self.new_bytes)} to write)",
        ]
        return "\n    ".join(lines)


Measure = Callable[[Sequence[list[int]], int], None]
"""Function that runs the model on rows of token ids without the cache, generating this many tokens; 0 for a forward."""


def planned(
    windows: Iterable[DocumentBatch],
    rows_of: Callable[[Any], list[list[int]]],
    stored: Callable[[Sequence[Any]], list[bool]],
    known: Callable[[Sequence[list[int]]], tuple[list[int], int]],
    measure: Measure,
    *,
    new: int,
    batch_size: int,
) -> JobPlan:
    """Make the forecast of a job; nothing is stored.

    rows_of: returns the rows of token ids that a prompt takes, one, or one for each choice. stored: tells which prompts
    have a stored answer. known: returns how many leading tokens of each row are stored, and the bytes of a token.
    new: most tokens that are generated for a prompt; 0 for choices. batch_size: rows in a batch.
    """
    counts = dict.fromkeys(("documents", "refused", "stored", "repeats", "computed"), 0)
    tokens = dict.fromkeys(("every", "computed", "restored", "fresh"), 0)
    seen, bytes_per_token, rows_computed, rows_of_all = set[int](), 0, 0, 0
    sample, others = list[list[int]](), list[list[int]]()  # rows to measure: of those to compute, and of all
    for window in windows:
        prompts = window.prompts or []
        counts["documents"] += len(prompts)
        counts["refused"] += len(window.refused)
        rows = [rows_of(prompt) for prompt in prompts]
        tokens["every"] += sum(len(row) for of_prompt in rows for row in of_prompt)
        has_answer, asked = stored(prompts), list[list[int]]()
        for of_prompt, answered in zip(rows, has_answer, strict=True):
            key = hash(tuple(map(tuple, of_prompt)))
            if answered:
                counts["stored"] += 1
            elif key in seen:
                counts["repeats"] += 1
            else:
                seen.add(key)
                asked += of_prompt
                counts["computed"] += 1
        lengths, bytes_per_token = known(asked) if asked else ([], bytes_per_token)
        tokens["computed"] += sum(map(len, asked))
        tokens["restored"] += sum(lengths)
        tokens["fresh"] += _fresh(asked, lengths)
        rows_computed += len(asked)
        rows_of_all += sum(map(len, rows))
        sample += asked[:: max(1, len(asked) // 16)]
        others += [of_prompt[0] for of_prompt in rows[:: max(1, len(rows) // 16)]]
    each_token, each_step = _measured(sample or others, measure, new)
    batches, batches_of_all = (-(-count // batch_size) for count in (rows_computed, rows_of_all))
    return JobPlan(
        **counts,
        prompt_tokens=tokens["computed"],
        restored=tokens["restored"],
        shared=tokens["computed"] - tokens["restored"] - tokens["fresh"],
        new_tokens=tokens["fresh"],
        generated=new * counts["computed"],
        bytes_per_token=bytes_per_token,
        new_bytes=tokens["fresh"] * bytes_per_token,
        seconds=tokens["fresh"] * each_token + batches * new * each_step,
        uncached_seconds=tokens["every"] * each_token + batches_of_all * new * each_step,
    )


def _fresh(rows: Sequence[list[int]], known: Sequence[int]) -> int:
    """Count the tokens to compute if each shared beginning is computed once: the new nodes of the prefix tree.

    known: leading tokens of each row that are stored.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    count, before = 0, np.zeros(0, np.int64)
    for i in order:
        row = np.asarray(rows[i], np.int64)
        n = min(len(row), len(before))
        differ = np.flatnonzero(row[:n] != before[:n])
        common = int(differ[0]) if len(differ) else n
        count += max(0, len(row) - max(common, known[i]))
        before = row
    return count


def _measured(rows: Sequence[list[int]], measure: Measure, new: int) -> tuple[float, float]:
    """Return the seconds that the model takes for a prompt token, and for a step of generation of a batch."""
    sample, tokens = list[list[int]](), 0
    for row in sorted(rows, key=len):
        if sample and tokens + len(row) > _SAMPLE_TOKENS:
            break
        sample.append(row)
        tokens += len(row)
    if not sample:
        return 0.0, 0.0
    measure(sample[:1], min(new, 1))
    began = time.perf_counter()
    measure(sample, min(new, 1))
    first = time.perf_counter() - began
    if new < 2:
        return first / tokens, 0.0
    began = time.perf_counter()
    measure(sample, 1 + min(_STEPS, new - 1))
    step = max(0.0, time.perf_counter() - began - first) / min(_STEPS, new - 1)
    return first / tokens, step

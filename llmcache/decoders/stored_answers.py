"""Generate answers of prompts, of which stored ones are read, unfinished ones continued, and new ones stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from llmcache.banks.counters import Counters
from llmcache.decoders.answer_audits import Compute, Ids, StoredAnswer
from llmcache.decoders.answer_bank import AnswerBank, packed, unpacked
from llmcache.decoders.answer_settings import AnswerSettings

Audit: TypeAlias = Callable[[list[StoredAnswer]], None]
"""Function that compares a few stored answers with the model's. ModelMismatch when they differ."""


@dataclass(frozen=True, slots=True)
class StoredResults:
    """Banks of the finished results of a decoder, and the counters of the cache."""

    answers: AnswerBank
    likelihoods: AnswerBank
    counters: Counters


@dataclass(slots=True)
class Answer:
    """Answers of one prompt. sequences: ids of each. reused: number of new tokens, of all, that came from the store."""

    sequences: list[Ids] = field(default_factory=list)
    reused: int = 0

    @property
    def stored(self) -> bool:
        """True if no token was computed."""
        return self.reused == sum(map(len, self.sequences)) and bool(self.sequences)


def answered(
    rows: Sequence[list[int]], settings: AnswerSettings, bank: AnswerBank, compute: Compute, audit: Audit
) -> list[Answer]:
    """Return the answers of rows of token ids. Equal rows are computed once.

    audit: compares stored answers with the model's before they are used; ModelMismatch when they differ.
    """
    distinct = list(dict.fromkeys(map(tuple, rows)))
    answers = {row: Answer() for row in distinct}
    open_ = {row: list(row) for row in distinct}  # ids of prompt and answer so far, of prompts without a whole answer
    _read(open_, answers, settings, bank, audit)
    if open_:  # a changed model must not add answers to those of the unchanged one
        sampled = [(ids.tolist(), unpacked(numbers), row) for ids, numbers, row in bank.sample(settings.name)]
        audit([(ids, answers[0], row) for ids, answers, row in sampled if answers is not None])
    rest: dict[int, list[tuple[int, ...]]] = {}
    for prompt, ids in open_.items():
        rest.setdefault(settings.most - len(ids) + len(prompt), []).append(prompt)
    for most, prompts in sorted(rest.items(), reverse=True):
        began, inputs = time.perf_counter(), [open_[prompt] for prompt in prompts]
        computed = compute(inputs, most)
        finished = [[len(ids) > 0 and int(ids[-1]) in settings.ends for ids in each] for each in computed]
        numbers = [packed(ids, done) for ids, done in zip(computed, finished, strict=True)]
        bank.put(settings.name, inputs, numbers, time.perf_counter() - began)
        for prompt, sequences in zip(prompts, computed, strict=True):
            before = answers[prompt].sequences
            answers[prompt].sequences = [np.concatenate([before[0], sequences[0]])] if before else sequences
    return [answers[tuple(row)] for row in rows]


def _read(
    open_: dict[tuple[int, ...], list[int]],
    answers: dict[tuple[int, ...], Answer],
    settings: AnswerSettings,
    bank: AnswerBank,
    audit: Audit,
) -> None:
    """Fill in stored answers, and remove the prompts whose answer is whole from `open_`.

    What is stored for a prompt may have ended at a lower limit. Its continuation is stored as an answer of the prompt
    together with that beginning.
    """
    asked = list(open_)
    while asked:
        inputs = [open_[prompt] for prompt in asked]
        stored = bank.find(settings.name, inputs)
        audit([(inputs[i], each.answers, each.row) for i, each in enumerate(stored) if each is not None])
        following = []
        for prompt, each in zip(asked, stored, strict=True):
            if each is None:
                continue
            answer, ids = answers[prompt], open_[prompt]
            if not settings.grows:
                answer.sequences, answer.reused = each.answers, sum(map(len, each.answers))
                del open_[prompt]
                continue
            room = settings.most - len(ids) + len(prompt)
            new = each.answers[0][:room]
            answer.sequences = [np.concatenate([*answer.sequences, new])]
            answer.reused += len(new)
            ids += new.tolist()
            if len(new) == room or (each.finished[0] and len(new) == len(each.answers[0])):
                del open_[prompt]
            elif len(new):
                following.append(prompt)
        asked = following


def up_to_end(ids: Ids, ends: frozenset[int], first: int) -> Ids:
    """Return an answer up to its first end token. first: 1 if the answer begins with the decoder's start token."""
    stops = np.flatnonzero(np.isin(ids[first:], list(ends)))
    return ids[: first + int(stops[0]) + 1] if len(stops) else ids

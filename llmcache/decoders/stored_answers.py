"""Generate answers of prompts, of which stored ones are read, unfinished ones continued, and new ones stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from llmcache.banks.counters import Counters
from llmcache.decoders.answer_audits import Compute, Ids, StoredAnswer
from llmcache.decoders.answer_bank import AnswerBank, Answered, packed, unpacked
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
    """Answers of one prompt.

    parts: for each returned sequence its stretches, in order; more than one where an answer was continued.
    reused: number of new tokens, of all sequences, that came from the store.
    restored: share of the prompt's tokens that were not computed for it.
    """

    parts: list[list[Answered]] = field(default_factory=list)
    reused: int = 0
    restored: float = 1.0

    @property
    def sequences(self) -> list[Answered]:
        """The answers, whole."""
        return [
            parts[0]
            if len(parts) == 1
            else Answered(
                np.concatenate([part.ids for part in parts]),
                np.concatenate([part.likelihoods for part in parts]),
                parts[-1].finished,
            )
            for parts in self.parts
        ]

    @property
    def tokens(self) -> int:
        """Number of new tokens of all sequences."""
        return sum(len(part.ids) for parts in self.parts for part in parts)

    @property
    def stored(self) -> bool:
        """True if no token was computed."""
        return self.reused == self.tokens and bool(self.parts)

    def add(self, following: Sequence[Answered]) -> None:
        """Add the next stretch of each sequence."""
        if not self.parts:
            self.parts = [[part] for part in following]
        else:
            for parts, part in zip(self.parts, following, strict=True):
                parts.append(part)


def answered(
    rows: Sequence[list[int]],
    settings: AnswerSettings,
    bank: AnswerBank,
    compute: Compute | None,
    audit: Audit,
    words: int,
    may_store: Callable[[Sequence[Sequence[int]]], bool],
) -> Iterator[list[tuple[int, Answer]]]:
    """Yield the answers of rows of token ids with the numbers of the rows: the stored ones first, then each batch.

    Equal rows are computed once, and are yielded together. A batch is stored before it is yielded.
    compute: computes the other answers; None to yield the stored ones only.
    audit: compares stored answers with the model's before they are used; ModelMismatch when they differ.
    words: number of token ids of the model. may_store: tells whether the answers of rows of token ids may be stored;
    otherwise only the stored ones are yielded.
    """
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        equal.setdefault(tuple(row), []).append(i)
    answers = {row: Answer() for row in equal}
    open_ = {row: list(row) for row in equal}  # ids of prompt and answer so far, of prompts without a whole answer
    _read(open_, answers, settings, bank, audit, words)
    yield [(i, answers[row]) for row, places in equal.items() if row not in open_ for i in places]
    if compute is None or not open_ or not may_store(list(open_)):
        return
    # a changed model must not add answers to those of the unchanged one
    sampled = [(ids.tolist(), unpacked(numbers, words), row) for ids, numbers, row in bank.sample(settings.name)]
    audit([(ids, found, row) for ids, found, row in sampled if found is not None])
    rest: dict[int, list[tuple[int, ...]]] = {}
    for prompt, ids in open_.items():
        rest.setdefault(settings.most - len(ids) + len(prompt), []).append(prompt)
    for most, prompts in sorted(rest.items(), reverse=True):
        inputs, began = [open_[prompt] for prompt in prompts], time.perf_counter()
        for batch in compute(inputs, most):
            seconds = time.perf_counter() - began
            chosen, computed = [inputs[i] for i, _ in batch], [answer.sequences for _, answer in batch]
            bank.put(settings.name, chosen, list(map(packed, computed)), seconds)
            for i, answer in batch:
                answers[prompts[i]].add(answer.sequences)
                answers[prompts[i]].restored = answer.restored
            yield [(place, answers[prompts[i]]) for i, _ in batch for place in equal[prompts[i]]]
            began = time.perf_counter()


def _read(
    open_: dict[tuple[int, ...], list[int]],
    answers: dict[tuple[int, ...], Answer],
    settings: AnswerSettings,
    bank: AnswerBank,
    audit: Audit,
    words: int,
) -> None:
    """Fill in stored answers, and remove the prompts whose answer is whole from `open_`.

    What is stored for a prompt may have ended at a lower limit. Its continuation is stored as an answer of the prompt
    together with that beginning.
    """
    asked = list(open_)
    while asked:
        inputs = [open_[prompt] for prompt in asked]
        stored = bank.find(settings.name, inputs, words)
        audit([(inputs[i], each.answers, each.row) for i, each in enumerate(stored) if each is not None])
        following = []
        for prompt, each in zip(asked, stored, strict=True):
            if each is None:
                continue
            answer, ids = answers[prompt], open_[prompt]
            room = settings.most - len(ids) + len(prompt)
            whole = each.answers if not settings.grows else [_first_tokens(each.answers[0], room)]
            answer.add(whole)
            answer.reused += sum(len(part.ids) for part in whole)
            new = whole[0]
            if not settings.grows or len(new.ids) == room or new.finished:
                del open_[prompt]
            elif len(new.ids):
                ids += new.ids.tolist()
                following.append(prompt)
        asked = following


def _first_tokens(answer: Answered, most: int) -> Answered:
    """Return an answer cut to at most this many tokens."""
    if len(answer.ids) <= most:
        return answer
    return Answered(answer.ids[:most], answer.likelihoods[:most], finished=False)


def up_to_end(ids: Ids, ends: frozenset[int], first: int) -> Ids:
    """Return an answer up to its first end token. first: 1 if the answer begins with the decoder's start token."""
    stops = np.flatnonzero(np.isin(ids[first:], list(ends)))
    return ids[: first + int(stops[0]) + 1] if len(stops) else ids

"""Audits of stored answers and log-likelihoods: a few are recomputed before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.banks.agreement import Agreement, compared, machine_epsilon, shapes
from llmcache.banks.audits import Evidence
from llmcache.decoders.answer_settings import AnswerSettings

Ids: TypeAlias = NDArray[np.int64]
Logits: TypeAlias = Callable[[list[tuple[list[int], Ids]]], list[Floats32]]
"""Function from prompts and answers to the logits that decided each token of the answers, [tokens, vocabulary] each;
all are computed in one batch."""
Compute: TypeAlias = Callable[[list[list[int]], int | None], list[list[Ids]]]
"""Function that generates answers of rows of token ids, within a limit of new tokens (None: that of the settings)."""

StoredAnswer: TypeAlias = tuple[list[int], list[Ids], int]
"""Ids of a prompt, its answers, and the row of the bank."""
_OF_TOTAL = 1e-3
"""Relative difference of the log-likelihoods of two answers of a beam search that counts as rounding."""


def audit_answers(
    evidence: Evidence,
    settings: AnswerSettings,
    stored: Sequence[StoredAnswer],
    model: Module,
    logits: Logits,
    compute: Compute,
) -> None:
    """Audit a few stored answers.

    A greedy answer is the model's if each of its tokens has the largest logit, up to rounding. Other answers are
    generated again; another answer must be as likely. ModelMismatch when they differ.
    """
    rows = np.array([row for *_, row in stored], np.int64)
    if not len(rows):
        return
    chosen = evidence.chosen(rows, lambda: np.array([len(ids) for ids, *_ in stored], np.int64)).tolist()
    audited = [stored[i] for i in chosen if any(map(len, stored[i][1]))]
    if not audited:
        return
    places = np.array([row for *_, row in audited], np.int64)
    with evidence.recompute():
        epsilon = max(epsilon_of(model), evidence.epsilon)
        allowed = max(_OF_TOTAL, 4 * evidence.epsilon)
        agreement = (
            _greedy(audited, logits, epsilon) if settings.grows else _generated(audited, logits, compute, allowed)
        )
    evidence.conclude(places, agreement)


def _greedy(audited: Sequence[StoredAnswer], logits: Logits, epsilon: float) -> Agreement:
    """Compare the logits of answers' tokens with the largest logits."""
    pairs = [(prompt, answers[0]) for prompt, answers, _ in audited]
    scale: dict[int, float] = {}

    def run(places: Sequence[int], size: int) -> list[Floats32]:
        """Return for each answer how far the logit of each token is below the largest, and the scale of the logits."""
        margins = []
        for start in range(0, len(places), size):
            some = list(places[start : start + size])
            for place, table in zip(some, logits([pairs[i] for i in some]), strict=True):
                ids = pairs[place][1]
                below = table.max(-1) - table[np.arange(len(ids)), ids]
                largest = scale.setdefault(place, float(np.abs(table).max()))
                margins.append(np.append(below, largest).astype(np.float32))
        return margins

    recomputed = shapes(len(pairs), 0, run)
    first = next(recomputed)
    expected = [np.append(np.zeros(len(one) - 1), one[-1]).astype(np.float32) for one in first]

    def runs() -> Any:
        yield first
        yield from recomputed

    return compared(expected, runs(), epsilon, "float32")


def _generated(audited: Sequence[StoredAnswer], logits: Logits, compute: Compute, allowed: float) -> Agreement:
    """Compare answers with answers that are generated again. allowed: relative difference of their log-likelihoods."""
    again = compute([prompt for prompt, *_ in audited], None)
    worst = Agreement(0, 0.0, allowed, 0.0)
    for place, ((prompt, answers, _), fresh) in enumerate(zip(audited, again, strict=True)):
        for ours, theirs in zip(answers, fresh, strict=True):
            if not np.array_equal(ours, theirs):
                one, other = (_total(prompt, ids, logits) for ids in (ours, theirs))
                difference = abs(one - other) / max(1.0, abs(other))
                if difference > worst.difference:
                    worst = Agreement(place, difference, allowed, abs(one - other))
    return worst


def _total(prompt: list[int], ids: Ids, logits: Logits) -> float:
    """Return the log-likelihood of an answer."""
    (table,) = logits([(prompt, ids)])
    likely = torch.log_softmax(torch.from_numpy(table), -1)
    return float(likely[torch.arange(len(ids)), torch.from_numpy(ids)].double().sum())


def epsilon_of(model: Module) -> float:
    """Return the machine epsilon of a model's arithmetic; see `machine_epsilon`."""
    return machine_epsilon(model, next(model.parameters()).device)


def audit_likelihoods(
    evidence: Evidence,
    rows: NDArray[np.int64],
    stored: Sequence[Floats32],
    model: Module,
    recompute: Callable[[Sequence[int]], list[Floats32]],
) -> None:
    """Audit a few stored log-likelihoods. rows: of the bank, int64 [n]. stored: of each, float32 [tokens].

    recompute: computes those at these places in one batch. ModelMismatch when they differ.
    """
    if not len(rows):
        return
    chosen = evidence.chosen(rows, lambda: np.array([len(each) for each in stored], np.int64))
    if not len(chosen):
        return
    places = chosen.tolist()

    def run(some: Sequence[int], size: int) -> list[Floats32]:
        values: list[Floats32] = []
        for start in range(0, len(some), size):
            values += recompute([places[i] for i in some[start : start + size]])
        # beside the largest logit's: log-likelihoods near zero are rounded as the terms that they sum
        return [np.append(value, np.float32(1)) for value in values]

    with evidence.recompute():
        expected = [np.append(stored[i], np.float32(1)) for i in places]
        epsilon = max(epsilon_of(model), evidence.epsilon)
        agreement = compared(expected, shapes(len(places), 0, run), epsilon, "float32")
    evidence.conclude(rows[chosen], agreement)

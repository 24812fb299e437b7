"""Audits of stored answers and log-likelihoods: a few are recomputed before they are used.

An answer is stored with the log-likelihoods of its tokens, so an audit compares numbers: another model that would write
the same text is found, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.banks.agreement import Agreement, compared, machine_epsilon, shapes
from llmcache.banks.audits import Evidence
from llmcache.decoders.answer_bank import Answered
from llmcache.decoders.answer_settings import AnswerSettings

if TYPE_CHECKING:
    from llmcache.decoders.stored_answers import Answer

Ids: TypeAlias = NDArray[np.int64]
Logits: TypeAlias = Callable[[list[tuple[list[int], Ids]]], list[Floats32]]
"""Function from prompts and answers to the logits that decided the last tokens of the answers, [tokens, vocabulary]
each: all tokens but the start token of an encoder-decoder. All are computed in one batch."""
Compute: TypeAlias = "Callable[[list[list[int]], int | None], Iterator[list[tuple[int, Answer]]]]"
"""Function that generates answers of rows of token ids, within a limit of new tokens (None: that of the settings), and
yields them batch by batch, with the numbers of the rows."""

StoredAnswer: TypeAlias = tuple[list[int], list[Answered], int]
"""Ids of a prompt, its answers, and the row of the bank."""
_TOKENS = 1024
"""Tokens that the first audits of an opening compute, apart from one answer."""
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

    A greedy answer is the model's if each of its tokens has the largest logit and the stored log-likelihood, up to
    rounding. Other answers are generated again; another answer must be as likely. ModelMismatch when they differ.
    """
    rows = np.array([row for *_, row in stored], np.int64)
    if not len(rows):
        return
    lengths = np.array([len(ids) + len(answers[0].ids) for ids, answers, _ in stored], np.int64)
    chosen = evidence.chosen(rows, lambda: lengths, most=_TOKENS).tolist()
    audited = [stored[i] for i in chosen if any(len(answer.ids) for answer in stored[i][1])]
    if not audited:
        return
    places = np.array([row for *_, row in audited], np.int64)
    with evidence.recompute():
        epsilon = max(epsilon_of(model), evidence.epsilon)
        allowed = max(_OF_TOTAL, 4 * evidence.epsilon)
        agreement = (
            _greedy(audited, logits, epsilon) if settings.greedy else _generated(audited, logits, compute, allowed)
        )
    evidence.conclude(places, agreement)


def _greedy(audited: Sequence[StoredAnswer], logits: Logits, epsilon: float) -> Agreement:
    """Compare the logits of answers' tokens with the largest logits, and their log-likelihoods with the stored ones."""
    pairs = [(prompt, answers[0].ids) for prompt, answers, _ in audited]
    scale: dict[int, float] = {}

    def run(places: Sequence[int], size: int) -> list[Floats32]:
        """Return for each answer how far the logit of each token is below the largest, the log-likelihoods of the
        tokens, and the scale of the logits."""
        margins = []
        for start in range(0, len(places), size):
            some = list(places[start : start + size])
            for place, table in zip(some, logits([pairs[i] for i in some]), strict=True):
                ids = _decided(pairs[place][1], table)
                own, most = table[np.arange(len(ids)), ids], table.max(-1)
                likely = own - most - np.log(np.exp(table - most[:, None]).sum(-1))
                largest = scale.setdefault(place, float(np.abs(table).max(initial=0)))
                margins.append(np.concatenate([most - own, likely, [largest]]).astype(np.float32))
        return margins

    recomputed = shapes(len(pairs), 0, run)
    first = next(recomputed)
    expected = []
    for each, (_, answers, _) in zip(first, audited, strict=True):
        decided = len(each) // 2
        likely = answers[0].likelihoods[len(answers[0].likelihoods) - decided :]
        expected.append(np.concatenate([np.zeros(decided), likely, each[-1:]]).astype(np.float32))

    def runs() -> Any:
        yield first
        yield from recomputed

    return compared(expected, runs(), epsilon, "float32")


def _generated(audited: Sequence[StoredAnswer], logits: Logits, compute: Compute, allowed: float) -> Agreement:
    """Compare answers with answers that are generated again. allowed: relative difference of their log-likelihoods."""
    again = {i: answer for batch in compute([prompt for prompt, *_ in audited], None) for i, answer in batch}
    worst = Agreement(0, 0.0, allowed, 0.0)
    for place, (prompt, answers, _) in enumerate(audited):
        for stored, fresh in zip(answers, again[place].sequences, strict=True):
            one, other = (float(answer.likelihoods.sum(dtype=np.float64)) for answer in (stored, fresh))
            if not np.array_equal(stored.ids, fresh.ids):
                one, other = (_total(prompt, answer.ids, logits) for answer in (stored, fresh))
            difference = abs(one - other) / max(1.0, abs(other))
            if difference > worst.difference:
                worst = Agreement(place, difference, allowed, abs(one - other))
    return worst


def _decided(ids: Ids, logits: Floats32) -> Ids:
    """Return the ids of an answer that these logits decided: the last ones."""
    return ids[len(ids) - len(logits) :]


def _total(prompt: list[int], ids: Ids, logits: Logits) -> float:
    """Return the log-likelihood of an answer."""
    (table,) = logits([(prompt, ids)])
    likely, ids = torch.log_softmax(torch.from_numpy(table), -1), _decided(ids, table)
    return float(likely[torch.arange(len(ids)), torch.from_numpy(ids)].double().sum())


def epsilon_of(model: Module) -> float:
    """Return the machine epsilon of a model's arithmetic; see `machine_epsilon`."""
    return machine_epsilon(model, next(model.parameters()).device)


def audit_likelihoods(
    evidence: Evidence,
    rows: NDArray[np.int64],
    stored: Sequence[Floats32],
    lengths: Sequence[int],
    model: Module,
    recompute: Callable[[Sequence[int]], list[Floats32]],
) -> None:
    """Audit a few stored log-likelihoods. rows: of the bank, int64 [n]. stored: of each, float32 [tokens].

    lengths: tokens to compute for each. recompute: computes those at these places in one batch.
    ModelMismatch when they differ.
    """
    if not len(rows):
        return
    chosen = evidence.chosen(rows, lambda: np.array(lengths, np.int64), most=_TOKENS)
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

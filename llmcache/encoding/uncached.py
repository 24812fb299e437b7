"""Compute documents by the model alone, without lookup or storing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.counters import Counters
from llmcache.banks.payoff import sample
from llmcache.document import characters
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import TokenRows, in_vocabulary

_WINDOW = 8192  # documents that are tokenised and sorted by length together
_PROBED = 16  # documents computed again to measure the model's speed, where nothing was computed yet


def answer_by_model(
    answers: Answers, call: EncodeCall, places: NDArray[np.int64], model: Model, counters: Counters
) -> None:
    """Compute the documents at these places of a call, and set their outputs. places: int64 [n]."""
    for start in range(0, len(places), _WINDOW):
        part = places[start : start + _WINDOW]
        part = part[np.argsort([-characters(call.texts[i]) for i in part], kind="stable")]
        tokens = model.tokenise([call.texts[i] for i in part], call.prompt, call.role)
        counters.at_limit += at_limit(model, tokens)
        for done in compute(model, tokens, call.batch_size, call.role):
            answers.outputs[part[done.chosen]] = done.outputs
            answers.set_device_outputs(part[done.chosen], done.vectors)
            counters.model_seconds += done.seconds
            call.progress(len(done.chosen), len(done.chosen))


def at_limit(model: Model, tokens: TokenRows) -> int:
    """Return the number of documents that fill the model's maximum length, whose text may be truncated."""
    limit = getattr(model, "limit", None)
    return 0 if limit is None else int((tokens.lengths >= limit).sum())


def seconds_again(model: Model, bank: Bank, rows: NDArray[np.int64]) -> float:
    """Measure the seconds the model takes to compute documents of a bank again.

    Returns the recorded seconds where the documents cannot be computed from their token ids.
    """
    stored = bank.tokens_of(rows)
    if not in_vocabulary(stored, len(model.token_embedding())).all():
        return bank.cost(rows)
    try:
        like = model.tokenise(["a"], None, None).like(stored)
    except ConfigError:  # the model needs more inputs than token ids
        return bank.cost(rows)
    return sum(done.seconds for done in compute(model, like, len(stored), None))


def tokens_and_seconds_again(model: Model, bank: Bank) -> tuple[int, float]:
    """Compute a few documents of a bank again. Returns their number of tokens, and the seconds of the model."""
    rows = sample(bank)[:_PROBED]
    return sum(len(ids) for ids in bank.tokens_of(rows)), seconds_again(model, bank, rows)

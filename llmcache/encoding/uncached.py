"""Documents computed by the model alone: nothing is looked up, and nothing is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.counters import Counters
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import TokenRows, in_vocabulary

_WINDOW = 8192  # documents that are tokenised and length-sorted together


def answer_by_model(
    answers: Answers, call: EncodeCall, places: NDArray[np.int64], model: Model, counters: Counters
) -> None:
    """Compute the documents at these places of a call, int64 [n], and fill in their outputs."""
    for start in range(0, len(places), _WINDOW):
        part = places[start : start + _WINDOW]
        part = part[np.argsort([-len(call.texts[i]) for i in part], kind="stable")]
        tokens = model.tokenise([call.texts[i] for i in part], call.prompt, call.role)
        counters.at_limit += at_limit(model, tokens)
        for done in compute(model, tokens, call.batch_size, call.role):
            answers.outputs[part[done.chosen]] = done.outputs
            answers.set_device_outputs(part[done.chosen], done.vectors)
            counters.model_seconds += done.seconds
            call.progress(len(done.chosen), len(done.chosen))


def at_limit(model: Model, tokens: TokenRows) -> int:
    """Return how many of these documents fill the model's maximum length, so that their text may have been cut off."""
    limit = getattr(model, "limit", None)
    return 0 if limit is None else int((tokens.lengths >= limit).sum())


def seconds_again(model: Model, bank: Bank, rows: NDArray[np.int64]) -> float:
    """Seconds the model takes for documents of a bank, computed again; as recorded where only the bank knows them."""
    stored = bank.tokens_of(rows)
    if not in_vocabulary(stored, len(model.token_embedding())).all():
        return bank.cost(rows)
    try:
        like = model.tokenise(["a"], None, None).like(stored)
    except ConfigError:  # it takes more than token ids
        return bank.cost(rows)
    return sum(done.seconds for done in compute(model, like, len(stored), None))

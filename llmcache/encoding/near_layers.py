"""Near matches by the paper's rule: the state of the deepest layer whose tau is reached, and on from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.counters import Counters
from llmcache.banks.lookup import near
from llmcache.config import CacheConfig
from llmcache.encoding.answers import Answers
from llmcache.indexes.bank import Bank
from llmcache.layers.layer_banks import bank_name
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import TokenRows, in_vocabulary

if TYPE_CHECKING:
    from llmcache.layers.attachment import Attachment

_SAME = 4  # nearest states whose token ids are compared with a document's own


class Asked(Protocol):
    """Role and prompt of a call; `execution.Call` is one."""

    @property
    def role(self) -> str | None: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def batch_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """Documents that near matches are wanted for.

    places: int64 [n], of their answers. raw: features, float32 [n, width].
    """

    call: Asked
    places: NDArray[np.int64]
    tokens: TokenRows
    raw: NDArray[np.float32]


def near_layers(
    attachment: Attachment, model: Model, config: CacheConfig, counters: Counters, answers: Answers, asking: Asking
) -> NDArray[np.int64]:
    """Serve near matches from the layer banks of an attachment; returns the indices into `asking.places` that are open.

    Everything above a state is a function of it, so what a document gets is the neighbour's output, computed from that
    layer on. Neighbours have the document's scope. A document whose own state is stored is left for an exact match.
    """
    open_ = np.arange(len(asking.places))
    for layer in reversed(attachment.banks.layers):
        tau = config.layer_tau.get(layer, config.tau)
        if tau is None or not len(open_):
            continue
        bank = attachment.banks.banks[layer]
        rows, similarity = near(bank, asking.raw[open_], tau, attachment.scope(layer))
        found = np.flatnonzero(rows >= 0)
        own = [asking.tokens.ids[i] for i in open_[found].tolist()]
        found = found[~_has_own_state(bank, asking.raw[open_[found]], own)]
        found = found[in_vocabulary(bank.tokens_of(rows[found]), len(model.token_embedding()))]
        neighbours = asking.tokens.like(bank.tokens_of(rows[found]))
        attachment.up_to = layer
        try:
            for done in compute(model, neighbours, asking.call.batch_size, asking.call.role):
                where = asking.places[open_[found[done.chosen]]]
                passed = attachment.last_pass() or (np.zeros(len(where), np.int64), [""] * len(where))
                answers.set_from_neighbour(where, done.outputs, *passed)
                answers.similarity[where] = similarity[found[done.chosen]]
        finally:
            attachment.up_to = None
        counters.layer(bank_name(layer)).near += len(found)
        open_ = np.delete(open_, found)
    return open_


def _has_own_state(bank: Bank, raw: NDArray[np.float32], tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.bool_]:
    """Mask of the documents whose token ids have an exact entry in a bank, under any role and prompt; bool [n].

    raw: their features, [n, width].
    """
    rows, _ = bank.nearest(raw, _SAME)
    return np.fromiter(
        (
            any(row >= 0 and np.array_equal(bank.tokens(row), ids) for row in nearest)
            for nearest, ids in zip(rows.tolist(), tokens, strict=True)
        ),
        np.bool_,
        len(tokens),
    )


@contextmanager
def asked_with(attachment: Attachment | None, call: Asked) -> Iterator[None]:
    """Inside, the states that an attachment stores are those of texts with the role and prompt of this call."""
    if attachment is None:
        yield
        return
    before, attachment.asked = attachment.asked, (call.role, call.prompt)
    try:
        yield
    finally:
        attachment.asked = before

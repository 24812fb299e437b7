"""Near matches by the paper's rule: resume from the deepest layer whose similarity threshold is reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.banks.counters import Counters
from llmcache.banks.lookup import near
from llmcache.config import CacheConfig
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall, OpenDocuments, Places
from llmcache.indexes.bank import Bank
from llmcache.layers.layer_banks import bank_name
from llmcache.model.batching import Model, compute
from llmcache.model.tokens import in_vocabulary

if TYPE_CHECKING:
    from llmcache.layers.attachment import Attachment

_SAME = 4  # nearest states whose token ids are compared with those of a document


def near_layers(
    attachment: Attachment,
    model: Model,
    config: CacheConfig,
    counters: Counters,
    answers: Answers,
    call: EncodeCall,
    documents: OpenDocuments,
) -> Places:
    """Serve near matches from the layer banks of an attachment; returns the indices into `documents` that stay open.

    Everything above a state is a function of that state, so a document gets the neighbour's output, computed from that
    layer on. Neighbours have the document's scope. A document whose own state is stored is left for an exact match.
    """
    places, tokens, raw = documents.places, documents.tokens(), documents.raw
    open_ = np.arange(len(places))
    for layer in reversed(attachment.banks.layers):
        tau = config.layer_tau.get(layer, config.tau)
        if tau is None or not len(open_):
            continue
        bank = attachment.banks.banks[layer]
        rows, similarity = near(bank, raw[open_], tau, attachment.scope(layer))
        hits = np.flatnonzero(rows >= 0)
        own_ids = [tokens.ids[i] for i in open_[hits].tolist()]
        hits = hits[~_has_own_state(bank, raw[open_[hits]], own_ids)]
        hits = hits[in_vocabulary(bank.tokens_of(rows[hits]), len(model.token_embedding()))]
        neighbours = tokens.like(bank.tokens_of(rows[hits]))
        attachment.up_to = layer
        try:
            for done in compute(model, neighbours, call.batch_size, call.role):
                where = places[open_[hits[done.chosen]]]
                layer_hits = attachment.last_pass() or (np.zeros(len(where), np.int64), [""] * len(where))
                answers.set_from_neighbour(where, done.outputs, *layer_hits)
                answers.similarity[where] = similarity[hits[done.chosen]]
        finally:
            attachment.up_to = None
        counters.layer(bank_name(layer)).near += len(hits)
        open_ = np.delete(open_, hits)
    return open_


def _has_own_state(bank: Bank, raw: Floats32, tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.bool_]:
    """Find documents whose token ids have an exact entry in a bank, under any role and prompt.

    raw: their features, [n, width]. Returns bool [n].
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
def asked_with(attachment: Attachment | None, call: EncodeCall) -> Iterator[None]:
    """Store the attachment's states under the role and prompt of this call inside the block."""
    if attachment is None:
        yield
        return
    before, attachment.asked = attachment.asked, (call.role, call.prompt)
    try:
        yield
    finally:
        attachment.asked = before

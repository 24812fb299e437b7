"""Audits of stored vectors: recompute hits of a call or entries of a bank, and compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32, objects
from llmcache.banks.agreement import (
    Agreement,
    compared,
    machine_epsilon,
    shapes,
)
from llmcache.banks.audits import Evidence
from llmcache.document import Text, characters
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.model.batching import Model, compute
from llmcache.model.keys import Seed, token_keys
from llmcache.model.tokens import TokenRows, in_vocabulary

Window: TypeAlias = tuple[Rows, TokenRows]
"""Places of documents in a call, int64 [n], and their tokens."""
_OTHER_TOKENS = "the tokenizer makes other token ids of its text"


class AuditedHits:
    """Auditor of one bank of document vectors and the model that fills the bank."""

    def __init__(self, model: Model, bank: Bank, evidence: Evidence) -> None:
        self._model, self._bank, self._evidence = model, bank, evidence

    def computed(self, keys: Keys) -> None:
        """Record entries as verified, since the model has just computed them. keys: uint64 [n, 2]."""
        self._evidence.computed(keys)

    def audit(self, answers: Answers, places: Rows, call: EncodeCall, window: Window | float) -> None:
        """Audit a few of the hits that were just served. The answers are not changed.

        places: int64 [n], of the hits in the call. window: tokenised documents of the call, including the hits; or, if
        nothing is tokenised yet, `time.perf_counter()` at the beginning of the call.
        ModelMismatch when stored vectors differ from the model's, or stored token ids from the tokenizer's.
        """
        elapsed = time.perf_counter() - window if isinstance(window, float) else 0.0
        rows, texts = answers.row[places], call.texts
        chosen = self._evidence.chosen(rows, lambda: _lengths(texts, places), elapsed)
        if not len(chosen):
            return
        few = places[:64].tolist()
        companions = (pick(few, key=lambda place: characters(texts[place])) for pick in (max, min))
        audited = [*places[chosen].tolist(), *companions]
        with self._evidence.recompute():
            if isinstance(window, float):
                tokens = self._model.tokenise([texts[place] for place in audited], call.prompt, call.role)
            else:  # on a GPU a thread may be using the tokenizer for the next window
                at = {place: i for i, place in enumerate(window[0].tolist())}
                tokens = window[1].take([at[place] for place in audited])
            self._conclude(rows[chosen], answers.given(places[chosen]), tokens, call.role)

    def audit_sample(self, like: TokenRows, seed: Seed, role: str | None) -> None:
        """Audit a few entries of the bank that have the role and prompt of this call.

        Runs before a call without exact hits stores entries or serves near matches, so that a changed model does not
        add to the entries of the unchanged one.
        like: rows of the call, for model inputs other than token ids. seed: of the call's token keys.
        """
        evidence = self._evidence
        if not evidence.open:
            return
        rows = evidence.sample(seed.digest())
        rows = rows[in_vocabulary(self._bank.tokens_of(rows), len(self._model.token_embedding()))]
        if not len(rows):
            return
        with evidence.recompute():
            ids = self._bank.tokens_of(rows)
            try:
                tokens = like.like(ids)
            except ConfigError:  # the model needs inputs that are not stored
                return
            keys = token_keys(seed, tokens.key_bytes()).view(np.uint64)
            same = np.flatnonzero((keys == self._bank.keys(rows)).all(axis=1))
            lengths = tokens.lengths
            chosen = same[evidence.spread(lengths[same] > 0, lambda: lengths[same])]
            if not len(chosen):
                return
            reading = self._bank.read(rows[chosen], count=False)
            values = reading.values if isinstance(reading.values, np.ndarray) else objects(reading.values)
            chosen, stored = chosen[reading.intact], values[reading.intact]
            if len(chosen):
                companions = [int(lengths.argmax()), int(np.where(lengths > 0, lengths, lengths.max() + 1).argmin())]
                self._conclude(rows[chosen], stored, tokens.take([*chosen.tolist(), *companions]), role)

    def _conclude(self, rows: Rows, stored: NDArray[Any], tokens: TokenRows, role: str | None) -> None:
        """Recompute rows and compare. tokens: of these rows, followed by companions that share their batches."""
        count = len(rows)
        for place, ids in enumerate(self._bank.tokens_of(rows)):
            if len(ids) and not np.array_equal(ids, tokens.ids[place]):
                self._evidence.conclude(rows, Agreement(place, np.inf, 0.0, 0.0, _OTHER_TOKENS))

        def run(places: Sequence[int], size: int) -> list[Floats32]:
            outputs = [stored[0]] * len(places)
            for done in compute(self._model, tokens.take(places), size, role):
                for place, output in zip(done.chosen, done.outputs, strict=True):
                    outputs[place] = output
            return self._model.comparable(outputs)

        epsilon = machine_epsilon(self._model.module, self._model.token_embedding().device)
        recomputed = shapes(count, len(tokens.ids) - count, run)
        expected = self._model.comparable(list(stored))
        self._evidence.conclude(rows, compared(expected, recomputed, epsilon, self._bank.facts.dtype))


def _lengths(texts: Sequence[Text], places: Rows) -> NDArray[np.int64]:
    """Return the number of characters of the texts at these places."""
    return np.fromiter((characters(texts[place]) for place in places.tolist()), np.int64, len(places))

"""Audits of stored vectors: hits of a call, or entries of a bank, are computed again by the model and compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.agreement import (
    Agreement,
    compared,
    machine_epsilon,
    shapes,
)
from llmcache.banks.audits import Evidence
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys
from llmcache.model.batching import Model, compute
from llmcache.model.keys import Seed, token_keys
from llmcache.model.tokens import TokenRows, in_vocabulary

Rows = NDArray[np.int64]
Window: TypeAlias = tuple[Rows, TokenRows]
"""Places of some documents of a call, int64 [n], and their tokens."""
_OTHER_TOKENS = "the tokenizer makes other token ids of its text"


class AuditedHits:
    """The audits of one bank of vectors, one per document, with the model that fills it."""

    def __init__(self, model: Model, bank: Bank, evidence: Evidence) -> None:
        self._model, self._bank, self._evidence = model, bank, evidence

    def computed(self, keys: Keys) -> None:
        """Count the entries of these keys, uint64 [n, 2], as verified: the model has just computed them."""
        self._evidence.computed(keys)

    def audit(self, answers: Answers, places: Rows, call: EncodeCall, window: Window | float) -> None:
        """Audit a few of the hits that were just served: nothing is changed in the answers.

        places: int64 [n], of the hits in the call. window: documents of the call that are tokenised already, the hits
        among them; or `time.perf_counter` at the beginning of the call, where none are, and the texts are tokenised.
        ModelMismatch when what is stored is not what the model gives, or stored token ids are not the tokenizer's.
        """
        elapsed = time.perf_counter() - window if isinstance(window, float) else 0.0
        rows, texts = answers.row[places], call.texts
        chosen = self._evidence.chosen(rows, lambda: _lengths(texts, places), elapsed)
        if not len(chosen):
            return
        few = places[:64].tolist()
        some = [*places[chosen].tolist(), *(pick(few, key=lambda place: len(texts[place])) for pick in (max, min))]
        with self._evidence.recompute():
            if isinstance(window, float):
                tokens = self._model.tokenise([texts[place] for place in some], call.prompt, call.role)
            else:  # on a GPU the tokenizer is at work on the next documents, in a thread
                at = {place: i for i, place in enumerate(window[0].tolist())}
                tokens = window[1].take([at[place] for place in some])
            self._conclude(rows[chosen], answers.given(places[chosen]), tokens, call.role)

    def audit_sample(self, like: TokenRows, seed: Seed, role: str | None) -> None:
        """Audit a few entries of the bank that were made as those of this call are, with the same role and prompt.

        Done before a model stores beside entries of which it was not asked any, and before near matches are given, so
        that a changed model does not add to what an unchanged one has stored.
        like: rows of the call, for all inputs beside token ids. seed: of the call's token keys.
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
            except ConfigError:  # the model takes more than token ids, which is not stored
                return
            keys = token_keys(seed, tokens.key_bytes()).view(np.uint64)
            same = np.flatnonzero((keys == self._bank.keys(rows)).all(axis=1))
            lengths = tokens.lengths
            chosen = same[evidence.spread(lengths[same] > 0, lambda: lengths[same])]
            if not len(chosen):
                return
            reading = self._bank.read(rows[chosen], count=False)
            chosen, stored = chosen[reading.intact], np.asarray(reading.values)[reading.intact]
            if len(chosen):
                companions = [int(lengths.argmax()), int(np.where(lengths > 0, lengths, lengths.max() + 1).argmin())]
                self._conclude(rows[chosen], stored, tokens.take([*chosen.tolist(), *companions]), role)

    def _conclude(self, rows: Rows, stored: NDArray[np.float32], tokens: TokenRows, role: str | None) -> None:
        """Compare stored vectors with what the model gives. tokens: of these rows, and of companions behind them."""
        count = len(rows)
        for place, ids in enumerate(self._bank.tokens_of(rows)):
            if len(ids) and not np.array_equal(ids, tokens.ids[place]):
                self._evidence.conclude(rows, Agreement(place, np.inf, 0.0, 0.0, _OTHER_TOKENS))

        def run(places: Sequence[int], size: int) -> list[NDArray[np.float32]]:
            outputs = np.zeros((len(places), stored.shape[1]), np.float32)
            for done in compute(self._model, tokens.take(places), size, role):
                if done.outputs.shape[1] != stored.shape[1]:  # a module was put in or taken out
                    return list(np.full_like(outputs, np.nan))
                outputs[done.chosen] = done.outputs
            return list(outputs)

        epsilon = machine_epsilon(self._model.module, self._model.token_embedding().device)
        recomputed = shapes(count, len(tokens.ids) - count, run)
        self._evidence.conclude(rows, compared(list(stored), recomputed, epsilon, self._bank.facts.dtype))


def _lengths(texts: Sequence[str], places: Rows) -> NDArray[np.int64]:
    return np.fromiter((len(texts[place]) for place in places.tolist()), np.int64, len(places))

"""Backend that pools sentence embeddings from stored token embeddings, and leaves other documents to another one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmcache.encoding.answers import MISS, POOLED
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.encoding.compute import Compute, ComputedMisses
from llmcache.indexes.format.rows import Rows
from llmcache.model.batching import batches
from llmcache.model.token_states import Tail

if TYPE_CHECKING:
    from llmcache.encoding.executor import Executor

_ROWS, _TOKENS = 64, 8192  # documents and padded tokens that are loaded together, some 12 MB at width 384


class PooledStates:
    """Backend that answers a miss from the token embeddings of the document, where these are stored."""

    def __init__(self, others: Compute, states: Callable[[], Executor | None], tail: Tail) -> None:
        """others: computes the documents without stored token embeddings.

        states: returns the executor of the bank of token embeddings; None without such a bank. tail: makes embeddings
        of token embeddings.
        """
        self._others, self._states, self._tail = others, states, tail
        self.stores = others.stores

    def check(self, device: torch.device) -> None:
        self._others.check(device)

    def batches(self, misses: Misses, call: EncodeCall) -> Generator[ComputedMisses]:
        states, count = self._states(), len(misses.places)
        if states is None or not count or not len(states.bank) or not self._tail.works:
            yield from self._others.batches(misses, call)
            return
        texts = [call.texts[i] for i in misses.places.tolist()]
        stored = states.reader.lookup(misses.keys, misses.tokens.ids)
        known = np.flatnonzero(stored >= 0)
        pooled: list[int] = []
        for group in batches(misses.tokens.lengths[known], _ROWS, _TOKENS):
            chosen = known[group].tolist()
            part = replace(call, texts=[texts[i] for i in chosen], ids=None, tensor=False)
            done = self._pooled(states, part, misses.take(chosen), chosen, stored[chosen])
            if done is not None:
                pooled += done.chosen
                yield done
        rest = np.setdiff1d(np.arange(count), pooled).tolist()
        if rest:
            for computed in self._others.batches(misses.take(rest), call):
                yield replace(computed, chosen=[rest[i] for i in computed.chosen])

    def _pooled(
        self, states: Executor, call: EncodeCall, misses: Misses, places: list[int], rows: Rows
    ) -> ComputedMisses | None:
        """Pool the documents whose stored token embeddings are intact; None if none are. places: of the misses."""
        found = states.served(call, rows, misses.tokens)
        intact = np.flatnonzero(found.tier != MISS).tolist()
        if not intact:
            return None
        vectors = self._tail.vectors([found.outputs[i] for i in intact], misses.tokens.take(intact))
        seconds = states.bank.cost(found.row[intact])
        if call.wanted:
            states.counters.saved_seconds += seconds
        sources = [
            name or states.bank.key(row)
            for name, row in zip(states.bank.sources(found.row[intact]), found.row[intact].tolist(), strict=True)
        ]
        return ComputedMisses(
            [places[i] for i in intact], vectors.float().cpu().numpy(),
            np.full(len(intact), seconds / len(intact), np.float32), 0.0, vectors,
            (np.full(len(intact), POOLED + 1), sources), lossless=self._lossless(states),
        )  # fmt: skip

    @staticmethod
    def _lossless(states: Executor) -> bool:
        """Return whether the bank stores token embeddings as the model computes them."""
        own = str(states.model.token_embedding().dtype).removeprefix("torch.")
        return states.bank.facts.dtype in ("float32", own)

    def close(self) -> None:
        self._others.close()

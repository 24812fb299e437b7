"""The layer banks: states of rows, found by everything that they depend on, and kept when they are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.banks.counters import LayerCounters
from llmcache.banks.writer import BankWriter
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import scoped
from llmcache.indexes.format.rows import Keys
from llmcache.model.inputs import InputRows
from llmcache.model.keys import key_seed, token_keys
from llmcache.near.marks import scope_of


def bank_name(layer: int) -> str:
    return f"layer-{layer}"


@dataclass(slots=True)
class LayerMatches:
    """What the banks have of some rows. enter: int64 [n], first layer to compute, 0 where nothing is known.

    states: per row float32 [tokens, width], what the layer before `enter` gave; None where nothing is known.
    seconds: float64 [n], what the model took for it when it was computed. entries: keys of what was found, in
    hexadecimal, or "". rows: int64 [n], rows of the bank of the layer before `enter`, or -1.
    """

    enter: NDArray[np.int64]
    states: list[NDArray[np.float32] | None]
    seconds: NDArray[np.float64]
    entries: list[str]
    rows: NDArray[np.int64]


class LayerBanks:
    """Banks of some layers of one trunk. Models that share the trunk up to a layer share the bank of that layer."""

    def __init__(
        self,
        layers: Sequence[int],
        open_bank: Callable[[int], Bank],
        digest: Callable[[int], bytes],
        storing: BankWriter,
        secret: bytes,
        features: Callable[[Sequence[NDArray[np.int32]]], NDArray[np.float32]],
        trunk: Module,
    ) -> None:
        """digest: of the identity up to a layer. features: of rows of token ids, as wide as the banks have them.

        trunk: the module whose states they are.
        """
        self.layers = tuple(sorted(layers))
        self.banks = {layer: open_bank(layer) for layer in self.layers}
        self._worth = {layer: storing.worth(bank, bank_name(layer)) for layer, bank in self.banks.items()}
        audits = storing.exact_audits
        self.evidence = {
            layer: audits.evidence(bank, bank_name(layer), trunk, digest(layer)) for layer, bank in self.banks.items()
        }
        """What was verified of each layer's bank with this trunk."""
        self.trunk = trunk
        self._digest, self._storing, self._secret, self._features = digest, storing, secret, features

    def keys(self, layer: int, rows: InputRows, mode: str) -> Keys:
        """uint64 [n, 2]. mode: whatever else of the running process decides the states (autocast)."""
        kind = f"layer {layer} {rows.signature} {mode}"
        return token_keys(key_seed(self._digest(layer), kind, None, None, self._secret), rows.content).view(np.uint64)

    def scope(self, layer: int, mode: str, asked: tuple[str | None, str | None]) -> int:
        """Near scope of a layer's states: only states of texts with the same role and prompt can answer,
        of a model that is the same up to this layer. mode: as for `keys`; asked: role and prompt.
        """
        return scope_of(key_seed(self._digest(layer), f"layer {layer} scope {mode}", *asked, self._secret))

    def find(self, rows: InputRows, chosen: NDArray[np.int64], mode: str, up_to: int | None = None) -> LayerMatches:
        """The deepest state that is stored for each of the chosen rows. up_to: deepest layer to look at."""
        n = len(chosen)
        found = LayerMatches(np.zeros(n, np.int64), [None] * n, np.zeros(n), [""] * n, np.full(n, -1))
        open_ = np.arange(n)
        for layer in reversed(self.layers):
            if not len(open_):
                break
            if up_to is not None and layer > up_to:
                continue
            tried = open_[self._worth[layer].select_for_lookup(len(open_))]
            began = time.perf_counter()
            counters = self._storing.counters.layer(bank_name(layer))
            bank, keys = self.banks[layer], self.keys(layer, rows, mode)[chosen[tried]]
            at = bank.find(keys)
            for i in np.flatnonzero(at >= 0).tolist():
                if not np.array_equal(bank.tokens(int(at[i])), rows.ids[chosen[tried[i]]]):
                    at[i] = -1
            known = np.flatnonzero(at >= 0)
            counters.asked += len(tried)
            counters.look_up_seconds += time.perf_counter() - began
            if len(known):
                known = known[self._read(bank, at[known], tried[known], layer, found, counters)]
            open_ = np.setdiff1d(open_, tried[known])
        return found

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers whose states are worth keeping."""
        return tuple(layer for layer in self.layers if self._worth[layer].pays)

    def _read(
        self,
        bank: Bank,
        at: NDArray[np.int64],
        places: NDArray[np.int64],
        layer: int,
        found: LayerMatches,
        counters: LayerCounters,
    ) -> NDArray[np.bool_]:
        """Fill these places of `found` from these bank rows; returns which rows could be read, bool [n]."""
        began = time.perf_counter()
        reading = bank.read(at)
        for i in np.flatnonzero(reading.intact).tolist():
            found.states[places[i]] = reading.values[i]
            found.enter[places[i]] = layer + 1
            found.seconds[places[i]] = bank.cost(at[i : i + 1])
            found.entries[places[i]] = bank.key(int(at[i]))
            found.rows[places[i]] = at[i]
        counters.hits += int(reading.intact.sum())
        seconds = time.perf_counter() - began
        counters.load_seconds += seconds
        self._worth[layer].served(at, seconds)
        counters.saved_seconds += float(found.seconds[places].sum())
        return reading.intact

    def put(
        self,
        layer: int,
        rows: InputRows,
        chosen: NDArray[np.int64],
        states: Sequence[NDArray[np.float32]],
        seconds: NDArray[np.float32],
        mode: str,
        asked: tuple[str | None, str | None] | None,
    ) -> None:
        """Keep what a layer gave for the chosen rows. states: per row float32 [tokens, width], taken over.

        asked: role and prompt of the texts; None: token ids were given, whose states stand for no others.
        """
        ids = [rows.ids[i] for i in chosen.tolist()]
        alike = self.banks[layer].facts.feature_width > 0
        keys = self.keys(layer, rows, mode)[chosen]
        self._storing.put(
            self.banks[layer],
            keys,
            states,
            tokens=ids,
            sources=[""] * len(ids),
            features=self._features(ids),
            cost=seconds,
            marks=scoped(len(ids), self.scope(layer, mode, asked)) if asked is not None and alike else None,
        )
        self.evidence[layer].computed(keys)

"""Banks of layer states: look-up by a key over everything a state depends on, and storage of new states."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.banks.counters import LayerCounters
from llmcache.banks.writer import BankWriter
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import scoped
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.model.inputs import InputRows
from llmcache.model.keys import key_seed, token_keys
from llmcache.near.marks import scope_of


def bank_name(layer: int) -> str:
    """Return the name of a layer's bank."""
    return f"layer-{layer}"


@dataclass(slots=True)
class LayerMatches:
    """Stored states that were found for n rows.

    enter: int64 [n], first layer to compute; 0 where no state was matches.
    states: per row float32 [tokens, width], state of the layer before `enter`; None where no state was matches.
    seconds: float64 [n], time that the model took for the state when it was computed.
    entries: keys of the entries in hexadecimal; "" where no state was matches.
    rows: int64 [n], row numbers in the bank of the layer before `enter`; -1 where no state was matches.
    """

    enter: NDArray[np.int64]
    states: list[Floats32 | None]
    seconds: NDArray[np.float64]
    entries: list[str]
    rows: NDArray[np.int64]


class LayerBanks:
    """Banks of some layers of one trunk. Models that agree up to a layer share the entries of that layer's bank."""

    def __init__(
        self,
        layers: Sequence[int],
        open_bank: Callable[[int], Bank],
        digest: Callable[[int], bytes],
        storing: BankWriter,
        secret: bytes,
        features: Callable[[Sequence[NDArray[np.int32]]], Floats32],
        trunk: Module,
    ) -> None:
        """Open the banks of these layers.

        open_bank: opens the bank of a layer. digest: digest of the model's identity up to a layer.
        storing: writes entries, and has the counters and audits. secret: of the namespace.
        features: computes the features of rows of token ids, float32 [n, feature width of the banks].
        trunk: the module whose states are stored.
        """
        self.layers = tuple(sorted(layers))
        self.banks = {layer: open_bank(layer) for layer in self.layers}
        self._payoff = {layer: storing.worth(bank, bank_name(layer)) for layer, bank in self.banks.items()}
        audits = storing.exact_audits
        self.evidence = {
            layer: audits.evidence(bank, bank_name(layer), trunk, digest(layer)) for layer, bank in self.banks.items()
        }
        """Audit results of each layer's bank with this trunk."""
        self.trunk = trunk
        self._digest, self._storing, self._secret, self._features = digest, storing, secret, features

    def keys(self, layer: int, rows: InputRows, mode: str) -> Keys:
        """Return the keys of rows at a layer, uint64 [n, 2].

        mode: settings of the process that change the states (autocast), see `running_mode`.
        """
        kind = f"layer {layer} {rows.signature} {mode}"
        return token_keys(key_seed(self._digest(layer), kind, None, None, self._secret), rows.content).view(np.uint64)

    def scope(self, layer: int, mode: str, asked: tuple[str | None, str | None]) -> int:
        """Return the near scope of a layer's states, a number that near matches have to share.

        It stands for the model up to this layer, the mode, and the role and prompt of the texts.
        mode: as for `keys`. asked: role and prompt.
        """
        return scope_of(key_seed(self._digest(layer), f"layer {layer} scope {mode}", *asked, self._secret))

    def find(self, rows: InputRows, chosen: Rows, mode: str, up_to: int | None = None) -> LayerMatches:
        """Return the deepest stored state of each of the chosen rows.

        chosen: int64 [n], rows of the call. mode: as for `keys`. up_to: deepest layer to look up; None for any.
        """
        n = len(chosen)
        matches = LayerMatches(np.zeros(n, np.int64), [None] * n, np.zeros(n), [""] * n, np.full(n, -1))
        missing = np.arange(n)
        for layer in reversed(self.layers):
            if not len(missing):
                break
            if up_to is not None and layer > up_to:
                continue
            tried = missing[self._payoff[layer].select_for_lookup(len(missing))]
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
                known = known[self._read(bank, at[known], tried[known], layer, matches, counters)]
            missing = np.setdiff1d(missing, tried[known])
        return matches

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers whose states are stored, because loading them costs less than computing them."""
        return tuple(layer for layer in self.layers if self._payoff[layer].pays)

    def _read(
        self,
        bank: Bank,
        at: Rows,
        places: Rows,
        layer: int,
        matches: LayerMatches,
        counters: LayerCounters,
    ) -> NDArray[np.bool_]:
        """Fill these places of `matches` from these bank rows. Returns which rows could be read, bool [n]."""
        began = time.perf_counter()
        reading = bank.read(at)
        for i in np.flatnonzero(reading.intact).tolist():
            matches.states[places[i]] = reading.values[i]
            matches.enter[places[i]] = layer + 1
            matches.seconds[places[i]] = bank.cost(at[i : i + 1])
            matches.entries[places[i]] = bank.key(int(at[i]))
            matches.rows[places[i]] = at[i]
        counters.hits += int(reading.intact.sum())
        seconds = time.perf_counter() - began
        counters.load_seconds += seconds
        self._payoff[layer].served(at, seconds)
        counters.saved_seconds += float(matches.seconds[places].sum())
        return reading.intact

    def put(
        self,
        layer: int,
        rows: InputRows,
        chosen: Rows,
        states: Sequence[Floats32],
        seconds: Floats32,
        mode: str,
        asked: tuple[str | None, str | None] | None,
    ) -> None:
        """Store the states of a layer for the chosen rows.

        states: per row float32 [tokens, width]; the bank takes ownership of the arrays. seconds: float32 [n], of the
        model for each row. mode: as for `keys`.
        asked: role and prompt of the texts; None when token ids were given, whose states serve no near matches.
        """
        ids = [rows.ids[i] for i in chosen.tolist()]
        near_reuse = self.banks[layer].facts.feature_width > 0
        keys = self.keys(layer, rows, mode)[chosen]
        self._storing.put(
            self.banks[layer],
            keys,
            states,
            tokens=ids,
            sources=[""] * len(ids),
            features=self._features(ids),
            cost=seconds,
            marks=scoped(len(ids), self.scope(layer, mode, asked)) if asked is not None and near_reuse else None,
        )
        self.evidence[layer].computed(keys)

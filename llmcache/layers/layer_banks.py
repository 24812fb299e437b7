"""Banks of layer states: look-up by a key over everything a state depends on, and storage of new states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.banks.reader import BankReader
from llmcache.banks.writer import BankWriter
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import scoped
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.layers.trunk_identity import TrunkIdentity
from llmcache.model.features import features
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
        banks: Mapping[int, Bank],
        identity: TrunkIdentity,
        storing: BankWriter,
        secret: bytes,
        trunk: Module,
        embedding: Tensor | None,
        fingerprint: str,
    ) -> None:
        """Use these banks, given by layer.

        identity: of the trunk. storing: writes entries, and has the counters and audits. secret: of the namespace.
        trunk: the module whose states are stored.
        embedding: the model's token embeddings, from which features are computed; None where near reuse is off.
        fingerprint: kind of the features, see `CacheConfig`.
        """
        self.layers, self.banks = tuple(sorted(banks)), banks
        self._readers = {
            layer: BankReader(bank, storing.worth(bank, bank_name(layer))) for layer, bank in banks.items()
        }
        self.evidence = {
            layer: storing.exact_audits.evidence(bank, bank_name(layer), trunk, identity.up_to(layer))
            for layer, bank in banks.items()
        }
        """Audit results of each layer's bank with this trunk."""
        self.trunk, self._identity, self._storing, self._secret = trunk, identity, storing, secret
        self._embedding, self._fingerprint = embedding, fingerprint

    def keys(self, layer: int, rows: InputRows, mode: str) -> Keys:
        """Return the keys of rows at a layer, uint64 [n, 2].

        mode: settings of the process that change the states (autocast), see `running_mode`.
        """
        kind = f"layer {layer} {rows.signature} {mode}"
        seed = key_seed(self._identity.up_to(layer), kind, None, None, self._secret)
        return token_keys(seed, rows.content).view(np.uint64)

    def scope(self, layer: int, mode: str, asked: tuple[str | None, str | None]) -> int:
        """Return the near scope of a layer's states, a number that near matches have to share.

        It stands for the model up to this layer, the mode, and the role and prompt of the texts.
        mode: as for `keys`. asked: role and prompt.
        """
        return scope_of(key_seed(self._identity.up_to(layer), f"layer {layer} scope {mode}", *asked, self._secret))

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
            reader, counters = self._readers[layer], self._storing.counters.layer(bank_name(layer))
            tried = missing[reader.select(len(missing))[0]]
            began = time.perf_counter()
            keys = self.keys(layer, rows, mode)[chosen[tried]]
            at = reader.lookup(keys, [rows.ids[i] for i in chosen[tried].tolist()])
            counters.asked += len(tried)
            found = time.perf_counter()
            counters.look_up_seconds += found - began
            known = np.flatnonzero(at >= 0)
            if not len(known):
                continue
            states, intact = reader.load(at[known])
            assert not isinstance(states, Tensor), "layer banks have no device cache"
            known = known[intact]
            served, at = tried[known], at[known]
            for place, row, state in zip(served.tolist(), at.tolist(), compress(states, intact), strict=True):
                matches.states[place], matches.entries[place] = state, reader.bank.key(row)
                matches.seconds[place] = reader.bank.cost(np.array([row]))
            matches.enter[served], matches.rows[served] = layer + 1, at
            counters.hits += len(served)
            counters.load_seconds += time.perf_counter() - found
            counters.saved_seconds += float(matches.seconds[served].sum())
            missing = np.setdiff1d(missing, served)
        return matches

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers whose states are stored, because loading them costs less than computing them."""
        return tuple(layer for layer in self.layers if self._readers[layer].pays)

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

    def _features(self, ids: Sequence[NDArray[np.int32]]) -> Floats32:
        """Return the features of rows of token ids, float32 [n, feature width of the banks]."""
        if self._embedding is None:
            return np.zeros((len(ids), 0), np.float32)
        return features(self._embedding, ids, self._fingerprint)

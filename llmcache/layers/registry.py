"""Attachments of a cache's models, with the banks of their layers and the identities that enter the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module

from llmcache.banks.device_cache import levels_of
from llmcache.banks.writer import BankWriter
from llmcache.config import CacheConfig
from llmcache.decoders.kv_buffer import KVLayout, shape_of
from llmcache.decoders.kv_encoding import KVEncoding, stored_dtype
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts
from llmcache.layers.attachment import Attachment
from llmcache.layers.layer_banks import LayerBanks, bank_name
from llmcache.layers.partial_forward import TrunkSpec, chosen_layers
from llmcache.layers.trunk_identity import TrunkIdentity
from llmcache.model.architecture import Trunk, find_trunk
from llmcache.model.batching import token_embedding
from llmcache.model.compiled import refuse_compiled
from llmcache.model.description.watch import ModelWatch
from llmcache.model.digests import Digests
from llmcache.model.features import feature_width
from llmcache.model.locks import CallLock
from llmcache.model.trial import Reach

_trials: WeakKeyDictionary[Module, dict[bytes, tuple[KVLayout, Reach]]] = WeakKeyDictionary()
"""Outcome of the trials of prefix caches by trunk and digest of the identity, so that they run once in a process."""


class Layers:
    """Attachments of one cache. The models of a namespace share the bank of a layer; keys tell their entries apart."""

    def __init__(
        self,
        config: CacheConfig,
        namespace: str,
        storing: BankWriter,
        secret: bytes,
        lock: CallLock,
        is_open: Callable[[], bool],
    ) -> None:
        """storing: writes entries. secret: of the namespace. lock: of the cache's calls.

        is_open: returns True while the cache is open.
        """
        self._lock, self._is_open = lock, is_open
        self._known: Digests = {}  # shared: attached models may have tensors in common
        self._config, self._namespace, self.storing, self.secret = config, namespace, storing, secret
        self._attachments: WeakKeyDictionary[Module, Attachment] = WeakKeyDictionary()

    def _check_dtype(self, trunk: Module) -> None:
        """Raise ConfigError for a trunk of another dtype than the namespace's model: banks have one dtype."""
        space = self.storing.store.namespace(self._namespace)
        expected = str(space.identity.get("dtype", "")) if space is not None else ""
        dtypes = {
            str(weight.dtype).removeprefix("torch.") for weight in trunk.parameters() if weight.is_floating_point()
        }
        if self._config.dtype == "auto" and dtypes and expected and not dtypes & set(expected.split("+")):
            raise ConfigError(
                f"its weights are {', '.join(sorted(dtypes))}, those that the namespace was made with are {expected}; "
                'use another namespace (namespace="..." in Python, --namespace on the command line)'
            )

    def _check_prefix_dtype(self, trunk: Module) -> None:
        """Raise ConfigError where `prefix_dtype` rounds without saving space."""
        floats = (weight.dtype for weight in trunk.parameters() if weight.is_floating_point())
        own = str(next(floats, torch.float32)).removeprefix("torch.")
        if self._config.prefix_block and own in DTYPES:
            stored_dtype(own, self._config.prefix_dtype)

    def attachment(self, model: Module, stack: str | None = None) -> Attachment:
        """Return the attachment of a model, made on the first call.

        stack: name of the model's list of layers; None finds it. ConfigError when the model cannot be attached.
        """
        refuse_compiled(model)
        trunk = find_trunk(model, stack)
        self._check_prefix_dtype(trunk.module)
        known = self._attachments.get(trunk.module)
        if known is None or known.trunk.blocks != trunk.blocks:  # another stack was named, or its layers were replaced
            if known is not None and known.active:
                raise ConfigError(
                    f"this {type(trunk.module).__name__} is attached with its layers {known.trunk.stack!r}; leave that "
                    "context first"
                )
            known = self.attachment_at(trunk, self.watch(trunk.module), self._config.layers)
            self._attachments[trunk.module] = known
        if not known.active:
            known.losses.watch(model)
        return known

    def watch(self, model: Module, tokenizer: Any = None) -> ModelWatch:
        """Return a watch that describes a model whose results are stored, and detects its changes."""
        return ModelWatch(model, tokenizer, self.storing, self._known)

    def attachment_at(self, trunk: Trunk, watch: ModelWatch, layers: str | tuple[int, ...]) -> Attachment:
        """Return a new attachment, with banks at these layers ("output", "all", or numbers).

        watch: of the trunk's module.
        """
        identity = TrunkIdentity(watch)
        return Attachment(
            trunk,
            lambda spec: self._open_banks(trunk.module, identity, chosen_layers(layers, spec.layers), spec),
            layers,
            identity,
            lambda mode: self._open_prefixes(trunk.module, identity, mode),
            self.storing.counters,
            self.storing.exact_audits,
            watch,
            lock=self._lock,
            is_open=self._is_open,
            states_only=layers != "output" or not self._config.prefix_block,
        )

    def _open_prefixes(self, trunk: Module, identity: TrunkIdentity, mode: str) -> PrefixCache | None:
        """Make the prefix cache of a trunk for a running mode; None when prefix caching is off."""
        if not self._config.prefix_block:
            return None
        self._check_dtype(trunk)
        digest = identity.digest(mode)
        trial = _trials.setdefault(trunk, {}).get(digest)
        encoding = KVEncoding.of(shape_of(trunk) if trial is None else trial[0], self._config.prefix_dtype)
        bank = self.bank(encoding.bank, encoding.facts)
        device = next(trunk.parameters()).device
        prefixes = PrefixCache(
            trunk,
            bank,
            digest,
            self.storing.put,
            self.storing.worth(bank, encoding.bank),
            secret=self.secret,
            block=self._config.prefix_block,
            levels=levels_of(bank, device, self._config, tokens=self._config.prefix_block),
            evidence=self.storing.exact_audits.evidence(bank, encoding.bank, trunk, digest),
            dtype=self._config.prefix_dtype,
            trial=trial,
        )
        _trials[trunk][digest] = prefixes.trial
        prefixes.counters = self.storing.counters.prefix
        return prefixes

    def bank(self, name: str, facts: BankFacts) -> Bank:
        """Return the bank of this name, or a new one with these facts if there is none."""
        return self.storing.store.bank(self._namespace, name, lambda: facts, self._config.near)

    def _open_banks(
        self, trunk: Module, identity: TrunkIdentity, layers: tuple[int, ...], spec: TrunkSpec
    ) -> LayerBanks:
        """Open the banks of these layers of a trunk; ConfigError when its dtype or width does not fit them."""
        config = self._config
        self._check_dtype(trunk)
        embedding: Any = token_embedding(trunk) if config.reuse == "layer" else None
        width = 0 if embedding is None else feature_width(embedding, config.fingerprint)
        floats = (weight.dtype for weight in trunk.parameters() if weight.is_floating_point())
        # under autocast states may have another dtype than the weights; one bank has to store both
        wide = torch.promote_types(next(floats, spec.dtype), spec.dtype)
        own = str(wide).removeprefix("torch.")
        if wide == torch.float64 and config.dtype == "auto":
            raise ConfigError(
                "its states are float64, and banks store float32 at most: run the model in float32, or allow rounding "
                'with CacheConfig(dtype="float32")'
            )
        facts = BankFacts(own if config.dtype == "auto" else config.dtype, spec.width, 2, width)
        banks = {layer: _checked_bank(self.bank(bank_name(layer), facts), facts, layer) for layer in layers}
        return LayerBanks(banks, identity, self.storing, self.secret, trunk, embedding, config.fingerprint)


def _checked_bank(bank: Bank, facts: BankFacts, layer: int) -> Bank:
    """Return the bank; ConfigError when it has another dtype or width than `facts`."""
    stored = bank.facts
    if (stored.dtype, stored.width, stored.feature_width) == (facts.dtype, facts.width, facts.feature_width):
        return bank
    raise ConfigError(
        f"the bank of layer {layer} holds {stored.dtype} states of width {stored.width} with {stored.feature_width} "
        f"features, this model's would be {facts.dtype} of width {facts.width} with {facts.feature_width}; use "
        "another namespace"
    )

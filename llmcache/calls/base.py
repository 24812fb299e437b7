"""Attributes and checks that the groups of `LLMCache` methods share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.banks.writer import BankWriter
from llmcache.concurrency.calls import Calls
from llmcache.config import CacheConfig
from llmcache.encoding.calibrations import Calibrations
from llmcache.encoding.executor import Executor
from llmcache.encoding.heads import Heads
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.store import Store
from llmcache.layers.registry import Layers
from llmcache.model.description.watch import ModelWatch
from llmcache.model.identity import Identity, mismatch
from llmcache.model.private_tokenizer import PrivateCopy
from llmcache.model.prompts import resolve

log = logging.getLogger("llmcache")

LAYER = "output"
"""Name of the bank of embeddings."""


class CacheParts:
    """Base class of the method groups of `LLMCache`. `LLMCache` sets the attributes declared here."""

    model: Module
    tokenizer: Any
    identity: Identity
    config: CacheConfig
    namespace: str
    _calls: Calls
    _store: Store
    _storing: BankWriter
    _counters: Counters
    _exact_audits: ExactAudits
    _layers: Layers
    _calibrations: Calibrations
    _encoding: Executor | None
    _tokenizer_copy: PrivateCopy
    _watch: ModelWatch
    _current: Identity
    _opened: bool

    @property
    def _execution(self) -> Executor:
        """Executor of the output bank. ConfigError when the model is not a SentenceTransformer."""
        if self._encoding is None:
            raise ConfigError(
                f"embeddings come from a SentenceTransformer; this cache has a {type(self.model).__name__}: use "
                "attached(), generate() or score()"
            )
        return self._encoding

    @property
    def _bank(self) -> Bank:
        """The output bank. ConfigError when the model is not a SentenceTransformer."""
        return self._execution.bank

    def _check_open(self) -> None:
        """LLMCacheError when the cache is closed."""
        if not self._opened:
            raise LLMCacheError("the cache is closed; open it again with LLMCache.open")

    def _identity_now(self) -> Identity:
        """Return the identity of the cache's own model, computed again after a change."""
        if self._watch.changed():
            self._current = self._watch.identity()
            self._exact_audits.renew()
        return self._current

    def _check_model(self) -> None:
        """ModelMismatch when the model has changed, so that the outputs in the namespace are no longer its own."""
        now = self._identity_now()
        if now is not self.identity and now.digest != self.identity.digest:
            raise mismatch(self.identity, now, self._watch.changes())

    def _heads(self, heads: Mapping[str, Module]) -> Heads:
        """Return the heads, each with its bank. Errors as `Heads`."""
        return Heads(
            self.model, self.tokenizer, heads, self._layers, self.config, self._calibrations.follow, self._check_tokens
        )

    def _check_tokens(self) -> None:
        """ModelMismatch when a SentenceTransformer has changed, so that texts may get other token ids."""
        if isinstance(self.model, SentenceTransformer):
            self._check_model()

    def _prompt(self, role: str | None, name: str | None, prompt: str | None) -> str | None:
        """Return the prompt that `SentenceTransformer.encode` would use; None for none."""
        model: Any = self.model
        return resolve(model.prompts, model.default_prompt_name, role=role, name=name, prompt=prompt)

"""Attributes and checks that the groups of `LLMCache` methods share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch.nn import Module
from tqdm.auto import tqdm

from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.banks.writer import BankWriter
from llmcache.concurrency.calls import Calls
from llmcache.config import CacheConfig
from llmcache.document import Text
from llmcache.encoding.answers import Answers
from llmcache.encoding.calibrations import Calibrations
from llmcache.encoding.call import EncodeCall
from llmcache.encoding.executor import Executor
from llmcache.encoding.heads import Heads
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.store import Store
from llmcache.layers.registry import Layers
from llmcache.model.description.watch import ModelWatch
from llmcache.model.encoders import ENCODERS
from llmcache.model.identity import Identity, mismatch
from llmcache.model.private_tokenizer import PrivateCopy
from llmcache.model.prompts import resolve

log = logging.getLogger("llmcache")

LAYER = "output"
"""Name of the bank of embeddings, or of the scores of pairs."""


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
    _token_states: Executor | None
    _reasons: set[str]
    """Reasons for bypassing the cache that were already logged."""
    _tokenizer_copy: PrivateCopy
    _watch: ModelWatch
    _current: Identity
    _opened: bool

    @property
    def _execution(self) -> Executor:
        """Executor of the output bank. ConfigError when the model is not one of sentence-transformers."""
        if self._encoding is None:
            raise ConfigError(
                f"embeddings come from a model of sentence-transformers; this cache has a {type(self.model).__name__}: "
                "use attached(), generate() or score()"
            )
        return self._encoding

    @property
    def _bank(self) -> Bank:
        """The output bank. ConfigError when the model is not one of sentence-transformers."""
        return self._execution.bank

    if TYPE_CHECKING:

        def _token_execution(self) -> Executor:
            """Executor of the bank of token embeddings, which `LLMCache` makes at first use."""

    def _bypass(self, reason: str | None, documents: int, method: str = "encode") -> None:
        """Count documents that the model answers without the cache, and log each reason once."""
        self._counters.bypassed += documents
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("%s goes past the cache: %s", method, reason)

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
        """ModelMismatch when the model has changed, so that texts may get other token ids."""
        if isinstance(self.model, ENCODERS):
            self._check_model()

    def _answered(
        self,
        texts: Sequence[Text],
        prompt_name: str | None,
        prompt: str | None,
        role: str | None,
        batch_size: int,
        show_progress_bar: bool | None,
        device: Any,
        tensor: bool = False,
        executor: Executor | None = None,
    ) -> Answers:
        """Return the answers of a call, with arguments as in sentence-transformers.

        tensor: True for outputs on the model's device. executor: None for that of the output bank.
        ConfigError for a batch size below 1.
        """
        if device is not None:
            cast(Any, self.model).to(device)  # as sentence-transformers does
        if batch_size <= 0:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")
        if self.model.training:  # also before hits, as sentence-transformers does
            self.model.eval()
        resolved = self._prompt(None, prompt_name, prompt)
        executor = self._execution if executor is None else executor
        with tqdm(total=len(texts), desc="Documents") if show_progress_bar else nullcontext() as bar:

            def advance(answered: int, _: int) -> None:
                if bar is not None:
                    bar.update(answered)

            answers = executor.answers(EncodeCall(texts, None, resolved, role, batch_size, advance, tensor))
        self._watch.rested_at = time.perf_counter()
        return answers

    def _prompt(self, role: str | None, name: str | None, prompt: str | None) -> str | None:
        """Return the prompt that the model's `encode` or `predict` would use; None for none."""
        model: Any = self.model
        return resolve(model.prompts, model.default_prompt_name, role=role, name=name, prompt=prompt)

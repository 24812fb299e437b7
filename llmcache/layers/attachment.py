"""Attachment of a model: its own forward reuses stored layer states or keys and values while it is attached."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from torch.nn import Module

from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.decoders.padded_batch import holds_tokens, wants_keys
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.indexes.format.rows import Rows
from llmcache.layers.forward_calls import ForwardSignature
from llmcache.layers.layer_banks import LayerBanks
from llmcache.layers.layer_reuse import LayerReuse
from llmcache.layers.partial_forward import (
    LayerStack,
    NoSuchLayer,
    TrunkSpec,
    chosen_layers,
    examine,
    gives_keys,
)
from llmcache.layers.prefix_caches import OFF, PrefixCaches
from llmcache.layers.trial import LayerTrial, MemoryBanks
from llmcache.layers.trunk_identity import TrunkIdentity
from llmcache.model.architecture import Trunk
from llmcache.model.compiled import not_compiled, refuse_compiled
from llmcache.model.description.process_settings import running_mode
from llmcache.model.description.watch import ModelWatch
from llmcache.model.forward_patch import StandIn, install, remove
from llmcache.model.inputs import Call, refusal
from llmcache.model.locks import CallLock, LockCycle
from llmcache.model.losses import LossArguments
from llmcache.model.restoring import without_trace
from llmcache.model.trial import explained, vocabulary_of
from llmcache.model.trial_inputs import first_call

log = logging.getLogger("llmcache")

_attached: WeakKeyDictionary[Module, Attachment] = WeakKeyDictionary()


class Attachment:
    """A context manager under which a trunk's `forward` reuses stored results. Outside the model is unchanged.

    The rows of a batch are looked up one by one. A row whose last state is stored only passes through the final norm
    and the modules after it. Another row enters after the deepest layer that is stored for it. A row with no stored
    state is computed from the start. At positions that the mask hides, a state is undefined: zeros, or the model's
    own. No gradient flows into a reused state. Forwards in several threads wait for each other and for calls of the
    cache. Copies and pickles of the model are made without the cache.
    """

    def __init__(
        self,
        trunk: Trunk,
        banks: Callable[[TrunkSpec], LayerBanks],
        layers: str | tuple[int, ...],
        identity: TrunkIdentity,
        prefixes: Callable[[str], PrefixCache | None],
        counters: Counters,
        exact_audits: ExactAudits,
        watch: ModelWatch,
        *,
        lock: CallLock,
        is_open: Callable[[], bool],
        states_only: bool = False,
    ) -> None:
        """Make an attachment that is not entered yet.

        banks: opens the layer banks for a trunk of this structure.
        layers: "output" for the last one, "all", or numbers. identity: of the trunk; renewed after a change of it.
        watch: detects changes of the trunk's module.
        prefixes: makes a decoder's prefix cache for a running mode; returns None when prefix caching is off.
        lock: of the cache. is_open: returns True while the cache is open; otherwise the model computes by itself.
        states_only: use the layer banks for a decoder's calls that do not request keys and values.
        """
        self.trunk = trunk
        self._open_banks, self._layers, self._identity, self._counters = banks, layers, identity, counters
        self._states_only, self._exact_audits = states_only, exact_audits
        self._blocks = LayerStack(trunk.blocks)
        self._parameters = ForwardSignature(trunk.module)
        self._warned: set[str] = set()
        self._depth = 0
        self.losses = LossArguments(trunk.module)
        self._lock, self._is_open, self._pid = lock, is_open, os.getpid()
        self._stand_in: StandIn | None = None
        self._specs: dict[tuple[object, ...], tuple[TrunkSpec, LayerBanks] | str] = {}
        self._decodes: bool | None = None
        self._prefixes = PrefixCaches(prefixes)
        self._watch = watch
        self.entered = np.zeros(0, np.int64)
        """First layer computed for each row of the last forward, int64 [rows]; the number of layers where none was."""
        self.entries: list[str] = []
        """Key of the entry that each row of the last forward reused, in hexadecimal; "" where none was reused."""
        self._last_returned: Rows | None = None  # `entered` as `last_pass` returned it last
        self.up_to: int | None = None
        """Deepest layer whose states are reused; None for any. While it is set, no states are stored."""
        self.asked: tuple[str | None, str | None] | None = None
        """Role and prompt of the texts of the current call; None when token ids are given without them."""

    def __enter__(self) -> Self:
        with self._lock:
            module = self.trunk.module
            if not self._depth:
                refuse_compiled(module)
                other = _attached.get(module)
                if other is not None and other._pid != self._pid:  # attached by the process that forked this one
                    other.detach()
                if _attached.setdefault(module, self) is not self:
                    raise ConfigError(
                        f"this {type(module).__name__} is attached already, by another cache, by `run_heads` or in "
                        "another thread; leave that `attached()` block first"
                    )
                self._forward = module.forward
                self._blocks.replace()
                self.losses.replace()
                self._stand_in = StandIn(module, not_compiled(self._cached_forward))
                install(self._stand_in)
            self._depth += 1
            try:
                if not self._in_training():
                    self._check_cacheable()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self.detach()

    def detach(self) -> None:
        """Restore the model's own forwards, whatever the number of nested contexts."""
        if self._stand_in is not None:
            remove(self._stand_in)
            self._stand_in = None
            self._blocks.restore()
            self.losses.restore()
            _attached.pop(self.trunk.module, None)

    @property
    def active(self) -> bool:
        """True while the model is attached."""
        return self._depth > 0

    @property
    def banks(self) -> LayerBanks:
        """Layer banks for the current running mode (autocast). ConfigError when the layers cannot be cached."""
        spec_and_banks = self._spec()
        if isinstance(spec_and_banks, str):
            raise ConfigError(spec_and_banks)
        return spec_and_banks[1]

    def last_pass(self) -> tuple[Rows, list[str]] | None:
        """Return `entered` and `entries` of the last forward, once.

        None when there was no forward since the last call, as when a model with several trunks used another trunk.
        """
        if not len(self.entered) or self.entered is self._last_returned:
            return None
        self._last_returned = self.entered
        return self.entered, self.entries

    def scope(self, layer: int) -> int:
        """Return the near scope of the texts of the current call, for one layer; see `LayerBanks.scope`."""
        return UNKNOWN if self.asked is None else self.banks.scope(layer, self._mode(), self.asked)

    @property
    def decodes(self) -> bool:
        """True if the model is a decoder: it returns keys and values for the next tokens."""
        if self._decodes is None:
            self._spec()
        return bool(self._decodes)

    def _check_cacheable(self) -> None:
        """Raise ConfigError when neither layers nor prompt prefixes of this model can be cached."""
        if any(not isinstance(spec_or_reason, str) for spec_or_reason in self._specs.values()):
            return
        self._specs.clear()
        reason = self._spec()
        if isinstance(reason, str) and not (self._uses_prefixes_only and not isinstance(self.prefix_cache(), str)):
            raise ConfigError(reason)

    # -- forward calls --------------------------------------------------------------------------------------

    def _cached_forward(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the trunk's forward: answer a call from stored results if possible, one thread at a time."""
        call = self._parameters.bind(args, kwargs)
        if holds_tokens(call.get("past_key_values")):  # the next token of a generation
            return own(*args, **kwargs)
        reason = self._unusable()
        if reason is None:
            try:
                self._lock.acquire()
            except LockCycle:  # waiting would be a deadlock; computing without the cache is only slower
                return own(*args, **kwargs)
            try:
                reason = self._unusable()  # the cache may have been closed while this thread waited
                if reason is None:
                    return self._answer_call(own, args, kwargs, call)
            finally:
                self._lock.release()
        self._warn_once(reason)
        return own(*args, **kwargs)

    def _unusable(self) -> str | None:
        """Return the reason why this attachment cannot be used; None if it can."""
        if self._pid != os.getpid():
            return "it was attached before a fork, so results of the child are not stored; attach it in the child"
        if self._stand_in is None:  # another thread left the context while this call waited
            return "it was detached during the call"
        return None if self._is_open() else "its cache is closed"

    def _answer_call(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
        """Answer a call from stored results, or run the model's own forward and count a bypass."""
        if self._exact_audits.recomputing:
            return own(*args, **kwargs)
        training = self._in_training()
        if not training and self._watch.changed():
            if self.trunk.replaced:
                raise ConfigError("layers of the attached model were replaced; leave the context and attach it again")
            self._identity.renew()
            self._specs.clear()
            self._prefixes.clear()
            self._decodes = None
        decoding = not training and self._needs_prefix_cache(call)
        refuse = self._prefix_refusal if decoding else self._layer_refusal
        reason = training or self._exact_audits.refusal() or refuse(call)
        reason = reason or self.losses.refusal(call.get("attention_mask"))
        if reason is not None:
            self._bypass(reason, call)
            return own(*args, **kwargs)

        def answer() -> Any:
            return self._answer_from_prefixes(call) if decoding else self._answer_from_layers(call)

        def uncached() -> Any:
            self._bypass(str(self._exact_audits.refusal()), call)
            return own(*args, **kwargs)

        return self._exact_audits.answered(answer, uncached)

    def _in_training(self) -> str:
        """Return the reason why the model is not deterministic (a module in training mode); "" if it is."""
        if self.trunk.module.training:
            return "the model is in training mode"
        path = self._watch.in_training()
        return (
            f"a part of the model is in training mode ({path}), so its results differ from call to call" if path else ""
        )

    def _layer_refusal(self, call: Call) -> str | None:
        """Return the reason why this call cannot use the layer banks; None if it can."""
        reason = refusal(self._parameters.configured_outputs() | call, self._parameters.main)
        if reason is not None:
            return reason
        spec_and_banks = self._spec(call.get("return_dict"))
        if isinstance(spec_and_banks, str):
            return spec_and_banks
        value = call[self._parameters.main]
        return None if value.is_floating_point() else spec_and_banks[0].reach.refusal(value.shape[1])

    # -- prefix cache of a decoder --------------------------------------------------------------------------

    def _needs_prefix_cache(self, call: Call) -> bool:
        """Return whether this is a call of a decoder that has to return keys and values, or may return them."""
        if call.get("past_key_values") is not None:
            return True
        if not (self._parameters.takes_cache and self.decodes):
            return False
        return not self._states_only or wants_keys(call, self.trunk.module)

    @property
    def _uses_prefixes_only(self) -> bool:
        """True if all calls use the prefix cache and none use the layer banks."""
        return self._parameters.takes_cache and self.decodes and not self._states_only

    def _prefix_refusal(self, call: Call) -> str | None:
        """Return the reason why this call cannot use the prefix cache; None if it can."""
        known = self.prefix_cache()
        return known if isinstance(known, str) else known.refuses(self._parameters.configured_outputs() | call)

    def prefix_cache(self) -> PrefixCache | str:
        """Return the prefix cache of an active attachment, or the reason why there is none."""
        assert self._stand_in is not None
        return self._prefixes.get(self._mode(), self._stand_in)

    def _answer_from_prefixes(self, call: Call) -> Any:
        prefixes = self.prefix_cache()
        assert not isinstance(prefixes, str)
        rows = len(call[self._parameters.main])
        self.entered, self.entries = np.zeros(rows, np.int64), [""] * rows
        return prefixes.forward(self._forward, call)

    # -- layers ---------------------------------------------------------------------------------------------

    def _bypass(self, reason: str, call: Call) -> None:
        """Count the rows of a call that the model computes itself, and warn about the reason."""
        value = call.get(self._parameters.main)
        rows = len(value) if isinstance(value, Tensor) and value.ndim else 1
        self._counters.bypassed += rows
        self.entered, self.entries = np.zeros(rows, np.int64), [""] * rows
        self._warn_once(reason)

    def _warn_once(self, reason: str) -> None:
        """Log a warning, once for each reason, that a call goes to the model itself."""
        if reason not in self._warned and reason != OFF:
            self._warned.add(reason)
            log.warning("%s goes past the cache: %s", type(self.trunk.module).__name__, reason)

    def _mode(self) -> str:
        """Return the process-wide settings that change the states, such as autocast."""
        return running_mode(self._watch.device.type)

    def _spec(self, return_dict: bool | None = None) -> tuple[TrunkSpec, LayerBanks] | str:
        """Return the structure of this trunk and its banks, or the reason why its layers cannot be cached.

        The structure is found by trial forwards, once for each running mode and kind of output. They leave no trace
        in the model.
        """
        module: Any = self.trunk.module
        if return_dict is None:
            return_dict = getattr(getattr(module, "config", None), "return_dict", None)
        mode = self._mode(), return_dict
        if mode not in self._specs:
            name = type(module).__name__
            try:
                spec = self._run_trials(return_dict)
                self._specs[mode] = spec, self._open_banks(spec)
            except NoSuchLayer as error:
                self._specs[mode] = str(error)
            except ConfigError as error:
                self._specs[mode] = f"{name} cannot be cached by layers: {error}"
            except Exception as error:  # a failed trial must not end the caller's forward
                self._specs[mode] = f"{name} cannot be cached by layers: a trial failed with {explained(error)}"
        return self._specs[mode]

    def _run_trials(self, return_dict: bool | None) -> TrunkSpec:
        """Run trial forwards; return the trunk's structure.

        ConfigError when its layers cannot be cached. Errors of the model pass through.
        """
        module: Any = self.trunk.module
        device = self._watch.device

        def first_trial() -> tuple[Call, TrunkSpec]:
            call = first_call(module, self._parameters.main, self._forward, self._parameters.takes, device, return_dict)
            if self._parameters.takes_cache:
                self._decodes = gives_keys(self._forward, call)
            return call, examine(self._blocks, self._forward, call, self._parameters.takes_cache, self._layers)

        call, spec = without_trace(module, device, first_trial)
        if self._uses_prefixes_only:
            return spec
        trial = LayerTrial(
            lambda arguments: self._forward(**arguments),
            lambda arguments, banks, up_to: self._trial_answer(arguments, spec, banks, up_to),
            call | ({"use_cache": False} if self._parameters.takes_cache else {}),
            self._parameters.main,
            chosen_layers(self._layers, spec.layers),
            spec.fields,
            self._parameters.takes,
        )
        return replace(spec, reach=trial.reach(module, vocabulary_of(module)))

    def _trial_answer(self, call: Call, spec: TrunkSpec, banks: MemoryBanks, up_to: int | None) -> Any:
        """Return the answer to a call from banks in memory. Counters, `entered` and `entries` do not change."""
        if (reason := refusal(call, self._parameters.main)) is not None:
            raise ConfigError(reason)
        return self._reuse(Counters(), up_to).answer(call, spec, banks)

    def _answer_from_layers(self, call: Call) -> Any:
        spec_and_banks = self._spec(call.get("return_dict"))
        assert not isinstance(spec_and_banks, str), "such a call is refused"
        reuse = self._reuse(self._counters, self.up_to)
        try:
            return reuse.answer(call, *spec_and_banks)
        finally:
            if reuse.entered is not None:  # else the call failed before any row was computed
                self.entered, self.entries = reuse.entered, reuse.entries

    def _reuse(self, counters: Counters, up_to: int | None) -> LayerReuse:
        main = self._parameters.main
        return LayerReuse(self._blocks, self._forward, main, self._watch, counters, up_to=up_to, asked=self.asked)

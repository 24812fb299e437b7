"""A model that uses the banks: while attached, its own forward computes only the layers that its rows still need."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.decoders.padded_batch import holds_tokens, wants_keys
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.errors import ConfigError
from llmcache.indexes.format.marks import UNKNOWN
from llmcache.layers.forward_calls import ForwardSignature
from llmcache.layers.layer_banks import LayerBanks
from llmcache.layers.layer_reuse import LayerReuse
from llmcache.layers.partial_forward import (
    LayerStack,
    NoSuchLayer,
    TrunkSpec,
    examine,
    gives_keys,
)
from llmcache.layers.prefix_caches import PrefixCaches
from llmcache.layers.trial import LayerTrial, MemoryBanks
from llmcache.model.architecture import Trunk
from llmcache.model.compiled import not_compiled, refuse_compiled
from llmcache.model.description.process_settings import running_mode
from llmcache.model.description.watch import ModelWatch
from llmcache.model.forward_patch import StandIn, install, remove
from llmcache.model.inputs import (
    Call,
    refusal,
)
from llmcache.model.locks import CallLock, LockCycle
from llmcache.model.losses import LossArguments
from llmcache.model.restoring import without_trace
from llmcache.model.trial import explained, vocabulary_of
from llmcache.model.trial_inputs import first_call

log = logging.getLogger("llmcache")

_attached: WeakKeyDictionary[Module, Attachment] = WeakKeyDictionary()


class Attachment:
    """A context in which a trunk's `forward` goes by the banks. Outside of it the model is as it was.

    Rows of a batch are looked up one by one: those whose last state is stored only pass the final norm and what
    follows, others enter after the deepest layer that is stored for them, the rest is computed from the start. Where
    the mask hides a position a state means nothing: it is zeros, or what the model gives. No gradient flows into a
    state that was reused. Forwards of several threads wait for each other and for calls of the cache. Copies and
    pickles of the model are of the model as it is without a cache.
    """

    def __init__(
        self,
        trunk: Trunk,
        banks: Callable[[TrunkSpec], LayerBanks],
        choose: Callable[[int], Sequence[int]],
        changed: Callable[[], None],
        prefixes: Callable[[str], PrefixCache | None],
        counters: Counters,
        exact_audits: ExactAudits,
        watch: ModelWatch,
        *,
        lock: CallLock,
        is_open: Callable[[], bool],
        states_only: bool = False,
    ) -> None:
        """banks: the banks for a trunk of this anatomy. choose: which layers have one, of how many; ConfigError.

        changed: called before the next pass when the model is not the one any more that the last pass was made with.
        watch: of the trunk's module, which says so.
        prefixes: what restores beginnings for a decoder, in this mode of running; None when that is off.
        lock: of the cache. is_open: whether the cache is; else the model computes by itself.
        states_only: a decoder's states are looked up whole in the layer banks where no keys and values are asked for.
        """
        self.trunk = trunk
        self._open_banks, self._choose, self._changed, self._counters = banks, choose, changed, counters
        self._states_only, self._exact_audits = states_only, exact_audits
        self._blocks = LayerStack(trunk.blocks)
        self._parameters = ForwardSignature(trunk.module)
        self._said: set[str] = set()
        self._depth = 0
        self.losses = LossArguments(trunk.module)
        self._lock, self._is_open, self._pid = lock, is_open, os.getpid()
        self._stand_in: StandIn | None = None
        self._anatomies: dict[tuple[object, ...], tuple[TrunkSpec, LayerBanks] | str] = {}
        self._decodes: bool | None = None
        self._prefixes = PrefixCaches(prefixes)
        self._watch = watch
        self.entered = np.zeros(0, np.int64)
        """int64 [rows]: first layer that was computed for each row of the last pass, their number when none was."""
        self.entries: list[str] = []
        """Per row of the last pass the key of the entry that was reused, in hexadecimal; "" where none was."""
        self._given: NDArray[np.int64] | None = None  # by `last_pass`
        self.up_to: int | None = None
        """Deepest layer whose states are reused, None for any; while it is set nothing is kept."""
        self.asked: tuple[str | None, str | None] | None = None
        """Role and prompt of the texts that pass; None while token ids are given, of which that is not known."""

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
                self._stand_in = StandIn(module, not_compiled(self._forwarded))
                install(self._stand_in)
            self._depth += 1
            try:
                if not self._in_training():
                    self._refuse_misfits()
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
        """Put the model's own forwards back, however often it was attached."""
        if self._stand_in is not None:
            remove(self._stand_in)
            self._stand_in = None
            self._blocks.restore()
            self.losses.restore()
            _attached.pop(self.trunk.module, None)

    @property
    def active(self) -> bool:
        """Whether the model goes by the banks now."""
        return self._depth > 0

    @property
    def banks(self) -> LayerBanks:
        """The banks of the layers, for the autocast state at hand. ConfigError when the layers cannot be cached."""
        found = self._anatomy()
        if isinstance(found, str):
            raise ConfigError(found)
        return found[1]

    def last_pass(self) -> tuple[NDArray[np.int64], list[str]] | None:
        """`entered` and `entries` of the last pass, given once; None where nothing has passed since they were given, as
        when a model with several trunks has used another one.
        """
        if not len(self.entered) or self.entered is self._given:
            return None
        self._given = self.entered
        return self.entered, self.entries

    def scope(self, layer: int) -> int:
        """Near scope of the texts in the current pass, for one layer; see `LayerBanks.scope`."""
        return UNKNOWN if self.asked is None else self.banks.scope(layer, self._mode(), self.asked)

    @property
    def decodes(self) -> bool:
        """Whether the model is a decoder, which gives keys and values for the tokens to come."""
        if self._decodes is None:
            self._anatomy()
        return bool(self._decodes)

    def _refuse_misfits(self) -> None:
        """ConfigError when neither layers nor beginnings of this model can be cached."""
        if any(not isinstance(one, str) for one in self._anatomies.values()):
            return
        self._anatomies.clear()
        reason = self._anatomy()
        if isinstance(reason, str) and not (self._uses_prefixes_only and not isinstance(self._prefix_cache(), str)):
            raise ConfigError(reason)

    # -- a pass ---------------------------------------------------------------------------------------------

    def _forwarded(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replacement of the trunk's forward: answer a call from the banks if possible, one thread at a time."""
        call = self._parameters.bind(args, kwargs)
        if holds_tokens(call.get("past_key_values")):  # a decoder's next token
            return own(*args, **kwargs)
        reason = self._unusable()
        if reason is None:
            try:
                self._lock.acquire()
            except LockCycle:  # to compute what is stored is slower than to wait, but not than to wait for ever
                return own(*args, **kwargs)
            try:
                reason = self._unusable()  # it may have been closed while this thread waited
                if reason is None:
                    return self._by_banks(own, args, kwargs, call)
            finally:
                self._lock.release()
        self._say(reason)
        return own(*args, **kwargs)

    def _unusable(self) -> str | None:
        """Reason why this attachment cannot be used; None if it can."""
        if self._pid != os.getpid():
            return "it was attached before a fork, and what the child computes is not stored; attach it in the child"
        return None if self._is_open() else "its cache is closed"

    def _by_banks(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
        if self._exact_audits.recomputing:
            return own(*args, **kwargs)
        training = self._in_training()
        if not training and self._watch.changed():
            if self.trunk.replaced:
                raise ConfigError("layers of the attached model were replaced; leave the context and attach it again")
            self._changed()
            self._anatomies.clear()
            self._prefixes.clear()
            self._decodes = None
        decoding = not training and self._keeps_keys(call)
        refusal = self._prefix_refusal if decoding else self._refusal
        reason = training or self._exact_audits.refusal() or refusal(call)
        reason = reason or self.losses.refusal(call.get("attention_mask"))
        if reason is not None:
            self._bypass(reason, call)
            return own(*args, **kwargs)

        def answer() -> Any:
            return self._decode(call) if decoding else self._answer(call)

        def uncached() -> Any:
            self._bypass(str(self._exact_audits.refusal()), call)
            return own(*args, **kwargs)

        return self._exact_audits.answered(answer, uncached)

    def _in_training(self) -> str:
        """Reason why the model is not deterministic (training mode of a module); "" if it is."""
        if self.trunk.module.training:
            return "the model is in training mode"
        part = self._watch.in_training()
        return (
            f"a part of the model is in training mode ({part}), so that its results differ from call to call"
            if part
            else ""
        )

    def _refusal(self, call: Call) -> str | None:
        """The reason why the layers are not cached in this call; None when they are."""
        reason = refusal(self._parameters.configured_outputs() | call, self._parameters.main)
        if reason is not None:
            return reason
        found = self._anatomy(call.get("return_dict"))
        if isinstance(found, str):
            return found
        value = call[self._parameters.main]
        return None if value.is_floating_point() else found[0].reach.refusal(value.shape[1])

    # -- a decoder's beginnings -----------------------------------------------------------------------------

    def _keeps_keys(self, call: Call) -> bool:
        """Whether this is a call for the beginnings: of a decoder that is to give keys and values, or may."""
        if call.get("past_key_values") is not None:
            return True
        if not (self._parameters.takes_cache and self.decodes):
            return False
        return not self._states_only or wants_keys(call, self.trunk.module)

    @property
    def _uses_prefixes_only(self) -> bool:
        """True if all calls use the prefix cache and none use layer banks."""
        return self._parameters.takes_cache and self.decodes and not self._states_only

    def _prefix_refusal(self, call: Call) -> str | None:
        prefixes = self._prefix_cache()
        return prefixes if isinstance(prefixes, str) else prefixes.refuses(self._parameters.configured_outputs() | call)

    def _prefix_cache(self) -> PrefixCache | str:
        assert self._stand_in is not None
        return self._prefixes.get(self._mode(), self._stand_in)

    def _decode(self, call: Call) -> Any:
        prefixes = self._prefix_cache()
        assert not isinstance(prefixes, str)
        rows = len(call[self._parameters.main])
        self.entered, self.entries = np.zeros(rows, np.int64), [""] * rows
        return prefixes.forward(self._forward, call)

    # -- layers ---------------------------------------------------------------------------------------------

    def _bypass(self, reason: str, call: Call) -> None:
        value = call.get(self._parameters.main)
        rows = len(value) if isinstance(value, Tensor) and value.ndim else 1
        self._counters.bypassed += rows
        self.entered, self.entries = np.zeros(rows, np.int64), [""] * rows
        self._say(reason)

    def _say(self, reason: str) -> None:
        """Warn once of each reason for which calls go to the model itself."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning("%s goes past the cache: %s", type(self.trunk.module).__name__, reason)

    def _mode(self) -> str:
        """Process-wide settings that change the states, such as autocast."""
        return running_mode(self._watch.device.type)

    def _anatomy(self, return_dict: bool | None = None) -> tuple[TrunkSpec, LayerBanks] | str:
        """Structure of this trunk as seen in trials, with its banks; or the reason why its layers cannot be cached.

        For the autocast state at hand and this kind of output. The trials leave no trace in the model.
        """
        module: Any = self.trunk.module
        if return_dict is None:
            return_dict = getattr(getattr(module, "config", None), "return_dict", None)
        mode = self._mode(), return_dict
        if mode not in self._anatomies:
            name = type(module).__name__
            try:
                anatomy = self._tried(return_dict)
                self._anatomies[mode] = anatomy, self._open_banks(anatomy)
            except NoSuchLayer as error:
                self._anatomies[mode] = str(error)
            except ConfigError as error:
                self._anatomies[mode] = f"{name} cannot be cached by layers: {error}"
            except Exception as error:  # a trial is ours, and so is its failure
                self._anatomies[mode] = f"{name} cannot be cached by layers: a trial failed with {explained(error)}"
        return self._anatomies[mode]

    def _tried(self, return_dict: bool | None) -> TrunkSpec:
        """Try the trunk out; returns its structure. ConfigError if it cannot be cached; model errors pass through."""
        module: Any = self.trunk.module
        device = self._watch.device

        def first_trial() -> tuple[Call, TrunkSpec]:
            call = first_call(module, self._parameters.main, self._forward, self._parameters.takes, device, return_dict)
            if self._parameters.takes_cache:
                self._decodes = gives_keys(self._forward, call)
            return call, examine(self._blocks, self._forward, call, self._parameters.takes_cache, self._choose)

        call, anatomy = without_trace(module, device, first_trial)
        if self._uses_prefixes_only:
            return anatomy
        trial = LayerTrial(
            lambda one: self._forward(**one),
            lambda one, banks, up_to: self._rehearsed(one, anatomy, banks, up_to),
            call | ({"use_cache": False} if self._parameters.takes_cache else {}),
            self._parameters.main,
            self._choose(anatomy.layers),
            anatomy.fields,
            self._parameters.takes,
        )
        return replace(anatomy, reach=trial.reach(module, vocabulary_of(module)))

    def _rehearsed(self, call: Call, anatomy: TrunkSpec, banks: MemoryBanks, up_to: int | None) -> Any:
        """The answer to a call from banks in memory, which leaves counters and what is said of the last pass alone."""
        reason = refusal(call, self._parameters.main)
        if reason is not None:
            raise ConfigError(reason)
        return self._reuse(Counters(), up_to).answer(call, anatomy, banks)

    def _answer(self, call: Call) -> Any:
        spec_and_banks = self._anatomy(call.get("return_dict"))
        assert not isinstance(spec_and_banks, str), "such a call is refused"
        reuse = self._reuse(self._counters, self.up_to)
        output = reuse.answer(call, *spec_and_banks)
        self.entered, self.entries = reuse.entered, reuse.entries
        return output

    def _reuse(self, counters: Counters, up_to: int | None) -> LayerReuse:
        main = self._parameters.main
        return LayerReuse(self._blocks, self._forward, main, self._watch, counters, up_to=up_to, asked=self.asked)

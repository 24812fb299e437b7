"""Detect changes of a live model before every call, within a fraction of a millisecond.

Containers are compared with copies of them, tensors by their address and version counter. What is written to a tensor
behind its version counter (through `tensor.data`, NumPy, or an optimiser's kernels) shows in checksums of the bytes:
all of them while credit lasts, a part that moves on at every call, and all of them before anything is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from llmcache.model.description.checksums import Contents
from llmcache.model.description.describe import Description, describe, trains
from llmcache.model.description.tokenizer_rules import rules_only
from llmcache.model.description.walk import Watched
from llmcache.model.digests import Digests, tensor_digests
from llmcache.model.forward_patch import is_stand_in, without_stand_ins
from llmcache.model.identity import Identity, identity_of

_PASSES = 2
"""Complete passes over the bytes that an opening, or a noticed change, is worth: one before each of the next calls."""
_CALL_SECONDS = 5e-5
"""What reading a part of the bytes may take before a call."""
_SMALL_SECONDS = 2e-4
"""A model whose bytes are read within this time is read whole before every call."""
_SHARE = 0.01
"""Of the seconds that the model computes, the part that further complete passes may take."""
_AT_ONCE = 5e-6
"""Seconds between two calls in which nobody can have written to a model: a pass is put off to a later call."""
_SHOWN = 6
_version, _training = attrgetter("_version"), attrgetter("training")


class Witness(Protocol):
    """Interface of the owner of pending results, which are committed only once the model is verified."""

    def asked(self, watch: ModelWatch) -> None:
        """The model may compute something that is kept."""

    def vouched(self, watch: ModelWatch) -> None:
        """Note that everything computed so far came from the model as described."""

    def doubted(self) -> None:
        """Note that results since the last complete pass may come from a changed model."""

    def model_seconds(self) -> float:
        """Seconds that models have computed so far."""
        ...


class ModelWatch:
    """A model, its description, and whether it still holds. Not for several threads at once."""

    def __init__(
        self,
        model: Module,
        tokenizer: Any = None,
        witness: Witness | None = None,
        known: Digests | None = None,
        name: str | None = None,
    ) -> None:
        """tokenizer: of a plain transformers model. known: digests of tensors in memory, by contents; filled.

        name: that the identity carries instead of the model's own.
        """
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self.witness = witness
        """What keeps the results; None where nothing is kept."""
        self._known: Digests = {} if known is None else known
        self._seconds, self._credit = 0.0, 0.0
        self._identity: Identity | None = None
        self._take(describe(model, tokenizer))
        self._first = _named(self._description), self._contents.checksums()
        self.rested_at: float | None = None
        """`time.perf_counter()` at which the last call ended, None where that is not known."""

    # -- what there is --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next((one.device for one in self._tensors), torch.device("cpu"))

    def identity(self) -> Identity:
        """The identity of the model as it was at the last look."""
        if self._identity is None:
            tensors = self._description.tensors
            digests = tensor_digests(tensors, self._contents.checksums(), self._known)
            found = identity_of(self._description, digests)
            self._identity = found if self._name is None else replace(found, name=self._name)
        return self._identity

    def changes(self) -> str:
        """Describe on one line what changed since the first description, by name and value; "" if nothing did."""
        facts, checksums = self._first
        now = _named(self._description)
        named = [
            f"{_shown(path)}: {facts.get(path, 'nothing')[:80]} -> {now.get(path, 'nothing')[:80]}"
            for path in {**facts, **now}
            if facts.get(path) != now.get(path)
        ]
        sums = self._contents.checksums()
        tensors = [path for path in {**checksums, **sums} if checksums.get(path) != sums.get(path)]
        named += [f"{path}: other numbers" for path in tensors if path in facts and path in now]
        more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        return "; ".join(named[:_SHOWN]) + more

    def in_training(self) -> str:
        """Path of a module that gives other results because it is in training mode; "" where there is none."""
        if not any(map(_training, self._modules)):
            return ""
        paths = {id(module): path for path, module in self._model.named_modules()}
        return next((paths.get(id(one), "") or type(one).__name__ for one in self._modules if trains(one)), "")

    # -- whether it holds -----------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Return whether the model changed since the last look, and take the present state as the new reference."""
        differs = not self._containers_hold() or self._states() != self._seen
        differs = differs or not self._contents.sample_holds() or self._paid_pass()
        changed = differs and self._look_again()
        if self.witness is not None:
            self.witness.asked(self)
        return changed

    def verified(self) -> bool:
        """A complete pass: whether what was computed since the last one came from the model as it was described.

        A change that the check before the next call is sure to see came after the last call, and does not count.
        """
        if self._doubtful():
            return False
        if not self._containers_hold() or self._states() != self._seen:
            return True
        fresh = describe(self._model, self._tokenizer)
        if _facts(fresh) != _facts(self._description) or not self._contents_of(fresh):
            return False
        self._keep_copies(fresh)
        return True

    def _doubtful(self) -> bool:
        """Return whether a tensor has other bytes without a trace of it; everything is read."""
        marks = self._marks()
        return any(marks[path] == self._noted[path] for path in self._contents.changed())

    def _contents_of(self, fresh: Description) -> bool:
        """Return whether all tensors of another description of this model have the bytes that they had."""
        before = self._description.tensors
        if fresh.tensors.keys() != before.keys():
            return False
        others = {path: one for path, one in fresh.tensors.items() if one is not before[path]}
        if not others:
            return True
        sums, found = self._contents.checksums(), Contents(others).checksums()
        return all(found[path] == sums[path] for path in others)

    def _paid_pass(self) -> bool:
        """Read as many bytes as the credit allows; whether some of them are others."""
        seconds = self.witness.model_seconds() if self.witness is not None else 0.0
        self._credit = min(_PASSES * self._pass_seconds, self._credit + _SHARE * max(0.0, seconds - self._seconds))
        self._seconds = seconds
        if self._pass_seconds < _SMALL_SECONDS:
            return not self._passes()
        rested, self.rested_at = self.rested_at, None
        at_once = rested is not None and time.perf_counter() - rested < _AT_ONCE
        if self._credit >= self._pass_seconds and not at_once:
            self._credit -= self._pass_seconds
            return not self._passes()
        part = self._contents.nbytes * _CALL_SECONDS / self._pass_seconds
        return bool(self._contents.changed_in_part(part))

    def _passes(self) -> bool:
        """Read all bytes; whether they are what they were."""
        if self._contents.changed():
            return False
        if self.witness is not None:
            self.witness.vouched(self)
        return True

    def _look_again(self) -> bool:
        """Describe the model anew; whether anything that decides results is another."""
        before, sums = self._description, self._contents.checksums()
        if self.witness is not None:
            self.witness.doubted() if self._doubtful() else self.witness.vouched(self)
        self._take(describe(self._model, self._tokenizer))
        now = self._description
        if _facts(before) == _facts(now) and sums == self._contents.checksums() and _alike(before, now):
            return False
        self._identity = None
        return True

    def _take(self, description: Description) -> None:
        self._description = description
        self._contents = Contents(description.tensors)
        self._pass_seconds = max(self._contents.seconds, 1e-7)
        self._credit = _PASSES * self._pass_seconds
        self._keep_copies(description)

    def _keep_copies(self, description: Description) -> None:
        self._watched: list[Watched] = description.walk.watched
        self._live = [one.live for one in self._watched]
        self._copies = [one.copy for one in self._watched]
        # taken now: what a stand-in stands for is found in its module, which may have another forward by the next look
        self._plain = [_KINDS[one.kind](one.copy) if one.kind in _KINDS else None for one in self._watched]
        self._probes = [read for _, read, _ in description.walk.probes]
        self._answers = [answer for _, _, answer in description.walk.probes]
        self._modules = description.modules
        self._by_path = description.tensors
        self._tensors = list(self._by_path.values())
        self._strided = [one for one in self._tensors if one.layout is torch.strided and _address(one)]
        self._seen, self._noted = self._states(), self._marks()

    def _marks(self) -> dict[str, tuple[int, int]]:
        """Address and version counter of each tensor, by path."""
        return {path: (_address(one), _version_of(one)) for path, one in self._by_path.items()}

    def _states(self) -> list[Any]:
        """Address, version counter and dtype of all tensors."""
        states: list[Any] = list(map(Tensor.data_ptr, self._strided))
        try:
            states += map(_version, self._tensors)
        except RuntimeError:  # a tensor made in inference mode has no version
            states += map(_version_of, self._tensors)
        return states

    def _containers_hold(self) -> bool:
        try:
            if self._live == self._copies and [read() for read in self._probes] == self._answers:
                return True
        except (RuntimeError, ValueError, TypeError):  # two tensors or arrays were compared: another one than before
            pass
        if not _equal([read() for read in self._probes], self._answers):
            return False
        return self._only_own_traces()

    def _only_own_traces(self) -> bool:
        """True if containers differ by nothing but training flags, and what LLMCache itself puts into a model."""
        for place, one in enumerate(self._watched):
            if _equal(one.live, self._copies[place]):
                continue
            if one.kind not in _KINDS or not _equal(_KINDS[one.kind](one.live), self._plain[place]):
                return False
            self._copies[place] = dict(one.live)
        return True


def _alike(before: Description, now: Description) -> bool:
    """Return whether tensors with the same bytes are also of the same dtypes and shapes."""
    mine, theirs = before.tensors, now.tensors
    return mine.keys() == theirs.keys() and all(
        (one.dtype, one.shape) == (theirs[path].dtype, theirs[path].shape) for path, one in mine.items()
    )


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # of tensors and arrays
        return False


def _own_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without its training flag, and with its own forward in the place of a stand-in."""
    plain = without_stand_ins(attributes)
    plain.pop("training", None)
    return plain


def _own_hooks(hooks: dict[int, Any]) -> list[Any]:
    return [hook for hook in hooks.values() if not is_stand_in(hook)]


_KINDS: dict[str, Callable[[Any], Any]] = {
    "module": _own_attributes,
    "hooks": _own_hooks,
    "tokenizer": rules_only,
}
"""By the kind of a container: what of it is not LLMCache's own doing, and no state of a call."""


def _named(description: Description) -> dict[str, str]:
    """All that a change is named by, besides tensors."""
    return {**description.facts, **description.settings, "rules of the tokenizer": description.rules[:8]}


def _facts(description: Description) -> tuple[Any, ...]:
    return description.facts, description.settings, description.rules


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse ones, and some that wrap others
        return 0


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shown(path: str) -> str:
    """A path of a description as people read it."""
    module, marked, name = path.rpartition("=")
    return f"{module.rstrip('.') or 'the model'} {name}".replace("_forward_hooks", "forward hook").replace(
        "_forward_pre_hooks", "forward pre-hook"
    ) if marked else path  # fmt: skip

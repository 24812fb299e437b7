"""Detect changes of a live model before every call, within a fraction of a millisecond.

Containers are compared with copies, tensors by their address and version counter. Writes that leave the version counter
unchanged (through `tensor.data`, NumPy, or an optimiser's kernels) are detected by checksums of the bytes. All bytes
are read while a time budget lasts. After that a call reads a part of the bytes, the next call the next part. All bytes
are read before anything is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, Protocol

import numpy as np
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
"""Complete passes over the bytes after opening or after a change: one before each of the next calls."""
_CALL_SECONDS = 5e-5
"""Seconds for reading a part of the bytes before a call."""
_SMALL_SECONDS = 2e-4
"""Seconds of a complete pass below which all bytes are read before every call."""
_SHARE = 0.01
"""Share of the model's seconds that further complete passes may take."""
_AT_ONCE = 5e-6
"""Seconds between two calls below which nobody can have written to the model: a pass waits for a later call."""
_SHOWN = 6  # changes that a message names
_version, _training = attrgetter("_version"), attrgetter("training")


class Witness(Protocol):
    """Interface of the owner of pending results, which are committed only once the model is verified."""

    def asked(self, watch: ModelWatch) -> None:
        """Note that the model may now compute results that are stored."""

    def vouched(self, watch: ModelWatch) -> None:
        """Note that everything computed so far came from the model as described."""

    def doubted(self) -> None:
        """Note that results since the last complete pass may come from a changed model."""

    def model_seconds(self) -> float:
        """Seconds that models have computed so far."""
        ...


class ModelWatch:
    """Watch of one model: its description, and checks for changes since. Not thread-safe."""

    def __init__(
        self,
        model: Module,
        tokenizer: Any = None,
        witness: Witness | None = None,
        known: Digests | None = None,
        name: str | None = None,
    ) -> None:
        """Describe a model.

        tokenizer: of a plain transformers model. witness: owner of the results that are stored.
        known: digests of tensors in memory, by contents; new digests are added.
        name: name in the identity, instead of the model's own.
        """
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self.witness = witness
        """Owner of pending results; None where nothing is stored."""
        self._known: Digests = {} if known is None else known
        self._seconds, self._credit = 0.0, 0.0
        self._identity: Identity | None = None
        self._take(describe(model, tokenizer))
        self._first = _named(self._description), self._contents.checksums()
        self.rested_at: float | None = None
        """`time.perf_counter()` at the end of the last call; None where that is unknown."""

    # -- identity -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next((tensor.device for tensor in self._tensors), torch.device("cpu"))

    def identity(self) -> Identity:
        """Return the identity of the model as it was at the last description."""
        if self._identity is None:
            tensors = self._description.tensors
            digests = tensor_digests(tensors, self._contents.checksums(), self._known)
            identity = identity_of(self._description, digests)
            self._identity = identity if self._name is None else replace(identity, name=self._name)
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
        """Return the path of a module that gives other results in training mode; "" where there is none."""
        if not any(map(_training, self._modules)):
            return ""
        paths = {id(module): path for path, module in self._model.named_modules()}
        return next(
            (paths.get(id(module), "") or type(module).__name__ for module in self._modules if trains(module)), ""
        )

    # -- checks ---------------------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Return whether the model changed since the last description, and describe it anew if it did."""
        differs = not self._containers_hold() or self._states() != self._seen
        differs = differs or not self._contents.sample_holds() or self._paid_pass()
        changed = differs and self._describe_again()
        if self.witness is not None:
            self.witness.asked(self)
        return changed

    def verified(self) -> bool:
        """Read all bytes; return whether all results since the last pass came from the model as described.

        A change that the check before the next call will detect came after the last call, and does not count.
        """
        if self._changed_without_trace():
            return False
        if not self._containers_hold() or self._states() != self._seen:
            return True
        fresh = describe(self._model, self._tokenizer)
        if _facts(fresh) != _facts(self._description) or not self._same_bytes(fresh):
            return False
        self._keep_copies(fresh)
        return True

    def _changed_without_trace(self) -> bool:
        """Read all bytes; return whether a tensor's bytes changed while its address and version counter did not."""
        marks = self._marks()
        return any(marks[path] == self._noted[path] for path in self._contents.changed())

    def _same_bytes(self, fresh: Description) -> bool:
        """Return whether all tensors of a fresh description of this model have the same bytes as before."""
        before = self._description.tensors
        if fresh.tensors.keys() != before.keys():
            return False
        replaced = {path: tensor for path, tensor in fresh.tensors.items() if tensor is not before[path]}
        if not replaced:
            return True
        sums, fresh_sums = self._contents.checksums(), Contents(replaced).checksums()
        return all(fresh_sums[path] == sums[path] for path in replaced)

    def _paid_pass(self) -> bool:
        """Read as many bytes as the time budget allows; return whether some of them changed."""
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
        """Read all bytes; return whether they are unchanged. If so, tell the witness."""
        if self._contents.changed():
            return False
        if self.witness is not None:
            self.witness.vouched(self)
        return True

    def _describe_again(self) -> bool:
        """Describe the model anew; return whether anything that decides results changed."""
        before, sums = self._description, self._contents.checksums()
        if self.witness is not None:
            self.witness.doubted() if self._changed_without_trace() else self.witness.vouched(self)
        self._take(describe(self._model, self._tokenizer))
        now = self._description
        if _facts(before) == _facts(now) and sums == self._contents.checksums() and _alike(before, now):
            return False
        self._identity = None
        return True

    def _take(self, description: Description) -> None:
        """Make a description the reference of later checks."""
        self._description = description
        self._contents = Contents(description.tensors)
        self._pass_seconds = max(self._contents.seconds, 1e-7)
        self._credit = _PASSES * self._pass_seconds
        self._keep_copies(description)

    def _keep_copies(self, description: Description) -> None:
        self._watched: list[Watched] = description.walk.watched
        self._live = [container.live for container in self._watched]
        self._copies = [container.copy for container in self._watched]
        # computed now: the forward behind a stand-in is looked up in its module, which may have another one later
        self._plain = [_KINDS[each.kind](each.copy) if each.kind in _KINDS else None for each in self._watched]
        self._numbers: list[tuple[Callable[[Any], tuple[Any, ...]], Any]] = [
            (itemgetter(*names, names[0]), each.live)
            for each in self._watched
            if each.own and isinstance(each.live, Mapping)
            for names in [[name for name, value in each.live.items() if _is_numeric(value) and name != "training"]]
            if names
        ]
        self._numbers += [
            (tuple, each.live) for each in self._watched if each.own and not isinstance(each.live, Mapping)
        ]
        self._number_values = self._numbers_now()
        own = [each.live for each in self._watched if each.own and each.kind in ("", "hooks")]
        self._orders = [live for live in own if isinstance(live, dict) and len(live) > 1]
        self._keys = list(map(list, self._orders))
        self._probes = [read for _, read, _ in description.walk.probes]
        self._answers = [answer for _, _, answer in description.walk.probes]
        self._modules = description.modules
        self._by_path = description.tensors
        self._tensors = list(self._by_path.values())
        self._strided = [each for each in self._tensors if each.layout is torch.strided and _address(each)]
        self._seen, self._noted = self._states(), self._marks()

    def _marks(self) -> dict[str, tuple[int, int]]:
        """Return the address and version counter of each tensor, by path."""
        return {path: (_address(tensor), _version_of(tensor)) for path, tensor in self._by_path.items()}

    def _states(self) -> list[Any]:
        """Return the addresses and version counters of all tensors."""
        states: list[Any] = list(map(Tensor.data_ptr, self._strided))
        try:
            states += map(_version, self._tensors)
        except RuntimeError:  # a tensor made in inference mode has no version
            states += map(_version_of, self._tensors)
        return states

    def _containers_hold(self) -> bool:
        """Return whether all containers and probes are as described, with numbers of the same type and sign."""
        try:
            if not all(map(_same_answer, [read() for read in self._probes], self._answers)):
                return False
            if not self._numbers_hold():
                return False
            if list(map(list, self._orders)) != self._keys:
                return False
            if self._live == self._copies:
                return True
        except (RuntimeError, ValueError, TypeError, KeyError):  # a tensor was compared, or an attribute is missing
            pass
        return self._only_own_traces()

    def _numbers_now(self) -> list[Any]:
        """Return the numbers among the values of all containers, and the tuples, which may contain numbers."""
        return [*chain.from_iterable([get(live) for get, live in self._numbers])]

    def _numbers_hold(self) -> bool:
        """Return whether numbers have the type and sign as described: True and 1, or 0.0 and -0.0, are equal in Python.

        Objects are compared first, which takes less time.
        """
        values = self._numbers_now()
        if len(values) == len(self._number_values) and all(map(is_, values, self._number_values)):
            return True
        if not strictly_equal(values, self._number_values):
            return False
        self._number_values = values
        return True

    def _only_own_traces(self) -> bool:
        """Return whether containers differ only by training flags and by stand-ins and hooks of LLMCache itself."""
        for place, container in enumerate(self._watched):
            if _equal(container.live, self._copies[place]):
                continue
            if container.kind not in _KINDS or not _equal(_KINDS[container.kind](container.live), self._plain[place]):
                return False
            self._copies[place] = dict(container.live)
        return True


def _alike(before: Description, now: Description) -> bool:
    """Return whether two descriptions have tensors of the same paths, dtypes and shapes."""
    mine, theirs = before.tensors, now.tensors
    return mine.keys() == theirs.keys() and all(
        (tensor.dtype, tensor.shape) == (theirs[path].dtype, theirs[path].shape) for path, tensor in mine.items()
    )


def _same_answer(now: Any, before: Any) -> bool:
    """Return whether the result of a probe is as before; results with the same objects are compared first."""
    same = type(now) is type(before) is list and len(now) == len(before) and all(map(is_, now, before))
    return same or strictly_equal(now, before)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, tuple, frozenset, np.generic))


def strictly_equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal, with numbers of the same type and sign and mappings in the same order."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(strictly_equal, one, other))
    if isinstance(one, dict):
        return strictly_equal(list(one.items()), list(other.items()))
    if isinstance(one, (bool, int, float, complex, np.generic)):
        return repr(one) == repr(other)
    if isinstance(one, (set, frozenset)):
        return bool(one == other) and sorted(map(repr, one)) == sorted(map(repr, other))
    return _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # of tensors and arrays
        return False


def _own_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without its training flag, and with its own forward instead of a stand-in."""
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
"""By kind of container: a function that removes entries of LLMCache itself and states of calls."""


def _named(description: Description) -> dict[str, str]:
    """Return all texts that messages compare, by name. Tensors are compared by checksum."""
    return {**description.facts, **description.settings, "rules of the tokenizer": description.rules[:8]}


def _facts(description: Description) -> tuple[Any, ...]:
    return description.facts, description.settings, description.rules


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse tensors, and some that wrap others
        return 0


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shown(path: str) -> str:
    """Return a path of a description in readable form."""
    module, marked, name = path.rpartition("=")
    return f"{module.rstrip('.') or 'the model'} {name}".replace("_forward_hooks", "forward hook").replace(
        "_forward_pre_hooks", "forward pre-hook"
    ) if marked else path  # fmt: skip

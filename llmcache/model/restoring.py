"""A module put back as it was: trial calls must leave no trace in its attributes, buffers, configuration or seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from llmcache.errors import ConfigError

_OF_MODULES = frozenset(Module().__dict__) - {"training"}
"""Attributes that every module has: dictionaries of parameters, buffers, children and hooks."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_LARGEST_COPY = 1 << 26
"""Bytes of a buffer up to which a trial gets a copy of it. Larger ones hold packed weights."""


Result = TypeVar("Result")


class WritesToWeights(ConfigError):
    """A forward wrote to parameters, or to buffers too large to be copied."""


def without_trace(module: Module, device: torch.device, trial: Callable[[], Result]) -> Result:
    """The result of a trial, run where the module is `preserved`, without gradients.

    A forward that writes to weights once (some rescale them when training ends) is run again. ConfigError when it
    writes to them every time.
    """
    try:
        with torch.no_grad(), preserved(module, device):
            return trial()
    except WritesToWeights:
        with torch.no_grad(), preserved(module, device):
            return trial()


@contextmanager
def preserved(module: Module, device: torch.device) -> Iterator[None]:
    """A context after which the module is as before, also after an error.

    Attributes, buffers, children and configurations of all modules inside it, and the states of the random generators
    of torch (the host's and this device's), numpy and Python. While the context is open, the module works on copies of
    its buffers, tensors, lists and dictionaries.

    `WritesToWeights` at the end when parameters, or buffers too large to be copied, were written to in place. They
    cannot be put back, and what goes with them is left as it is: a note that weights were rescaled has to stay true.
    """
    modules = list(module.modules())
    modes = [(one, one.training) for one in modules]
    objects = [one.__dict__ for one in modules] + [vars(config) for config in _configurations(modules)]
    registries = [(one, name, dict(getattr(one, name))) for one in modules for name in _REGISTRIES]
    attributes = [(holder, dict(holder)) for holder in objects]
    copies: dict[int, Any] = {}
    for holder, before in attributes:
        for name, value in before.items():
            if name not in _OF_MODULES:
                holder[name] = _duplicate(value, copies)
    for one in modules:
        for name, buffer in one._buffers.items():
            one._buffers[name] = _duplicate(buffer, copies)
    shared = [buffer for one in modules for buffer in one._buffers.values() if buffer is not None]
    written_to = [(one, one._version) for one in (*shared, *module.parameters()) if not one.is_inference()]
    seeds = random.getstate(), np.random.get_state()  # noqa: NPY002  # what models draw from
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])  # noqa: NPY002
        originals = {id(buffer) for _, name, before in registries if name == "_buffers" for buffer in before.values()}
        kept = [(one, version) for one, version in written_to if isinstance(one, Parameter) or id(one) in originals]
        written = any(one._version != version for one, version in kept)
        for one, training in modes:
            one.training = training
        if not written:
            _put_back(attributes, registries)
    if written:
        raise WritesToWeights("its forward writes to its own weights, so what it gives is not decided by its inputs")


def _put_back(
    attributes: list[tuple[dict[str, Any], dict[str, Any]]], registries: list[tuple[Module, str, dict[str, Any]]]
) -> None:
    """Give dictionaries of attributes, and those of parameters, buffers and children, the entries they had before."""
    for holder, before in attributes:
        for name in holder.keys() - before.keys():
            del holder[name]
        holder.update(before)
    for one, name, before in registries:
        registry = getattr(one, name)
        registry.clear()
        registry.update(before)


def _configurations(modules: list[Module]) -> list[Any]:
    """The configurations of some modules and those inside them, each once."""
    found: dict[int, Any] = {}
    pending = [config for one in modules if (config := one.__dict__.get("config")) is not None]
    while pending:
        config = pending.pop()
        if id(config) not in found and hasattr(config, "__dict__") and hasattr(config, "to_dict"):
            found[id(config)] = config
            pending += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return list(found.values())


def _duplicate(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a tensor, an array, or a container with all that is in it; anything else itself.

    copies: of what was duplicated before, so that what was shared stays shared.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Parameter) or not isinstance(value, (Tensor, np.ndarray, list, dict, set)):
        return value
    if isinstance(value, Tensor):
        copy: Any = value if value.numel() * value.element_size() > _LARGEST_COPY else value.detach().clone()
    elif isinstance(value, np.ndarray):
        copy = value.copy()
    elif type(value) is list:
        copy = [_duplicate(one, copies) for one in value]
    elif type(value) is dict:
        copy = {name: _duplicate(one, copies) for name, one in value.items()}
    elif type(value) is set:
        copy = set(value)
    else:  # of a class of its own, which a copy might not survive
        return value
    copies[id(value)] = copy
    return copy

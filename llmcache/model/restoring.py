"""Restore a module after trial calls: its attributes, buffers and configuration, and the random states."""

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
"""Attributes of every module: dictionaries of parameters, buffers, children and hooks, and flags."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_LARGEST_COPY = 1 << 26
"""Bytes of a buffer up to which a trial works on a copy. Larger buffers are packed weights."""


Result = TypeVar("Result")


class WritesToWeights(ConfigError):
    """Error for a forward that wrote to parameters, or to buffers too large to be copied."""


def without_trace(module: Module, device: torch.device, trial: Callable[[], Result]) -> Result:
    """Run a trial without gradients while the module is `preserved`; returns the trial's result.

    A trial that writes to weights is run a second time, since some models rescale them once when training ends.
    `WritesToWeights` (a ConfigError) when the second run writes to them too.
    """
    try:
        with torch.no_grad(), preserved(module, device):
            return trial()
    except WritesToWeights:
        with torch.no_grad(), preserved(module, device):
            return trial()


@contextmanager
def preserved(module: Module, device: torch.device) -> Iterator[None]:
    """Restore the module when the context ends, also after an error.

    Restored are attributes, buffers, children and configurations of all modules inside it, and the states of the random
    generators of torch (the host's and this device's), NumPy and Python. Inside the context the module works on copies
    of its buffers, tensors, lists and dictionaries.

    `WritesToWeights` at the end when parameters, or buffers too large to be copied, were written to in place. They
    cannot be restored, so attributes and dictionaries are not restored either: a flag that weights were rescaled has to
    stay true.
    """
    modules = list(module.modules())
    modes = [(part, part.training) for part in modules]
    objects = [part.__dict__ for part in modules] + [vars(config) for config in _configurations(modules)]
    registries = [(part, name, dict(getattr(part, name))) for part in modules for name in _REGISTRIES]
    attributes = [(holder, dict(holder)) for holder in objects]
    copies: dict[int, Any] = {}
    for holder, before in attributes:
        for name, value in before.items():
            if name not in _OF_MODULES:
                holder[name] = _duplicate(value, copies)
    for part in modules:
        for name, buffer in part._buffers.items():
            part._buffers[name] = _duplicate(buffer, copies)
    shared = [buffer for part in modules for buffer in part._buffers.values() if buffer is not None]
    versions = [(tensor, tensor._version) for tensor in (*shared, *module.parameters()) if not tensor.is_inference()]
    seeds = random.getstate(), np.random.get_state()  # noqa: NPY002  # the generator that models use
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])  # noqa: NPY002
        originals = {id(buffer) for _, name, before in registries if name == "_buffers" for buffer in before.values()}
        written = any(
            tensor._version != version
            for tensor, version in versions
            if isinstance(tensor, Parameter) or id(tensor) in originals
        )
        for part, training in modes:
            part.training = training
        if not written:
            _put_back(attributes, registries)
    if written:
        raise WritesToWeights("its forward writes to its own weights, so its inputs alone do not decide its results")


def _put_back(
    attributes: list[tuple[dict[str, Any], dict[str, Any]]], registries: list[tuple[Module, str, dict[str, Any]]]
) -> None:
    """Restore the entries of dictionaries of attributes, and of those of parameters, buffers and children."""
    for holder, before in attributes:
        for name in holder.keys() - before.keys():
            del holder[name]
        holder.update(before)
    for module, name, before in registries:
        registry = getattr(module, name)
        registry.clear()
        registry.update(before)


def _configurations(modules: list[Module]) -> list[Any]:
    """Return the configurations of some modules and those inside them, each once."""
    by_id: dict[int, Any] = {}
    pending = [config for module in modules if (config := module.__dict__.get("config")) is not None]
    while pending:
        config = pending.pop()
        if id(config) not in by_id and hasattr(config, "__dict__") and hasattr(config, "to_dict"):
            by_id[id(config)] = config
            pending += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return list(by_id.values())


def _duplicate(value: Any, copies: dict[int, Any]) -> Any:
    """Return a deep copy of a tensor, an array, or a plain container; any other value itself.

    copies: copies made before, by id, so that shared values stay shared.
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
        copy = [_duplicate(item, copies) for item in value]
    elif type(value) is dict:
        copy = {name: _duplicate(item, copies) for name, item in value.items()}
    elif type(value) is set:
        copy = set(value)
    else:  # of a subclass, which might not support copies
        return value
    copies[id(value)] = copy
    return copy

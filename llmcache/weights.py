"""Whether the weights of a model are still those that were looked at."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
    torch.int8: torch.uint8,
    torch.uint8: torch.uint8,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
"""Numbers that are compared bit by bit on the host: numpy takes a fifth of torch's time for many short views."""
_state, _below, _values = attrgetter("dtype", "_version"), attrgetter("_modules"), methodcaller("values")


class _Sample(NamedTuple):
    """Numbers of all tensors. host: their bits. elsewhere: by dtype and device; 0 for NaN, which no NaN is equal to."""

    host: bytes
    elsewhere: dict[object, Tensor]

    def same(self, other: _Sample) -> bool:
        return self.host == other.host and all(
            torch.equal(one, other.elsewhere[kind]) for kind, one in self.elsewhere.items()
        )


class Weights:
    """Whether a module's parameters and buffers are those of the last look: the same tensors, not written to since.

    What is written through `tensor.data` (adapters are merged so) changes no version: a sample of the numbers shows it.
    The sample holds on to the storages, so that new weights cannot lie where the old ones were.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._parents: list[Module] = []
        self._children: list[Module | None] = []
        self._leaves: list[dict[str, Module | None]] = []
        self._holders: list[tuple[dict[str, Any], str]] = []
        self._seen: list[object] = []
        self._views: dict[object, list[Tensor]] = {}
        self._on_host: dict[object, list[NDArray[Any]]] = {}
        self._sample = _Sample(b"", {})
        self._walk()
        self.changed()

    @property
    def device(self) -> torch.device:
        return next(
            (one.device for holder, name in self._holders if (one := holder.get(name)) is not None), torch.device("cpu")
        )

    def changed(self) -> bool:
        if any(self._leaves) or self._below() != self._children:
            self._walk()
        before, self._seen = self._seen, self._look()
        if before != self._seen:
            self._choose()
            self._sample = self._sampled()
            return True
        sample, self._sample = self._sample, self._sampled()
        return not sample.same(self._sample)

    def _walk(self) -> None:
        modules = _within(self._module)
        self._parents = [one for one in modules if one._modules]
        self._leaves = [one._modules for one in modules if not one._modules]
        self._children = self._below()
        self._holders = [
            (holder, name) for one in modules for holder in (one._parameters, one._buffers) for name in holder
        ]

    def _below(self) -> list[Module | None]:
        """The children of all modules that have some, one after the other: the same as long as all modules are."""
        return list(chain.from_iterable(map(_values, map(_below, self._parents))))

    def _tensors(self) -> list[Tensor]:
        return [one for holder, name in self._holders if (one := holder.get(name)) is not None]

    def _look(self) -> list[object]:
        config, tensors = getattr(self._module, "config", None), self._tensors()
        seen: list[object] = [getattr(config, "_attn_implementation", None), *map(Tensor.data_ptr, tensors)]
        try:
            seen += map(_state, tensors)
        except RuntimeError:  # a tensor made in inference mode has no version
            seen += [(one.dtype, 0 if one.is_inference() else one._version) for one in tensors]
        return seen

    def _choose(self) -> None:
        """Views of up to 16 numbers of each tensor, by dtype and device."""
        self._views, self._on_host = {}, {}
        for one in self._tensors():
            if not one.is_contiguous() or not one.numel():
                continue
            some = one.detach().view(-1)[:: max(1, one.numel() // 16)][:16]
            bits = _BITS.get(one.dtype)
            if bits is not None and one.device.type == "cpu" and type(one) in (Tensor, Parameter):
                self._on_host.setdefault(bits, []).append(some.view(bits).numpy())
            else:
                self._views.setdefault((one.dtype, one.device), []).append(some)

    def _sampled(self) -> _Sample:
        return _Sample(
            b"".join(np.concatenate(views).tobytes() for views in self._on_host.values()),
            {kind: torch.cat(views).nan_to_num() for kind, views in self._views.items()},
        )


def _within(module: Module) -> list[Module]:
    """The module and all below it, each once; `Module.modules` takes ten times as long, for its nested generators."""
    found, seen = [module], {id(module)}
    for one in found:  # grows while it is walked
        for child in one._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found

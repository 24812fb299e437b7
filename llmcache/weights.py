"""Whether the weights of a model are still those that were looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class Weights:
    """Whether a module's parameters and buffers are those of the last look: the same tensors, not written to since.

    What is written through `tensor.data` (adapters are merged so) changes no version: a sample of the numbers shows it.
    The sample holds on to the storages, so that new weights cannot lie where the old ones were.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._modules: list[Module] = []
        self._holders: list[tuple[dict[str, Any], str]] = []
        self._seen: list[object] = []
        self._views: dict[object, list[Tensor]] = {}
        self._sample: dict[object, Tensor] = {}
        self.changed()

    @property
    def device(self) -> torch.device:
        return next(
            (one.device for holder, name in self._holders if (one := holder.get(name)) is not None), torch.device("cpu")
        )

    def changed(self) -> bool:
        modules = _within(self._module)
        if modules != self._modules:
            self._modules = modules
            self._holders = [
                (holder, name) for one in modules for holder in (one._parameters, one._buffers) for name in holder
            ]
        before, self._seen = self._seen, self._look()
        if before != self._seen:
            self._views = self._some()
            self._sample = self._sampled()
            return True
        sample, self._sample = self._sample, self._sampled()
        return not all(torch.equal(one, self._sample[kind]) for kind, one in sample.items())

    def _tensors(self) -> list[Tensor]:
        return [one for holder, name in self._holders if (one := holder.get(name)) is not None]

    def _look(self) -> list[object]:
        config = getattr(self._module, "config", None)
        seen: list[object] = [getattr(config, "_attn_implementation", None)]
        seen += [(one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in self._tensors()]
        return seen

    def _some(self) -> dict[object, list[Tensor]]:
        """Views of up to 16 numbers of each tensor, by dtype and device."""
        found: dict[object, list[Tensor]] = {}
        for one in self._tensors():
            if one.is_contiguous() and one.numel():
                flat = one.detach().view(-1)
                found.setdefault((one.dtype, one.device), []).append(flat[:: max(1, one.numel() // 16)][:16])
        return found

    def _sampled(self) -> dict[object, Tensor]:
        return {kind: torch.cat(views).nan_to_num() for kind, views in self._views.items()}


def _within(module: Module) -> list[Module]:
    """The module and all below it, each once; `Module.modules` takes ten times as long, for its nested generators."""
    found, seen = [module], {id(module)}
    for one in found:  # grows while it is walked
        for child in one._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found

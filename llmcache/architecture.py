"""Where the layers of a model are: which tensors come before them, in which one, or after them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

INDEXED = re.compile(r"(?:(.+?)\.)?(\d+)\.")
_FINAL_NORM = re.compile(r"(norm|norm_f|ln_f|final_norm|final_layer_?norm)\.[^.]+")


def trunk_of(model: Module) -> tuple[Module, str]:
    """The transformers model inside, and what its tensors' names begin with."""
    inner = getattr(model, "transformers_model", None)
    for name, module in model.named_modules():
        if inner is None or module is inner:
            return module, f"{name}." if name else ""
    raise ConfigError(f"the weights are held by {type(inner).__name__}, not by torch; load with backend='torch'")


def tensors_of(model: Module, trunk: Module, prefix: str) -> dict[str, Tensor]:
    found = {name: one for name, one in model.state_dict().items() if hasattr(one, "untyped_storage")}
    if trunk is not model and _pooler_is_idle(model, trunk):
        found = {name: one for name, one in found.items() if not name.startswith(f"{prefix}pooler.")}
    for name, one in found.items():
        if one.is_meta:
            raise ConfigError(f"{name} is on the meta device and has no bytes; load the model's weights first")
    return found


def _pooler_is_idle(model: Module, trunk: Module) -> bool:
    """Whether nothing but the last hidden state is used.

    A checkpoint without a pooler gets a random one at every load; the model would never be recognised again.
    """
    owner = next((one for one in model.modules() if getattr(one, "model", None) is trunk), None)
    modes: Mapping[Any, Mapping[str, Any]] = getattr(owner, "modality_config", None) or {}
    return bool(modes) and all(mode.get("method_output_name") == "last_hidden_state" for mode in modes.values())


def layer_stacks(sizes: Mapping[str, int], count: int) -> list[str]:
    """The lists of blocks that hold most numbers, in the model's order: "encoder.layer", "model.layers"."""
    held: Counter[str] = Counter()
    for name, size in sizes.items():
        if indexed := INDEXED.match(name):
            held[indexed[1] or ""] += size
    largest = {name for name, _ in held.most_common(count)}
    return [name for name in held if name in largest]


def layer_places(names: Sequence[str], stacks: Sequence[str]) -> tuple[dict[str, int], list[int]]:
    """Where each tensor comes in: -1 before the layers, its layer's number, or after them; layers per stack.

    Only what certainly comes late is placed late, since a mistake would let different models share layers. A
    stack's siblings are often used inside its blocks (relative positions in MPNet and DeBERTa), in any order.
    """
    places: dict[str, int] = dict.fromkeys(names, -1)
    indexed = {name: INDEXED.match(name) for name in names}
    depths: list[int] = []
    for stack in stacks:
        inside = {name: int(one[2]) for name, one in indexed.items() if one and (one[1] or "") == stack}
        places.update({name: sum(depths) + index for name, index in inside.items()})
        depths.append(max(inside.values()) + 1)
        parent = stack[: stack.rfind(".") + 1]
        last = max(i for i, name in enumerate(names) if name in inside)
        for name in names[last + 1 :]:
            sibling = name.startswith(parent)
            late = _FINAL_NORM.fullmatch(name.removeprefix(parent)) if sibling else "emb" not in name
            if late and places[name] < 0 and (sibling or stack == stacks[-1]):
                places[name] = sum(depths)  # the head; after an encoder, the first layer of its decoder
    return places, depths

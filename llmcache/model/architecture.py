"""Locate the layers of a model, and the tensors before, inside and after them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcache.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn import Module

INDEXED = re.compile(r"(?:(.+?)\.)?(\d+)\.")
_FINAL_NORM = re.compile(r"(norm|norm_f|ln_f|final_norm|final_layer_?norm)\.[^.]+")


def trunk_of(model: Module) -> tuple[Module, str]:
    """Return the transformers model inside a model, and the prefix of its tensors' names."""
    inner = getattr(model, "transformers_model", None)
    for name, module in model.named_modules():
        if inner is None or module is inner:
            return module, f"{name}." if name else ""
    raise ConfigError(f"the weights belong to {type(inner).__name__}, not to torch; load with backend='torch'")


def pooler_is_idle(model: Module, trunk: Module) -> bool:
    """Return whether only the last hidden state is used.

    The pooler is then no part of the identity: a checkpoint without a pooler gets a random one at every load.
    """
    owner = next((module for module in model.modules() if getattr(module, "model", None) is trunk), None)
    modes: Mapping[Any, Mapping[str, Any]] = getattr(owner, "modality_config", None) or {}
    return bool(modes) and all(mode.get("method_output_name") == "last_hidden_state" for mode in modes.values())


def layer_stacks(sizes: Mapping[str, int], count: int) -> list[str]:
    """Return the names of the `count` lists of blocks with most parameters, in the model's order: "encoder.layer".

    sizes: elements of each tensor, by name.
    """
    parameters: Counter[str] = Counter()
    for name, size in sizes.items():
        if indexed := INDEXED.match(name):
            parameters[indexed[1] or ""] += size
    largest = {name for name, _ in parameters.most_common(count)}
    return [name for name in parameters if name in largest]


def layer_places(names: Sequence[str], stacks: Sequence[str]) -> tuple[dict[str, int], list[int]]:
    """Return the place of each tensor, and the number of layers of each stack.

    A place is -1 before the layers, the number of a layer, or the number of layers for tensors after them. A tensor is
    placed after the layers only if it is certainly used there, since a mistake would let different models share layers.
    A stack's siblings are often used inside its blocks (relative positions in MPNet and DeBERTa), in any order.
    """
    places: dict[str, int] = dict.fromkeys(names, -1)
    indexed = {name: INDEXED.match(name) for name in names}
    depths: list[int] = []
    for stack in stacks:
        inside = {name: int(match[2]) for name, match in indexed.items() if match and (match[1] or "") == stack}
        places.update({name: sum(depths) + index for name, index in inside.items()})
        depths.append(max(inside.values()) + 1)
        parent = stack[: stack.rfind(".") + 1]
        last = max(i for i, name in enumerate(names) if name in inside)
        for name in names[last + 1 :]:
            sibling = name.startswith(parent)
            late = _FINAL_NORM.fullmatch(name.removeprefix(parent)) if sibling else "emb" not in name
            if late and places[name] < 0 and (sibling or stack == stacks[-1]):
                places[name] = sum(depths)  # the head; after an encoder, the first layer of the decoder
    return places, depths


# -- modules ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trunk:
    """The part of a model whose layers are cached: `module` runs the `blocks` one after the other.

    name: of the module inside the model, "" for the model itself. stack: name of the list of blocks in the model.
    A model may run one block several times (ALBERT), so there may be more layers than blocks.
    """

    module: Module
    name: str
    stack: str
    blocks: tuple[Module, ...]

    @property
    def replaced(self) -> bool:
        """True if the blocks were replaced by others since."""
        stack = self.stack.removeprefix(f"{self.name}.") if self.name else self.stack
        return tuple(self.module.get_submodule(stack).children()) != self.blocks


def find_trunk(model: Module, stack: str | None = None) -> Trunk:
    """Find the trunk of a transformers model, a SentenceTransformer, or a module with a list of layers.

    stack: name of the list of layers in `model.named_modules()` ("bert.encoder.layer"); None takes the list with most
    parameters. The trunk of an encoder-decoder is its encoder. ConfigError names the lists that exist when none fits.
    """
    inner, name = _inner(model)
    if stack is not None:
        outside = not stack.startswith(f"{name}." if name else "")
        module, name = (model, "") if outside else (inner, name)
        return Trunk(module, name, stack, _blocks(model, stack))
    sizes = {path: tensor.numel() for path, tensor in inner.state_dict().items() if hasattr(tensor, "numel")}
    stacks = layer_stacks(sizes, 1)
    if not stacks or not stacks[0]:
        raise ConfigError(f"{type(model).__name__} has no list of layers; {_lists(model)}")
    return Trunk(inner, name, f"{name}.{stacks[0]}".lstrip("."), _blocks(inner, stacks[0]))


def _inner(model: Module) -> tuple[Module, str]:
    """Return the module whose forward maps token ids to states, and its name inside the model."""
    places = {id(module): name for name, module in model.named_modules()}
    outer: Any = getattr(model, "transformers_model", None)
    if outer is None:
        outer = next((module for module in model.modules() if hasattr(module, "base_model_prefix")), model)
    config = getattr(outer, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(outer, "get_encoder"):
        inner = outer.get_encoder()
    else:
        inner = getattr(outer, getattr(outer, "base_model_prefix", "") or " ", outer)
        if hasattr(inner, "get_decoder"):  # in OPT the model with a head calls this module; in most it is `inner`
            inner = inner.get_decoder() or inner
    return inner, places.get(id(inner), "")


def _blocks(module: Module, stack: str) -> tuple[Module, ...]:
    """Return the blocks in the list of this name; ConfigError when it is no list of modules."""
    try:
        listed: Any = module.get_submodule(stack)
    except AttributeError:
        raise ConfigError(f"{type(module).__name__} has no {stack!r}; {_lists(module)}") from None
    blocks = tuple(listed.children())
    if not blocks or [name for name, _ in listed.named_children()] != [str(i) for i in range(len(blocks))]:
        raise ConfigError(f"{stack!r} is a {type(listed).__name__} and no list of layers; {_lists(module)}")
    return blocks


def _lists(model: Module) -> str:
    """Return a sentence for an error that names the lists of modules in a model."""
    lists = [
        f"{name!r} ({len(list(module.children()))} x {type(next(module.children())).__name__})"
        for name, module in model.named_modules()
        if name and type(module).__name__ in ("ModuleList", "Sequential") and len(list(module.children())) > 1
    ]
    if not lists:
        return (
            f"it has no list of modules at all (top level: {', '.join(n for n, _ in model.named_children()) or 'none'})"
        )
    return f'its lists of modules are {", ".join(lists[:8])}; name the one to use: stack="..."'

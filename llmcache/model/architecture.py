"""Where the layers of a model are: which tensors come before them, in which one, or after them."""

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
    """The transformers model inside, and what its tensors' names begin with."""
    inner = getattr(model, "transformers_model", None)
    for name, module in model.named_modules():
        if inner is None or module is inner:
            return module, f"{name}." if name else ""
    raise ConfigError(f"the weights are held by {type(inner).__name__}, not by torch; load with backend='torch'")


def pooler_is_idle(model: Module, trunk: Module) -> bool:
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


# -- modules ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trunk:
    """The part of a model whose layers are cached: `module` runs the `blocks`, one after the other.

    name: of the module inside the model, "" for the model itself. stack: name of the list of blocks in the module.
    A model may run one block several times (ALBERT), so there may be more layers than blocks.
    """

    module: Module
    name: str
    stack: str
    blocks: tuple[Module, ...]

    @property
    def replaced(self) -> bool:
        """Whether other blocks are in their place by now."""
        stack = self.stack.removeprefix(f"{self.name}.") if self.name else self.stack
        return tuple(self.module.get_submodule(stack).children()) != self.blocks


def find_trunk(model: Module, stack: str | None = None) -> Trunk:
    """The trunk of a model: of any transformers model, of a SentenceTransformer, or of a module with a list of layers.

    stack: name of the list of layers as `model.named_modules()` has it ("bert.encoder.layer"); None looks for the list
    that holds most numbers. Of an encoder-decoder it is the encoder. ConfigError says what was found when none fits.
    """
    inner, name = _inner(model)
    if stack is not None:
        outside = not stack.startswith(f"{name}." if name else "")
        module, name = (model, "") if outside else (inner, name)
        return Trunk(module, name, stack, _blocks(model, stack))
    sizes = {one: tensor.numel() for one, tensor in inner.state_dict().items() if hasattr(tensor, "numel")}
    found = layer_stacks(sizes, 1)
    if not found or not found[0]:
        raise ConfigError(f"{type(model).__name__} has no list of layers; {_lists(model)}")
    return Trunk(inner, name, f"{name}.{found[0]}".lstrip("."), _blocks(inner, found[0]))


def _inner(model: Module) -> tuple[Module, str]:
    """The module whose forward runs from token ids to states, and its name inside the model."""
    places = {id(module): name for name, module in model.named_modules()}
    outer: Any = getattr(model, "transformers_model", None)
    if outer is None:
        outer = next((one for one in model.modules() if hasattr(one, "base_model_prefix")), model)
    config = getattr(outer, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(outer, "get_encoder"):
        inner = outer.get_encoder()
    else:
        inner = getattr(outer, getattr(outer, "base_model_prefix", "") or " ", outer)
        if hasattr(inner, "get_decoder"):  # of OPT it is what the model with a head calls; of most, the same module
            inner = inner.get_decoder() or inner
    return inner, places.get(id(inner), "")


def _blocks(module: Module, stack: str) -> tuple[Module, ...]:
    try:
        listed: Any = module.get_submodule(stack)
    except AttributeError:
        raise ConfigError(f"{type(module).__name__} has no {stack!r}; {_lists(module)}") from None
    blocks = tuple(listed.children())
    if not blocks or [name for name, _ in listed.named_children()] != [str(i) for i in range(len(blocks))]:
        raise ConfigError(f"{stack!r} is a {type(listed).__name__} and no list of layers; {_lists(module)}")
    return blocks


def _lists(model: Module) -> str:
    """What could be meant, for an error."""
    found = [
        f"{name!r} ({len(list(one.children()))} x {type(next(one.children())).__name__})"
        for name, one in model.named_modules()
        if name and type(one).__name__ in ("ModuleList", "Sequential") and len(list(one.children())) > 1
    ]
    if not found:
        return (
            f"it has no list of modules at all (top level: {', '.join(n for n, _ in model.named_children()) or 'none'})"
        )
    return f'its lists of modules are {", ".join(found[:8])}; name the one to use: stack="..."'

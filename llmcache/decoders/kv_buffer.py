"""Keys, values and final states of rows of tokens: layout in a model, buffers in memory, records in KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.model.restoring import without_trace
from llmcache.model.trial import explained

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LAYERS = {"full_attention", "sliding_attention"}

Forward = Callable[..., Any]


@dataclass(frozen=True)
class KVLayout:
    """Layout of what is stored for a token of a trunk.

    planes: (heads, head dim) of keys and of values, layer after layer, [2 layers]. width, dtype: of the final state.
    takes_positions: True if the forward has a parameter position_ids.
    positions_skip_padding: True if the model, without position_ids, counts positions over tokens, not over columns.
    output: class of the trunk's output.
    """

    planes: tuple[tuple[int, int], ...]
    width: int
    dtype: torch.dtype
    takes_positions: bool
    positions_skip_padding: bool
    output: Callable[..., Any]

    @cached_property
    def kinds(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the planes by (heads, head dim): one tensor has all planes of a kind. Most models have one."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for plane, size in enumerate(self.planes):
            kinds.setdefault(size, []).append(plane)
        return kinds

    @cached_property
    def record(self) -> int:
        """Count of numbers that are stored for one token: keys and values, kind after kind, then the final state."""
        return sum(heads * dim for heads, dim in self.planes) + self.width

    @property
    def facts(self) -> BankFacts:
        """Facts of a bank for KV blocks of this layout. KeyError for a dtype that cannot be stored."""
        return BankFacts(_DTYPES[self.dtype], self.record, 2, 0)


@dataclass(eq=False)
class KVBuffer:
    """Keys, values and final states of n rows, each in adjacent columns of a table with `columns` columns.

    planes: one tensor per kind, [planes, n, heads, columns, head dim]; empty where only the states are wanted.
    states: [n, columns, width]. lengths: tokens of each row. firsts: column of each row's first token.
    Columns outside a row have undefined values, but no NaN.
    """

    shape: KVLayout
    planes: list[Tensor]
    states: Tensor
    lengths: Sequence[int]
    firsts: Sequence[int]

    @classmethod
    def empty(
        cls,
        shape: KVLayout,
        lengths: Sequence[int],
        firsts: Sequence[int],
        columns: int,
        device: torch.device,
        *,
        planes: bool = True,
    ) -> KVBuffer:
        """Return a buffer for rows: zeros outside of them, uninitialised inside. planes: False for states only."""
        n, kinds = len(lengths), shape.kinds.items() if planes else ()
        buffer = cls(
            shape,
            [
                torch.empty((len(places), n, heads, columns, dim), dtype=shape.dtype, device=device)
                for (heads, dim), places in kinds
            ],
            torch.empty((n, columns, shape.width), dtype=shape.dtype, device=device),
            lengths,
            firsts,
        )
        for i, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            for beside in (slice(0, first), slice(first + length, columns)):
                if beside.start < beside.stop:  # a masked key has weight 0, but 0 times NaN is NaN
                    for plane in buffer.planes:
                        plane[:, i, :, beside] = 0
                    buffer.states[i, beside] = 0
        return buffer

    @property
    def columns(self) -> int:
        return self.states.shape[1]

    def plane(self, number: int) -> Tensor:
        """Return keys (even) or values (odd) of layer number // 2, as a view [n, heads, columns, head dim]."""
        for tensor, places in zip(self.planes, self.shape.kinds.values(), strict=True):
            if number in places:
                return tensor[places.index(number)]
        raise IndexError(number)

    def take(self, i: int, source: KVBuffer, j: int, tokens: int) -> None:
        """Copy the first tokens of row j of `source` to row i. `source` may be this buffer."""
        to, of = self.firsts[i], source.firsts[j]
        for tensor, other in zip(self.planes, source.planes, strict=False):
            tensor[:, i, :, to : to + tokens] = other[:, j, :, of : of + tokens]
        self.states[i, to : to + tokens] = source.states[j, of : of + tokens]

    def restore(self, i: int, first: int, numbers: Tensor, states: Tensor, scales: Tensor | None = None) -> None:
        """Write tokens of row i from token `first` on, on the buffer's device. For the arguments see `restore_from`."""
        to, tokens, at, head = self.firsts[i] + first, len(numbers), 0, 0
        for tensor in self.planes:
            places, _, heads, _, dim = tensor.shape
            part = numbers[:, at : at + places * heads * dim].reshape(tokens, places, heads, dim).permute(1, 2, 0, 3)
            slots = tensor[:, i, :, to : to + tokens]
            if scales is None:
                slots.copy_(part)
            else:
                scale = scales[:, head : head + places * heads].reshape(tokens, places, heads, 1).permute(1, 2, 0, 3)
                torch.mul(part, scale, out=slots)  # rounds to the buffer's dtype, without a copy between
            at, head = at + places * heads * dim, head + places * heads
        self.states[i, to : to + tokens] = states

    @property
    def in_arrays(self) -> bool:
        """True if NumPy can view the buffer (float32 on the host), as `restore_from` requires."""
        return self.states.device.type == "cpu" and self.states.dtype == torch.float32

    def restore_from(
        self, i: int, first: int, numbers: Floats32, states: Floats32, scales: Floats32 | None = None
    ) -> None:
        """Write tokens of row i from token `first` on. Requires `in_arrays`. The arrays may be read-only.

        numbers: keys and values in the order of a record, [tokens, keys and values or more]. states: [tokens, width].
        scales: one per plane and head, [tokens, heads of all planes], by which the numbers are multiplied; None: by 1.
        """
        to, tokens, at, head = self.firsts[i] + first, len(numbers), 0, 0
        for tensor in self.planes:
            places, _, heads, _, dim = tensor.shape
            part = numbers[:, at : at + places * heads * dim].reshape(tokens, places, heads, dim).transpose(1, 2, 0, 3)
            slots = tensor.numpy()[:, i, :, to : to + tokens]
            if scales is None:
                slots[...] = part
            else:
                scale = scales[:, head : head + places * heads].reshape(tokens, places, heads, 1)
                np.multiply(part, scale.transpose(1, 2, 0, 3), out=slots)
            at, head = at + places * heads * dim, head + places * heads
        self.states.numpy()[i, to : to + tokens] = states

    def records(self, i: int, start: int, stop: int) -> Floats32:
        """Return records of tokens start to stop of row i: a copy on the host, float32 [tokens, record]."""
        record = torch.empty((stop - start, self.shape.record), dtype=torch.float32, device=self.states.device)
        low, high, at = self.firsts[i] + start, self.firsts[i] + stop, 0
        for tensor in self.planes:
            places, _, heads, _, dim = tensor.shape
            part = record[:, at : at + places * heads * dim].view(-1, places, heads, dim)
            part.copy_(tensor[:, i, :, low:high].permute(2, 0, 1, 3))
            at += places * heads * dim
        record[:, at:] = self.states[i, low:high]
        return record.cpu().numpy()


class _Slots(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses without types
    """A layer's cache inside a `KVBuffer`: new keys and values are written after the restored ones, without a copy."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._all = keys, values
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        filled = self.keys.shape[2]  # type: ignore[union-attr]  # set above
        stop = filled + key_states.shape[2]
        for place, new in zip(self._all, (key_states, value_states), strict=True):
            place[:, :, filled:stop] = new
        self.keys, self.values = (table[:, :, :stop] for table in self._all)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])  # type: ignore[union-attr]


def cache_of(buffer: KVBuffer, filled: int) -> DynamicCache:
    """Return a transformers cache with the first `filled` columns of a buffer, which writes further columns into it."""
    cache = DynamicCache()
    cache.layers = [
        _Slots(buffer.plane(place), buffer.plane(place + 1), filled) for place in range(0, len(buffer.shape.planes), 2)
    ]
    cache.layer_class_to_replicate = None
    return cache


def hand_over(buffer: KVBuffer, cache: DynamicCache) -> DynamicCache:
    """Fill an empty cache with the keys and values of a buffer, without a copy where possible. Returns the cache."""
    for place in range(0, len(buffer.shape.planes), 2):
        keys, values, number = buffer.plane(place), buffer.plane(place + 1), place // 2
        if number == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]  # as above
        layer: Any = cache.layers[number] if number < len(cache.layers) else None
        if type(layer) is DynamicLayer:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # `update` would copy them
        else:
            cache.update(keys, values, number)
    return cache


# -- finding the layout -------------------------------------------------------------------------------------


def shape_of(trunk: nn.Module) -> KVLayout:
    """Return the layout of a trunk, from four trial calls with a few tokens.

    They compare computed states with states after restored keys and values.
    ConfigError, with the reason, when prefixes of this trunk cannot be restored.
    """
    config: Any = getattr(trunk, "config", None)
    reason = _unfit(config)
    if reason:
        raise ConfigError(f"{type(trunk).__name__} has no reusable prompt prefixes: {reason}")
    takes = "position_ids" in signature(trunk.forward).parameters
    try:
        return without_trace(trunk, next(trunk.parameters()).device, lambda: _probed(trunk, takes))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(trunk).__name__} has no reusable prompt prefixes: a trial failed with {explained(error)}"
        ) from error


def _unfit(config: Any) -> str | None:
    """Return the reason why a model with this configuration has no prefixes to restore; None if it may have."""
    if config is None or not hasattr(config, "get_text_config"):
        return "it has no transformers configuration"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it attends to an encoder"
    text = config.get_text_config(decoder=True)
    try:
        others = set(get_layer_types_and_kwargs(text)[0]) - _LAYERS
    except (AttributeError, TypeError) as error:
        return f"the types of its layers cannot be told ({error})"
    if others:
        return f"it has layers of type {', '.join(sorted(others))}, whose state is not keys and values per token"
    return None


def _probed(trunk: nn.Module, takes: bool) -> KVLayout:
    """Run the trial calls of `shape_of`. takes: True if the forward has a parameter position_ids."""
    trunk.eval()
    device = next(trunk.parameters()).device
    ids = torch.arange(6, device=device)[None] % trunk.get_input_embeddings().num_embeddings  # type: ignore[operator]
    whole = _run(trunk, ids)
    planes = _planes(whole)
    if not planes or any(plane is None or plane.dim() != 4 or plane.shape[2] != 6 for plane in planes):
        raise ConfigError(f"{type(trunk).__name__} does not keep keys and values of each token in each layer")
    dtype = whole.last_hidden_state.dtype
    if dtype not in _DTYPES or any(plane.dtype != dtype for plane in planes):
        raise ConfigError(f"{type(trunk).__name__} mixes dtypes; float32, float16 or bfloat16 throughout can be stored")
    sizes = tuple((plane.shape[1], plane.shape[3]) for plane in planes)
    padded = _run(
        trunk, torch.cat([ids[:, :2], ids], 1), attention_mask=torch.tensor([[0, 0] + [1] * 6], device=device)
    )
    skips = all(_near(plane, other[:, :, 2:]) for plane, other in zip(planes, _planes(padded), strict=True))
    if not takes and not skips:
        raise ConfigError(f"{type(trunk).__name__} takes no position_ids, and counts positions over padding")
    shape = KVLayout(sizes, whole.last_hidden_state.shape[-1], dtype, takes, skips, type(whole))
    buffer = KVBuffer.empty(shape, [6], [1], 7, device)
    for number, plane in enumerate(_planes(_run(trunk, ids[:, :3]))):  # of a call without the later tokens
        buffer.plane(number)[:, :, 1:4] = plane
    more = {"position_ids": torch.arange(3, 6, device=device)[None]} if takes else {}
    mask = torch.tensor([[0] + [1] * 6], device=device)
    rest = _run(trunk, ids[:, 3:], attention_mask=mask, past_key_values=cache_of(buffer, 4), **more)
    if not _near(rest.last_hidden_state, whole.last_hidden_state[:, 3:]):
        raise ConfigError(f"{type(trunk).__name__} gives other states when its prefix is restored")
    return shape


def _run(trunk: nn.Module, ids: Tensor, **others: Any) -> Any:
    # a new cache: the cache that a model with a window makes would drop the tokens outside the window
    return trunk(input_ids=ids, use_cache=True, return_dict=True, **{"past_key_values": DynamicCache(), **others})


def _planes(output: Any) -> list[Tensor]:
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    return [plane for layer in layers for plane in (layer.keys, layer.values)]


def _near(one: Tensor, other: Tensor) -> bool:
    scale = float(one.float().abs().max()) + 1e-6
    return float((one.float() - other.float()).abs().max()) <= (1e-3 if one.dtype == torch.float32 else 0.1) * scale

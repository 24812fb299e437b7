"""Partial forwards of a trunk: skip the blocks before any layer, and record states.

A forward hook cannot skip a module. So while a `LayerStack` is installed, the `forward` of every block is a stand-in,
which calls the block's own forward unless the current pass enters at a later layer. The model itself computes
everything around its layers: embeddings, masks, positions, final norm, pooler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from llmcache.errors import ConfigError
from llmcache.model.forward_patch import StandIn, install, remove
from llmcache.model.trial import Reach

LayerPlace: TypeAlias = int | str
"""Position or name of an argument, or of a part of an output."""


class NoSuchLayer(ConfigError):
    """Error: the settings name a layer that the model does not have."""


@dataclass(slots=True)
class PartialForward:
    """One forward pass that may enter at a later layer.

    enter: number of the first layer that is computed. state: output state of the layer before it.
    keep: layers whose states are recorded. kept: the recorded states, by layer. number: of the next layer.
    trace: if a list, it receives positional arguments, keyword arguments and result of every block that is run.
    """

    enter: int = 0
    state: Tensor | None = None
    keep: frozenset[int] = frozenset()
    kept: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0
    trace: list[tuple[tuple[Any, ...], Mapping[str, Any], Any]] | None = None


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """Form of a block's call and result: a state alone, or a tuple whose first part is the state.

    state: argument that is the input state. single: True if the result is the state alone.
    others: for each further part of the tuple the argument that the block passes through, or None for another value.
    constants: for each further part its value if it is no tensor, else None.
    made: True if the block computes one of these parts as a tensor; then it runs even where it is skipped.
    one_row: True if no such tensor has one entry per row; then the block runs on one row.
    """

    state: LayerPlace
    single: bool
    others: tuple[LayerPlace | None, ...] = ()
    constants: tuple[Any, ...] = ()
    made: bool = False
    one_row: bool = False


class _Running(threading.local):
    """Current pass of each thread; None where the thread runs none."""

    now: PartialForward | None = None


class LayerStack:
    """Blocks of a trunk, with stand-ins for their forwards from `replace` to `restore`.

    A pass belongs to the thread that runs it. In all other threads the blocks compute as usual.
    """

    def __init__(self, blocks: Sequence[Module]) -> None:
        self._blocks = list(dict.fromkeys(blocks))
        self._stand_ins: list[StandIn] = []
        self.forms: list[LayerSignature] = []
        self._running = _Running()

    def replace(self) -> None:
        """Install the stand-ins."""
        self._stand_ins = [StandIn(block, self._answer) for block in self._blocks]
        for stand_in in self._stand_ins:
            install(stand_in)

    def restore(self) -> None:
        """Remove the stand-ins."""
        for stand_in in self._stand_ins:
            remove(stand_in)
        self._stand_ins = []

    def run(self, partial: PartialForward, forward: Callable[..., Any], call: Mapping[str, Any]) -> Any:
        """Run the trunk's own `forward` with the layers before `partial.enter` skipped; returns its output."""
        before, self._running.now = self._running.now, partial
        try:
            return forward(**call)
        finally:
            self._running.now = before

    def _answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or skip a block in this thread's current pass."""
        partial = self._running.now
        if partial is None:
            return own(*args, **kwargs)
        number = partial.number
        partial.number += 1
        if number < partial.enter:
            return self._skipped(partial, number, own, args, kwargs)
        result = own(*args, **kwargs)
        if partial.trace is not None:
            partial.trace.append((args, kwargs, result))
        if number in partial.keep:
            partial.kept[number] = _tensor(state_of(result)).clone()  # some models then change the state in place
        return result

    def _skipped(
        self,
        partial: PartialForward,
        number: int,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return a result in the form of this block's, with the stored state or the unchanged input state."""
        form = self.forms[number]
        state = partial.state if number == partial.enter - 1 else _at(form.state, args, kwargs)
        if form.single:
            return state
        if form.made:
            rows = len(_at(form.state, args, kwargs))
            if form.one_row:
                args = tuple(_first_row(arg, rows) for arg in args)
                kwargs = {name: _first_row(arg, rows) for name, arg in kwargs.items()}
            return (state, *own(*args, **kwargs)[1:])
        parts = zip(form.others, form.constants, strict=True)
        return (state, *(constant if place is None else _at(place, args, kwargs) for place, constant in parts))


def state_of(result: Any) -> Tensor:
    """Return the state in a block's result."""
    state: Tensor = result[0] if isinstance(result, tuple) else result
    return state


def _tensor(state: Any) -> Tensor:
    """Return the state itself; ConfigError when it is no tensor."""
    if isinstance(state, Tensor):
        return state
    raise ConfigError(f"a layer gives a {type(state).__name__}, not a tensor [rows, tokens, width]")


def form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, rows: int) -> LayerSignature:
    """Derive the form of a block from one call with `rows` rows: its arguments and its result.

    ConfigError when the state is not a tensor [rows, tokens, width].
    """
    state = state_of(result)
    places: list[LayerPlace] = [*range(len(args)), *kwargs]
    if not isinstance(state, Tensor) or state.is_nested or state.ndim != 3 or len(state) != rows:
        shape = "nested" if getattr(state, "is_nested", False) else list(getattr(state, "shape", ()))
        raise ConfigError(
            f"a layer gives {type(state).__name__} {shape} for {rows} rows, not [rows, tokens, width]; its states "
            "cannot be stored"
        )
    into = next(
        (place for place in places if getattr(_at(place, args, kwargs), "shape", None) == state.shape),
        0 if args else "hidden_states",
    )
    if not isinstance(result, tuple):
        return LayerSignature(into, True)
    others, constants, made, one_row = [], [], False, True
    for part in result[1:]:
        origin = next((place for place in places if part is not None and _at(place, args, kwargs) is part), None)
        others.append(origin)
        constants.append(None if isinstance(part, Tensor) else part)
        if origin is None and isinstance(part, Tensor):
            made, one_row = True, one_row and part.shape[:1] == (1,)
    return LayerSignature(into, False, tuple(others), tuple(constants), made, one_row)


def _at(place: LayerPlace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else None
    return kwargs.get(place)


def _first_row(value: Any, rows: int) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value


# -- a trial ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """Structure of a trunk as a trial found it, under the autocast state and on the device of the trial.

    layers: their number. width, dtype: of the states.
    decodes: True if the trunk returns keys and values when they are requested.
    fields: kind of each part of the output, "tokens" for [rows, tokens, ...] and "rows" for [rows, ...].
    reach: up to which length of rows the trials passed.
    """

    layers: int
    width: int
    dtype: torch.dtype
    decodes: bool
    fields: Mapping[LayerPlace, str]
    reach: Reach = field(default_factory=Reach)


def chosen_layers(layers: str | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the numbers of the layers that have banks, of `count` layers.

    layers: "output" for the last one, "all", or numbers. `NoSuchLayer` (a ConfigError) for a number that is too large.
    """
    if layers == "output":
        return (count - 1,)
    if isinstance(layers, str):
        return tuple(range(count))
    if wrong := [layer for layer in layers if layer >= count]:
        raise NoSuchLayer(f"there is no layer {wrong[0]}: the model has {count}, numbered from 0 to {count - 1}")
    return tuple(sorted(set(layers)))


@torch.no_grad()
def examine(
    blocks: LayerStack,
    forward: Callable[..., Any],
    call: dict[str, Any],
    use_cache: bool,
    layers: str | tuple[int, ...],
) -> TrunkSpec:
    """Run a trial forward through a trunk whose blocks are replaced; sets `blocks.forms` and returns the structure.

    call: arguments of the trial, the main input first. use_cache: True if the trunk's forward has this parameter.
    layers: those that have banks, see `chosen_layers`.
    ConfigError when entering after a layer with a bank does not give the output of the full pass, bit for bit: later
    layers then depend on more than the state. Also when hidden tokens at the end of a row change the output, since
    rows are cut to their visible tokens.
    """
    rows = len(next(iter(call.values())))
    decodes = use_cache and gives_keys(forward, call)
    call = {**call, "use_cache": False} if use_cache else call
    full = PartialForward(trace=[], keep=frozenset(range(1 << 12)))
    whole = blocks.run(full, forward, call)
    assert full.trace is not None
    if not full.trace:
        raise ConfigError(
            "its forward does not run the layers that were found; name the list of layers that it runs: stack="
        )
    blocks.forms = [form_of(args, kwargs, result, rows) for args, kwargs, result in full.trace]
    fields = _fields(whole, _cut_short(blocks, forward, call, whole), rows)
    states = {layer: full.kept[layer] for layer in chosen_layers(layers, len(blocks.forms))}
    main = next(iter(call.values()))
    for layer, state in states.items():
        if not main.is_floating_point() and state.shape[1] != main.shape[1]:
            raise ConfigError(
                f"its layer {layer} gives states of {state.shape[1]} positions for {main.shape[1]} tokens: it pads, "
                "adds or leaves out tokens, so states cannot be assigned to tokens"
            )
    for layer, state in states.items():
        again = blocks.run(PartialForward(enter=layer + 1, state=state), forward, call)
        if not same(again, whole):
            raise ConfigError(
                f"its output depends on more than the state of its layer {layer} (of {len(blocks.forms)}): entering "
                "after this layer changes the output, so its layers cannot be reused"
            )
    kinds = {(state.shape[-1], state.dtype) for state in states.values()}
    if len(kinds) != 1:
        seen = ", ".join(sorted(f"{width} {dtype}" for width, dtype in kinds)) or "none was chosen"
        raise ConfigError(f"the layers with banks give states of different kinds ({seen}); choose layers of one kind")
    [(width, dtype)] = kinds
    return TrunkSpec(len(blocks.forms), width, dtype, decodes, fields)


def parts_of(output: Any) -> dict[LayerPlace, Any]:
    """Return the parts of a trunk's output (a ModelOutput, a tuple, or a tensor) by name or position."""
    if isinstance(output, Tensor):
        return {0: output}
    if isinstance(output, Mapping):
        return dict(output.items())
    return dict(enumerate(output))


def gives_keys(forward: Callable[..., Any], call: Mapping[str, Any]) -> bool:
    """Return whether a forward returns keys and values with use_cache=True; False if it fails, as encoders may."""
    try:
        output = forward(**{**call, "use_cache": True})
    except Exception:
        return False
    return any(part is not None and not isinstance(part, Tensor) for part in parts_of(output).values())


def _cut_short(blocks: LayerStack, forward: Callable[..., Any], call: dict[str, Any], whole: Any) -> Any:
    """Return the trunk's output for rows without their last two tokens; `whole` where the input has no tokens.

    ConfigError when the output differs from the output for the full rows with these tokens hidden by the mask.
    whole: output for the full rows.
    """
    ids = next(iter(call.values()))
    if ids.is_floating_point():
        return whole
    length = ids.shape[1] - 2
    short = blocks.run(
        PartialForward(), forward, {k: v[:, :length] if isinstance(v, Tensor) else v for k, v in call.items()}
    )
    if "attention_mask" in call:
        mask = call["attention_mask"].clone()
        mask[:, length:] = 0
        padded = parts_of(blocks.run(PartialForward(), forward, {**call, "attention_mask": mask}))
        for place, part in parts_of(short).items():
            other = padded[place]
            if not isinstance(part, Tensor) or not isinstance(other, Tensor):
                continue
            if part.ndim > 1 and part.shape[1:2] == (length,) and other.shape[1:2] == (ids.shape[1],):
                other = other[:, :length]
            far = float((part - other).abs().nan_to_num().max())
            if far > torch.finfo(part.dtype).eps ** 0.5 * max(1.0, float(part.abs().nan_to_num().max())):
                raise ConfigError(
                    f"its output {place!r} depends on tokens that its attention_mask hides (by {far:.2g}), so rows "
                    "of different lengths cannot be separated and its layers cannot be reused"
                )
    return short


def _fields(output: Any, short: Any, rows: int) -> dict[LayerPlace, str]:
    """Return the kind of each part of an output, see `TrunkSpec`. short: the output for fewer tokens."""
    fields: dict[LayerPlace, str] = {}
    shorter = parts_of(short)
    for place, part in parts_of(output).items():
        if part is None:
            continue
        if not isinstance(part, Tensor) or part.shape[:1] != (rows,):
            raise ConfigError(f"it returns {type(part).__name__} as {place!r}, which cannot be merged from rows")
        other = shorter[place].shape
        if part.shape != other and (part.shape[:1], part.shape[2:]) != (other[:1], other[2:]):
            raise ConfigError(f"it returns {place!r} of {list(part.shape)}, which cannot be merged from rows")
        fields[place] = "rows" if part.shape == other else "tokens"
    return fields


def same(one: Any, other: Any) -> bool:
    """Return whether two outputs are equal, bit for bit; NaN counts as equal to NaN."""
    mine, theirs = parts_of(one), parts_of(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(theirs[place])) if isinstance(a, Tensor) else True
        for place, a in mine.items()
    )

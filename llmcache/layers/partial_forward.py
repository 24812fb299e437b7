"""Passes through a trunk that enter at any layer: its blocks are skipped until then, and their states recorded.

A forward hook cannot skip a module, so while `LayerStack` is in place every block's `forward` is a stand-in, which
calls the block's own unless the pass at hand begins later. All that a model does around its layers (embeddings,
masks, positions, final norm, pooler) is done by the model itself.
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

Place: TypeAlias = int | str
"""Of an argument: its position, or its name."""


class NoSuchLayer(ConfigError):
    """The settings name a layer that the model does not have."""


@dataclass(slots=True)
class PartialForward:
    """One forward pass. enter: number of the first layer that is computed; the one before gives `state`.

    keep: layers whose states are wanted, in `kept` afterwards. number: of the next layer.
    """

    enter: int = 0
    state: Tensor | None = None
    keep: frozenset[int] = frozenset()
    kept: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0
    trace: list[tuple[tuple[Any, ...], Mapping[str, Any], Any]] | None = None


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """What a block returns: its state alone, or a tuple that begins with it.

    state: which argument is the state that comes in. others: of each further part of the tuple, the argument that it
    is (handed through), or None where the block makes it. made: whether there is such a one; the block then runs even
    when it is skipped, on one row if what it makes has no rows.
    """

    state: Place
    single: bool
    others: tuple[Place | None, ...] = ()
    constants: tuple[Any, ...] = ()
    made: bool = False
    one_row: bool = False


class _Running(threading.local):
    """The pass that each thread runs; None where it runs none."""

    now: PartialForward | None = None


class LayerStack:
    """The blocks of a trunk with stand-ins for their forwards, from `replace` to `restore`.

    A pass belongs to the thread that runs it: in all other threads the blocks compute as they always do.
    """

    def __init__(self, blocks: Sequence[Module]) -> None:
        self._blocks = list(dict.fromkeys(blocks))
        self._stand_ins: list[StandIn] = []
        self.forms: list[LayerSignature] = []
        self._running = _Running()

    def replace(self) -> None:
        self._stand_ins = [StandIn(block, self._answer) for block in self._blocks]
        for stand_in in self._stand_ins:
            install(stand_in)

    def restore(self) -> None:
        for stand_in in self._stand_ins:
            remove(stand_in)
        self._stand_ins = []

    def run(self, one: PartialForward, forward: Callable[..., Any], call: Mapping[str, Any]) -> Any:
        """What the trunk's own `forward` gives for this call, with the layers before `one.enter` skipped."""
        before, self._running.now = self._running.now, one
        try:
            return forward(**call)
        finally:
            self._running.now = before

    def _answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or skip a block in this thread's current pass."""
        one = self._running.now
        if one is None:
            return own(*args, **kwargs)
        number = one.number
        one.number += 1
        if number < one.enter:
            return self._skipped(one, number, own, args, kwargs)
        result = own(*args, **kwargs)
        if one.trace is not None:
            one.trace.append((args, kwargs, result))
        if number in one.keep:
            one.kept[number] = _tensor(state_of(result)).clone()  # some models go on with it in place
        return result

    def _skipped(
        self,
        one: PartialForward,
        number: int,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        form = self.forms[number]
        state = one.state if number == one.enter - 1 else _at(form.state, args, kwargs)
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
    """The state in what a block returned."""
    state: Tensor = result[0] if isinstance(result, tuple) else result
    return state


def _tensor(state: Any) -> Tensor:
    """The state itself; ConfigError when it is no tensor."""
    if isinstance(state, Tensor):
        return state
    raise ConfigError(f"a layer gives a {type(state).__name__}, not a tensor [rows, tokens, width]")


def form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, rows: int) -> LayerSignature:
    """How to stand in for a block that was called like this, with `rows` rows, and returned that.

    ConfigError when its state is not [rows, tokens, width].
    """
    state = state_of(result)
    places: list[Place] = [*range(len(args)), *kwargs]
    if not isinstance(state, Tensor) or state.is_nested or state.ndim != 3 or len(state) != rows:
        shape = "nested" if getattr(state, "is_nested", False) else list(getattr(state, "shape", ()))
        raise ConfigError(
            f"a layer gives {type(state).__name__} {shape} for {rows} rows, not [rows, tokens, width]; its states "
            "cannot be kept"
        )
    into = next(
        (one for one in places if getattr(_at(one, args, kwargs), "shape", None) == state.shape),
        0 if args else "hidden_states",
    )
    if not isinstance(result, tuple):
        return LayerSignature(into, True)
    others, constants, made, one_row = [], [], False, True
    for part in result[1:]:
        origin = next((one for one in places if part is not None and _at(one, args, kwargs) is part), None)
        others.append(origin)
        constants.append(None if isinstance(part, Tensor) else part)
        if origin is None and isinstance(part, Tensor):
            made, one_row = True, one_row and part.shape[:1] == (1,)
    return LayerSignature(into, False, tuple(others), tuple(constants), made, one_row)


def _at(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else None
    return kwargs.get(place)


def _first_row(value: Any, rows: int) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value


# -- a trial ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """What a trial showed of a trunk, under the autocast state and on the device of the trial.

    dtype, width: of the states. decodes: it returns keys and values unless told not to. fields: of the outputs that it
    returns, "tokens" for [rows, tokens, ...] and "rows" for [rows, ...]. reach: how long rows may be.
    """

    layers: int
    width: int
    dtype: torch.dtype
    decodes: bool
    fields: Mapping[Place, str]
    reach: Reach = field(default_factory=Reach)


@torch.no_grad()
def examine(
    blocks: LayerStack,
    forward: Callable[..., Any],
    call: dict[str, Any],
    use_cache: bool,
    choose: Callable[[int], Sequence[int]],
) -> TrunkSpec:
    """Run a trial through a trunk whose blocks are replaced, and learn what stands in for each of them.

    Entering after a layer that is to have a bank, with its state, must give what the full pass gives, bit for bit;
    ConfigError when it does not, so that no model is cached whose later layers see more than the state. Nor one for
    which it makes a difference whether hidden tokens at the end are there: rows are cut to what is visible.
    use_cache: whether the trunk's forward takes such an argument. choose: which layers have banks, of how many.
    """
    rows = len(next(iter(call.values())))
    decodes = use_cache and gives_keys(forward, call)
    call = {**call, "use_cache": False} if use_cache else call
    full = PartialForward(trace=[], keep=frozenset(range(1 << 12)))
    whole = blocks.run(full, forward, call)
    assert full.trace is not None
    if not full.trace:
        raise ConfigError("its forward does not run the layers that were found; name the list of those it runs: stack=")
    blocks.forms = [form_of(args, kwargs, result, rows) for args, kwargs, result in full.trace]
    fields = _fields(whole, _cut_short(blocks, forward, call, whole), rows)
    states = {layer: full.kept[layer] for layer in choose(len(blocks.forms))}
    main = next(iter(call.values()))
    for layer, state in states.items():
        if not main.is_floating_point() and state.shape[1] != main.shape[1]:
            raise ConfigError(
                f"its layer {layer} gives states of {state.shape[1]} positions for {main.shape[1]} tokens: it pads, "
                "adds or leaves out tokens, so states cannot be told apart by tokens"
            )
    for layer, state in states.items():
        again = blocks.run(PartialForward(enter=layer + 1, state=state), forward, call)
        if not same(again, whole):
            raise ConfigError(
                f"what the model gives depends on more than the state of its layer {layer} (of {len(blocks.forms)}): "
                "entering after it gives something else, so its layers cannot be reused"
            )
    kinds = {(one.shape[-1], one.dtype) for one in states.values()}
    if len(kinds) != 1:
        seen = ", ".join(sorted(f"{width} {dtype}" for width, dtype in kinds)) or "none was chosen"
        raise ConfigError(f"the layers to keep give states of different kinds ({seen}); choose layers of one kind")
    [(width, dtype)] = kinds
    return TrunkSpec(len(blocks.forms), width, dtype, decodes, fields)


def parts_of(output: Any) -> dict[Place, Any]:
    """What a trunk returned, by name or place: of a ModelOutput, a tuple, or a tensor."""
    if isinstance(output, Tensor):
        return {0: output}
    if isinstance(output, Mapping):
        return dict(output.items())
    return dict(enumerate(output))


def gives_keys(forward: Callable[..., Any], call: Mapping[str, Any]) -> bool:
    """Return whether a forward returns keys and values when it is asked for them; it may fail to, as encoders do."""
    try:
        output = forward(**{**call, "use_cache": True})
    except Exception:
        return False
    return any(part is not None and not isinstance(part, Tensor) for part in parts_of(output).values())


def _cut_short(blocks: LayerStack, forward: Callable[..., Any], call: dict[str, Any], whole: Any) -> Any:
    """What the trunk gives for fewer tokens; `whole` itself where the call has none, such as images."""
    ids = next(iter(call.values()))
    if ids.is_floating_point():
        return whole
    some = ids.shape[1] - 2
    short = blocks.run(
        PartialForward(), forward, {k: v[:, :some] if isinstance(v, Tensor) else v for k, v in call.items()}
    )
    if "attention_mask" in call:
        mask = call["attention_mask"].clone()
        mask[:, some:] = 0
        padded = parts_of(blocks.run(PartialForward(), forward, {**call, "attention_mask": mask}))
        for place, part in parts_of(short).items():
            other = padded[place]
            if not isinstance(part, Tensor) or not isinstance(other, Tensor):
                continue
            if part.ndim > 1 and part.shape[1:2] == (some,) and other.shape[1:2] == (ids.shape[1],):
                other = other[:, :some]
            far = float((part - other).abs().nan_to_num().max())
            if far > torch.finfo(part.dtype).eps ** 0.5 * max(1.0, float(part.abs().nan_to_num().max())):
                raise ConfigError(
                    f"what the model gives as {place!r} depends on tokens that its attention_mask hides (by "
                    f"{far:.2g}), so rows of different lengths cannot be taken apart and its layers cannot be reused"
                )
    return short


def _fields(output: Any, short: Any, rows: int) -> dict[Place, str]:
    """short: the output for fewer tokens."""
    fields: dict[Place, str] = {}
    shorter = parts_of(short)
    for place, part in parts_of(output).items():
        if part is None:
            continue
        if not isinstance(part, Tensor) or part.shape[:1] != (rows,):
            raise ConfigError(f"it returns {type(part).__name__} as {place!r}, which cannot be put together from rows")
        other = shorter[place].shape
        if part.shape != other and (part.shape[:1], part.shape[2:]) != (other[:1], other[2:]):
            raise ConfigError(f"it returns {place!r} of {list(part.shape)}, which cannot be put together from rows")
        fields[place] = "rows" if part.shape == other else "tokens"
    return fields


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal, bit for bit; NaN is equal to itself."""
    mine, theirs = parts_of(one), parts_of(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(theirs[place])) if isinstance(a, Tensor) else True
        for place, a in mine.items()
    )

"""Stand-ins for the `forward` of a model's modules, which copies and pickles of the model leave out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch.nn import Module

from llmcache.model.locks import after_fork

Answer: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Function that a stand-in calls, with the replaced forward, positional arguments and keyword arguments."""


class StandIn:
    """Callable that replaces a module's `forward`, from `install` to `remove`.

    own: the replaced forward, which may be another stand-in. previous: the replaced instance attribute; None where the
    forward was that of the class.
    """

    def __init__(self, module: Module, answer: Answer) -> None:
        self.module = module
        self._answer = answer
        self.own: Callable[..., Any] = module.forward
        self.previous: Any = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The replaced forward, for `inspect.signature`: `Trainer` passes only arguments that a model accepts."""
        return self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self.own, args, kwargs)

    # copies of a module have no stand-ins (see `PlainState`); these are for classes that copy attributes themselves

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        plain = plain_forward(self.module)
        if plain is not None:
            return deepcopy(plain, memo)
        copied = memo.get(id(self.module))
        return type(self.module).forward.__get__(self.module if copied is None else copied)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")


class PlainState:
    """Replacement of a module's `__getstate__` for `copy` and `pickle`: returns its attributes without stand-ins."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __call__(self) -> Any:
        kind: Any = type(self._module)
        state = kind.__getstate__(self._module)
        if isinstance(state, tuple) and state and isinstance(state[0], dict):
            return (without_stand_ins(state[0]), *state[1:])
        return without_stand_ins(state) if isinstance(state, dict) else state


_changing = threading.RLock()


def _renew_lock() -> None:
    global _changing
    _changing = threading.RLock()


after_fork(_renew_lock)


def install(stand_in: StandIn) -> None:
    """Replace a module's forward by a stand-in."""
    module: Any = stand_in.module
    with _changing:
        stand_in.previous, stand_in.own = module.__dict__.get("forward"), module.forward
        module.__dict__["forward"] = stand_in
        module.__dict__.setdefault("__getstate__", PlainState(module))


def remove(stand_in: StandIn) -> None:
    """Remove a stand-in and restore the replaced forward, also where another stand-in was installed since."""
    attributes = stand_in.module.__dict__
    with _changing:
        current = attributes.get("forward")
        if current is stand_in:
            if stand_in.previous is None:
                del attributes["forward"]
            else:
                attributes["forward"] = stand_in.previous
        else:
            while isinstance(current, StandIn) and current.previous is not stand_in:
                current = current.previous
            if isinstance(current, StandIn):
                current.previous, current.own = stand_in.previous, stand_in.own
        if not isinstance(attributes.get("forward"), StandIn) and isinstance(
            attributes.get("__getstate__"), PlainState
        ):
            del attributes["__getstate__"]


def plain_forward(module: Module) -> Any:
    """Return the instance attribute `forward` of a module without stand-ins; None where it has none."""
    current = module.__dict__.get("forward")
    while isinstance(current, StandIn):
        current = current.previous
    return current


def without_stand_ins(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's `__dict__` as a new dict, without stand-ins."""
    plain = {name: value for name, value in attributes.items() if not isinstance(value, PlainState)}
    current = plain.get("forward")
    if isinstance(current, StandIn):
        previous = plain_forward(current.module)
        if previous is None:
            del plain["forward"]
        else:
            plain["forward"] = previous
    return plain


class OwnHook:
    """Forward hook of the cache itself, which acts on calls of one module in the thread that registered it.

    Copies and pickles of the module get a hook that does nothing.
    """

    def __init__(self, module: Module | None = None, act: Callable[..., Any] | None = None) -> None:
        self._module, self._act = module, act
        self._thread = threading.get_ident()

    def __call__(self, module: Module, *arguments: Any) -> Any:
        if self._act is None or module is not self._module or threading.get_ident() != self._thread:
            return None
        return self._act(module, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnHook:
        return OwnHook()

    def __reduce__(self) -> Any:
        return OwnHook, ()


def is_stand_in(value: object) -> bool:
    """Return whether a value is a `StandIn`, an `OwnHook` or a `PlainState`."""
    return isinstance(value, (StandIn, OwnHook, PlainState))

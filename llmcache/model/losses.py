"""Detect calls that compute a loss in a head, since the trunk does not get the head's arguments."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from llmcache.model.compiled import not_compiled
from llmcache.model.forward_patch import StandIn, install, remove

_LOSS = re.compile(r"label|^(start|end)_positions$|^targets?$|return_loss")


class _Given(threading.local):
    """Name of the loss argument of each thread's current call; None if it has none."""

    name: str | None = None


class LossArguments:
    """Stand-ins for the forwards of the modules around a trunk, from `replace` to `restore`.

    A loss may count positions that the mask hides: with padding on the left the first token of a row is predicted from
    the hidden position before it. Cached states are undefined there, so the model computes such a call itself.
    """

    def __init__(self, trunk: Module) -> None:
        self._trunk = trunk
        self._around: list[Module] = []
        self._stand_ins: list[StandIn] = []
        self._of_threads = _Given()

    @property
    def given(self) -> str | None:
        """Name of the argument that makes this thread's call compute a loss; None without one."""
        return self._of_threads.name

    @given.setter
    def given(self, name: str | None) -> None:
        self._of_threads.name = name

    def watch(self, model: Module) -> None:
        """Watch calls of this model and of the modules around its trunk, from the next `replace` on."""
        name = next((name for name, module in model.named_modules() if module is self._trunk), None)
        config = getattr(model, "config", None)
        self._around = []
        if not name or getattr(config, "is_encoder_decoder", False):  # a loss does not use an encoder's positions
            return
        parts = name.split(".")
        for depth in range(len(parts)):
            module = model.get_submodule(".".join(parts[:depth]))
            if type(module).forward is not Module.forward:
                self._around.append(module)

    def replace(self) -> None:
        """Install the stand-ins."""
        self._stand_ins = [StandIn(module, not_compiled(self._answer)) for module in self._around]
        for stand_in in self._stand_ins:
            install(stand_in)

    def restore(self) -> None:
        """Remove the stand-ins."""
        for stand_in in self._stand_ins:
            remove(stand_in)
        self._stand_ins = []

    def refusal(self, mask: Any) -> str | None:
        """Return the reason why the model has to compute a call with this mask itself; None if it need not."""
        if self.given is None or not isinstance(mask, Tensor) or bool(mask.bool().all()):
            return None
        return f"{self.given} request a loss, which may count positions that the mask hides"

    def _answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward, with its loss argument recorded for this thread."""
        before = self.given
        if before is None:
            self.given = _loss_argument(inspect.signature(own), args, kwargs)
        try:
            return own(*args, **kwargs)
        finally:
            self.given = before


def _loss_argument(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the name of the first argument of a call that makes a model compute a loss."""
    named = dict(zip(signature.parameters, args, strict=False)) | kwargs
    return next((name for name, value in named.items() if value is not None and _LOSS.search(name)), None)

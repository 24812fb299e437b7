"""Calls of a trunk's forward, bound to the names of its parameters."""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn import Module

from llmcache.model.inputs import Call, asked_by, main_input


class ForwardSignature:
    """The parameters of a trunk's own forward. To be made while the forward is the model's own.

    main: name of the main input, such as "input_ids". takes_cache: True if the forward has a `use_cache` parameter.
    ConfigError when the forward has no main input.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._signature = inspect.signature(module.forward)
        self.main = main_input(module, self._signature)
        self.takes_cache = "use_cache" in self._signature.parameters

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the arguments of a call by name, without those whose None means the same as leaving them out."""
        bound = self._signature.bind(*args, **kwargs)
        call: Call = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                call |= value
            else:
                call[name] = value
        return {name: value for name, value in call.items() if value is not None or not self._is_unset_by_none(name)}

    def _is_unset_by_none(self, name: str) -> bool:
        """Return whether an argument of None is the same as leaving it out."""
        parameter = self._signature.parameters.get(name)
        return parameter is None or parameter.default in (None, inspect.Parameter.empty)

    def takes(self, name: str) -> bool:
        """Return whether the forward accepts an argument of this name."""
        parameters = self._signature.parameters
        return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def configured_outputs(self) -> Call:
        """Return the further outputs that the model's configuration requests in every call, as arguments."""
        return asked_by(getattr(self._module, "config", None))

"""Refuse compiled models, and exclude functions from torch.compile: compiled code would bypass the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from llmcache.errors import ConfigError


def refuse_compiled(module: Module) -> None:
    """Raise ConfigError for a module that is compiled or has compiled parts."""
    if hasattr(module, "_orig_mod") or any(getattr(part, "_compiled_call_impl", None) for part in module.modules()):
        raise ConfigError(
            "the model is compiled, and compiled code would bypass the cache; attach the model as it was before "
            "torch.compile (model._orig_mod), and run it uncompiled"
        )


def not_compiled(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a function from `torch.compile`."""
    disable: Any = torch.compiler.disable
    uncompiled: Callable[..., Any] = disable(answer)
    return uncompiled

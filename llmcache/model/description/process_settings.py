"""Settings of the running process, outside of any model, that change a model's results."""

from __future__ import annotations

from typing import Any

import torch

# settings that are read for each kind of device, with PyTorch's initial value; other values change float32 products
_PRECISIONS = {
    "cuda": (("generic", "all", "none"), ("cuda", "matmul", "none"), ("cuda", "conv", "tf32"), ("cuda", "rnn", "tf32")),
    "cpu": (("generic", "all", "none"), ("mkldnn", "matmul", "none"), ("mkldnn", "conv", "none")),
}


def running_mode(device: str) -> str:
    """Return the current settings that change results, as a text that is part of keys; "" for PyTorch's defaults.

    The settings are autocast, the precision of float32 products, the default dtype, and active function and dispatch
    modes.
    device: type of the model's device, such as "cpu".
    """
    parts = []
    if torch.is_autocast_enabled(device):
        parts.append(f"{device} {torch.get_autocast_dtype(device)}")
    read: Any = torch._C._get_fp32_precision_getter  # the public API raises once old and new settings were mixed
    for backend, operation, usual in _PRECISIONS.get(device, ()):
        precision = read(backend, operation)
        if precision not in ("ieee", usual):
            parts.append(f"{backend} {operation} {precision}")
    if torch.get_default_dtype() != torch.float32:
        parts.append(f"default {torch.get_default_dtype()}")
    if torch._C._len_torch_function_stack():
        parts += _function_modes()
    if torch._C._len_torch_dispatch_stack():
        parts += _dispatch_modes()
    return ", ".join(parts)


def _dispatch_modes() -> list[str]:
    """Return the texts of active dispatch modes."""
    from torch.utils import _python_dispatch

    from llmcache.model.description.walk import Walk

    read: Any = _python_dispatch._get_current_dispatch_mode_stack
    return [Walk().text_of(mode, "mode") for mode in read()]


def _function_modes() -> list[str]:
    """Return the texts of active function modes, without that of a default device, which changes no result."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    from llmcache.model.description.walk import Walk

    read: Any = _get_current_function_mode_stack
    modes = [mode for mode in read() if not isinstance(mode, DeviceContext)]
    return [Walk().text_of(mode, "mode") for mode in modes]

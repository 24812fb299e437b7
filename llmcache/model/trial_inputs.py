"""Inputs for the first trial of a model: token ids, or images, audio and video of the sizes in its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmcache.errors import ConfigError
from llmcache.model.inputs import MUST_BE_OFF
from llmcache.model.trial import vocabulary_of

_ROWS, _TOKENS = 2, 7
_SAMPLES = 4000  # of audio: enough for any stack of convolutions at the start of a model


def trial_inputs(module: Module, main: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield main inputs to try, the likeliest first: two rows each, with a mask for token ids.

    main: name of the main input. For "pixel_values", "input_features" and "input_values" the shape is guessed from the
    configuration; any other name stands for token ids [rows, tokens].
    """
    config: Any = getattr(module, "config", None)
    if main in ("pixel_values", "pixel_values_videos", "input_features", "input_values"):
        dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)
        for shape in _shapes(main, config):
            yield {main: _numbers(shape, device).to(dtype)}
        return
    ids = torch.arange(_ROWS * _TOKENS, device=device).reshape(_ROWS, _TOKENS) % vocabulary_of(module)
    yield {main: ids, "attention_mask": torch.ones_like(ids)}


def first_call(
    module: Module,
    main: str,
    forward: Callable[..., Any],
    takes: Callable[[str], bool],
    device: torch.device,
    return_dict: bool | None,
) -> dict[str, Any]:
    """Return arguments that a forward accepts: two rows, no further outputs, and this kind of output.

    takes: returns True if the forward has an argument of this name. Raises the forward's own error if all inputs fail.
    """
    flags: dict[str, Any] = {}
    if hasattr(module, "config"):
        flags = dict.fromkeys(MUST_BE_OFF, False) | {"return_dict": return_dict}
    flags = {name: value for name, value in flags.items() if value is not None and takes(name)}
    failure: Exception | None = None
    for inputs in trial_inputs(module, main, device):
        call = {name: value for name, value in inputs.items() if takes(name)} | flags
        try:
            forward(**call)
            return call
        except Exception as error:
            failure = error
    raise failure or ConfigError(f"no inputs are known for {main}")


def _numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return two different rows of this shape, with values between -1 and 1."""
    return torch.linspace(-1, 1, _ROWS * torch.Size(shape).numel(), device=device).reshape(_ROWS, *shape)


def _shapes(main: str, config: Any) -> Iterator[tuple[int, ...]]:
    """Yield shapes of one row of these inputs."""
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
        frames = 2 * getattr(config, "max_source_positions", 50)
        yield (bins, frames)
        yield (min(frames, 64), bins)
        yield (1, getattr(config, "spec_size", 64), bins)
    elif main == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        if bins and getattr(config, "max_length", None):
            yield (config.max_length, bins)
        yield (_SAMPLES,)
    else:
        side = getattr(config, "image_size", None) or 8
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        channels: int = getattr(config, "num_channels", 3)
        if count := getattr(config, "num_frames", None):
            yield (count, channels, height, width)
        yield (channels, height, width)

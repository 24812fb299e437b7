"""Prompts as model inputs: token ids, padding, and the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llmcache.errors import ConfigError

Attached: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""Function that returns the context in which a model's forward uses the banks; nullcontext for none."""


def padded(rows: Sequence[Sequence[int]], padding: int, device: Any, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [rows, columns], padded on the left or on the right."""
    columns = max(map(len, rows))
    ids = np.full((len(rows), columns), padding, np.int64)
    mask = np.zeros((len(rows), columns), np.int64)
    for i, row in enumerate(rows):
        span = slice(columns - len(row), columns) if left else slice(len(row))
        ids[i, span], mask[i, span] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return token ids with the special tokens before the text, without those after the text."""
    ids = list(tokenizer(text)["input_ids"])
    last = tokenizer.eos_token_id
    if len(ids) > 1 and last is not None and ids[-1] == last and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def padding_id(model: Any, tokenizer: Any) -> int:
    """Return a token id for padding. Padding is masked, so any id will do."""
    ends = model.generation_config.eos_token_id
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, ends[0] if isinstance(ends, list) else ends):
        if token is not None:
            return int(token)
    return 0


def forward_call(model: Any, rows: Sequence[Sequence[int]], padding: int) -> dict[str, Any]:
    """Return the arguments for rows padded on the right, with a mask where there is padding."""
    ids, mask = padded(rows, padding, model.device, left=False)
    parameters = signature(model.forward).parameters
    call: dict[str, Any] = {"input_ids": ids}
    if not mask.all():
        call["attention_mask"] = mask
    if "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        call["use_cache"] = False
    return call


def logits_of(model: Any, call: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**call).logits
    return logits


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")

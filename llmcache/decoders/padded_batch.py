"""Layout of a call of a decoder's trunk: columns and positions of its rows, or the reason for a bypass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmcache.decoders.schedule import TokenSequence
from llmcache.model.inputs import asks_for_nothing, is_plain_mask

_KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
_ATTENTION = {"eager", "sdpa"}


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Rows of tokens of a call.

    ids: int32 [rows, columns]. firsts: column of each row's first token. lengths: tokens of each row.
    starts: position of each row's first token.
    """

    ids: NDArray[np.int32]
    firsts: list[int]
    lengths: list[int]
    starts: list[int]

    def distinct(self) -> tuple[list[TokenSequence], list[int]]:
        """Return the distinct rows without padding, and for each row of the call the number of its distinct row."""
        seen: dict[tuple[int, bytes], int] = {}
        rows: list[TokenSequence] = []
        which = []
        for i, (first, length, start) in enumerate(zip(self.firsts, self.lengths, self.starts, strict=True)):
            ids = self.ids[i, first : first + length]
            number = seen.setdefault((start, ids.tobytes()), len(rows))
            if number == len(rows):
                rows.append(TokenSequence(ids, start, i))
            which.append(number)
        return rows, which


def layout_of(call: Mapping[str, Any], *, skips: bool) -> PaddedBatch | str:
    """Return the layout of a call, or the reason why it has none. skips: `KVLayout.positions_skip_padding`."""
    ids, mask, positions = call.get("input_ids"), call.get("attention_mask"), call.get("position_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or not _is_integer(ids):
        return "it has no token ids [rows, columns]"
    wide_ids = ids.cpu().numpy()
    table = wide_ids.astype(np.int32)
    if (table != wide_ids).any():
        return "its token ids do not fit into 32 bits"
    columns = np.arange(table.shape[1])
    visible = np.ones(table.shape, np.bool_)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return "its mask is not one number per token"
        if not is_plain_mask(mask):
            return "its mask has values other than 0 and 1"
        visible = mask.bool().cpu().numpy()
    lengths, firsts = visible.sum(1), visible.argmax(1)
    if not lengths.all():
        return "a row has no tokens"
    if (visible != ((columns >= firsts[:, None]) & (columns < (firsts + lengths)[:, None]))).any():
        return "the tokens of a row are not next to each other"
    starts = np.zeros_like(firsts) if skips else firsts
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dim() != 2 or not _is_integer(positions):
            return "its position_ids are not one number per token"
        if positions.shape[1] != table.shape[1] or positions.shape[0] not in (1, table.shape[0]):
            return "its position_ids are not one number per token"
        by_column = np.broadcast_to(positions.cpu().numpy(), table.shape)
        starts = np.take_along_axis(by_column, firsts[:, None], 1)[:, 0]
        if ((by_column - (columns - firsts[:, None]) != starts[:, None]) & visible).any():
            return "the positions of a row do not count up by one"
    return PaddedBatch(table, firsts.tolist(), lengths.tolist(), starts.tolist())


def _is_integer(table: Tensor) -> bool:
    return not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)


def unfit(call: Mapping[str, Any], trunk: Any, dtype: torch.dtype) -> str | None:
    """Return the reason why a call cannot use the prefix cache, apart from its tokens; None if it can.

    An unknown argument is a reason whatever its value is, since False and 0 are values too.
    call: arguments of the trunk's forward that are not None. dtype: of the stored keys and values.
    """
    others = {name for name, value in call.items() if name not in _KNOWN and value is not None}
    others -= {name for name in others if asks_for_nothing(name, call[name])}
    if call.get("is_causal") is True:  # the trials ran with a causal trunk too
        others.discard("is_causal")
    if others:
        return f"it has {', '.join(sorted(others))}"
    past = call.get("past_key_values")
    if past is not None:
        fits = type(past) is DynamicCache and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers
        )
        if not fits or getattr(past, "offloading", False):
            return f"its cache is a {type(past).__name__} that cannot be filled"
        if past.get_seq_length():
            return "it goes on from the keys and values in its past_key_values"
        if not wants_keys(call, trunk):
            return "it has past_key_values, but use_cache=False"
    if trunk.training:
        return "the model is in training mode"
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in trunk.parameters()):
        return "gradients are enabled; run it under torch.no_grad() or torch.inference_mode()"
    if call.get("return_dict") is False or not getattr(trunk.config, "return_dict", True):
        return "it requests a tuple (return_dict=False)"
    if any(getattr(trunk.config, f"output_{name}", False) for name in ("attentions", "hidden_states")):
        return "its configuration requests attentions or hidden states"
    if trunk.config._attn_implementation not in _ATTENTION:
        return f"its attention is {trunk.config._attn_implementation}"
    if trunk.dtype != dtype:
        return f"the model is {trunk.dtype} by now, and was {dtype}"
    ids = call.get("input_ids")
    if isinstance(ids, Tensor) and torch.is_autocast_enabled(ids.device.type):
        return "autocast is on"
    return None


def wants_keys(call: Mapping[str, Any], trunk: Any) -> bool:
    """Return whether keys and values are requested, by the call or else by the configuration."""
    use_cache = call.get("use_cache")
    return bool(getattr(trunk.config, "use_cache", True) if use_cache is None else use_cache)


def holds_tokens(past: Any) -> bool:
    """Return whether a cache has keys and values. True where its length cannot be read (recurrent models)."""
    length = getattr(past, "get_seq_length", None)
    try:
        return length is not None and length() > 0
    except Exception:
        return True

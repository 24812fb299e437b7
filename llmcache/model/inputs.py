"""Inputs of one forward call as rows: the content that keys are made of, and calls with some of the rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.errors import ConfigError

Call: TypeAlias = dict[str, Any]
"""Arguments of a trunk's forward by name, without those that are None."""

SIDE = ("attention_mask", "token_type_ids", "position_ids")
_LARGEST = np.iinfo(np.int32).max
_IGNORED = ("return_dict",)
MUST_BE_OFF = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True, slots=True)
class InputRows:
    """Rows of one call.

    call: its arguments. main: name of the main input ("input_ids").
    ends: int64 [rows], tokens of each row up to the last one that the mask shows.
    content: per row all inputs that its layers depend on, as bytes; equal only for rows with equal inputs.
    ids: per row its token ids, int32; empty where the main input has no token ids.
    signature: names of the inputs in `content`, part of every key.
    """

    call: Call
    main: str
    ends: NDArray[np.int64]
    content: list[bytes]
    ids: list[NDArray[np.int32]]
    signature: str

    def __len__(self) -> int:
        return len(self.content)

    @property
    def tokens(self) -> int | None:
        """Columns of the padded batch; None where the main input has no token ids, such as images."""
        value = self.call[self.main]
        return int(value.shape[1]) if _is_ids(value) else None

    def some(self, rows: NDArray[np.int64], width: int | None) -> Call:
        """Return the call for some of the rows, cut to the first `width` columns where the main input has token ids."""
        whole = len(rows) == len(self) and bool((rows == np.arange(len(self))).all())
        call = dict(self.call)
        index = torch.as_tensor(rows, device=call[self.main].device)
        for name in (self.main, *SIDE):
            value = call.get(name)
            if value is None:
                continue
            if not whole and value.shape[0] == len(self):  # position_ids may be [1, tokens] for all rows
                value = value.index_select(0, index.to(value.device))
            if name != self.main or _is_ids(value):
                value = value[:, :width]
            call[name] = value
        return call


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether an argument declines a further output, such as output_attentions=False."""
    return name.startswith("output_") and value is False


def asked_by(config: Any) -> Call:
    """Return arguments for the further outputs that a configuration requests in every call, such as a router's."""
    flags = vars(config).items() if hasattr(config, "__dict__") else ()
    asked = {name for name, value in flags if value is True and name.startswith("output_")}
    return dict.fromkeys(asked | {name for name in MUST_BE_OFF if getattr(config, name, False)}, True)


def main_input(module: Module, signature: inspect.Signature) -> str:
    """Return the name of a module's main argument, such as "input_ids"; ConfigError where its forward has none."""
    named = getattr(module, "main_input_name", None)
    open_ = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    if isinstance(named, str) and (open_ or named in signature.parameters):
        return named
    if "input_ids" in signature.parameters:
        return "input_ids"
    plain = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    if not plain:
        raise ConfigError(f"the forward of {type(module).__name__} has no argument for token ids; call it input_ids")
    return plain[0]


def refusal(call: Mapping[str, Any], main: str) -> str | None:
    """Return the reason why the layers of a call cannot be cached; None if they can.

    call: arguments of the trunk by name, without those that are None. main: name of the main input.
    An argument that is not part of a key is a reason, whatever its value is.
    """
    value = call.get(main)
    if not isinstance(value, torch.Tensor):
        return "inputs_embeds are given instead of token ids" if "inputs_embeds" in call else f"it has no {main}"
    for name in MUST_BE_OFF:
        if call.get(name):
            return f"{name} requests the outputs of all layers"
    if value.ndim < 2:
        return f"its {main} are not [rows, tokens]"
    if value.dtype == torch.bool or value.is_complex() or value.layout != torch.strided:
        return f"its {main} are {value.dtype}"
    if not _is_ids(value) and not value.numel():
        return f"its {main} are empty"
    mask = call.get("attention_mask")
    if mask is not None:
        if not (isinstance(mask, torch.Tensor) and mask.shape == value.shape[:2]):
            return "its attention_mask is not [rows, tokens]"
        if not mask.bool().any(dim=1).all():
            return "a row has no visible token"
        if not is_plain_mask(mask):
            return "its attention_mask has values other than 0 and 1"
    if _is_ids(value) and value.numel() and (value.shape[1] == 0 or value.max() > _LARGEST or value.min() < 0):
        return "its token ids are missing, negative or above 32 bits"
    for name in ("token_type_ids", "position_ids"):
        if name in call and not _is_table(call[name], value):
            return f"its {name} are not [rows, tokens]"
    if call.get("use_cache") not in (None, False):
        return "it requests keys and values"
    known = {*SIDE, *_IGNORED, "use_cache", main}
    others = sorted(name for name in call if name not in known and not asks_for_nothing(name, call[name]))
    return f"it has the input {others[0]!r}" if others else None


def is_plain_mask(mask: torch.Tensor) -> bool:
    """Return whether a mask has only 0 and 1, in any dtype. Another number would weigh its token."""
    return mask.dtype == torch.bool or not bool(((mask != 0) & (mask != 1)).any())


def _is_table(table: Any, value: torch.Tensor) -> bool:
    """Return whether a table has 32-bit integers [rows, tokens] or [1, tokens]. value: the token ids."""
    if not isinstance(table, torch.Tensor) or table.is_floating_point() or table.is_complex() or table.ndim != 2:
        return False
    if table.shape[1] != value.shape[1] or table.shape[0] not in (1, value.shape[0]):
        return False
    return not table.numel() or bool(table.max() <= _LARGEST and table.min() >= -_LARGEST)


def input_rows(call: Call, main: str) -> InputRows:
    """Return the rows of a call that `refusal` accepts."""
    value = call[main]
    if not _is_ids(value):
        sides = [name for name in SIDE if name in call]
        content = _bytes_of_rows(value, len(value))
        for name in sides:
            side = _bytes_of_rows(call[name].expand(len(value), -1), len(value))
            content = [row + more for row, more in zip(content, side, strict=True)]
        signature = " ".join([_named(main, value), *(_named(name, call[name]) for name in sides)])
        return InputRows(call, main, np.zeros(len(value), np.int64), content, _no_ids(len(value)), signature)
    rows, width = value.shape
    ids = _table(value)
    columns = [ids]
    mask = _table(call["attention_mask"]) if "attention_mask" in call else np.ones((rows, width), np.int32)
    ends = np.where(mask.any(axis=1), width - np.argmax(mask[:, ::-1] != 0, axis=1), 0) if width else _nothing(rows)
    names = [main]
    plain = (mask == (np.arange(width) < ends[:, None])).all(axis=1)  # False for left padding, holes, packed documents
    for name in ("token_type_ids", "position_ids"):
        if name in call:
            columns.append(np.broadcast_to(_table(call[name]), (rows, width)))
            names.append(name)
    stacked = np.stack(columns, axis=1)
    content = [stacked[i, :, :end].tobytes() for i, end in enumerate(ends.tolist())]
    for i in np.flatnonzero(~plain).tolist():
        content[i] = b"\1" + content[i] + mask[i, : ends[i]].tobytes()  # an odd length, unlike that of any other row
    return InputRows(call, main, ends, content, [ids[i, :end].copy() for i, end in enumerate(ends)], ",".join(names))


def _nothing(rows: int) -> NDArray[np.int64]:
    return np.zeros(rows, np.int64)


def _no_ids(rows: int) -> list[NDArray[np.int32]]:
    return [np.zeros(0, np.int32)] * rows


def _bytes_of_rows(value: torch.Tensor, rows: int) -> list[bytes]:
    """Return the bytes of each row of a tensor [rows, ...]."""
    table = value.detach().to("cpu").contiguous().reshape(rows, -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in table]


def _named(main: str, value: torch.Tensor) -> str:
    return f"{main} {value.dtype} {tuple(value.shape[1:])}"


def _is_ids(value: torch.Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point() and not value.is_complex()


def _table(value: torch.Tensor) -> NDArray[np.int32]:
    return value.detach().to("cpu", torch.int32).numpy()

"""Merge outputs for groups of rows into one output for all rows of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcache.indexes.format.rows import Rows
from llmcache.layers.partial_forward import LayerPlace, TrunkSpec, parts_of
from llmcache.model.inputs import InputRows


def merged(parts: list[tuple[Rows, Any]], first: Rows, rows: InputRows, spec: TrunkSpec) -> Any:
    """Return one output for all rows of a call, in their order.

    parts: per group the numbers of its rows (int64, ascending) and the trunk's output for the group.
    first: int64 [rows], for each row of the call the number of the first equal row, which is in a group.
    spec: structure of the trunk. Positions that the mask hides are zeros, or the model's output for them in a group.
    """
    count, columns = len(rows), rows.tokens
    chosen, output = parts[0]
    if len(parts) == 1 and len(chosen) == count:
        tokens = {place: part for place, part in parts_of(output).items() if spec.fields.get(place) == "tokens"}
        if columns is None or all(part.shape[1] == columns for part in tokens.values()):
            return output
    whole: dict[LayerPlace, Any] = {}
    for place, example in parts_of(output).items():
        kind = spec.fields.get(place)
        if kind is None:
            whole[place] = example
            continue
        shape = list(example.shape)
        shape[0] = count
        if kind == "tokens" and columns is not None:
            shape[1] = columns
        whole[place] = example.new_zeros(shape)
    for chosen, group_output in parts:
        where = np.flatnonzero(np.isin(first, chosen))
        source = torch.as_tensor(np.searchsorted(chosen, first[where]))
        target = torch.as_tensor(where)
        for place, part in parts_of(group_output).items():
            if place not in spec.fields:
                continue
            picked = part.index_select(0, source.to(part.device))
            if spec.fields[place] == "tokens" and columns is not None:
                whole[place][target.to(part.device), : part.shape[1]] = picked
            else:
                whole[place][target.to(part.device)] = picked
    if isinstance(output, Tensor):
        return whole[0]
    if isinstance(output, tuple):
        return type(output)(whole[i] for i in range(len(output)))
    return type(output)(**{str(place): part for place, part in whole.items()})

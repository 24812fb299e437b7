"""One output for all rows of a call, of outputs for groups of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.layers.partial_forward import Place, TrunkSpec, parts_of
from llmcache.model.inputs import InputRows


def merged(
    parts: list[tuple[NDArray[np.int64], Any]], first: NDArray[np.int64], rows: InputRows, anatomy: TrunkSpec
) -> Any:
    """One output for all rows of a call, in their order.

    parts: per group its places among the distinct rows, int64, and the trunk's output for it. first: int64 [rows], the
    distinct row that each row of the call is. Positions that the mask hides are zeros, or what the model gave for them
    in a group.
    """
    count, columns = len(rows), rows.tokens
    chosen, output = parts[0]
    if len(parts) == 1 and len(chosen) == count:
        tokens = {place: part for place, part in parts_of(output).items() if anatomy.fields.get(place) == "tokens"}
        if columns is None or all(part.shape[1] == columns for part in tokens.values()):
            return output
    together: dict[Place, Any] = {}
    for place, example in parts_of(output).items():
        kind = anatomy.fields.get(place)
        if kind is None:
            together[place] = example
            continue
        shape = list(example.shape)
        shape[0] = count
        if kind == "tokens" and columns is not None:
            shape[1] = columns
        together[place] = example.new_zeros(shape)
    for chosen, one in parts:
        where = np.flatnonzero(np.isin(first, chosen))
        source = torch.as_tensor(np.searchsorted(chosen, first[where]))
        target = torch.as_tensor(where)
        for place, part in parts_of(one).items():
            if place not in anatomy.fields:
                continue
            picked = part.index_select(0, source.to(part.device))
            if anatomy.fields[place] == "tokens" and columns is not None:
                together[place][target.to(part.device), : part.shape[1]] = picked
            else:
                together[place][target.to(part.device)] = picked
    if isinstance(output, Tensor):
        return together[0]
    if isinstance(output, tuple):
        return type(output)(together[i] for i in range(len(output)))
    return type(output)(**{str(place): part for place, part in together.items()})

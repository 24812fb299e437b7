"""Trials of a model before its layers are cached: compare answers from stored states with the model's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.layers.layer_banks import LayerMatches
from llmcache.layers.partial_forward import LayerPlace, parts_of
from llmcache.model.inputs import Call, InputRows
from llmcache.model.restoring import without_trace
from llmcache.model.trial import (
    BASE_LENGTHS,
    Reach,
    TooLong,
    drawn_ids,
    explained,
    explored,
    relative_rounding,
    right_mask,
    rounding_of,
    unlike,
)

Forward = Callable[[Call], Any]


class MemoryBanks:
    """Layer banks of a trial, in memory, with the methods of `LayerBanks` that a forward uses."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = self.kept = tuple(sorted(layers))
        self._states: dict[tuple[int, bytes], Floats32] = {}

    def keys(self, layer: int, rows: InputRows, mode: str) -> Keys:
        seed = f"{layer} {rows.signature} {mode} ".encode()
        digests = b"".join(hashlib.sha256(seed + content).digest()[:16] for content in rows.content)
        return np.frombuffer(digests, np.uint64).reshape(-1, 2)

    def find(self, rows: InputRows, chosen: Rows, mode: str, up_to: int | None = None) -> LayerMatches:
        n = len(chosen)
        matches = LayerMatches(np.zeros(n, np.int64), [None] * n, np.zeros(n), [""] * n, np.full(n, -1))
        for layer in self.layers:
            if up_to is not None and layer > up_to:
                continue
            for place, key in enumerate(self.keys(layer, rows, mode)[chosen]):
                state = self._states.get((layer, key.tobytes()))
                if state is not None:
                    matches.enter[place], matches.states[place] = layer + 1, state
        return matches

    def put(
        self,
        layer: int,
        rows: InputRows,
        chosen: Rows,
        states: Sequence[Floats32],
        seconds: Floats32,
        mode: str,
        asked: tuple[str | None, str | None] | None = None,
    ) -> None:
        for key, state in zip(self.keys(layer, rows, mode)[chosen], states, strict=True):
            self._states[layer, key.tobytes()] = state

    def rounding(self, dtype: torch.dtype) -> float:
        """Return the rounding error, in this dtype, of a sum over a state; 0 while nothing is stored."""
        if not self._states:
            return 0.0
        state = next(iter(self._states.values()))
        size = float(np.sqrt(np.square(state.astype(np.float64)).mean()))
        return float(min(4.0 * torch.finfo(dtype).eps * state.shape[-1] ** 0.5, relative_rounding(dtype)) * size)


class LayerTrial:
    """Trials of one trunk: calls with rows of several lengths, answered from stored states and by the model.

    forward: the model's own. answer(call, banks, up_to): the cache's, from the layers of these banks up to `up_to`.
    call: arguments of every trial; the main input, mask, token types and positions are replaced.
    main: name of the main input. layers: those with banks. fields: kinds of the outputs, see `TrunkSpec`.
    takes: returns True if the forward has an argument of this name.
    """

    def __init__(
        self,
        forward: Forward,
        answer: Callable[[Call, MemoryBanks, int | None], Any],
        call: Mapping[str, Any],
        main: str,
        layers: Sequence[int],
        fields: Mapping[LayerPlace, str],
        takes: Callable[[str], bool],
    ) -> None:
        self._forward, self._answer, self._main, self._layers = forward, answer, main, layers
        self._value: Tensor = call[main]
        self._call = {name: value for name, value in call.items() if name not in (main, "attention_mask")}
        self._call = {name: value for name, value in self._call.items() if value is not None}
        self._fields, self._takes = fields, takes
        self._rounding = torch.float32

    def reach(self, module: Module, vocabulary: int) -> Reach:
        """Return up to which length of rows the cache's answers are the model's.

        vocabulary: number of token ids. ConfigError when the answers differ already for short rows.
        """
        self._rounding = rounding_of(module, self._value.device)
        if self._value.is_floating_point():
            without_trace(module, self._value.device, self._try_images)
            return Reach()

        def attempt(tokens: int, thorough: Callable[[], bool]) -> float:
            return self._try_length(tokens, vocabulary, thorough)

        return explored(BASE_LENGTHS, module, attempt, effort=6)

    def _try_length(self, tokens: int, vocabulary: int, thorough: Callable[[], bool]) -> float:
        """Compare answers for rows of this length and shorter ones. Returns the seconds of one forward.

        thorough: returns True while there is time for further calls: without a mask, with padding on the left, with
        holes in the mask, and so on.
        """
        device = self._value.device
        ids = drawn_ids(3, tokens, vocabulary, device)
        lengths = [tokens, max(1, tokens - 3), max(1, tokens // 2)]
        mask = right_mask(lengths, tokens, device)
        banks = MemoryBanks(self._layers)
        call = self._with(ids[:2], mask[:2])
        began = time.thread_time()
        try:
            self._forward(dict(call))
        except Exception as error:
            raise TooLong(f"the model fails for rows of {tokens} tokens ({explained(error)})") from error
        seconds = time.thread_time() - began
        where = f"for rows of {tokens} tokens"
        self._compare(call, banks, f"{where} that it has not seen")
        self._compare(self._with(ids[1:2, : lengths[1]], mask[1:2, : lengths[1]]), banks, f"for {lengths[1]} tokens")
        order = [2, 1, 0, 2, 1] if thorough() else [0, 2]
        self._compare(self._with(ids[order], mask[order]), banks, f"{where} in another batch")
        shallow = min(self._layers)
        left, holes = mask.flip(1), mask.clone()
        holes[:, 1] = 0
        more = [
            (self._with(ids[:2], None), "without a mask", None),
            *[(self._with(ids, left), "with padding on the left", None)] * 2,
            *[(self._with(ids, holes), "with a hole in the mask", None)] * 2,
            (self._with(ids[[1, 0]], mask[[1, 0]]), f"entering after layer {shallow}", shallow),
        ]
        for call, name, up_to in more:
            if thorough():
                self._compare(call, banks, f"{where}, {name},", up_to)
        for name in ("token_type_ids", "position_ids"):
            if thorough():
                self._try_beside(name, ids, mask, banks, where)
        return seconds

    def _try_beside(self, name: str, ids: Tensor, mask: Tensor, banks: MemoryBanks, where: str) -> None:
        """Compare calls with token types or unusual positions, if the model has such an argument."""
        if not self._takes(name):
            return
        tokens = ids.shape[1]
        values = torch.arange(tokens, device=ids.device)[None].expand_as(ids)
        values = (values >= tokens // 2).long() if name == "token_type_ids" else values.clone()
        call = self._with(ids, mask) | {name: values}
        try:
            self._forward(dict(call))
        except Exception:  # the model refuses this argument, and will do so for any caller
            return
        for _ in range(2):
            self._compare(call, banks, f"{where} with {name}")

    def _try_images(self) -> None:
        """Compare batches of inputs that are no token ids, such as images."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(3, *self._value.shape[1:], generator=generator).to(self._value)
        banks = MemoryBanks(self._layers)
        for order in ([0, 1], [0], [2, 1, 2, 0]):
            self._compare({**self._call, self._main: drawn[order]}, banks, f"for {len(order)} rows")

    def _with(self, ids: Tensor, mask: Tensor | None) -> Call:
        call = {**self._call, self._main: ids}
        if mask is not None and self._takes("attention_mask"):
            call["attention_mask"] = mask
        return call

    def _compare(self, call: Call, banks: MemoryBanks, where: str, up_to: int | None = None) -> None:
        """Answer a call by the model and from the banks; ConfigError when the answers differ.

        Positions that the mask hides are not compared, since their states are undefined.
        """
        expected, answer = self._forward(dict(call)), self._answer(dict(call), banks, up_to)
        mine, theirs = parts_of(answer), parts_of(expected)
        if type(answer) is not type(expected) or mine.keys() != theirs.keys():
            raise ConfigError(f"{where} a cache would return {sorted(map(str, mine))}, not {sorted(map(str, theirs))}")
        mask = call.get("attention_mask")
        for place, part in theirs.items():
            other = mine[place]
            if isinstance(part, Tensor) and isinstance(other, Tensor) and part.shape != other.shape:
                raise ConfigError(f"{where} its {place!r} would be {list(other.shape)}, not {list(part.shape)}")
            if mask is not None and self._fields.get(place) == "tokens":
                part, other = part[mask.bool()], other[mask.bool()]
            if difference := unlike(other, part, self._rounding, banks.rounding(self._rounding)):
                raise ConfigError(
                    f"{where} its {place!r} would be {difference}: it depends on the other rows of a batch"
                )

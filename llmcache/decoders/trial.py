"""Trials of a decoder before its prefixes are reused: compare answers from KV blocks in memory with the model's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Keys, Rows
from llmcache.model.trial import (
    BASE_LENGTHS,
    Reach,
    TooLong,
    drawn_ids,
    explained,
    explored,
    unlike,
    vocabulary_of,
)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Result of `MemoryBank.read`, in the form of `Bank.read`."""

    values: list[Floats32]
    intact: NDArray[np.bool_]


@dataclass(slots=True)
class MemoryBank:
    """Bank of KV blocks in memory, with the methods of `Bank` that look-ups of prefixes use."""

    _places: dict[bytes, int] = field(default_factory=dict)
    _tokens: list[NDArray[np.int32]] = field(default_factory=list)
    _values: list[Floats32] = field(default_factory=list)

    def find(self, keys: Keys) -> Rows:
        return np.array([self._places.get(key.tobytes(), -1) for key in keys], np.int64)

    def tokens_of(self, rows: Rows) -> list[NDArray[np.int32]]:
        return [self._tokens[row] for row in rows.tolist()]

    def read(self, rows: Rows) -> _Reading:
        return _Reading([self._values[row] for row in rows.tolist()], np.ones(len(rows), np.bool_))

    def put(
        self,
        _: Any,
        keys: Keys,
        values: Sequence[Floats32],
        *,
        tokens: Sequence[NDArray[np.int32]],
        **__: Any,
    ) -> None:
        for key, value, ids in zip(keys, values, tokens, strict=True):
            self._places[key.tobytes()] = len(self._values)
            self._values.append(value)
            self._tokens.append(ids)


def reach_of_prefixes(
    trunk: nn.Module,
    original: Callable[..., Any],
    answers: Callable[[MemoryBank], Callable[[Mapping[str, Any]], Any]],
    *,
    takes_positions: bool,
) -> Reach:
    """Return up to which length of rows the answers after restored prefixes are the model's.

    original: the trunk's own forward. answers: returns a function that answers calls from a bank in memory.
    takes_positions: True if the forward has a parameter position_ids.
    ConfigError when the answers differ already for short rows.
    """
    vocabulary, device = vocabulary_of(trunk), next(trunk.parameters()).device

    def attempt(tokens: int, thorough: Callable[[], bool]) -> float:
        trunk.eval()
        ids = drawn_ids(1, tokens, vocabulary, device)
        call: dict[str, Any] = {"input_ids": ids, "use_cache": True}
        began = time.thread_time()
        try:
            original(**call)
        except Exception as error:
            raise TooLong(f"the model fails for rows of {tokens} tokens ({explained(error)})") from error
        seconds = time.thread_time() - began
        answer = answers(MemoryBank())
        whole = ids[0].tolist()
        other = drawn_ids(1, tokens + 1, vocabulary, device)[0].tolist()
        rows = [whole[:-3] + other[:3], whole[: tokens // 2] + other[: tokens // 4], other[: max(1, tokens // 3)]]
        for row in (whole[:-4], whole):
            _compare(original, answer, _batch([row], device, left=True), f"for a row of {len(row)} tokens")
        _compare(original, answer, _batch(rows, device, left=True), f"for rows of {tokens} tokens, padded on the left")
        right = _batch([other, rows[2], whole[: tokens // 2]], device, left=False)
        left = _batch([*rows, whole], device, left=True)
        more = [(right, "padded on the right"), ({**left, "use_cache": False}, "without a cache")]
        if takes_positions and "attention_mask" in left:
            positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
            more.append(({**left, "position_ids": positions}, "with position_ids"))
        for call, name in more:
            if thorough():
                _compare(original, answer, call, f"for rows of {tokens} tokens, {name},")
        return seconds

    return explored(BASE_LENGTHS, trunk, attempt, effort=7)


def _batch(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> dict[str, Any]:
    """Return ids and mask of padded rows, int64 [rows, columns], as arguments; no mask where there is no padding."""
    columns = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), columns), np.int64)
    for i, row in enumerate(rows):
        span = slice(columns - len(row), columns) if left else slice(len(row))
        ids[i, span], mask[i, span] = row, 1
    call: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": True}
    if not mask.all():
        call["attention_mask"] = torch.from_numpy(mask).to(device)
    return call


def _compare(
    original: Callable[..., Any], answer: Callable[[Mapping[str, Any]], Any], call: Mapping[str, Any], where: str
) -> None:
    """Answer a call by the model and from restored prefixes; ConfigError when states, keys or values differ."""
    expected, answered = original(**call), answer(dict(call))
    mask = call.get("attention_mask")
    visible = torch.ones_like(call["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if type(answered) is not type(expected):
        raise ConfigError(f"{where} a cache would return {type(answered).__name__}, not {type(expected).__name__}")
    theirs, mine = dict(expected.items()), dict(answered.items())
    if theirs.keys() != mine.keys():
        raise ConfigError(f"{where} a cache would return {sorted(mine)}, not {sorted(theirs)}")
    for name, part in theirs.items():
        if name == "past_key_values":
            _compare_planes(answered.past_key_values, part, visible, where)
            continue
        other = mine[name]
        if isinstance(part, Tensor) and isinstance(other, Tensor) and part.shape == other.shape:
            part, other = part[visible], other[visible]
        if difference := unlike(other, part):
            raise ConfigError(f"{where} its {name!r} would be {difference}")


def _compare_planes(answered: Any, expected: Any, visible: Tensor, where: str) -> None:
    """Compare two caches of keys and values. A layer with a window has the last columns only."""
    if expected is None or answered is None:
        if expected is not answered:
            raise ConfigError(f"{where} it would return {answered!r} as past_key_values, not {expected!r}")
        return
    if type(answered) is not type(expected) or answered.get_seq_length() != expected.get_seq_length():
        raise ConfigError(f"{where} its keys and values would be a {type(answered).__name__} of another length")
    for layer, (mine, theirs) in enumerate(zip(answered.layers, expected.layers, strict=True)):
        if type(mine) is not type(theirs):
            raise ConfigError(
                f"{where} the cache of layer {layer} would be a {type(mine).__name__}, not {type(theirs).__name__}"
            )
        for part, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            if part.shape == other.shape:
                shown = visible[:, visible.shape[1] - other.shape[2] :]
                part, other = part.transpose(1, 2)[shown], other.transpose(1, 2)[shown]
            if difference := unlike(part, other):
                raise ConfigError(f"{where} keys or values of layer {layer} would be {difference}")

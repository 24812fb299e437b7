"""Decide which token rows can share a batch so that each row gets the result it gets alone and unpadded.

A mask does not always suffice for padding: some models count positions over it, recurrent models carry it into their
state, others compute differently in a longer batch. So a few short rows are tried once for each model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from llmcache.errors import ConfigError
from llmcache.model.restoring import without_trace
from llmcache.model.trial import (
    Reach,
    drawn_ids,
    explored,
    reach_of_positions,
    rounding_of,
    unlike,
    vocabulary_of,
)

_LENGTHS = (7,)

Results = Callable[[list[list[int]]], list[Tensor]]
"""Run rows of token ids in one batch; returns a tensor for each row."""


@dataclass(frozen=True, slots=True)
class Batching:
    """Batching rule of a model.

    padded: True if rows of different lengths can share a batch. equal: True if rows of one length can.
    causal: True if results do not depend on later tokens, so the end of a row may be left out.
    reach: up to which length of rows this was verified.
    """

    padded: bool
    equal: bool
    causal: bool
    reach: Reach = field(default_factory=Reach)

    def batches(self, order: Sequence[int], lengths: Sequence[int], size: int, more: int = 0) -> Iterator[list[int]]:
        """Yield batches of at most `size` rows. order: row numbers. lengths: of all rows, in tokens.

        more: tokens that will be added to each row.
        """
        if self.padded and not (lengths and self.reach.refusal(max(lengths) + more)):
            groups: list[list[int]] = [list(order)]
        else:
            by_length: dict[int, list[int]] = {}
            for row in order:
                by_length.setdefault(lengths[row], []).append(row)
            # shortest first: rotary positions that depend on the length keep the setting of the longest batch so far
            groups = [by_length[length] for length in (sorted(by_length) if self.padded else by_length)]
        size = size if self.padded or self.equal else 1
        for group in groups:
            for start in range(0, len(group), size):
                yield group[start : start + size]


_known: WeakKeyDictionary[Module, dict[object, Batching]] = WeakKeyDictionary()


def batching_of(model: Any, kind: str, results: Results) -> Batching:
    """Return the batching rule of a model, found by trial forwards that leave no trace in the model.

    kind: of the results ("logits", "generate"); trials run once for each kind. results: runs rows in one batch.
    """
    config = getattr(model, "config", None)
    state = kind, next(model.parameters()).dtype, getattr(config, "_attn_implementation", None)
    known = _known.setdefault(model, {})
    if state not in known:
        device = next(model.parameters()).device
        known[state] = _run_trials(model, results, device)
    return known[state]


def _run_trials(model: Any, results: Results, device: torch.device) -> Batching:
    rounding, vocabulary = rounding_of(model, device), vocabulary_of(model)
    same = drawn_ids(3, _LENGTHS[0], vocabulary, device).tolist()

    def attempt(tokens: int, _: Callable[[], bool]) -> float:
        model.eval()
        rows = drawn_ids(3, tokens, vocabulary, device).tolist()
        rows = [rows[0][: tokens // 2], rows[1], rows[2][: max(2, tokens - 2)]]
        began = time.thread_time()
        _compare(results, rows, rounding)
        return time.thread_time() - began

    def equal() -> bool:
        model.eval()
        _compare(results, same, rounding)
        return True

    def causal() -> bool:
        model.eval()
        return _is_causal(results, same[0], rounding)

    try:
        reach, padded = explored(_LENGTHS, model, attempt, effort=1), True
    except Exception:  # a model that fails for padded rows may be right without padding
        reach, padded = reach_of_positions(getattr(model, "config", None)), False
    return Batching(padded, _holds(model, device, equal), _holds(model, device, causal), reach)


def _holds(model: Any, device: torch.device, trial: Callable[[], bool]) -> bool:
    """Return the trial's answer; False if the trial raises."""
    try:
        return without_trace(model, device, trial)
    except Exception:
        return False


def _is_causal(results: Results, row: list[int], rounding: torch.dtype) -> bool:
    """Return whether a token's output is independent of the tokens after it."""
    return unlike(results([row])[0][:-1], results([row[:-1]])[0], rounding) is None


def _compare(results: Results, rows: list[list[int]], rounding: torch.dtype) -> None:
    """Raise ConfigError when rows get other results in one batch than each alone."""
    for row, together in zip(rows, results(rows), strict=True):
        if difference := unlike(together, results([row])[0], rounding):
            raise ConfigError(f"a row of {len(row)} tokens gets {difference}, in a batch with others")

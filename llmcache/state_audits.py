"""Audits of stored layer states: rows of a call are computed from the start, and compared with what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmcache.agreement import compared, machine_epsilon, shapes
from llmcache.inputs import InputRows
from llmcache.states import Found, LayerBanks

Rows = NDArray[np.int64]
States = Callable[[InputRows, Rows, frozenset[int]], dict[int, Tensor]]
"""States of rows at some layers, computed from the start, [rows, tokens, width] for each layer."""


def audit_states(found: Found, rows: InputRows, chosen: Rows, banks: LayerBanks, states: States) -> None:
    """Audit a few of the states that were found for a call, before anything is computed from them.

    chosen: int64 [n], the rows of the call that were looked up. states: computes states of rows.
    ModelMismatch when a stored state is not what the trunk gives.
    """
    for layer in np.unique(found.enter[found.enter > 0] - 1).tolist():
        hits = np.flatnonzero(found.enter == layer + 1)
        evidence = banks.evidence[layer]
        audited = hits[evidence.chosen(found.rows[hits], lambda hits=hits: rows.ends[chosen[hits]])]  # type: ignore[misc]
        if not len(audited):
            continue
        with evidence.recompute():
            _audit(found, rows, chosen, audited, layer, banks, states)


def _audit(
    found: Found, rows: InputRows, chosen: Rows, audited: Rows, layer: int, banks: LayerBanks, states: States
) -> None:
    places = chosen[audited]
    others = np.setdiff1d(chosen, places)
    companions = others[[int(rows.ends[others].argmax())]] if len(others) else others
    every = np.concatenate([places, companions])
    visible = [_visible(rows, place) for place in every.tolist()]

    def run(at: Sequence[int], size: int) -> list[NDArray[np.float32]]:
        computed: list[NDArray[np.float32]] = []
        for start in range(0, len(at), size):
            part = at[start : start + size]
            table = states(rows, every[part], frozenset([layer]))[layer].float().cpu().numpy()
            computed += [table[i][visible[place]] for i, place in enumerate(part)]
        return computed

    stored = [np.asarray(found.states[place])[visible[i]] for i, place in enumerate(audited.tolist())]
    device = rows.call[rows.main].device
    epsilon = machine_epsilon(banks.trunk, device)
    recomputed = shapes(len(audited), len(companions), run)
    banks.evidence[layer].conclude(
        found.rows[audited], compared(stored, recomputed, epsilon, banks.banks[layer].facts.dtype)
    )


def _visible(rows: InputRows, place: int) -> NDArray[np.int64] | slice:
    """Positions of a row that its mask shows; all of them where it has no tokens."""
    mask = rows.call.get("attention_mask")
    if rows.tokens is None:
        return slice(None)
    if mask is None:
        return np.arange(rows.ends[place])
    return np.flatnonzero(mask[place].cpu().numpy())

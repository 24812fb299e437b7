"""Audits of stored layer states: rows of a call are computed from the start, and compared with what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.agreement import compared, machine_epsilon, shapes
from llmcache.layers.layer_banks import LayerBanks, LayerMatches
from llmcache.model.inputs import InputRows, input_rows

Rows = NDArray[np.int64]
States = Callable[[InputRows, Rows, frozenset[int]], dict[int, Tensor]]
"""States of rows at some layers, computed from the start, [rows, tokens, width] for each layer."""


def audit_states(
    found: LayerMatches, rows: InputRows, chosen: Rows, banks: LayerBanks, mode: str, states: States
) -> None:
    """Audit a few of the states that were found for a call, before anything is computed from them.

    Where rows are to be computed, and stored, a few entries of the deepest bank are audited before that.
    chosen: int64 [n], the rows of the call that were looked up. mode: see `LayerBanks.keys`. states: computes states
    of rows. ModelMismatch when a stored state is not what the trunk gives.
    """
    for layer in np.unique(found.enter[found.enter > 0] - 1).tolist():
        hits = np.flatnonzero(found.enter == layer + 1)
        evidence = banks.evidence[layer]
        audited = hits[evidence.chosen(found.rows[hits], lambda hits=hits: rows.ends[chosen[hits]])]  # type: ignore[misc]
        if not len(audited):
            continue
        with evidence.recompute():
            _audit(found, rows, chosen, audited, layer, banks, states)
    if (found.enter <= banks.layers[-1]).any():
        _audit_sample(rows, banks, mode, states)


def _audit_sample(like: InputRows, banks: LayerBanks, mode: str, states: States) -> None:
    """Audit a few entries of the deepest bank that were made as those of this call will be.

    A changed model then does not add to what an unchanged one has stored.
    """
    layer = banks.layers[-1]
    bank, evidence = banks.banks[layer], banks.evidence[layer]
    if not evidence.open or like.tokens is None or "position_ids" in like.call:
        return
    sampled = evidence.sample(f"{like.signature} {mode} {'attention_mask' in like.call}".encode())
    ids = bank.tokens_of(sampled)
    known = [place for place, row in enumerate(ids) if len(row)]
    if known and "attention_mask" not in like.call:  # rows of one length need no mask
        known = [place for place in known if len(ids[place]) == len(ids[known[0]])]
    if not known:
        return
    with evidence.recompute():
        sampled, rows = sampled[known], _rows_of([ids[place] for place in known], like)
        same = np.flatnonzero((banks.keys(layer, rows, mode) == bank.keys(sampled)).all(axis=1))
        chosen = same[evidence.spread(np.ones(len(same), np.bool_), lambda: rows.ends[same])]
        reading = bank.read(sampled[chosen], count=False)
        intact = np.flatnonzero(reading.intact)
        if not len(intact):
            return
        values = [reading.values[place] for place in intact.tolist()]
        n = len(intact)
        found = LayerMatches(np.full(n, layer + 1), values, np.zeros(n), [""] * n, sampled[chosen[intact]])
        _audit(found, rows, chosen[intact], np.arange(n), layer, banks, states)


def _rows_of(ids: Sequence[NDArray[np.int32]], like: InputRows) -> InputRows:
    """A call of these token ids, padded on the right, with the arguments of another call."""
    given = like.call[like.main]
    table = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros_like(table)
    for place, row in enumerate(ids):
        table[place, : len(row)], mask[place, : len(row)] = row, 1
    call = {**like.call, like.main: torch.from_numpy(table).to(given)}
    if "attention_mask" in call:
        call["attention_mask"] = torch.from_numpy(mask).to(call["attention_mask"])
    if "token_type_ids" in call:
        call["token_type_ids"] = torch.zeros_like(call[like.main])
    return input_rows(call, like.main)


def _audit(
    found: LayerMatches, rows: InputRows, chosen: Rows, audited: Rows, layer: int, banks: LayerBanks, states: States
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

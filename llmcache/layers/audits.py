"""Audits of stored layer states: compute rows of a call from the start and compare them with the stored states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.banks.agreement import compared, machine_epsilon, shapes
from llmcache.indexes.format.rows import Rows
from llmcache.layers.layer_banks import LayerBanks, LayerMatches
from llmcache.model.inputs import InputRows, input_rows

States = Callable[[InputRows, Rows, frozenset[int]], dict[int, Tensor]]
"""Compute the states of some rows at some layers from the start; returns [rows, tokens, width] for each layer."""


def audit_states(
    matches: LayerMatches, rows: InputRows, chosen: Rows, banks: LayerBanks, mode: str, states: States
) -> None:
    """Audit a few of the states that were matches for a call, before they are used.

    Where rows will be computed and stored, a few entries of the deepest bank are audited first.
    matches: matches of the rows that were looked up. chosen: int64 [n], these rows' numbers in the call.
    mode: see `LayerBanks.keys`. states: computes states of rows.
    ModelMismatch when a stored state differs from the state that the trunk computes.
    """
    for layer in np.unique(matches.enter[matches.enter > 0] - 1).tolist():
        hits = np.flatnonzero(matches.enter == layer + 1)
        evidence = banks.evidence[layer]
        audited = hits[evidence.chosen(matches.rows[hits], lambda hits=hits: rows.ends[chosen[hits]])]  # type: ignore[misc]
        if not len(audited):
            continue
        with evidence.recompute():
            _audit(matches, rows, chosen, audited, layer, banks, states)
    if (matches.enter <= banks.layers[-1]).any():
        _audit_sample(rows, banks, mode, states)


def _audit_sample(like: InputRows, banks: LayerBanks, mode: str, states: States) -> None:
    """Audit a few entries of the deepest bank that were stored from calls of the same form as this call.

    So a changed model does not add its states to the states of the unchanged model.
    """
    layer = banks.layers[-1]
    bank, evidence = banks.banks[layer], banks.evidence[layer]
    if not evidence.open or like.tokens is None or "position_ids" in like.call:
        return
    sampled = evidence.sample(f"{like.signature} {mode} {'attention_mask' in like.call}".encode())
    ids = bank.tokens_of(sampled)
    nonempty = [place for place, row in enumerate(ids) if len(row)]
    if nonempty and "attention_mask" not in like.call:  # only rows of one length share a batch without a mask
        nonempty = [place for place in nonempty if len(ids[place]) == len(ids[nonempty[0]])]
    if not nonempty:
        return
    with evidence.recompute():
        sampled, rows = sampled[nonempty], _rows_of([ids[place] for place in nonempty], like)
        same_key = np.flatnonzero((banks.keys(layer, rows, mode) == bank.keys(sampled)).all(axis=1))
        chosen = same_key[evidence.spread(np.ones(len(same_key), np.bool_), lambda: rows.ends[same_key])]
        reading = bank.read(sampled[chosen], count=False)
        intact = np.flatnonzero(reading.intact)
        if not len(intact):
            return
        values = [reading.values[place] for place in intact.tolist()]
        n = len(intact)
        matches = LayerMatches(np.full(n, layer + 1), values, np.zeros(n), [""] * n, sampled[chosen[intact]])
        _audit(matches, rows, chosen[intact], np.arange(n), layer, banks, states)


def _rows_of(ids: Sequence[NDArray[np.int32]], like: InputRows) -> InputRows:
    """Return a call of these token ids, padded on the right, with the other arguments of the call `like`."""
    example = like.call[like.main]
    table = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros_like(table)
    for place, row in enumerate(ids):
        table[place, : len(row)], mask[place, : len(row)] = row, 1
    call = {**like.call, like.main: torch.from_numpy(table).to(example)}
    if "attention_mask" in call:
        call["attention_mask"] = torch.from_numpy(mask).to(call["attention_mask"])
    if "token_type_ids" in call:
        call["token_type_ids"] = torch.zeros_like(call[like.main])
    return input_rows(call, like.main)


def _audit(
    matches: LayerMatches, rows: InputRows, chosen: Rows, audited: Rows, layer: int, banks: LayerBanks, states: States
) -> None:
    """Compute the audited rows of a call from the start, in several batches, and compare them with the stored states.

    audited: positions in `chosen` and in `matches`. layer: whose states are compared.
    """
    places = chosen[audited]
    others = np.setdiff1d(chosen, places)
    companions = others[[int(rows.ends[others].argmax())]] if len(others) else others
    batch = np.concatenate([places, companions])
    visible = [_visible(rows, place) for place in batch.tolist()]

    def run(at: Sequence[int], size: int) -> list[Floats32]:
        computed: list[Floats32] = []
        for start in range(0, len(at), size):
            part = at[start : start + size]
            table = states(rows, batch[part], frozenset([layer]))[layer].float().cpu().numpy()
            computed += [table[i][visible[place]] for i, place in enumerate(part)]
        return computed

    stored = [np.asarray(matches.states[place])[visible[i]] for i, place in enumerate(audited.tolist())]
    device = rows.call[rows.main].device
    epsilon = machine_epsilon(banks.trunk, device)
    recomputed = shapes(len(audited), len(companions), run)
    banks.evidence[layer].conclude(
        matches.rows[audited], compared(stored, recomputed, epsilon, banks.banks[layer].facts.dtype)
    )


def _visible(rows: InputRows, place: int) -> NDArray[np.int64] | slice:
    """Return the positions of a row that its mask shows; all positions where the input has no tokens."""
    mask = rows.call.get("attention_mask")
    if rows.tokens is None:
        return slice(None)
    if mask is None:
        return np.arange(rows.ends[place])
    return np.flatnonzero(mask[place].cpu().numpy())

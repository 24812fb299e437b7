"""Answers to forward calls from stored layer states: each row enters after its deepest stored layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.banks.counters import Counters
from llmcache.banks.lookup import first_occurrences
from llmcache.indexes.format.rows import Rows
from llmcache.layers.audits import audit_states
from llmcache.layers.layer_banks import LayerBanks, LayerMatches
from llmcache.layers.merged_outputs import merged
from llmcache.layers.partial_forward import LayerStack, PartialForward, TrunkSpec
from llmcache.layers.trial import MemoryBanks
from llmcache.model.description.process_settings import running_mode
from llmcache.model.description.watch import ModelWatch
from llmcache.model.inputs import Call, InputRows, input_rows


class LayerReuse:
    """One forward call that is answered from layer banks: look up, compute the missing layers, store, merge.

    entered, entries: of the rows of the call, see `Attachment`; `entered` is None until all rows are computed.
    """

    def __init__(
        self,
        blocks: LayerStack,
        forward: Callable[..., Any],
        main: str,
        watch: ModelWatch,
        counters: Counters,
        *,
        up_to: int | None,
        asked: tuple[str | None, str | None] | None,
    ) -> None:
        """Prepare one call.

        forward: the trunk's own, with stand-ins in place of its blocks. main: name of the main input.
        up_to: deepest layer whose states are reused; nothing is stored then. None: any layer, and states are stored.
        asked: role and prompt of the texts; None when token ids were given.
        """
        self._blocks, self._forward, self._main, self._watch, self._counters = blocks, forward, main, watch, counters
        self._up_to, self._asked = up_to, asked
        self.entered: Rows | None = None
        self.entries: list[str] = []

    def answer(self, call: Call, spec: TrunkSpec, banks: LayerBanks | MemoryBanks) -> Any:
        """Return the output for all rows of a call. banks: of a store, or in memory for a trial."""
        rows = input_rows(call, self._main)
        mode = self._mode()
        distinct, first = first_occurrences(banks.keys(banks.layers[-1], rows, mode))
        if not len(distinct):
            self.entered = np.zeros(0, np.int64)
            return self._forward(**call)
        matches = banks.find(rows, distinct, mode, self._up_to)
        if isinstance(banks, LayerBanks):
            audit_states(matches, rows, distinct, banks, mode, self._states)
        outputs: list[tuple[Rows, Any]] = []
        for enter in np.unique(matches.enter).tolist():
            group = np.flatnonzero(matches.enter == enter)
            outputs.append((distinct[group], self._run(rows, distinct, matches, group, spec, banks)))
        place = np.searchsorted(distinct, first)
        self.entered, self.entries = matches.enter[place], [matches.entries[i] for i in place.tolist()]
        if self._asked is None:  # else the rows are documents, which the caller counts
            self._counters.attached_rows += len(place)
            self._counters.attached_skipped += float(self.entered.sum()) / max(1, spec.layers)
        return merged(outputs, first, rows, spec)

    def _mode(self) -> str:
        return running_mode(self._watch.device.type)

    def _run(
        self,
        rows: InputRows,
        distinct: Rows,
        matches: LayerMatches,
        group: Rows,
        spec: TrunkSpec,
        banks: LayerBanks | MemoryBanks,
    ) -> Any:
        """Compute the rows of a group, all of which enter at one layer, and store the states of layers with banks."""
        enter, chosen = int(matches.enter[group[0]]), distinct[group]
        whole = len(group) == len(rows) and enter == 0  # the call as it is: cutting or reordering would save nothing
        width = rows.tokens if whole or rows.tokens is None else max(1, int(rows.ends[chosen].max()))
        partial = PartialForward(enter=enter)
        if self._up_to is None:
            partial.keep = frozenset(layer for layer in banks.kept if layer >= enter)
        if enter:
            partial.state = self._padded([matches.states[i] for i in group.tolist()], width, spec)
        began = time.perf_counter()
        output = self._blocks.run(partial, self._forward, rows.some(chosen, width))
        # sound of another length may change the width of a layer's states; a bank has one width
        fitting = {layer: state for layer, state in partial.kept.items() if state.shape[-1] == spec.width}
        states = {layer: state.detach().float().cpu().numpy() for layer, state in fitting.items()}
        seconds = time.perf_counter() - began
        self._counters.model_seconds += seconds
        self._keep(rows, chosen, states, seconds / max(1, spec.layers - enter), enter, banks)
        return output

    @torch.no_grad()
    def _states(self, rows: InputRows, chosen: Rows, layers: frozenset[int]) -> dict[int, Tensor]:
        """Compute states of some rows at these layers from the start; [chosen, tokens, width] for each layer."""
        width = None if rows.tokens is None else max(1, int(rows.ends[chosen].max()))
        states = PartialForward(keep=layers)
        self._blocks.run(states, self._forward, rows.some(chosen, width))
        return states.kept

    def _padded(self, states: Sequence[Floats32 | None], width: int | None, spec: TrunkSpec) -> Tensor:
        """Return the states as one tensor [rows, tokens, width] on the model's device, zeros after each row."""
        known = [state for state in states if state is not None]
        table = np.zeros((len(known), len(known[0]) if width is None else width, spec.width), np.float32)
        for place, state in zip(table, known, strict=True):
            place[: len(state)] = state
        return torch.from_numpy(table).to(self._watch.device, spec.dtype)

    def _keep(
        self,
        rows: InputRows,
        chosen: Rows,
        states: dict[int, Floats32],
        seconds: float,
        enter: int,
        banks: LayerBanks | MemoryBanks,
    ) -> None:
        """Store new states. states: by layer, [chosen, tokens, width]. seconds: of one layer, for all rows together."""
        ends = np.ones(len(chosen), np.int64) if rows.tokens is None else rows.ends[chosen]
        full = np.flatnonzero(ends)  # a row without tokens has no state to store
        for layer, table in states.items():
            values = [table[i] if rows.tokens is None else table[i, : ends[i]] for i in full.tolist()]
            cost = ends[full] * (seconds * (layer + 1 - enter) / max(1, ends.sum()))
            banks.put(layer, rows, chosen[full], values, cost.astype(np.float32), self._mode(), self._asked)

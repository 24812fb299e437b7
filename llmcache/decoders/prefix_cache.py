"""Decoders: keys, values and final states of beginnings that were computed before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from llmcache.banks.audits import Evidence
from llmcache.banks.counters import PrefixCounters
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.payoff import Payoff
from llmcache.decoders.audits import audit_beginnings, audit_sample
from llmcache.decoders.block_store import BlockStore, Records
from llmcache.decoders.kv_buffer import (
    Forward,
    KVBuffer,
    cache_of,
    hand_over,
    shape_of,
)
from llmcache.decoders.padded_batch import (
    PaddedBatch,
    layout_of,
    unfit,
    wants_keys,
)
from llmcache.decoders.schedule import PrefixSchedule, TokenSequence, together
from llmcache.decoders.trial import MemoryBank, reach_of_beginnings
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.model.keys import key_seed
from llmcache.model.trial import Reach, explained


@dataclass(eq=False, slots=True)
class _Work:
    """One call under way. places: where in memory the keys and values of each row are, as far as they are."""

    original: Forward
    waves: PrefixSchedule
    records: Records
    ids: Tensor  # of the call: dtype and device
    places: dict[TokenSequence, tuple[KVBuffer, int]]


class PrefixCache:
    """The forward of a causal trunk that computes only what no row began with before.

    Rows of a call that begin alike share what one of them computes; beginnings that the store has are restored from
    blocks of tokens. What is computed is stored. Final states carry no gradient, and are zeros beside the tokens.
    """

    def __init__(
        self,
        trunk: nn.Module,
        bank: Bank,
        digest: bytes,
        put: Callable[..., Any],
        worth: Payoff | None = None,
        *,
        secret: bytes = b"",
        block: int = 16,
        forward_cost: int | None = None,
        levels: DeviceCache | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        """To be made while the trunk's forward is its own.

        bank: with the facts `shape_of(trunk).facts`. digest: of the trunk's identity. put: `put(bank, keys, values,
        tokens=, sources=, features=, cost=)` stores. worth: of the bank; None: it is always looked at. secret: of the
        namespace. block: tokens per entry. forward_cost: what a forward costs besides its tokens, in tokens; None
        estimates it. levels: memory for whole blocks, with `tokens=block`; None reads them from files.
        evidence: what was verified of the bank with this trunk; None audits nothing.
        ConfigError when the trunk's beginnings cannot be restored, or the bank is another trunk's.
        """
        self.shape = shape_of(trunk)
        fresh = self.shape.facts
        if (bank.facts.dtype, bank.facts.width, bank.facts.rank) != (fresh.dtype, fresh.width, fresh.rank):
            raise ConfigError(
                f"the bank holds {bank.facts.dtype} [tokens, {bank.facts.width}], and the model gives {fresh.dtype} "
                f"[tokens, {fresh.width}]; start a fresh namespace"
            )
        if block < 1:
            raise ConfigError(f"block is a number of tokens, at least 1, got {block}")
        self._trunk: Any = trunk
        put = put if evidence is None else evidence.verifying(put)
        self._beginnings = BlockStore(bank, key_seed(digest, "prefix", None, None, secret), put, block, worth, levels)
        self._evidence = evidence
        self._forward_cost = _forward_cost(trunk) if forward_cost is None else forward_cost
        self.counters = PrefixCounters()
        self._reach = Reach()
        self._reach = self._tried()

    def refuses(self, call: Mapping[str, Any]) -> str | None:
        """Why this call is one for the model itself; None when it is not."""
        read = self._read(call)
        return read if isinstance(read, str) else None

    def _read(self, call: Mapping[str, Any]) -> PaddedBatch | str:
        layout = unfit(call, self._trunk, self.shape.dtype) or layout_of(call, skips=self.shape.positions_skip_padding)
        if isinstance(layout, str):
            return layout
        mask = call.get("attention_mask")
        generates = call.get("past_key_values") is not None
        if generates and isinstance(mask, Tensor) and mask.numel() and not bool(mask[:, -1].bool().all()):
            return "its rows end before the last column, which generation reads; pad on the left"
        ends = max(start + length for start, length in zip(layout.starts, layout.lengths, strict=True))
        return self._reach.refusal(max(ends, layout.ids.shape[1])) or layout

    def _tried(self) -> Reach:
        """Up to which length answers from stored beginnings were seen to be the model's. ConfigError for none."""
        trunk, name = self._trunk, type(self._trunk).__name__

        def answers(bank: MemoryBank) -> Callable[[Mapping[str, Any]], Any]:
            rehearsal = object.__new__(PrefixCache)
            rehearsal.__dict__.update(self.__dict__)
            rehearsal.counters, rehearsal._evidence = PrefixCounters(), None
            rehearsal._beginnings = self._beginnings.with_bank(bank)
            return lambda call: rehearsal.forward(trunk.forward, call)

        try:
            return reach_of_beginnings(trunk, trunk.forward, answers, takes_positions=self.shape.takes_positions)
        except ConfigError as error:
            raise ConfigError(f"{name} has no beginnings to reuse: {error}") from error
        except Exception as error:
            raise ConfigError(f"{name} has no beginnings to reuse: a trial failed with {explained(error)}") from error

    def forward(self, original: Forward, call: Mapping[str, Any]) -> Any:
        """What the trunk returns for this call. original: its own forward; call: keyword arguments."""
        layout = self._read(call)
        self.counters.calls += 1
        if isinstance(layout, str):
            self.counters.bypassed += 1
            return original(**call)
        past = call.get("past_key_values")
        if past is None and wants_keys(call, self._trunk):
            past = DynamicCache(config=self._trunk.config)
        with torch.no_grad():
            held = self._answer(original, layout, call["input_ids"], cached=past is not None)
            if past is not None:
                hand_over(held, past)
        return self.shape.output(last_hidden_state=held.states, past_key_values=past)

    def _answer(self, original: Forward, layout: PaddedBatch, ids: Tensor, *, cached: bool) -> KVBuffer:
        counters, began, model_seconds = self.counters, time.perf_counter(), self.counters.model_seconds
        rows, which = layout.distinct()
        records = self._beginnings.look_up(rows)
        if self._evidence is not None:
            recomputed = partial(self._recomputed, original, ids)
            audit_beginnings(rows, records, self._evidence, self._trunk, self.shape, recomputed)
            if self._evidence.open and any(row.missing for row in rows):
                audit_sample(self._beginnings, self._evidence, self._trunk, self.shape, recomputed)
        waves = PrefixSchedule(rows, self._forward_cost)
        work = _Work(original, waves, records, ids, {})
        whole = [row for row in rows if row.known == len(row)]
        if whole:
            self._compute(work, whole, planes=cached)
        parted, computed = [], counters.computed
        for wave in waves:
            parted += [donor for donor in map(waves.donor, wave) if donor]
            for group in together(wave, self._forward_cost):
                self._compute(work, group)
        counters.tokens += sum(layout.lengths)
        counters.shared += sum(layout.lengths) - sum(map(len, rows))
        held = _in_layout(layout, [work.places[rows[i]] for i in which], cached=cached)
        stored, model_seconds = time.perf_counter(), counters.model_seconds - model_seconds
        counters.lookup_seconds += stored - began - model_seconds
        fresh = {row: place for row, place in work.places.items() if place[0].planes and row not in whole}
        self._beginnings.store(fresh, parted, model_seconds / max(1, counters.computed - computed))
        counters.store_seconds += time.perf_counter() - stored
        return held

    def _compute(self, work: _Work, group: list[TokenSequence], *, planes: bool = True) -> None:
        """Compute what is not known of some rows, all of which have nearly as much of it, in one forward."""
        group = sorted(group, key=lambda row: row.place)
        columns, need = max(map(len, group)), max(len(row) - row.known for row in group)
        lengths = [len(row) for row in group]
        firsts = [columns - length for length in lengths]
        held = KVBuffer.empty(self.shape, lengths, firsts, columns, work.ids.device, planes=planes)
        # the forward gives the last `need` columns of every row, also those that are known
        known = [min(row.known, max(0, len(row) - need)) for row in group]
        self._restore(work, group, held, known)
        work.places.update({row: (held, i) for i, row in enumerate(group)})
        self.counters.computed += sum(lengths) - sum(known)
        if not need:
            return
        ids = np.zeros((len(group), need), np.int64)
        positions = np.zeros((len(group), need), np.int64)
        mask = np.ones((len(group), columns), np.int64)
        for i, row in enumerate(group):
            fresh = len(row) - known[i]
            ids[i, need - fresh :] = row.ids[known[i] :]
            positions[i, need - fresh :] = row.start + known[i] + np.arange(fresh)
            mask[i, : firsts[i]] = 0
        self._run(work, held, ids, positions, None if mask.all() else mask)

    def _run(self, work: _Work, held: KVBuffer, ids: Any, positions: Any, mask: Any) -> None:
        began, need = time.perf_counter(), ids.shape[1]
        self._fill(work.original, work.ids, held, held.columns - need, ids, positions, mask)
        self.counters.forwards += 1
        self.counters.model_seconds += time.perf_counter() - began

    def _recomputed(
        self, original: Forward, like: Tensor, rows: Sequence[TokenSequence], tokens: Sequence[int], split: bool
    ) -> list[NDArray[np.float32]]:
        """Records of the first tokens of some rows, computed in one batch from the start, [tokens, record] each.

        like: ids of the call. tokens: of each row. split: compute each half of the columns by itself.
        """
        columns = max(tokens)
        firsts = [columns - count for count in tokens]
        held = KVBuffer.empty(self.shape, tokens, firsts, columns, like.device)
        ids, mask = np.zeros((len(rows), columns), np.int64), np.ones((len(rows), columns), np.int64)
        positions = np.zeros((len(rows), columns), np.int64)
        for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            ids[i, first:] = row.ids[: tokens[i]]
            positions[i, first:] = row.start + np.arange(tokens[i])
            mask[i, :first] = 0
        middle = columns // 2 if split and max(firsts) < columns // 2 else 0
        for low, high in ((0, middle), (middle, columns)):
            if low < high:
                part = None if mask[:, :high].all() else mask[:, :high]
                self._fill(original, like, held, low, ids[:, low:high], positions[:, low:high], part)
        return [held.records(i, 0, count) for i, count in enumerate(tokens)]

    def _fill(
        self, original: Forward, like: Tensor, held: KVBuffer, filled: int, ids: Any, positions: Any, mask: Any
    ) -> None:
        """Compute the columns of `held` behind the first `filled` ones. like: ids of the call, dtype and device."""
        device, stop = like.device, filled + ids.shape[1]
        call: dict[str, Any] = {"position_ids": torch.from_numpy(positions).to(device)}
        if not self.shape.takes_positions:
            call = {}
        output = original(
            input_ids=torch.from_numpy(ids).to(like),
            attention_mask=None if mask is None else torch.from_numpy(mask).to(device),
            past_key_values=cache_of(held, filled),
            use_cache=True,
            return_dict=True,
            **call,
        )
        held.states[:, filled:stop] = output.last_hidden_state

    def _restore(self, work: _Work, group: Sequence[TokenSequence], held: KVBuffer, known: Sequence[int]) -> None:
        """Write the known beginning of each row into `held`: from another row of the call, or from the store."""
        seen: dict[tuple[int, ...], int] = {}
        for i in sorted(range(len(group)), key=lambda i: -known[i]):
            tokens, donor = known[i], work.waves.donor(group[i])
            if not tokens:
                continue
            if donor:
                source, j = work.places[donor[0]]
                held.take(i, source, j, tokens)
                self.counters.shared += tokens
                continue
            first = seen.setdefault(group[i].chain, i)
            if first != i:  # rows with one beginning in the store: read once, and copied from row to row
                held.take(i, held, first, tokens)
            else:
                restore(held, i, [work.records[number] for number in group[i].chain], tokens)
            self.counters.restored += tokens


def restore(held: KVBuffer, i: int, records: Sequence[NDArray[np.float32] | Tensor], tokens: int) -> None:
    """Write the first tokens of row i from these records, each [its tokens, record], one after another."""
    arrays = [one for one in records if isinstance(one, np.ndarray)]
    if len(arrays) < len(records) or not held.in_arrays:
        held.restore(i, _joined(records, held)[:tokens])
        return
    at = 0
    for one in arrays:  # to join them would be a copy more
        held.restore_from(i, one[: tokens - at], at)
        at += len(one)


def _joined(records: Sequence[NDArray[np.float32] | Tensor], held: KVBuffer) -> Tensor:
    """One record after another, [tokens, record]: on the host where all of them are there, else on the device."""
    arrays = [one for one in records if isinstance(one, np.ndarray)]
    if len(arrays) == len(records):
        return torch.from_numpy(np.concatenate(arrays))
    device, dtype = held.states.device, held.states.dtype
    return torch.cat([torch.as_tensor(one).to(device, dtype) for one in records])


def _in_layout(layout: PaddedBatch, places: Sequence[tuple[KVBuffer, int]], *, cached: bool) -> KVBuffer:
    """Keys, values and states where the caller has the tokens: as they are where they lie so already, else a copy."""
    held, columns = places[0][0], layout.ids.shape[1]
    as_it_is = [(one is held, i) for one, i in places] == [(True, i) for i in range(len(held.lengths))]
    if as_it_is and held.columns == columns and list(held.firsts) == layout.firsts:
        for i, first in enumerate(held.firsts):
            held.states[i, :first] = 0
        return held
    whole = KVBuffer.empty(held.shape, layout.lengths, layout.firsts, columns, held.states.device, planes=cached)
    for i, (source, j) in enumerate(places):
        whole.take(i, source, j, layout.lengths[i])
    return whole


def _forward_cost(trunk: nn.Module) -> int:
    """What a forward costs besides its tokens, in tokens: a guess that is right within a factor of three will do.

    Not measured: equal calls should be computed in equal batches in every process.
    """
    inside = [one for one in trunk.modules() if isinstance(one, nn.Embedding)]
    numbers = sum(one.numel() for one in trunk.parameters()) - sum(one.weight.numel() for one in inside)
    cpu = next(trunk.parameters()).device.type == "cpu"
    # reading the weights costs what some tokens cost (measured: 32 for GPT-2-small), and so do calls of modules
    calls = 16e-6 * sum(1 for _ in trunk.modules()) * (5e10 if cpu else 2e14) / (2 * max(1, numbers))
    return int(calls) + (32 if cpu else 64)

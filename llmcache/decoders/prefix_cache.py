"""Prefix cache of a decoder: reuse keys, values and final states of prompt prefixes that were computed before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmcache.arrays import Floats32
from llmcache.banks.audits import Evidence
from llmcache.banks.counters import PrefixCounters
from llmcache.banks.device_cache import DeviceCache, tensor_of
from llmcache.banks.payoff import Payoff
from llmcache.banks.reader import BankReader
from llmcache.decoders.audits import audit_prefixes, audit_sample
from llmcache.decoders.block_store import BlockRecords, BlockStore
from llmcache.decoders.kv_buffer import (
    Forward,
    KVBuffer,
    KVLayout,
    cache_of,
    hand_over,
    shape_of,
)
from llmcache.decoders.kv_encoding import KVEncoding, bytes_per_token
from llmcache.decoders.padded_batch import (
    PaddedBatch,
    layout_of,
    unfit,
    wants_keys,
)
from llmcache.decoders.schedule import PrefixSchedule, TokenSequence, together
from llmcache.decoders.trial import MemoryBank, reach_of_prefixes
from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.model.keys import key_seed
from llmcache.model.trial import Reach, explained

_shares: ContextVar[list[list[float]] | None] = ContextVar("llmcache_restored_shares", default=None)


@contextmanager
def restored_shares() -> Iterator[list[list[float]]]:
    """Collect, for each call inside the block that prefix caches answer, the share of each row that is not computed.

    Yields the list, to which each call adds a list of shares in [0, 1], one for each row of the call.
    """
    shares: list[list[float]] = []
    token = _shares.set(shares)
    try:
        yield shares
    finally:
        _shares.reset(token)


@dataclass(eq=False, slots=True)
class _Work:
    """State of one call.

    original: the trunk's own forward. waves: schedule of the rows. records: KV blocks that were read.
    ids: of the call, for dtype and device. places: buffer, and row in it, of each row that is restored or computed.
    """

    original: Forward
    waves: PrefixSchedule
    records: BlockRecords
    ids: Tensor
    places: dict[TokenSequence, tuple[KVBuffer, int]]


class PrefixCache:
    """Forward of a causal trunk that computes only the tokens after the longest known prefix of each row.

    Rows of a call with a common prefix share the keys and values that one of them computes. Prefixes in the store are
    restored from KV blocks. New KV blocks are stored. Final states carry no gradient, and are zeros outside the rows.
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
        dtype: str = "auto",
        trial: tuple[KVLayout, Reach] | None = None,
    ) -> None:
        """Make a prefix cache, with trial forwards. The trunk's forward must be its own, without a stand-in.

        bank: with the facts `KVEncoding.of(shape_of(trunk), dtype).facts`. digest: of the trunk's identity.
        put: `put(bank, keys, values, tokens=, sources=, features=, cost=)` stores entries.
        worth: decides which rows are looked up; None looks up all. secret: of the namespace.
        block: tokens per KV block. forward_cost: cost of a forward apart from its tokens, in tokens; None estimates it.
        levels: memory for full KV blocks, with `tokens=block`; None reads them from files.
        evidence: audit results of the bank with this trunk; None audits nothing.
        dtype: setting `CacheConfig.prefix_dtype`. The trial judges the model without its rounding.
        trial: `trial` of an earlier prefix cache of this trunk with this digest; None for new trial forwards.
        ConfigError when prefixes of the trunk cannot be restored, or the bank does not fit the trunk.
        """
        self.shape = shape_of(trunk) if trial is None else trial[0]
        self.bytes_per_token = bytes_per_token(self.shape, dtype, max(1, block))
        encoding = KVEncoding.of(self.shape, dtype)
        fresh = encoding.facts
        if (bank.facts.dtype, bank.facts.width, bank.facts.rank) != (fresh.dtype, fresh.width, fresh.rank):
            raise ConfigError(
                f"the bank holds {bank.facts.dtype} [tokens, {bank.facts.width}], and the model gives {fresh.dtype} "
                f"[tokens, {fresh.width}]; start a fresh namespace"
            )
        if block < 1:
            raise ConfigError(f"block is a number of tokens, at least 1, got {block}")
        self._trunk: Any = trunk
        seed = key_seed(digest, encoding.bank, None, None, secret)
        self._blocks = BlockStore(BankReader(bank, worth, levels), seed, put, block, encoding)
        self._evidence = evidence
        self._forward_cost = _forward_cost(trunk) if forward_cost is None else forward_cost
        self.counters = PrefixCounters()
        self._reach = Reach()
        self._reach = self._find_reach() if trial is None else trial[1]

    @property
    def trial(self) -> tuple[KVLayout, Reach]:
        """Outcome of the trial forwards: layout of what is stored, and length of rows up to which it is right."""
        return self.shape, self._reach

    def refuses(self, call: Mapping[str, Any]) -> str | None:
        """Return the reason why the model has to compute this call itself; None if the prefix cache can answer it."""
        layout = self._read(call)
        return layout if isinstance(layout, str) else None

    def known(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Return how many leading tokens of each row of token ids have stored KV blocks; nothing is read but keys."""
        return self._blocks.known([TokenSequence(np.asarray(row, np.int32), 0, i) for i, row in enumerate(rows)])

    def _read(self, call: Mapping[str, Any]) -> PaddedBatch | str:
        """Return the layout of a call, or the reason why the prefix cache cannot answer it."""
        layout = unfit(call, self._trunk, self.shape.dtype) or layout_of(call, skips=self.shape.positions_skip_padding)
        if isinstance(layout, str):
            return layout
        mask = call.get("attention_mask")
        generates = call.get("past_key_values") is not None
        if generates and isinstance(mask, Tensor) and mask.numel() and not bool(mask[:, -1].bool().all()):
            return "its rows end before the last column, which generation reads; pad on the left"
        ends = max(start + length for start, length in zip(layout.starts, layout.lengths, strict=True))
        return self._reach.refusal(max(ends, layout.ids.shape[1])) or layout

    def _find_reach(self) -> Reach:
        """Return up to which length trial answers from stored prefixes are the model's. ConfigError if for none."""
        trunk, name = self._trunk, type(self._trunk).__name__

        def answers(bank: MemoryBank) -> Callable[[Mapping[str, Any]], Any]:
            trial = object.__new__(PrefixCache)
            trial.__dict__.update(self.__dict__)
            trial.counters, trial._evidence = PrefixCounters(), None
            trial._blocks = self._blocks.with_bank(bank)
            return lambda call: trial.forward(trunk.forward, call)

        token = _shares.set(None)  # calls of the trial are none of the caller's
        try:
            return reach_of_prefixes(trunk, trunk.forward, answers, takes_positions=self.shape.takes_positions)
        except ConfigError as error:
            raise ConfigError(f"{name} has no reusable prompt prefixes: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"{name} has no reusable prompt prefixes: a trial failed with {explained(error)}"
            ) from error
        finally:
            _shares.reset(token)

    def forward(self, original: Forward, call: Mapping[str, Any]) -> Any:
        """Return the trunk's output for a call. original: the trunk's own forward. call: keyword arguments."""
        layout = self._read(call)
        self.counters.calls += 1
        if isinstance(layout, str):
            self.counters.bypassed += 1
            return original(**call)
        past = call.get("past_key_values")
        if past is None and wants_keys(call, self._trunk):
            past = DynamicCache(config=self._trunk.config)
        with torch.no_grad():
            buffer = self._answer(original, layout, call["input_ids"], cached=past is not None)
            if past is not None:
                hand_over(buffer, past)
        return self.shape.output(last_hidden_state=buffer.states, past_key_values=past)

    def _answer(self, original: Forward, layout: PaddedBatch, ids: Tensor, *, cached: bool) -> KVBuffer:
        """Look up, compute and store the rows of a call; returns them in the call's layout.

        ids: of the call, for dtype and device. cached: True if keys and values are requested beside the states.
        """
        counters, began, model_seconds = self.counters, time.perf_counter(), self.counters.model_seconds
        rows, which = layout.distinct()
        records = self._blocks.look_up(rows)
        if self._evidence is not None:
            recomputed = partial(self._recomputed, original, ids)
            audit_prefixes(rows, records, self._evidence, self._trunk, self._blocks.encoding, recomputed)
            if self._evidence.open and any(row.missing for row in rows):
                audit_sample(self._blocks, self._evidence, self._trunk, recomputed)
        waves = PrefixSchedule(rows, self._forward_cost)
        work = _Work(original, waves, records, ids, {})
        whole = [row for row in rows if row.known == len(row)]
        if whole:
            self._compute(work, whole, planes=cached)
        diverged, computed = [], counters.computed
        for wave in waves:
            diverged += [donor for donor in map(waves.donor, wave) if donor]
            for group in together(wave, self._forward_cost):
                self._compute(work, group)
        counters.prompts += len(layout.lengths)
        counters.tokens += sum(layout.lengths)
        counters.shared += sum(layout.lengths) - sum(map(len, rows))
        if (shares := _shares.get()) is not None:
            shares.append([rows[i].known / max(1, len(rows[i])) for i in which])
        buffer = _in_layout(layout, [work.places[rows[i]] for i in which], cached=cached)
        stored, model_seconds = time.perf_counter(), counters.model_seconds - model_seconds
        counters.lookup_seconds += stored - began - model_seconds
        fresh = {row: place for row, place in work.places.items() if place[0].planes and row not in whole}
        keys = self._blocks.store(fresh, diverged, model_seconds / max(1, counters.computed - computed))
        if self._evidence is not None:
            self._evidence.computed(keys)
        counters.store_seconds += time.perf_counter() - stored
        return buffer

    def _compute(self, work: _Work, group: list[TokenSequence], *, planes: bool = True) -> None:
        """Compute the unknown tokens of some rows in one forward. All rows have nearly the same number of them."""
        group = sorted(group, key=lambda row: row.place)
        columns, need = max(map(len, group)), max(len(row) - row.known for row in group)
        lengths = [len(row) for row in group]
        firsts = [columns - length for length in lengths]
        buffer = KVBuffer.empty(self.shape, lengths, firsts, columns, work.ids.device, planes=planes)
        # the forward computes the last `need` columns of every row, also tokens that are known
        known = [min(row.known, max(0, len(row) - need)) for row in group]
        self._restore(work, group, buffer, known)
        work.places.update({row: (buffer, i) for i, row in enumerate(group)})
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
        self._run(work, buffer, ids, positions, None if mask.all() else mask)

    def _run(self, work: _Work, buffer: KVBuffer, ids: Any, positions: Any, mask: Any) -> None:
        began, need = time.perf_counter(), ids.shape[1]
        self._fill(work.original, work.ids, buffer, buffer.columns - need, ids, positions, mask)
        self.counters.forwards += 1
        self.counters.model_seconds += time.perf_counter() - began

    def _recomputed(
        self,
        original: Forward,
        like: Tensor,
        rows: Sequence[TokenSequence],
        tokens: Sequence[int],
        split: bool = False,
        before: Floats32 | None = None,
    ) -> list[Floats32]:
        """Compute records of the first tokens of some rows from the start, in one batch; [tokens, record] each.

        like: ids of the call, for dtype and device. tokens: their number for each row.
        split: compute each half of the columns in a forward of its own.
        before: records of the first tokens of the only row, which are not computed.
        """
        columns = max(tokens)
        firsts = [columns - count for count in tokens]
        buffer = KVBuffer.empty(self.shape, tokens, firsts, columns, like.device)
        ids, mask = np.zeros((len(rows), columns), np.int64), np.ones((len(rows), columns), np.int64)
        positions = np.zeros((len(rows), columns), np.int64)
        for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            ids[i, first:] = row.ids[: tokens[i]]
            positions[i, first:] = row.start + np.arange(tokens[i])
            mask[i, :first] = 0
        middle = columns // 2 if split and max(firsts) < columns // 2 else 0
        if before is not None:
            restore(buffer, 0, [before], len(before))
            middle = len(before)
        for low, high in ((0, middle), (middle, columns)):
            if low < high and (low or before is None):
                part = None if mask[:, :high].all() else mask[:, :high]
                self._fill(original, like, buffer, low, ids[:, low:high], positions[:, low:high], part)
        return [buffer.records(i, 0, count) for i, count in enumerate(tokens)]

    def _fill(
        self, original: Forward, like: Tensor, buffer: KVBuffer, filled: int, ids: Any, positions: Any, mask: Any
    ) -> None:
        """Compute the columns of a buffer after the first `filled` ones. like: ids of the call (dtype, device)."""
        device, stop = like.device, filled + ids.shape[1]
        call: dict[str, Any] = {"position_ids": torch.from_numpy(positions).to(device)}
        if not self.shape.takes_positions:
            call = {}
        output = original(
            input_ids=torch.from_numpy(ids).to(like),
            attention_mask=None if mask is None else torch.from_numpy(mask).to(device),
            past_key_values=cache_of(buffer, filled),
            use_cache=True,
            return_dict=True,
            **call,
        )
        buffer.states[:, filled:stop] = output.last_hidden_state

    def _restore(self, work: _Work, group: Sequence[TokenSequence], buffer: KVBuffer, known: Sequence[int]) -> None:
        """Write the known prefix of each row into the buffer, from another row of the call or from the store."""
        seen: dict[tuple[int, ...], int] = {}
        for i in sorted(range(len(group)), key=lambda i: -known[i]):
            tokens, donor = known[i], work.waves.donor(group[i])
            if not tokens:
                continue
            if donor:
                source, j = work.places[donor[0]]
                buffer.take(i, source, j, tokens)
                self.counters.shared += tokens
                continue
            first = seen.setdefault(group[i].chain, i)
            if first != i:  # rows with the same stored prefix: write it once, and copy it from row to row
                buffer.take(i, buffer, first, tokens)
            else:
                blocks = [work.records[number] for number in group[i].chain]
                restore(buffer, i, blocks, tokens, self._blocks.encoding)
            self.counters.restored += tokens


def restore(
    buffer: KVBuffer, i: int, blocks: Sequence[Floats32 | Tensor], tokens: int, encoding: KVEncoding | None = None
) -> None:
    """Write the first tokens of row i of a buffer from consecutive KV blocks, each [its tokens, width].

    encoding: stored form of the blocks; None: that without rounding.
    """
    encoding = encoding or KVEncoding.of(buffer.shape)
    arrays = [block for block in blocks if isinstance(block, np.ndarray)]
    if len(arrays) < len(blocks) or buffer.states.device.type != "cpu":
        buffer.restore(i, 0, *encoding.parts(_joined(blocks, buffer, encoding)[:tokens]))
        return
    at = 0
    for block in arrays:  # one by one: joining them would be another copy
        part = block[: tokens - at]
        if buffer.in_arrays:
            buffer.restore_from(i, at, *encoding.parts(part))
        else:  # of another dtype: rounded while it is copied
            buffer.restore(i, at, *encoding.parts(tensor_of(part)))
        at += len(block)


def _joined(blocks: Sequence[Floats32 | Tensor], buffer: KVBuffer, encoding: KVEncoding) -> Tensor:
    """Return the blocks as one tensor [tokens, width] on the buffer's device."""
    device, dtype = buffer.states.device, buffer.states.dtype if encoding.exact else torch.float32
    arrays = [block for block in blocks if isinstance(block, np.ndarray)]
    if len(arrays) == len(blocks):
        return torch.from_numpy(np.concatenate(arrays)).to(device)
    return torch.cat([torch.as_tensor(block).to(device, dtype) for block in blocks])


def _in_layout(layout: PaddedBatch, places: Sequence[tuple[KVBuffer, int]], *, cached: bool) -> KVBuffer:
    """Return a buffer with the rows in the layout of the call: the buffer itself if it has this layout, else a copy.

    places: buffer and row in the buffer, for each row of the call. cached: copy keys and values beside the states.
    """
    buffer, columns = places[0][0], layout.ids.shape[1]
    same_rows = [(other is buffer, i) for other, i in places] == [(True, i) for i in range(len(buffer.lengths))]
    if same_rows and buffer.columns == columns and list(buffer.firsts) == layout.firsts:
        for i, first in enumerate(buffer.firsts):
            buffer.states[i, :first] = 0
        return buffer
    whole = KVBuffer.empty(buffer.shape, layout.lengths, layout.firsts, columns, buffer.states.device, planes=cached)
    for i, (source, j) in enumerate(places):
        whole.take(i, source, j, layout.lengths[i])
    return whole


def _forward_cost(trunk: nn.Module) -> int:
    """Estimate the cost of a forward apart from its tokens, in tokens. A factor of three makes little difference.

    Not measured, so that equal calls are computed in equal batches in every process.
    """
    embeddings = [module for module in trunk.modules() if isinstance(module, nn.Embedding)]
    numbers = sum(weight.numel() for weight in trunk.parameters()) - sum(each.weight.numel() for each in embeddings)
    cpu = next(trunk.parameters()).device.type == "cpu"
    # reading the weights costs as much as some tokens (measured: 32 for GPT-2-small); calls of modules add to it
    calls = 16e-6 * sum(1 for _ in trunk.modules()) * (5e10 if cpu else 2e14) / (2 * max(1, numbers))
    return int(calls) + (32 if cpu else 64)

"""Log-likelihoods of tokens with a causal model, by plain forward passes; stored ones are read."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.decoders.answer_audits import audit_likelihoods
from llmcache.decoders.answer_bank import LIKELIHOODS
from llmcache.decoders.prefix_cache import restored_shares
from llmcache.decoders.prefix_order import prefix_order
from llmcache.decoders.prompts import Attached, forward_call, logits_of, padding_id
from llmcache.decoders.stored_answers import StoredResults
from llmcache.model.forward_patch import OwnHook
from llmcache.model.row_batches import Batching, batching_of

_STORED = Batching(padded=True, equal=True, causal=True)
"""Batching rule of every model whose log-likelihoods are stored."""
CountedRow: TypeAlias = tuple[list[int], int]
"""Token ids of a row, and the number of its last tokens whose log-likelihoods count."""


@dataclass(slots=True)
class Likelihoods:
    """Log-likelihoods of the rows of one prompt. values: in nats, float64 [tokens that count] of each row.

    reused: share of the rows that came from the store. restored: share of the rows' tokens that were not computed.
    """

    values: list[NDArray[np.float64]]
    reused: float
    restored: float


def likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[CountedRow]],
    *,
    attached: Attached = nullcontext,
    stored: StoredResults | None = None,
    batch_size: int = 32,
    stored_only: bool = False,
) -> Iterator[list[tuple[int, Likelihoods]]]:
    """Yield the log-likelihoods of the rows of each prompt with the number of the prompt.

    The prompts whose rows are all stored come first, then batches of at most `batch_size` rows, or of one prompt.
    Prompts with common beginnings share batches. A batch is stored before it is yielded.
    prompts: for each prompt its rows, at least one. stored_only: yield the prompts only whose rows are all stored.
    """
    if not prompts:
        return
    known: dict[tuple[int, ...], Floats32] = {}
    if stored is not None:
        known = _stored_likelihoods(model, tokenizer, [row for rows in prompts for row in rows], stored)
    whole, open_ = list[int](), list[int]()
    for i, rows in enumerate(prompts):
        (whole if all(_keyed(row) in known for row in rows) else open_).append(i)
    if whole:
        yield [(i, _collected(prompts[i], known, {}, {})) for i in whole]
    if stored_only or not open_:
        return
    if stored is not None:
        batching = scoring_batches(model, tokenizer)
        longest = max(len(ids) for i in open_ for ids, _ in prompts[i])
        if not (batching.causal and batching.padded) or batching.reach.refusal(longest):
            stored = None  # the values depend on the other rows of a batch
        else:
            _audit_sample(model, tokenizer, stored)
    stems = [prompts[i][0][0][: max(1, len(prompts[i][0][0]) - prompts[i][0][1])] for i in open_]
    for batch in _batches([open_[i] for i in prefix_order(stems)], prompts, known, batch_size):
        began = time.perf_counter()
        wanted = list(dict.fromkeys(_keyed(row) for i in batch for row in prompts[i] if _keyed(row) not in known))
        rows = [(list(ids), counted) for *ids, counted in wanted]
        fresh, shares = {}, {}
        for j, values, share in computed_likelihoods(model, tokenizer, rows, batch_size, attached):
            fresh[wanted[j]], shares[wanted[j]] = values.astype(np.float32), share
        if stored is not None:
            numbers = [fresh[key] for key in wanted]
            stored.likelihoods.put(LIKELIHOODS, wanted, numbers, time.perf_counter() - began)
        yield [(i, _collected(prompts[i], known, fresh, shares)) for i in batch]


def _keyed(row: CountedRow) -> tuple[int, ...]:
    """Return the ids of a row and the number of tokens that count, which is compared as if it were an id."""
    return (*row[0], row[1])


def _collected(
    rows: Sequence[CountedRow],
    known: Mapping[tuple[int, ...], Floats32],
    fresh: Mapping[tuple[int, ...], Floats32],
    shares: Mapping[tuple[int, ...], float],
) -> Likelihoods:
    """Return the values of the rows of a prompt. known: stored values. fresh: computed ones, with shares restored."""
    keys = [_keyed(row) for row in rows]
    values = [(known[key] if key in known else fresh[key]).astype(np.float64) for key in keys]
    tokens = np.array([len(ids) for ids, _ in rows], np.float64)
    restored = float(np.dot(tokens, [shares.get(key, 1.0) for key in keys]) / tokens.sum())
    return Likelihoods(values, sum(key in known for key in keys) / len(keys), restored)


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[CountedRow]], known: Container[tuple[int, ...]], size: int
) -> Iterator[list[int]]:
    """Split prompts into batches of at most `size` rows that are not known, or of one prompt with more rows.

    Prompts with equal rows share a batch, so that they are computed once.
    """
    equal: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i in order:
        equal.setdefault(tuple(map(_keyed, prompts[i])), []).append(i)
    batch, filled = list[int](), 0
    for keys, places in equal.items():
        count = sum(key not in known for key in keys)
        if batch and filled + count > size:
            yield batch
            batch, filled = [], 0
        batch, filled = batch + places, filled + count
    if batch:
        yield batch


def _stored_likelihoods(
    model: Any, tokenizer: Any, rows: Sequence[CountedRow], stored: StoredResults
) -> dict[tuple[int, ...], Floats32]:
    """Return the stored log-likelihoods of rows, by `_keyed`. ModelMismatch when an audit finds others."""
    bank, keyed = stored.likelihoods, list(dict.fromkeys(map(_keyed, rows)))
    numbers, places = bank.numbers(LIKELIHOODS, keyed)
    # a forged store may have another number of values
    found = {i: each for i, each in enumerate(numbers) if each is not None and len(each) == keyed[i][-1]}
    at = list(found)
    entries = [(list(keyed[i][:-1]), keyed[i][-1]) for i in at]
    _audit(model, tokenizer, stored, entries, list(found.values()), places[at])
    known = {keyed[i]: each for i, each in found.items()}
    stored.counters.answers_stored += sum(_keyed(row) in known for row in rows)
    return known


def _audit_sample(model: Any, tokenizer: Any, stored: StoredResults) -> None:
    """Audit a few stored entries, since a changed model must not add results to those of the unchanged one."""
    sampled = stored.likelihoods.sample(LIKELIHOODS)
    entries = [(ids[:-1].tolist(), int(ids[-1])) for ids, *_ in sampled]
    places = np.array([row for *_, row in sampled], np.int64)
    _audit(model, tokenizer, stored, entries, [value for _, value, _ in sampled], places)


def _audit(
    model: Any,
    tokenizer: Any,
    stored: StoredResults,
    entries: Sequence[CountedRow],
    values: Sequence[Floats32],
    places: NDArray[np.int64],
) -> None:
    """Compare some of these entries with the model alone. places: their rows in the bank. ModelMismatch when they
    differ."""

    def recompute(some: Sequence[int]) -> list[Floats32]:
        chosen = [entries[i] for i in some]
        # without the cache, whose prefixes may be of another model, too; what is stored needs no trial of batches
        rows = computed_likelihoods(model, tokenizer, chosen, len(some), nullcontext, _STORED)
        computed = {i: each for i, each, _ in rows}
        return [computed[i].astype(np.float32) for i in range(len(some))]

    lengths = [len(ids) for ids, _ in entries]
    audit_likelihoods(stored.likelihoods.evidence, places, values, lengths, model, recompute)


def computed_likelihoods(
    model: Any,
    tokenizer: Any,
    rows: Sequence[CountedRow],
    batch_size: int,
    attached: Attached,
    batching: Batching | None = None,
) -> Iterator[tuple[int, NDArray[np.float64], float]]:
    """Yield for each row its number, the log-likelihoods of its last tokens, computed by the model, and the share of
    its tokens that were restored.

    Rows with common prefixes share batches. They are padded on the right: a causal model does not attend to this
    padding, and counts positions as for the row alone. batching: of the model; None to find it by trials.
    """
    if not rows:
        return
    padding, batching = padding_id(model, tokenizer), batching or scoring_batches(model, tokenizer)
    # the prediction after the last id is not needed, so a causal model is not given this id
    inputs = [ids[:-1] if batching.causal and not batching.reach.refusal(len(ids)) else ids for ids, _ in rows]
    lengths = list(map(len, inputs))
    # rows with common prefixes next to each other: the prefix cache computes a prefix once per batch
    batches = list(batching.batches(_by_length_and_prefix(rows), lengths, batch_size))
    with torch.inference_mode(), attached(), restored_shares() as shares:
        for chosen in batches:
            shares.clear()
            call = forward_call(model, [inputs[i] for i in chosen], padding)
            counted = [rows[i][1] for i in chosen]
            ends = [len(rows[i][0]) - 1 for i in chosen]
            of = np.repeat(np.arange(len(chosen)), counted)
            columns = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counted, strict=True)])
            wanted = np.concatenate([rows[i][0][-n:] for i, n in zip(chosen, counted, strict=True)])
            logits = logits_at(model, call, torch.from_numpy(of), torch.from_numpy(columns))
            asked = torch.from_numpy(wanted)[:, None].to(logits.device)
            likely = torch.log_softmax(logits.float(), -1).gather(1, asked)
            values = np.split(likely[:, 0].double().cpu().numpy(), np.cumsum(counted)[:-1])
            known = shares[0] if shares and len(shares[0]) == len(chosen) else [0.0] * len(chosen)
            yield from zip(chosen, values, known, strict=True)


def scoring_batches(model: Any, tokenizer: Any) -> Batching:
    """Return which rows may share a batch of the model for their logits; a trial shows it, once for each model."""
    padding = padding_id(model, tokenizer)

    def probed(batch: list[list[int]]) -> list[Tensor]:
        """Return the logits of each row, run in one batch; of several rows with `logits_at`, as below."""
        if len(batch) == 1:
            return [logits_of(model, forward_call(model, batch, padding))[0]]
        of = torch.cat([torch.full((len(row),), i) for i, row in enumerate(batch)])
        columns = torch.cat([torch.arange(len(row)) for row in batch])
        logits = logits_at(model, forward_call(model, batch, padding), of, columns)
        return list(torch.split(logits, [len(row) for row in batch]))

    return batching_of(model, "logits", probed)


def logits_at(model: Any, call: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """Return the logits at these rows and columns of a call, [n, vocabulary].

    The head, a third of a small model, is computed for these places only. `logits_to_keep` would need the same columns
    for all rows.
    """

    inside = 0  # nested calls of the decoder: its first call may run trial forwards of the decoder

    def enter(_: Any, __: Any) -> None:
        nonlocal inside
        inside += 1

    def pick(_: Any, __: Any, output: Any) -> Any:
        nonlocal inside
        inside -= 1
        states = getattr(output, "last_hidden_state", None)
        if states is not None and not inside:
            output.last_hidden_state = states[rows.to(states.device), columns.to(states.device)][None]
        return output

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, torch.nn.Module):
        return logits_of(model, call)[rows.to(model.device), columns.to(model.device)]
    # OwnHook: the hooks must not act in other threads that run the model, nor in copies of it
    hooks = (
        decoder.register_forward_pre_hook(OwnHook(decoder, enter)),
        decoder.register_forward_hook(OwnHook(decoder, pick)),
    )
    try:
        logits = logits_of(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape[:2] == (1, len(rows)):
        return logits[0]
    # here the head does not read the output of get_decoder()
    return logits[rows.to(logits.device), columns.to(logits.device)]


def _by_length_and_prefix(rows: Sequence[tuple[list[int], int]]) -> list[int]:
    """Return the order of the rows: grouped by the tokens before those that count, groups with long rows first.

    rows: ids, and the number of last tokens that count.
    """
    longest: dict[tuple[int, ...], int] = {}
    stems = [tuple(ids[: max(1, len(ids) - n)]) for ids, n in rows]
    for stem, (ids, _) in zip(stems, rows, strict=True):
        longest[stem] = max(longest.get(stem, 0), len(ids))
    return sorted(range(len(rows)), key=lambda i: (-longest[stems[i]], stems[i], -len(rows[i][0])))

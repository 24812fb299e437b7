"""Log-likelihoods with a causal model: multiple choice and perplexity, by plain forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
from llmcache.decoders.prompts import Attached, check_batch_size, forward_call, logits_of, padding_id, prompt_ids
from llmcache.decoders.stored_answers import StoredResults
from llmcache.errors import ConfigError
from llmcache.model.forward_patch import OwnHook
from llmcache.model.row_batches import Batching, batching_of
from llmcache.records import check_many, check_texts

CountedRow: TypeAlias = tuple[list[int], int]
"""Token ids of a row, and the number of its last tokens whose log-likelihoods count."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-likelihoods of choices given their prompts, in nats.

    total: float64 [prompts, choices]. tokens: int64 [prompts, choices], tokens of each choice. Where a prompt has fewer
    choices than others, total is -inf and tokens 0.
    reused: for each prompt, the share of its choices whose scores came from the store, float64 [prompts]. restored: for
    each prompt, the share of the tokens of its rows that were not computed, float64 [prompts].
    """

    total: NDArray[np.float64]
    tokens: NDArray[np.int64]
    reused: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    restored: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def per_token(self) -> NDArray[np.float64]:
        """Mean log-likelihood per token of each choice, float64 [prompts, choices]."""
        return self.total / np.maximum(self.tokens, 1)


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    attached: Attached = nullcontext,
    stored: StoredResults | None = None,
    batch_size: int = 32,
) -> Scores:
    """Compute the log-likelihood of each choice as the continuation of its prompt.

    choices: the same for all prompts, or a list for each prompt. A choice has its own leading space.
    As in evaluation harnesses, prompt and choice are tokenised as one text. White space at the end of the prompt
    (blanks, tabs, line ends, no-break spaces) counts for the choice. The choice begins at the first token that the
    prompt alone does not have, so a token that spans both counts for the choice. A prompt without tokens is replaced
    by the tokenizer's first (or last) special token.
    ConfigError when there is not one list for each prompt, or a choice has no tokens.
    """
    check_batch_size(batch_size)
    check_texts(prompts, "prompts")
    check_many(choices, "choices")
    by_prompt = _of_each(choices, len(prompts))
    if len(by_prompt) != len(prompts):
        raise ConfigError(
            f"there are {len(prompts)} prompts and {len(by_prompt)} lists of choices; give one list for each"
        )
    rows = [
        choice_rows(tokenizer, prompt, of_prompt, f"prompt {i}")
        for i, (prompt, of_prompt) in enumerate(zip(prompts, by_prompt, strict=True))
    ]
    total = np.full((len(prompts), max(map(len, by_prompt), default=0)), -np.inf)
    tokens = np.zeros(total.shape, np.int64)
    reused, restored = np.ones(len(prompts)), np.ones(len(prompts))
    for batch in likelihoods(model, tokenizer, rows, attached=attached, stored=stored, batch_size=batch_size):
        for i, found in batch:
            total[i, : len(found.values)] = [values.sum() for values in found.values]
            tokens[i, : len(found.values)] = list(map(len, found.values))
            reused[i], restored[i] = found.reused, found.restored
    return Scores(total, tokens, reused, restored)


def choice_rows(tokenizer: Any, prompt: str, choices: Sequence[str], name: str) -> list[CountedRow]:
    """Return a row for each choice of a prompt. name: of the prompt, in messages. ConfigError as of `score`."""
    stem, rows = prompt_ids(tokenizer, prompt.rstrip()), []
    for j, choice in enumerate(choices):
        whole = prompt_ids(tokenizer, prompt + choice)
        shared = _common_prefix(stem, whole)
        if len(whole) == shared:
            raise ConfigError(f"choice {j} of {name} has no tokens of its own: {choice!r}")
        if not shared:
            whole, shared = [_first(tokenizer), *whole], 1
        rows.append((whole, len(whole) - shared))
    return rows


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    window: int,
    stride: int | None = None,
    attached: Attached = nullcontext,
    stored: StoredResults | None = None,
    batch_size: int = 8,
) -> float:
    """Return the perplexity of texts: exp of the mean negative log-likelihood per token, over windows of the texts.

    window: tokens of a window, at least 2. stride: tokens from one window to the next; None: windows do not overlap.
    A token in two windows counts in the first of them. So a token after the first window has at least window - stride
    tokens before it. The first token of a text has no context and does not count.
    ConfigError when no token counts, or window or stride is out of range.
    """
    check_batch_size(batch_size)
    step = window if stride is None else stride
    if not 1 <= step <= window or window < 2:
        raise ConfigError(f"window is at least 2 tokens and stride from 1 to window, got {window} and {step}")
    rows = []
    texts = [texts] if isinstance(texts, str) else texts
    check_texts(texts, "texts")
    for text in texts:
        ids, done = prompt_ids(tokenizer, text), 1
        for start in range(0, len(ids), step):
            stop = min(start + window, len(ids))
            counted = min(stop - done, stop - start - 1)
            if counted > 0:
                rows.append((ids[start:stop], counted))
            done = stop
            if stop == len(ids):
                break
    sums, windows = np.zeros(len(rows)), [[row] for row in rows]
    for batch in likelihoods(model, tokenizer, windows, attached=attached, stored=stored, batch_size=batch_size):
        for place, found in batch:
            sums[place] = found.values[0].sum()
    count = sum(counted for _, counted in rows)
    if not count:
        raise ConfigError("the texts have no token that follows another; perplexity needs at least two tokens")
    return math.exp(-float(sums.sum()) / count)


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
) -> Iterator[list[tuple[int, Likelihoods]]]:
    """Yield the log-likelihoods of the rows of each prompt with the number of the prompt.

    The prompts whose rows are all stored come first, then batches of at most `batch_size` rows, or of one prompt.
    Prompts with common beginnings share batches. A batch is stored before it is yielded.
    prompts: for each prompt its rows, at least one.
    """
    if not prompts:
        return
    if stored is not None:
        batching = scoring_batches(model, tokenizer)
        longest = max(len(ids) for rows in prompts for ids, _ in rows)
        if not (batching.causal and batching.padded) or batching.reach.refusal(longest):
            stored = None  # the values depend on the other rows of a batch
    known: dict[tuple[int, ...], Floats32] = {}
    if stored is not None:
        known = _stored_likelihoods(model, tokenizer, [row for rows in prompts for row in rows], stored, attached)
    whole, open_ = list[int](), list[int]()
    for i, rows in enumerate(prompts):
        (whole if all(_keyed(row) in known for row in rows) else open_).append(i)
    if whole:
        yield [(i, _collected(prompts[i], known, {}, {})) for i in whole]
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
    model: Any, tokenizer: Any, rows: Sequence[CountedRow], stored: StoredResults, attached: Attached
) -> dict[tuple[int, ...], Floats32]:
    """Return the stored log-likelihoods of rows, by `_keyed`. ModelMismatch when an audit finds others."""
    bank, keyed = stored.likelihoods, list(dict.fromkeys(map(_keyed, rows)))
    numbers, places = bank.numbers(LIKELIHOODS, keyed)
    # a forged store may have another number of values
    found = {i: each for i, each in enumerate(numbers) if each is not None and len(each) == keyed[i][-1]}

    def audit(entries: list[CountedRow], values: list[Floats32], of_bank: NDArray[np.int64]) -> None:
        def recompute(some: Sequence[int]) -> list[Floats32]:
            chosen = [entries[i] for i in some]
            computed = {i: each for i, each, _ in computed_likelihoods(model, tokenizer, chosen, len(some), attached)}
            return [computed[i].astype(np.float32) for i in range(len(some))]

        audit_likelihoods(bank.evidence, of_bank, values, model, recompute)

    at = list(found)
    audit([(list(keyed[i][:-1]), keyed[i][-1]) for i in at], list(found.values()), places[at])
    if len(found) < len(keyed):  # a changed model must not add results to those of the unchanged one
        sampled = bank.sample(LIKELIHOODS)
        entries = [(ids[:-1].tolist(), int(ids[-1])) for ids, *_ in sampled]
        audit(entries, [value for _, value, _ in sampled], np.array([row for *_, row in sampled], np.int64))
    known = {keyed[i]: each for i, each in found.items()}
    stored.counters.answers_stored += sum(_keyed(row) in known for row in rows)
    return known


def computed_likelihoods(
    model: Any, tokenizer: Any, rows: Sequence[CountedRow], batch_size: int, attached: Attached
) -> Iterator[tuple[int, NDArray[np.float64], float]]:
    """Yield for each row its number, the log-likelihoods of its last tokens, computed by the model, and the share of
    its tokens that were restored.

    Rows with common prefixes share batches. They are padded on the right: a causal model does not attend to this
    padding, and counts positions as for the row alone.
    """
    if not rows:
        return
    padding, batching = padding_id(model, tokenizer), scoring_batches(model, tokenizer)
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
            logits = _logits_at(model, call, torch.from_numpy(of), torch.from_numpy(columns))
            asked = torch.from_numpy(wanted)[:, None].to(logits.device)
            likely = torch.log_softmax(logits.float(), -1).gather(1, asked)
            values = np.split(likely[:, 0].double().cpu().numpy(), np.cumsum(counted)[:-1])
            known = shares[0] if shares and len(shares[0]) == len(chosen) else [0.0] * len(chosen)
            yield from zip(chosen, values, known, strict=True)


def scoring_batches(model: Any, tokenizer: Any) -> Batching:
    """Return which rows may share a batch of the model for their logits; a trial shows it, once for each model."""
    padding = padding_id(model, tokenizer)

    def probed(batch: list[list[int]]) -> list[Tensor]:
        """Return the logits of each row, run in one batch; of several rows with `_logits_at`, as below."""
        if len(batch) == 1:
            return [logits_of(model, forward_call(model, batch, padding))[0]]
        of = torch.cat([torch.full((len(row),), i) for i, row in enumerate(batch)])
        columns = torch.cat([torch.arange(len(row)) for row in batch])
        logits = _logits_at(model, forward_call(model, batch, padding), of, columns)
        return list(torch.split(logits, [len(row) for row in batch]))

    return batching_of(model, "logits", probed)


def _logits_at(model: Any, call: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two rows of token ids."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _by_length_and_prefix(rows: Sequence[tuple[list[int], int]]) -> list[int]:
    """Return the order of the rows: grouped by the tokens before those that count, groups with long rows first.

    rows: ids, and the number of last tokens that count.
    """
    longest: dict[tuple[int, ...], int] = {}
    stems = [tuple(ids[: max(1, len(ids) - n)]) for ids, n in rows]
    for stem, (ids, _) in zip(stems, rows, strict=True):
        longest[stem] = max(longest.get(stem, 0), len(ids))
    return sorted(range(len(rows)), key=lambda i: (-longest[stems[i]], stems[i], -len(rows[i][0])))


def _first(tokenizer: Any) -> int:
    """Return the token id that stands for an empty prompt."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("a prompt has no tokens and the tokenizer no special token to begin with; give a longer prompt")


def _of_each(choices: Sequence[Any], prompts: int) -> list[list[str]]:
    """Return one list of choices for each prompt."""
    if not isinstance(choices, Sequence):
        raise ConfigError(f"choices are a list of texts, or a list for each prompt, got a {type(choices).__name__}")
    if any(isinstance(choice, str) for choice in choices):
        check_texts(choices, "choices")
        return [list(choices)] * prompts
    for of_prompt in choices:
        check_texts(of_prompt, "choices of a prompt")
    return [list(of_prompt) for of_prompt in choices]

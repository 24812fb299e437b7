"""What a causal model writes after a text, and how likely it finds one: generation, multiple choice, perplexity.

Plain transformers calls. `attached` is entered around each, and is where a cache comes in: without one they are the
uncached results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.errors import ConfigError
from llmcache.model.forward_patch import OwnHook
from llmcache.model.row_batches import batching_of
from llmcache.records import check_many, check_texts

Attached: TypeAlias = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Generated:
    """What was written. ids: int64 [new tokens] for each prompt (and each returned sequence), as `generate` gives."""

    texts: list[str]
    ids: list[NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-likelihoods in nats of choices given their prompts. Where a prompt has fewer choices than others: -inf, 0.

    total: float64 [prompts, choices]. tokens: int64, of each choice.
    """

    total: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def per_token(self) -> NDArray[np.float64]:
        return self.total / np.maximum(self.tokens, 1)


# -- generation ---------------------------------------------------------------------------------------------


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    attached: Attached = nullcontext,
    batch_size: int = 32,
    **generate_kwargs: Any,
) -> Generated:
    """What `model.generate` writes after each prompt, in batches in the order given, padded on the left.

    Of an encoder-decoder what it makes of each text, padded on the right, since its encoder counts from the left.
    Where padding changes what a model writes (recurrent ones), only prompts of equal length share a batch.
    generate_kwargs: for `model.generate`. With num_return_sequences there are that many answers per prompt. A prompt
    that is too long for the model ends in the model's own error.
    """
    _check_batch_size(batch_size)
    check_texts(prompts, "prompts")
    whole = bool(getattr(model.config, "is_encoder_decoder", False))
    rows = [list(tokenizer(prompt)["input_ids"]) if whole else _ids(tokenizer, prompt) for prompt in prompts]
    if not rows:
        return Generated([], [])
    padding, lengths = _padding(model, tokenizer), list(map(len, rows))
    batching = batching_of(model, "generate", lambda some: _first_steps(model, some, padding, left=not whole))
    more = generate_kwargs.get("max_new_tokens") or getattr(model.generation_config, "max_new_tokens", None) or 20
    answers: dict[int, list[NDArray[np.int64]]] = {}
    with torch.inference_mode(), attached():
        for chosen in batching.batches(range(len(rows)), lengths, batch_size, int(more)):
            ids, mask = padded([rows[i] for i in chosen], padding, model.device, left=not whole)
            given = {"pad_token_id": padding, **generate_kwargs}
            found = model.generate(input_ids=ids, attention_mask=mask, **given)
            found = found if isinstance(found, Tensor) else found.sequences
            written = list(found[:, 0 if whole else ids.shape[1] :].cpu().numpy())
            each = len(written) // len(chosen)
            answers |= {row: written[each * i : each * (i + 1)] for i, row in enumerate(chosen)}
    every = [ids for row in range(len(rows)) for ids in answers[row]]
    return Generated([tokenizer.decode(ids, skip_special_tokens=True) for ids in every], every)


def _first_steps(model: Any, rows: list[list[int]], padding: int, *, left: bool) -> list[Tensor]:
    """Logits of the first two tokens that are generated after each row in one batch; [2, vocabulary] each."""
    ids, mask = padded(rows, padding, model.device, left=left)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=padding,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(torch.stack(found.logits, 1))


# -- likelihoods --------------------------------------------------------------------------------------------


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    attached: Attached = nullcontext,
    batch_size: int = 32,
) -> Scores:
    """Log-likelihood of each choice as what follows its prompt.

    choices: the same for all prompts, or a list for each prompt. A choice brings its own leading space.
    As evaluation harnesses do it: prompt and choice are tokenised as one text, and white space at the end of the prompt
    (blanks, tabs, line ends, no-break spaces) counts for the choice. The choice begins at the first token that the
    prompt alone does not have, so where both share a token that token counts for the choice. A prompt without tokens
    of its own becomes the tokenizer's first (or last) special token.
    """
    _check_batch_size(batch_size)
    check_texts(prompts, "prompts")
    check_many(choices, "choices")
    each = _of_each(choices, len(prompts))
    if len(each) != len(prompts):
        raise ConfigError(f"there are {len(prompts)} prompts and {len(each)} lists of choices; give one list for each")
    rows, places = [], []
    for i, (prompt, some) in enumerate(zip(prompts, each, strict=True)):
        stem = _ids(tokenizer, prompt.rstrip())
        for j, choice in enumerate(some):
            whole = _ids(tokenizer, prompt + choice)
            shared = _common_beginning(stem, whole)
            if len(whole) == shared:
                raise ConfigError(f"choice {j} of prompt {i} has no tokens of its own: {choice!r}")
            if not shared:
                whole, shared = [_first(tokenizer), *whole], 1
            rows.append((whole, len(whole) - shared))
            places.append((i, j))
    total = np.full((len(prompts), max(map(len, each), default=0)), -np.inf)
    tokens = np.zeros(total.shape, np.int64)
    for start, values in _likelihoods(model, tokenizer, rows, batch_size, attached):
        i, j = places[start]
        total[i, j], tokens[i, j] = values.sum(), len(values)
    return Scores(total, tokens)


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    window: int,
    stride: int | None = None,
    attached: Attached = nullcontext,
    batch_size: int = 8,
) -> float:
    """exp of the mean negative log-likelihood per token, over texts cut into windows.

    window: tokens of a window. stride: tokens from one window to the next; a token that two windows have counts in
    the first, where it has less before it only if it is among the first window. None: windows that do not overlap.
    The first token of a text has nothing before it and does not count.
    """
    _check_batch_size(batch_size)
    step = window if stride is None else stride
    if not 1 <= step <= window or window < 2:
        raise ConfigError(f"window is at least 2 tokens and stride from 1 to window, got {window} and {step}")
    rows = []
    many = [texts] if isinstance(texts, str) else texts
    check_texts(many, "texts")
    for text in many:
        ids, done = _ids(tokenizer, text), 1
        for start in range(0, len(ids), step):
            stop = min(start + window, len(ids))
            counted = min(stop - done, stop - start - 1)
            if counted > 0:
                rows.append((ids[start:stop], counted))
            done = stop
            if stop == len(ids):
                break
    sums = np.zeros(len(rows))
    for place, values in _likelihoods(model, tokenizer, rows, batch_size, attached):
        sums[place] = values.sum()
    count = sum(counted for _, counted in rows)
    if not count:
        raise ConfigError("the texts have no token that follows another; perplexity needs at least two tokens")
    return math.exp(-float(sums.sum()) / count)


def _likelihoods(
    model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], int]], batch_size: int, attached: Attached
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Log-likelihoods of the last tokens of each row, with the row's place; rows that are alike are computed together.

    rows: ids, and how many of them count.
    Padded on the right, where a causal model cannot see it and counts positions as for the row alone.
    """
    if not rows:
        return
    padding = _padding(model, tokenizer)

    def probed(some: list[list[int]]) -> list[Tensor]:
        """Logits of each row in one batch, by way of the places alone where there are several rows."""
        if len(some) == 1:
            return [_logits(model, _call(model, some, padding))[0]]
        of = torch.cat([torch.full((len(row),), i) for i, row in enumerate(some)])
        columns = torch.cat([torch.arange(len(row)) for row in some])
        found = _logits_at(model, _call(model, some, padding), of, columns)
        return list(torch.split(found, [len(row) for row in some]))

    batching = batching_of(model, "logits", probed)
    # nothing asks what follows the last id, which therefore is left out where nothing depends on it
    given = [ids[:-1] if batching.causal and not batching.reach.refusal(len(ids)) else ids for ids, _ in rows]
    lengths = list(map(len, given))
    # rows that begin alike next to each other: a batch shares what its rows have in common
    batches = list(batching.batches(_by_length_and_beginning(rows), lengths, batch_size))
    with torch.inference_mode(), attached():
        for chosen in batches:
            call = _call(model, [given[i] for i in chosen], padding)
            counted = [rows[i][1] for i in chosen]
            ends = [len(rows[i][0]) - 1 for i in chosen]
            of = np.repeat(np.arange(len(chosen)), counted)
            columns = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counted, strict=True)])
            wanted = np.concatenate([rows[i][0][-n:] for i, n in zip(chosen, counted, strict=True)])
            logits = _logits_at(model, call, torch.from_numpy(of), torch.from_numpy(columns))
            asked = torch.from_numpy(wanted)[:, None].to(logits.device)
            likely = torch.log_softmax(logits.float(), -1).gather(1, asked)
            values = np.split(likely[:, 0].double().cpu().numpy(), np.cumsum(counted)[:-1])
            yield from zip(chosen, values, strict=True)


def _logits_at(model: Any, call: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """Logits [n, vocabulary] at these places of a call. The head, a third of a small model, is computed for no others.

    `logits_to_keep` could only say the same columns for all rows.
    """

    inside = 0  # calls of the decoder at work: the first one may try out, inside itself, what the model can do

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
        return _logits(model, call)[rows.to(model.device), columns.to(model.device)]
    # other threads may run the model meanwhile, and a copy of it may be made: neither is to have its states picked
    hooks = (
        decoder.register_forward_pre_hook(OwnHook(decoder, enter)),
        decoder.register_forward_hook(OwnHook(decoder, pick)),
    )
    try:
        logits = _logits(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape[:2] == (1, len(rows)):
        return logits[0]
    return logits[rows.to(logits.device), columns.to(logits.device)]  # a model that knows no decoder of its own


def _call(model: Any, rows: Sequence[Sequence[int]], padding: int) -> dict[str, Any]:
    """Arguments for rows that are padded on the right, with a mask where there is padding."""
    ids, mask = padded(rows, padding, model.device, left=False)
    parameters = signature(model.forward).parameters
    call: dict[str, Any] = {"input_ids": ids}
    if not mask.all():
        call["attention_mask"] = mask
    if "use_cache" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        call["use_cache"] = False
    return call


def _logits(model: Any, call: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**call).logits
    return logits


def _common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two rows of token ids."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _by_length_and_beginning(rows: Sequence[tuple[list[int], int]]) -> list[int]:
    """Longest first, in families: a row's first tokens decide its family, the longest of a family its place."""
    longest: dict[tuple[int, ...], int] = {}
    stems = [tuple(ids[: max(1, len(ids) - n)]) for ids, n in rows]
    for stem, (ids, _) in zip(stems, rows, strict=True):
        longest[stem] = max(longest.get(stem, 0), len(ids))
    return sorted(range(len(rows)), key=lambda i: (-longest[stems[i]], stems[i], -len(rows[i][0])))


# -- tokens -------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Sequence[int]], padding: int, device: Any, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [rows, columns], padded on the left, or on the right."""
    columns = max(map(len, rows))
    ids = np.full((len(rows), columns), padding, np.int64)
    mask = np.zeros((len(rows), columns), np.int64)
    for i, row in enumerate(rows):
        here = slice(columns - len(row), columns) if left else slice(len(row))
        ids[i, here], mask[i, here] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the special tokens before the text, without those behind it."""
    ids = list(tokenizer(text)["input_ids"])
    last = tokenizer.eos_token_id
    if len(ids) > 1 and last is not None and ids[-1] == last and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def _first(tokenizer: Any) -> int:
    for one in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if one is not None:
            return int(one)
    raise ConfigError("a prompt has no tokens and the tokenizer no special token to begin with; give a longer prompt")


def _padding(model: Any, tokenizer: Any) -> int:
    """An id to pad with; masked, so that any will do."""
    ends = model.generation_config.eos_token_id
    for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, ends[0] if isinstance(ends, list) else ends):
        if one is not None:
            return int(one)
    return 0


def _of_each(choices: Sequence[Any], prompts: int) -> list[list[str]]:
    if not isinstance(choices, Sequence):
        raise ConfigError(f"choices are a list of texts, or a list for each prompt, got a {type(choices).__name__}")
    if any(isinstance(one, str) for one in choices):
        check_texts(choices, "choices")
        return [list(choices)] * prompts
    for some in choices:
        check_texts(some, "choices of a prompt")
    return [list(some) for some in choices]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")

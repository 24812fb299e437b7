"""Scores of texts with a causal model: multiple choice and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.decoders.likelihoods import CountedRow, likelihoods
from llmcache.decoders.prompts import (
    Attached,
    Prompt,
    Rendered,
    check_batch_size,
    check_prompts,
    prompt_ids,
    prompts_ids,
    rendered,
)
from llmcache.decoders.stored_answers import StoredResults
from llmcache.errors import ConfigError
from llmcache.records import check_many, check_texts


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
    prompts: Sequence[Prompt],
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
    check_prompts(prompts)
    check_many(choices, "choices")
    by_prompt = _of_each(choices, len(prompts))
    if len(by_prompt) != len(prompts):
        raise ConfigError(
            f"there are {len(prompts)} prompts and {len(by_prompt)} lists of choices; give one list for each"
        )
    rows = choice_rows(tokenizer, [rendered(tokenizer, prompt) for prompt in prompts], by_prompt)
    for i, of_prompt in enumerate(rows):
        if isinstance(of_prompt, str):
            raise ConfigError(f"prompt {i}: {of_prompt}")
    counted = [of_prompt for of_prompt in rows if not isinstance(of_prompt, str)]
    total = np.full((len(prompts), max(map(len, by_prompt), default=0)), -np.inf)
    tokens = np.zeros(total.shape, np.int64)
    reused, restored = np.ones(len(prompts)), np.ones(len(prompts))
    for batch in likelihoods(model, tokenizer, counted, attached=attached, stored=stored, batch_size=batch_size):
        for i, found in batch:
            total[i, : len(found.values)] = [values.sum() for values in found.values]
            tokens[i, : len(found.values)] = list(map(len, found.values))
            reused[i], restored[i] = found.reused, found.restored
    return Scores(total, tokens, reused, restored)


def choice_rows(
    tokenizer: Any, prompts: Sequence[Rendered | str], choices: Sequence[Sequence[str]]
) -> list[list[CountedRow] | str]:
    """Return a row of tokens for each choice of each prompt, or the reason why a prompt cannot be scored.

    choices: of each prompt, with their own leading white space. ConfigError when a prompt has no tokens, and the
    tokenizer no special token to begin with.
    """
    whole = [each if isinstance(each, Rendered) else Rendered(each, special=True) for each in prompts]
    stems = prompts_ids(tokenizer, [Rendered(each.text.rstrip(), each.special) for each in whole])
    joined = [
        Rendered(each.text + choice, each.special)
        for each, of_prompt in zip(whole, choices, strict=True)
        for choice in of_prompt
    ]
    ids = iter(prompts_ids(tokenizer, joined))
    found: list[list[CountedRow] | str] = []
    for stem, of_prompt in zip(stems, choices, strict=True):
        rows, reason = list[CountedRow](), ""
        for j, choice in enumerate(of_prompt):
            row = next(ids)
            shared = _common_prefix(stem, row)
            if len(row) == shared:
                reason = reason or f"choice {j} has no tokens of its own: {choice!r}"
                continue
            if not shared:
                row, shared = [_first(tokenizer), *row], 1
            rows.append((row, len(row) - shared))
        found.append(reason or rows)
    return found


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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two rows of token ids."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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

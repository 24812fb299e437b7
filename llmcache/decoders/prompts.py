"""Prompts as model inputs: texts and chats, token ids, padding, and the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llmcache.document import kind
from llmcache.errors import ConfigError
from llmcache.records import check_many, check_texts

Prompt: TypeAlias = str | Sequence[Mapping[str, str]]
"""Text, or the messages of a chat: mappings with "role" and "content"."""
Attached: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""Function that returns the context in which a model's forward uses the banks; nullcontext for none."""
_MOST_AT_ONCE = 4_000_000  # characters of one call of a tokenizer, whose result takes about 100 bytes for each token


def padded(rows: Sequence[Sequence[int]], padding: int, device: Any, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [rows, columns], padded on the left or on the right."""
    columns = max(map(len, rows))
    ids = np.full((len(rows), columns), padding, np.int64)
    mask = np.zeros((len(rows), columns), np.int64)
    for i, row in enumerate(rows):
        span = slice(columns - len(row), columns) if left else slice(len(row))
        ids[i, span], mask[i, span] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text that a tokenizer reads. special: whether the tokenizer adds its special tokens; a chat has them already."""

    text: str
    special: bool


class RefusedMessages(ConfigError):
    """Messages that the chat template of a tokenizer refuses."""


def check_prompts(prompts: Any) -> None:
    """Check that an argument is a sequence of prompts: texts, chats, or both. ConfigError otherwise."""
    check_many(prompts, "prompts")
    if not isinstance(prompts, Sequence) or not any(map(_is_chat, prompts)):
        check_texts(prompts, "prompts")
        return
    if all(isinstance(each, Mapping) and "role" in each for each in prompts):
        raise ConfigError("prompts must be a collection, got the messages of one chat; give a list of chats: [[...]]")
    for place, prompt in enumerate(prompts):
        if _is_chat(prompt):
            _check_messages(prompt, f"prompt {place}")
        elif not isinstance(prompt, str):
            found = f"{type(prompt).__name__}: {prompt!r:.60}"
            raise ConfigError(f"prompts are texts or lists of messages, and number {place} is a {found}")


def _is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages or one message, whatever its form."""
    if isinstance(value, Mapping):
        return True
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    return all(isinstance(each, Mapping) for each in value)


def _check_messages(messages: Any, what: str) -> None:
    """ConfigError unless a value is a sequence of messages. what: its name in the message."""
    if isinstance(messages, bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConfigError(f"{what} must be a text or a list of messages, got {kind(messages)}")
    if not messages:
        raise ConfigError(f"{what} is a chat without messages; give at least one")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"{what} has {kind(message)} as message {place}, not a mapping with 'role' and 'content'")
        for name in dict.fromkeys(("role", "content", *message)):
            if name not in message:
                raise ConfigError(f"{what} has no {name!r} in message {place}; it needs 'role' and 'content'")
            if not isinstance(message[name], str):
                raise ConfigError(f"{what} has {kind(message[name])} as {name!r} of message {place}, not a text")


def rendered(tokenizer: Any, prompt: Prompt) -> Rendered:
    """Return the text that a tokenizer reads for a prompt.

    A text is returned as it is. Messages are written by the chat template of the tokenizer, up to the place where the
    answer begins.
    ConfigError for messages of a wrong form, and when the tokenizer has no chat template, or one that cannot be read;
    RefusedMessages, a ConfigError, when the template refuses these messages.
    """
    if isinstance(prompt, str):
        return Rendered(prompt, special=True)
    _check_messages(prompt, "a prompt")
    try:
        from jinja2 import TemplateError, TemplateSyntaxError
    except ImportError as error:
        raise ConfigError("chat templates need jinja2; install it: pip install 'jinja2>=3.1'") from error
    _check_template(tokenizer)
    messages = [dict(message) for message in prompt]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the tokenizer's chat template is damaged in line {error.lineno}: {error}") from error
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        roles = ", ".join(message["role"] for message in messages[:9])
        raise RefusedMessages(
            f"the tokenizer's chat template refuses messages of these roles ({roles}): {_line(error)}"
        ) from error
    return Rendered(str(text), special=False)


def _check_template(tokenizer: Any) -> None:
    """ConfigError unless a tokenizer has a chat template for messages without tools."""
    try:
        present = hasattr(tokenizer, "apply_chat_template")
        if present and hasattr(tokenizer, "get_chat_template"):
            present = bool(tokenizer.get_chat_template())
        reason = ""
    except ValueError as error:  # no template, or several without a default
        present, reason = False, "" if getattr(tokenizer, "chat_template", None) is None else f" ({_line(error)})"
    if not present:
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__}) has no chat template{reason}; "
            "give texts as prompts, or set its chat_template"
        )


def _line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def prompt_ids(tokenizer: Any, prompt: Rendered | str) -> list[int]:
    """Return token ids with the special tokens before the text, without those after the text.

    A rendered chat has the special tokens that its template writes, and no others.
    """
    if isinstance(prompt, Rendered) and not prompt.special:
        return list(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    text = prompt.text if isinstance(prompt, Rendered) else prompt
    return _without_end(tokenizer, text, tokenizer(text)["input_ids"])


def prompts_ids(tokenizer: Any, prompts: Sequence[Rendered | str]) -> list[list[int]]:
    """Return `prompt_ids` of each prompt. Fast tokenizers read many prompts in one call, on all cores."""
    if not getattr(tokenizer, "is_fast", False):
        return [prompt_ids(tokenizer, prompt) for prompt in prompts]
    every = [each if isinstance(each, Rendered) else Rendered(each, special=True) for each in prompts]
    rows: list[list[int]] = [[] for _ in every]
    for special in (True, False):
        places = [i for i, each in enumerate(every) if each.special == special]
        for part in parts([len(every[i].text) for i in places]):
            texts = [every[places[i]].text for i in part]
            found = (
                tokenizer(texts)["input_ids"] if special else tokenizer(texts, add_special_tokens=False)["input_ids"]
            )
            for i, text, ids in zip(part, texts, found, strict=True):
                rows[places[i]] = _without_end(tokenizer, text, ids) if special else list(ids)
    return rows


def parts(characters: Sequence[int]) -> Iterator[range]:
    """Yield the numbers of consecutive texts that one call of a tokenizer may read. characters: length of each text."""
    start, size = 0, 0
    for i, each in enumerate(characters, 1):
        size += each
        if size >= _MOST_AT_ONCE or i == len(characters):
            yield range(start, i)
            start, size = i, 0


def _without_end(tokenizer: Any, text: str, row: Sequence[int]) -> list[int]:
    """Return the ids of a text without the end token that a tokenizer adds to it."""
    ids, last = list(row), tokenizer.eos_token_id
    if len(ids) > 1 and last is not None and ids[-1] == last and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def padding_id(model: Any, tokenizer: Any) -> int:
    """Return a token id for padding. Padding is masked, so any id will do."""
    ends = model.generation_config.eos_token_id
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, ends[0] if isinstance(ends, list) else ends):
        if token is not None:
            return int(token)
    return 0


def forward_call(model: Any, rows: Sequence[Sequence[int]], padding: int) -> dict[str, Any]:
    """Return the arguments for rows padded on the right, with a mask where there is padding."""
    ids, mask = padded(rows, padding, model.device, left=False)
    parameters = signature(model.forward).parameters
    call: dict[str, Any] = {"input_ids": ids}
    if not mask.all():
        call["attention_mask"] = mask
    if "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        call["use_cache"] = False
    return call


def logits_of(model: Any, call: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**call).logits
    return logits


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")

"""Settings of language-model jobs: their templates, and checks of what is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmcache.decoders.templates import PromptTemplate
from llmcache.errors import ConfigError


def context_of(model: Any) -> int:
    """Return the number of tokens that a model reads at most; 2**31 where its positions have no limit."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return 1 << 31


def job_template(template: str | PromptTemplate, *settings: Any) -> PromptTemplate:
    """Return the template of a job. settings: the arguments of `PromptTemplate` in order."""
    names = ("system", "chat", "examples", "answer", "syntax")
    if not isinstance(template, PromptTemplate):
        return PromptTemplate(template, **dict(zip(names, settings, strict=True)))
    given = [
        name for name, value, usual in zip(names, settings, (None, None, (), "answer", "format"), strict=True)
        if value != usual
    ]  # fmt: skip
    if given:
        raise ConfigError(f"{given[0]} belongs to the template; give it to PromptTemplate")
    return template


def check_generation(settings: Mapping[str, Any], choices: object, choices_field: object) -> None:
    """ConfigError for settings that task="generate" does not take. settings: for `model.generate`."""
    if choices is not None or choices_field is not None:
        raise ConfigError('choices are for task="score" and "classify"; "generate" writes free text')
    if (settings.get("num_return_sequences") or 1) != 1:
        raise ConfigError("a job writes one answer per record; leave num_return_sequences out")
    if "max_length" in settings:
        raise ConfigError("max_length counts the tokens of the prompt, which differ; give max_new_tokens")
    for name in ("generation_config", "tokenizer", "input_ids", "attention_mask", "inputs", "return_dict_in_generate"):
        if name in settings:
            raise ConfigError(f"{name} cannot be set for a job; give settings such as max_new_tokens one by one")


def check_choices(
    task: str, choices: Sequence[str] | None, choices_field: str | None, others: Mapping[str, Any]
) -> None:
    """ConfigError for wrong choices, and for `others`, settings of generation, which scoring does not take."""
    if others:
        raise ConfigError(f"task={task!r} generates nothing, so it has no setting {next(iter(others))!r}")
    if (choices is None) == (choices_field is None):
        raise ConfigError(f"task={task!r} scores choices; give either choices=[...] or choices_field=...")
    if choices is not None:
        wrong = _wrong_choices(choices)
        if wrong:
            raise ConfigError(f"choices {wrong}")


def _wrong_choices(choices: Any) -> str:
    """Return what is wrong with choices; "" if they are right."""
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"are a list of texts, got {choices!r:.60}"
    if not choices:
        return "are empty; give at least one"
    for i, choice in enumerate(choices):
        if not isinstance(choice, str):
            return f"are texts, and number {i} is {choice!r:.60}"
        if not choice.strip():
            return f"are texts, and number {i} is empty or white space"
        if choice in choices[:i]:
            return f"differ from each other, and {choice!r:.60} is there twice"
    return ""


def choices_in(values: Mapping[str, str], name: str) -> tuple[str, ...] | str:
    """Return the choices of a record, or the reason why they cannot be used. values: texts, or JSON, by field."""
    try:
        choices = json.loads(values[name])
    except ValueError:
        choices = values[name]
    wrong = _wrong_choices(choices)
    return f"has choices under {name!r} that {wrong}" if wrong else tuple(choices)

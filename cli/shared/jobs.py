"""Options of language-model jobs, and the cache of a language model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcache.cli.shared.options import Access
from llmcache.errors import ConfigError
from llmcache.indexes.store import Store

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

EMBED = "embed"

TaskOption = Annotated[
    str,
    typer.Option(
        help="embed: vectors. generate, score or classify: a job of a language model, which answers a prompt for each "
        "document."
    ),
]
Template = Annotated[
    str | None, typer.Option(help="With --task, prompt of a document, with its fields in braces: 'Topic of {text}:'.")
]
TemplateFile = Annotated[Path | None, typer.Option(help="With --task, file with the template.")]
Syntax = Annotated[str, typer.Option(help="Syntax of the template: format, for {field}; or jinja, for {{ field }}.")]
System = Annotated[str | None, typer.Option(help="With --task, system message; the prompt is then a chat.")]
Chat = Annotated[bool, typer.Option("--chat", help="With --task, write prompts by the model's chat template.")]
Examples = Annotated[
    Path | None, typer.Option(help="With --task, few-shot examples: .jsonl or .csv, with the fields and an answer.")
]
AnswerField = Annotated[str, typer.Option(help="Field of the examples with the answer.")]
Choice = Annotated[
    list[str] | None, typer.Option(help="Choice to score, or label; repeatable. For --task score and classify.")
]
ChoicesField = Annotated[str | None, typer.Option(help="Field of each document with a list of its own choices.")]
Separator = Annotated[
    str | None,
    typer.Option(
        help="Text between a prompt and a choice; by default one blank, or nothing beside white space and in a chat."
    ),
]
By = Annotated[str, typer.Option(help="Score that decides: total, or its mean per token or per character.")]
TooLongOption = Annotated[
    str, typer.Option(help="Prompt beyond the model's context: refuse it, or cut its longest field left or right.")
]
NoProvenance = Annotated[
    bool,
    typer.Option("--no-provenance", help="With --task, leave out where rows came from: the same job, the same bytes."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens of a generated answer; by default the model's own setting, or 64."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE for generation, such as num_beams=4; repeatable."),
]


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Options of a language-model job, as given on the command line."""

    task: str
    template: str | None = None
    template_file: Path | None = None
    syntax: str = "format"
    system: str | None = None
    chat: bool = False
    examples: Path | None = None
    answer: str = "answer"
    choices: list[str] = field(default_factory=list)
    choices_field: str | None = None
    by: str = "total"
    too_long: str = "refuse"
    no_provenance: bool = False
    max_new_tokens: int | None = None
    settings: list[str] = field(default_factory=list)
    separator: str | None = None

    def check_unused(self) -> None:
        """ConfigError for options of jobs where --task is embed."""
        usual = type(self)(EMBED)
        for each in fields(self):
            if each.name != "task" and getattr(self, each.name) != getattr(usual, each.name):
                option = {"choices": "choice", "settings": "set"}.get(each.name, each.name.replace("_", "-"))
                raise ConfigError(f"--{option} is for language models; give --task generate, score or classify")

    def check(self, vectors: Mapping[str, object]) -> bool:
        """Return whether this is a job of a language model. ConfigError for options that do not go with --task.

        vectors: options that are for vectors only, with a true value if given.
        """
        if self.task == EMBED:
            self.check_unused()
        elif given := [name for name, value in vectors.items() if value]:
            raise ConfigError(f"{given[0]} is for vectors, and --task {self.task} is for language models; leave it out")
        return self.task != EMBED

    def arguments(self) -> dict[str, Any]:
        """Return the settings of `Pipeline`, with the template. ConfigError for options that do not fit."""
        from llmcache.decoders.templates import PromptTemplate, read_examples

        if (self.template is None) == (self.template_file is None):
            raise ConfigError(f"--task {self.task} needs --template or --template-file, one of them")
        syntax: Any = self.syntax
        template = PromptTemplate(
            self.template if self.template is not None else _text_of(self.template_file),
            system=self.system,
            chat=True if self.chat else None,
            examples=[] if self.examples is None else read_examples(self.examples),
            answer=self.answer,
            syntax=syntax,
        )
        arguments: dict[str, Any] = {
            "task": self.task, "template": template, "by": self.by, "too_long": self.too_long,
            "provenance": not self.no_provenance, "choices": self.choices or None,
            "choices_field": self.choices_field, "separator": self.separator,
        }  # fmt: skip
        if self.max_new_tokens is not None:
            arguments["max_new_tokens"] = self.max_new_tokens
        for setting in self.settings:
            name, value = _setting(setting)
            if name in arguments:
                raise ConfigError(f"--set {name} is given twice, or has an option of its own; give it once")
            arguments[name] = value
        return arguments

    def read_fields(self, template: Any) -> str | tuple[str, ...]:
        """Return the names of the fields of the records that a job reads."""
        names = tuple(dict.fromkeys((*template.fields, *([self.choices_field] if self.choices_field else []))))
        return names[0] if len(names) == 1 else names


def _text_of(path: Path | None) -> str:
    """Return the text of a template's file, without the line end at its end."""
    assert path is not None
    try:
        return path.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"the template {path} cannot be read: {reason}") from error


def _setting(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is JSON, or else a text. ConfigError for anything else."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set is NAME=VALUE, such as num_beams=4, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


@contextmanager
def opened(store: str, model: str | None, namespace: str, access: Access, **settings: Any) -> Iterator[LLMCache]:
    """Open the cache of a language model; the store is made if there is none.

    model: name or folder; None for that of the store. ConfigError when it cannot be loaded, or has no tokenizer.
    """
    from llmcache.cache import LLMCache
    from llmcache.cli.shared.engine import committed
    from llmcache.model.loading import load_any

    name = model if model is not None else _model_of(store, namespace, access)
    module, tokenizer = load_any(name)
    if tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer, and prompts need one; save it in the model's folder")
    if not hasattr(module, "generate"):
        raise ConfigError(
            f"{name} is a {type(module).__name__}, no language model; give --model with one, or leave out --task"
        )
    with LLMCache.open(
        store, module, tokenizer=tokenizer, namespace=namespace, **access.keywords(), **settings
    ) as cache:
        yield cache
        committed(cache)


def _model_of(store: str, namespace: str, access: Access) -> str:
    """Return the name of the model of a store's namespace. ConfigError where none is known."""
    from llmcache.model.identity import Identity

    if not Path(store, "FORMAT").exists():
        raise ConfigError(f"there is no store in {store} yet; name the model it will be for: --model M")
    existing = Store.open(store, **access.of_store())
    space = existing.namespace(namespace)
    existing.close()
    name = "" if space is None else Identity.from_json(space.identity).name
    if not name or not (os.path.isdir(name) or "/" in name):
        raise ConfigError(
            f"the store in {store} does not say where the model of namespace {namespace!r} is; give --model M"
        )
    return name

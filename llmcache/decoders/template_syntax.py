"""The two syntaxes of prompt templates: names in braces, and jinja2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter
from typing import TypeAlias

from llmcache.errors import ConfigError, CorpusError

Fill: TypeAlias = Callable[[Mapping[str, str]], str]
"""Function that fills a template with texts by field."""
FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors of expressions in a template of jinja2, beside its own."""


def format_template(template: str) -> tuple[tuple[str, ...], Fill]:
    """Return the fields of a template with names in braces, and the function that fills it."""
    parts: list[tuple[str, str]] = []  # text, and the name of the field that follows it, or ""
    at = 0
    try:
        for text, name, specification, conversion in Formatter().parse(template):
            at += len(text)
            if name is None:
                at += text[-1:] in ("{", "}")  # a doubled brace, of which the text has one
                parts.append((text, ""))
                continue
            if conversion or specification or not name.isidentifier():
                whole = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
                raise ConfigError(
                    f"the template has {{{whole}}} at {_place(template, at)}, and only plain names of fields may stand "
                    "in braces, such as {text}; double a brace that belongs to the text"
                )
            parts.append((text, name))
            at = template.index("}", at) + 1
    except ConfigError:
        raise
    except ValueError as error:
        at += next((i for i, character in enumerate(template[at:]) if character in "{}"), 0)
        raise ConfigError(
            f"the template has a brace without its other half at {_place(template, at)}; double a brace that belongs "
            "to the text"
        ) from error

    def fill(values: Mapping[str, str]) -> str:
        return "".join(text + values[name] if name else text for text, name in parts)

    return tuple(dict.fromkeys(name for _, name in parts if name)), fill


def _place(text: str, at: int) -> str:
    """Describe a place of a text by line and column, both from 1."""
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def jinja_template(template: str) -> tuple[tuple[str, ...], Fill]:
    """Return the fields of a template of jinja2, and the function that fills it."""
    try:
        from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError("syntax='jinja' needs jinja2; install it: pip install 'jinja2>=3.1'") from error
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    for random in (environment.filters, environment.globals):  # prompts must be the same in every run
        random.pop("random", None)
        random.pop("lipsum", None)
    try:
        tree = environment.parse(template)
        free = meta.find_undeclared_variables(tree) - environment.globals.keys()
        other = list(meta.find_referenced_templates(tree))
        compiled = environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the template is no jinja2 template: {error.message} (line {error.lineno})") from error
    except (TemplateError, *FAULTS) as error:
        raise ConfigError(f"the template is no jinja2 template: {error}") from error
    if other:
        raise ConfigError(f"the template reads another one ({other[0] or 'chosen by a value'}); write it in one text")
    fields = tuple(dict.fromkeys(node.name for node in tree.find_all(nodes.Name) if node.name in free))

    def fill(values: Mapping[str, str]) -> str:
        try:
            return compiled.render({name: values[name] for name in fields})
        except (TemplateError, *FAULTS) as error:
            raise CorpusError(f"has values that the template cannot use ({' '.join(str(error).split())})") from error

    return fields, fill

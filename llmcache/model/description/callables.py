"""Texts of functions and other callables: their code, and the values that the code reads."""

from __future__ import annotations

import hashlib
import inspect
import operator
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn import Module

from llmcache.model.description.code import (
    code_digest,
    imported,
    is_library_function,
    is_library_module,
    is_plain_global,
    name_of,
    names_in_texts,
    names_stored,
    names_used,
    names_written_into,
    strings,
)
from llmcache.model.forward_patch import is_stand_in

if TYPE_CHECKING:
    from llmcache.model.description.walk import Walk

MISSING = object()


def callable_text(walk: Walk, value: Any, path: str) -> str | None:
    """Describe a callable; None for an object that is described by its attributes."""
    if is_stand_in(value):
        return "nothing"
    if isinstance(value, FunctionType):
        return _function(walk, value, path)
    if isinstance(value, MethodType):
        owner = "" if isinstance(value.__self__, Module) else walk.text_of(value.__self__, path)
        return f"method {walk.text_of(value.__func__, path)} {owner}"
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        return "partial(" + ", ".join(walk.text_of(part, f"{path}.partial") for part in parts) + ")"
    if isinstance(value, (staticmethod, classmethod)):
        return f"{type(value).__name__} {walk.text_of(value.__func__, path)}"
    if isinstance(value, (operator.attrgetter, operator.itemgetter, operator.methodcaller)):
        return repr(value)
    if is_own(inner := inspect.unwrap(value, stop=is_own)):  # such as functools.lru_cache
        return f"{name_of(type(value))} around {walk.text_of(inner, path)}"
    if isinstance(value, BuiltinFunctionType) or (
        is_library_module(type(value).__module__) and not hasattr(value, "__dict__")
    ):
        return name_of(value)
    return None


def _function(walk: Walk, function: FunctionType, path: str) -> str:
    """Describe a function: by name if it is a library's, else by its code and the values that the code reads."""
    if is_library_function(function):
        inner = inspect.unwrap(function, stop=is_own)
        if inner is function:
            return f"{name_of(function)}{_defaults(walk, function, path)}"
        return f"{name_of(function)} around {walk.text_of(inner, path)}{_registered(walk, function, path)}"
    known = walk.code_known.get(id(function))
    if known is not None:
        return known
    code, used = function.__code__, function.__globals__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))
    stored = names_stored(code)
    for name in stored:
        cells.pop(name, None)
    names = sorted({name for name in [*names_used(code), *names_in_texts(code)] if name in used} - stored)
    keywords: Any = lambda: dict(function.__kwdefaults__ or {})  # noqa: E731
    walk.probe(path, lambda: [function.__code__, function.__defaults__, keywords(), *map(_content, cells.values())])
    walk.probe(path, lambda: [used.get(name, MISSING) for name in names])
    written = names_written_into(code)

    def text(name: str, value: Any) -> str:
        if name.partition(".")[0] in written and _is_mutable(value):
            return type(value).__name__  # an object that the function only records in does not decide its result
        return walk.text_of(value, f"{path}.{name}")

    defaults = (*(function.__defaults__ or ()), *keywords().values())
    with walk.in_order(True):
        parts = [code_digest(code), *(text("defaults", value) for value in defaults)]
        parts += [f"{name}={text(name, _content(cell))}" for name, cell in cells.items()]
        parts += [f"{name}={text(name, used[name])}" for name in names if is_plain_global(used[name])]
        modules = {name: used[name] for name in names if isinstance(used[name], ModuleType)}
        modules |= imported(code)
        parts += [f"{name}={text(name, value)}" for name, value in _of_modules(walk, code, path, modules)]
        parts += _of_surroundings(walk, code, path)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    known = f"{function.__name__} with code {digest}"
    walk.code_known[id(function)] = known
    return known


def _defaults(walk: Walk, function: FunctionType, path: str) -> str:
    """Return the defaults of a library's function: they can be replaced in place."""
    if not function.__defaults__ and not function.__kwdefaults__:
        return ""
    walk.probe(path, lambda: [function.__defaults__, dict(function.__kwdefaults__ or {})])
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return f" with defaults {[walk.text_of(value, path) for value in defaults]}"


def _registered(walk: Walk, function: FunctionType, path: str) -> str:
    """Return the functions that are registered by type with a `functools.singledispatch` function."""
    registry = getattr(function, "registry", None)
    if not isinstance(registry, Mapping):
        return ""
    walk.probe(path, lambda: dict(registry))
    return f" {sorted((name_of(kind), walk.text_of(value, path)) for kind, value in registry.items())}"


def _of_modules(walk: Walk, code: CodeType, path: str, modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, Any]]:
    """Yield values that a function reads from modules, such as `settings.SCALE`, by their name in the code.

    Of an installed library these are only functions: some that were replaced, and defaults of the others.
    """
    attributes, waiting, seen = set(names_used(code)), list(modules.items()), set[int]()
    for name, module in waiting:  # the list grows during the loop
        if id(module) in seen:
            continue
        seen.add(id(module))
        entries, library = vars(module), is_library_module(module.__name__)
        read = sorted(attributes & entries.keys())
        if library:
            walk.probe(path, lambda entries=entries, read=read: [entries.get(each, MISSING) for each in read])  # type: ignore[misc]
        else:
            walk.watch(path, entries)
        for attribute in read:
            value = entries[attribute]
            if isinstance(value, ModuleType):
                waiting.append((f"{name}.{attribute}", value))
            elif isinstance(value, FunctionType) if library else is_plain_global(value):
                yield f"{name}.{attribute}", value


def _of_surroundings(walk: Walk, code: CodeType, path: str) -> list[str]:
    """Return texts of the environment variables, and of the globals by name in a text, that a function reads."""
    names, texts = set(names_used(code)), sorted(set(strings(code)))
    if not names & {"environ", "getenv"}:
        return []
    walk.probe(path, lambda: [os.environ.get(text) for text in texts if "\0" not in text])
    return [f"{text}={os.environ.get(text)!r}" for text in texts if "\0" not in text]


def is_own(function: Any) -> bool:
    """Return whether a callable is a function from outside installed libraries."""
    return isinstance(function, FunctionType) and not is_library_function(function)


def _is_mutable(value: Any) -> bool:
    """Return whether a value can be changed in place, other than a tensor, an array or a callable."""
    plain = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None), Tensor, np.ndarray, Enum, type)
    return not isinstance(value, plain) and not callable(value)


def _content(cell: Any) -> Any:
    """Return the value of a closure cell."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return MISSING

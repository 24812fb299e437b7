"""Texts of the values that decide what a model computes: attributes, functions, classes, hooks and settings.

A walk also collects every mutable container that it reads, with a shallow copy. As long as all containers are equal to
their copies, another walk would give the same texts.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from llmcache.model.description.callables import MISSING, callable_text, is_own
from llmcache.model.description.code import (
    class_entries,
    is_library_function,
    is_library_module,
    name_of,
)
from llmcache.model.description.configurations import VOLATILE_ADAPTER_SETTINGS, is_configuration, settings_of
from llmcache.model.description.tokenizer_rules import (
    attributes_text,
    is_tokenizer,
    length_limit,
    rules_digest,
)

Probe: TypeAlias = Callable[[], Any]

_LONG = 400
"""Characters of a text above which it is replaced by its start and its digest."""
_DEEPEST = 16
"""Nesting depth up to which values are described."""
_OF_PROCESSORS = ("tokenizer", "image_processor", "feature_extractor", "video_processor")


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """A container that a walk read.

    path: of the value in the model. kind: "module" (attributes of a module), "class" (of a class), "hooks",
    "tokenizer" (attributes of a tokenizer), or "" for any other. live, copy: the container and its shallow copy.
    own: True for one of code outside installed libraries, which may tell True from 1, or depend on the order of a
    mapping.
    """

    path: str
    kind: str
    live: Any
    copy: Any
    own: bool = False


class Walk:
    """Texts of values, and the containers and function results that they depend on.

    watched: containers that were read. probes: (path, function without arguments, its result) for other values.
    tensors: all tensors that were met, by path; their texts do not depend on their data.
    tokenizer: the model's own, which is described elsewhere and only named here.
    """

    def __init__(self) -> None:
        self.watched: list[Watched] = []
        self.probes: list[tuple[str, Probe, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.tokenizer: Any = None
        self._stack: list[int] = []
        self._classes: dict[type, str] = {}
        self._configurations: set[int] = set()
        self.code_known: dict[int, str] = {}
        self.ordered = False
        """True while values of code outside installed libraries are read, which may depend on the order of a mapping.

        Libraries' own settings are sorted: saving and loading a model may change their order.
        """

    # -- containers and probes ------------------------------------------------------------------------------

    def watch(self, path: str, container: Any, kind: str = "") -> None:
        """Record a dict, list, set or class dictionary with a copy of its present entries."""
        copied = dict(container) if isinstance(container, Mapping) else type(container)(container)
        self.watched.append(Watched(path, kind, container, copied, self.ordered))

    def probe(self, path: str, read: Probe) -> None:
        """Record a function without arguments with its present result."""
        self.probes.append((path, read, read()))

    # -- values ---------------------------------------------------------------------------------------------

    def text_of(self, value: Any, path: str) -> str:
        """Return a text that is the same for equal values in every process. path: of the value in the model."""
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, str, bytes):
            return _short(repr(value))
        if len(self._stack) > _DEEPEST or id(value) in self._stack:
            return "(again)"
        self._stack.append(id(value))
        try:
            return _short(self._text(value, path))
        finally:
            self._stack.pop()

    def _text(self, value: Any, path: str) -> str:
        if isinstance(value, Tensor):
            self.tensors[path] = value
            return "tensor"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.Size)):
            return str(value)
        if isinstance(value, (torch.device, ModuleType)):
            return type(value).__name__  # the device of a model is no part of its identity
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, np.generic):
            return f"{type(value).__name__}({value!r})"
        if isinstance(value, Enum):
            self.probe(path, lambda: value.value)
            return f"{type(value).__qualname__}.{value.name}={self.text_of(value.value, path)}"
        if isinstance(value, torch.Generator):
            self.probe(path, lambda: value.get_state().tolist())
            return f"generator {hashlib.sha256(value.get_state().numpy().tobytes()).hexdigest()}"
        if isinstance(value, threading.local):
            self.probe(path, lambda: dict(vars(value)))
            return f"values of a thread {self.text_of(dict(vars(value)), path)}"
        if isinstance(value, type):
            return self.class_text(value)
        if (callable(value) or isinstance(value, classmethod)) and not isinstance(value, Module):
            known = callable_text(self, value, path)
            if known is not None:
                return known
        if isinstance(value, ContextVar):
            self.probe(path, lambda: value.get(None))
            return f"context variable {self.text_of(value.get(None), path)}"
        if isinstance(value, (deque, bytearray, array, SimpleNamespace)):
            return self._buffer(value, path)
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return self._collection(value, path)
        return self._object(value, path)

    def _array(self, value: np.ndarray[Any, Any], path: str) -> str:
        if value.dtype.kind in "biufc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about read-only arrays; the tensor is only read
                try:
                    self.tensors[path] = torch.from_numpy(value)
                    return "array"
                except (TypeError, ValueError):
                    pass
        self.probe(path, value.tolist)
        return f"array {value.dtype} {value.shape} {hashlib.sha256(repr(value.tolist()).encode()).hexdigest()}"

    def _buffer(self, value: Any, path: str) -> str:
        """Describe a queue, buffer or namespace by its contents, which are compared again before every call."""
        if isinstance(value, SimpleNamespace):
            self.watch(path, vars(value))
            return f"namespace {self.text_of(dict(vars(value)), path)}"
        self.probe(path, lambda: list(value))
        return f"{type(value).__name__} {self.text_of(list(value), path)}"

    def _collection(self, value: Any, path: str) -> str:
        if isinstance(value, (dict, list, set)):
            self.watch(path, value)
        elif isinstance(value, Mapping):
            self.probe(path, lambda: dict(value))
        name = "" if type(value).__module__ == "builtins" else name_of(type(value))
        if isinstance(value, Mapping):
            items = [(self.text_of(key, path), self.text_of(item, f"{path}.{key}")) for key, item in value.items()]
            items = items if self.ordered else sorted(items)
            return name + "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
        if isinstance(value, (set, frozenset)):
            return name + "{" + ", ".join(sorted(self.text_of(item, path) for item in value)) + "}"
        marks = "()" if isinstance(value, tuple) else "[]"
        inside = ", ".join(self.text_of(item, f"{path}.{place}") for place, item in enumerate(value))
        return name + marks[0] + inside + marks[1]

    def _object(self, value: Any, path: str) -> str:
        """Describe an object of any other class by its class, and by its attributes if these decide results."""
        if isinstance(value, Module):
            return self.module_text(value, path)
        if is_configuration(value):
            return self.configuration(value, path)
        if is_tokenizer(value):
            return self._tokenizer(value, path)
        name = self.class_text(type(value))
        with self.in_order(not is_library_module(type(value).__module__) or self.ordered):
            return self._of_attributes(value, name, path)

    @contextmanager
    def in_order(self, ordered: bool) -> Iterator[None]:
        """Set `ordered` inside the block."""
        before, self.ordered = self.ordered, ordered
        try:
            yield
        finally:
            self.ordered = before

    def _of_attributes(self, value: Any, name: str, path: str) -> str:
        """Describe an object by its attributes. name: text of its class."""
        if is_dataclass(value):
            self.watch(path, vars(value)) if hasattr(value, "__dict__") else None
            items = [(field.name, getattr(value, field.name, None)) for field in fields(value)]
            if is_library_module(type(value).__module__):
                items = [(key, item) for key, item in items if not VOLATILE_ADAPTER_SETTINGS.fullmatch(key)]
        elif is_library_module(type(value).__module__):
            attributes = getattr(value, "__dict__", {})
            parts = [part for part in attributes if part in _OF_PROCESSORS or is_own(attributes[part])]
            return name + "".join(f" {part}={self.text_of(attributes[part], f'{path}.{part}')}" for part in parts)
        else:
            items = list(getattr(value, "__dict__", {}).items())
            if items or hasattr(value, "__dict__"):
                self.watch(path, vars(value))
            names = [slot for base in type(value).__mro__ for slot in _slots(base)]
            items += [(slot, getattr(value, slot)) for slot in names if hasattr(value, slot)]
            if names:
                self.probe(path, lambda: [getattr(value, slot, MISSING) for slot in names])
            if isinstance(value, (dict, list, set)):
                items.append(("items", list(value)))
        inside = ", ".join(f"{key}={self.text_of(item, f'{path}.{key}')}" for key, item in sorted(items, key=_first))
        return f"{name}({inside})"

    def _tokenizer(self, value: Any, path: str) -> str:
        if value is self.tokenizer:  # described separately, beside the modules
            return "the tokenizer"
        rules = rules_digest(value, attributes_text(self, value, path))
        return f"{type(value).__qualname__} {rules} {length_limit(value)}"

    def module_text(self, module: Module, path: str) -> str:
        """Describe a module that is a plain attribute, with all modules inside it."""
        from llmcache.model.description.describe import facts_of_module

        facts = facts_of_module(self, module, path)
        return "module " + hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()

    def configuration(self, config: Any, path: str) -> str:
        """Describe the settings of a transformers configuration; one that was read before is only named."""
        if id(config) in self._configurations:
            return f"configuration {type(config).__name__}"
        self._configurations.add(id(config))
        return f"{type(config).__name__} {self.text_of(self.settings(config, path), path)}"

    def settings(self, config: Any, path: str) -> dict[str, Any]:
        """Return the settings of a configuration that differ from the defaults and decide results, by name."""
        self._configurations.add(id(config))
        self._watch_configuration(config, path)
        plain: dict[str, Any] = settings_of(config)
        return plain

    def _watch_configuration(self, config: Any, path: str) -> None:
        self.watch(path, vars(config))
        for name, value in vars(config).items():
            if is_configuration(value):
                self._configurations.add(id(value))
                self._watch_configuration(value, f"{path}.{name}")
            elif isinstance(value, (dict, list, set)):
                self._watch_nested(value, f"{path}.{name}")

    def _watch_nested(self, value: Any, path: str) -> None:
        self.watch(path, value)
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (dict, list, set)):
                self._watch_nested(item, path)

    # -- classes --------------------------------------------------------------------------------------------

    def class_text(self, cls: type) -> str:
        """Return the name of a class, with a digest of all its code that comes from outside installed libraries."""
        known = self._classes.get(cls)
        if known is None:
            self._classes[cls] = name_of(cls) if is_library_module(cls.__module__) else cls.__qualname__
            foreign: list[str] = []
            for base in cls.__mro__:
                if base.__module__ != "builtins":
                    foreign += self._foreign_entries(base)
            name = name_of(cls) if is_library_module(cls.__module__) else cls.__qualname__
            digest = hashlib.sha256(repr(foreign).encode()).hexdigest()
            known = self._classes[cls] = f"{name} with code {digest}" if foreign else name
        return known

    def _foreign_entries(self, cls: type) -> Iterable[str]:
        """Yield texts of the entries of a class that do not come from an installed library."""
        path = cls.__qualname__
        library = is_library_module(cls.__module__)
        self.watched.append(Watched(path, "class", vars(cls), dict(vars(cls)), not library))
        if not library:
            yield f"class {cls.__qualname__}"
        for name, value in class_entries(cls):
            if isinstance(value, property):
                accessors = [each for each in (value.fget, value.fset) if isinstance(each, FunctionType)]
                for accessor in accessors:
                    if not (library and is_library_function(accessor)):
                        yield f"{name} {self.text_of(accessor, f'{path}.{name}')}"
            elif not library or _is_foreign(value):
                yield f"{name} {self.text_of(value, f'{path}.{name}')}"


def _is_foreign(value: Any) -> bool:
    """Return whether an entry of a library's class comes from outside installed libraries."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, FunctionType):
        inner = inspect.unwrap(value, stop=is_own)
        return is_own(inner)
    return isinstance(value, partial)


def _slots(cls: type) -> tuple[str, ...]:
    """Return the names of the attributes that a class declares in `__slots__`."""
    slots = vars(cls).get("__slots__", ())
    if isinstance(slots, str):
        return (slots,)
    return tuple(slot for slot in slots if slot not in ("__dict__", "__weakref__"))


def _first(pair: tuple[Any, Any]) -> str:
    return str(pair[0])


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:40]}... {hashlib.sha256(text.encode()).hexdigest()}"

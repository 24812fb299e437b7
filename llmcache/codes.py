"""Digests of functions and classes by their code, so that two revisions of one name are told apart.

What lies in an installed library, or in Python's own, is known by its name: its code is that of a release.
"""

from __future__ import annotations

import dis
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

_LIBRARY_FOLDERS = tuple(
    os.path.join(path, "")
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if path
)
_OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_OF_CLASSES = frozenset(
    (
        "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__firstlineno__",
        "__static_attributes__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
        "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__classcell__", "__slots__",
        "__match_args__", "__dataclass_fields__", "__dataclass_params__",
    )
)  # fmt: skip
"""Entries of a class that say nothing about what it does."""


@cache
def is_library_file(path: str) -> bool:
    """Return whether a source file belongs to Python or to an installed package."""
    return path.startswith(("<frozen", _OWN, *_LIBRARY_FOLDERS)) or any(folder in path for folder in _PACKAGES)


def is_library_module(name: str | None) -> bool:
    """Return whether the module of this name belongs to Python or to an installed package; False for "__main__"."""
    if (name or "").partition(".")[0] == "llmcache":
        return True
    module = sys.modules.get(name or "")
    if name in ("__main__", "__mp_main__") or module is None:
        return False
    path = getattr(module, "__file__", None)
    return path is None or is_library_file(path)  # modules that are built in have no file


def is_library_function(function: FunctionType) -> bool:
    """Return whether a function's code was read from a library's file, or made by a library at run time."""
    path = function.__code__.co_filename
    return is_library_file(path) or (path.startswith("<") and is_library_module(function.__module__))


def name_of(value: Any) -> str:
    """The package and the qualified name of a library's function or class."""
    module = getattr(value, "__module__", None) or ""
    return f"{module.partition('.')[0]}:{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def code_digest(code: CodeType) -> str:
    """sha256 in hexadecimal of what a code object does: not of its file, its line numbers or its name."""
    hashed = hashlib.sha256()
    for part in _parts(code):
        hashed.update(f"{len(part)}:".encode() + part)
    return hashed.hexdigest()


def names_used(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes that a code object and those inside it refer to."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_used(constant)


_CHANGES = frozenset(
    ("append", "appendleft", "extend", "add", "update", "insert", "setdefault", "pop", "clear", "remove", "put")
)


def keeps_notes(code: CodeType) -> bool:
    """Return whether a function writes into containers or objects, as one does that records what passes by."""
    if not _CHANGES.isdisjoint(names_used(code)):
        return True
    return any(one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR") for one in _instructions(code))


def names_stored(code: CodeType) -> frozenset[str]:
    """Names of globals and of variables of an enclosing function that a function assigns to."""
    stored = (one.argval for one in _instructions(code) if one.opname in ("STORE_DEREF", "STORE_GLOBAL"))
    return frozenset(stored)


def attributes_stored(code: CodeType) -> frozenset[str]:
    """Names of attributes that a function assigns to."""
    return frozenset(one.argval for one in _instructions(code) if one.opname == "STORE_ATTR")


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def class_entries(cls: type) -> Iterator[tuple[str, Any]]:
    """Entries of a class body, sorted by name, without those that are documentation."""
    for name in sorted(vars(cls)):
        if name not in _OF_CLASSES:
            yield name, vars(cls)[name]


def is_plain_global(value: object) -> bool:
    """True if a global that a function uses is described by its value, and not left out as a module or a library's."""
    if isinstance(value, ModuleType):
        return False
    if isinstance(value, type):
        return not is_library_module(value.__module__)
    if isinstance(value, FunctionType):
        return not is_library_function(value)
    return not callable(value) or not is_library_module(getattr(value, "__module__", None))


def _parts(code: CodeType) -> Iterator[bytes]:
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    yield repr(counts).encode()
    yield code.co_code
    yield code.co_exceptiontable
    for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        yield repr(names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield code_digest(constant).encode()
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant))).encode()
        else:
            yield repr(constant).encode()

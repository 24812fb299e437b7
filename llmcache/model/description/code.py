"""Digests of functions and classes by their code, so that two revisions under one name differ.

Functions and classes of Python and of installed libraries are described by name only: their code is that of a release.
"""

from __future__ import annotations

import dis
import hashlib
import importlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_LIBRARY_FOLDERS = tuple(
    os.path.join(path, "")
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if path
)
_OWN = os.path.join(Path(__file__).resolve().parents[2], "")  # of this package
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_OF_CLASSES = frozenset(
    (
        "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__firstlineno__",
        "__static_attributes__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
        "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__classcell__", "__slots__",
        "__match_args__", "__dataclass_fields__", "__dataclass_params__",
    )
)  # fmt: skip
"""Entries of a class that do not affect its behaviour."""


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
    if path is not None:
        return is_library_file(path)
    # built in, a namespace package, or made at run time by a library or by the user
    top = str(name).partition(".")[0]
    above = getattr(sys.modules.get(top), "__file__", None)
    folders = list(getattr(module, "__path__", ()))
    known = top in sys.stdlib_module_names or (above is not None and is_library_file(above))
    return known or (bool(folders) and all(is_library_file(os.path.join(folder, "")) for folder in folders))


def is_library_function(function: FunctionType) -> bool:
    """Return whether a function's code was read from a library's file, or made by a library at run time."""
    path = function.__code__.co_filename
    return is_library_file(path) or (path.startswith("<") and is_library_module(function.__module__))


def name_of(value: Any) -> str:
    """Return the package and the qualified name of a library's function or class."""
    module = getattr(value, "__module__", None) or ""
    return f"{module.partition('.')[0]}:{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def code_digest(code: CodeType) -> str:
    """Return the sha256 in hexadecimal of a code object's behaviour, without its file, line numbers and name."""
    hashed = hashlib.sha256()
    for part in _parts(code):
        hashed.update(f"{len(part)}:".encode() + part)
    return hashed.hexdigest()


def names_used(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes that a code object and those inside it refer to."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_used(constant)


def strings(code: CodeType) -> Iterator[str]:
    """Yield the texts among the constants of a code object and of those inside it."""
    for each in (code, *_inner(code)):
        for constant in each.co_consts:
            if isinstance(constant, str):
                yield constant


def names_in_texts(code: CodeType) -> Iterator[str]:
    """Yield names in the texts of a function that reads globals by name, through `globals`, `eval` or `exec`."""
    if {"globals", "eval", "exec"} & set(names_used(code)):
        for text in strings(code):
            yield from _NAME.findall(text)


def imported(code: CodeType) -> dict[str, ModuleType]:
    """Return the modules that a function imports itself, by name. They are imported now, as its first call would."""
    modules = {}
    for instruction in _instructions(code):
        if instruction.opname == "IMPORT_NAME" and instruction.argval:
            with suppress(Exception):  # an optional package that is missing, or fails to load
                modules[instruction.argval] = importlib.import_module(instruction.argval)
    return modules


_NAME = re.compile(r"[^\W\d]\w*")
_CHANGES = frozenset(
    ("append", "appendleft", "extend", "add", "update", "insert", "setdefault", "pop", "clear", "remove", "put")
)


_FOLLOWED = 24  # instructions that are followed after a name is loaded


def names_written_into(code: CodeType) -> frozenset[str]:
    """Return the names of globals and of variables of an enclosing function whose values a function changes in place.

    Such as NOTES in `NOTES.append(x)`, `NOTES["last"] = x`, `NOTES[name].add(x)`, `NOTES.count += 1`, in a function
    that records its calls.
    """
    names: set[str] = set()
    for each in (code, *_inner(code)):
        instructions = list(dis.get_instructions(each))
        for place, instruction in enumerate(instructions):
            loads = instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLASSDEREF")
            if loads and _is_written_into(instructions[place + 1 : place + 1 + _FOLLOWED]):
                names.add(str(instruction.argval))
    return frozenset(names)


def _is_written_into(following: list[dis.Instruction]) -> bool:
    """Return whether these instructions change the value on top of the stack in place."""
    above = 0  # number of values on the stack above the value that is followed
    for instruction in following:
        name = instruction.opname
        if name in ("LOAD_METHOD", "LOAD_ATTR") and above == 0:
            if instruction.argval in _CHANGES:
                return True
        elif name in ("LOAD_METHOD", "LOAD_ATTR", "CACHE", "NOP", "RESUME"):
            continue
        elif name in ("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"):
            above += 2
        elif name.startswith("LOAD_"):
            above += 1
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]"):
            if above == 0:  # the value is the key
                return False
            above -= 1
        elif name == "COPY":  # of an assignment such as `x[key] += 1`
            return True
        elif name in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            return above == 1
        elif name in ("STORE_ATTR", "DELETE_ATTR"):
            return above == 0
        else:
            return False
    return False


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def names_stored(code: CodeType) -> frozenset[str]:
    """Return the names of globals and of variables of an enclosing function that a function assigns to."""
    stored = (each.argval for each in _instructions(code) if each.opname in ("STORE_DEREF", "STORE_GLOBAL"))
    return frozenset(stored)


def attributes_stored(code: CodeType) -> frozenset[str]:
    """Return the names of attributes that a function assigns to."""
    return frozenset(each.argval for each in _instructions(code) if each.opname == "STORE_ATTR")


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def class_entries(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a class body, sorted by name, without documentation and bookkeeping."""
    for name in sorted(vars(cls)):
        if name not in _OF_CLASSES:
            yield name, vars(cls)[name]


def is_plain_global(value: object) -> bool:
    """Return whether a global that a function uses is described by its value. False for modules and library objects."""
    if isinstance(value, ModuleType):
        return False
    if isinstance(value, type):
        return not is_library_module(value.__module__)
    if isinstance(value, FunctionType):
        return not is_library_function(value) or hasattr(value, "__wrapped__")
    if hasattr(value, "__wrapped__"):  # such as a function with functools.lru_cache
        return True
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

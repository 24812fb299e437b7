"""Private copies of tokenizers, so that other users of a tokenizer do not change how a cache tokenises.

A fast tokenizer of transformers keeps the padding and truncation of its last call in its Rust backend. Another user of
the same object during a call (another thread, or the generator of the documents) would change the token ids, or get
wrong ones. So a cache never calls the caller's tokenizer: it reads the settings, and calls a copy.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

from sentence_transformers.base.model import BaseModel
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from llmcache.errors import ConfigError
from llmcache.model.locks import after_fork

_LARGEST = 64  # items up to which a container is compared item by item; larger ones by identity and length
_DEEPEST = 4  # nesting depth of objects whose attributes are compared
_REMEMBERED = re.compile(r"_.*_cache|_prompt_length_mapping|deprecation_warnings|_in_target_context_manager|training")
"""Attributes that a call changes, but that do not affect its result."""
_OF_MODEL = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word", "fuse_unk",
    "byte_fallback", "ignore_merges",
)  # fmt: skip


class PrivateCopy:
    """A copy of a tokenizer, or of the tokenising part of a sentence-transformers model, renewed after changes.

    lock: to be acquired while the copy is used; no other lock may be acquired meanwhile.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._copy: Any = None
        self._settings: Settings | None = None

    def of(self, source: Any) -> Any:
        """Return the copy of `source`, renewed if the settings of `source` have changed.

        source: a tokenizer of transformers or a model of sentence-transformers. ConfigError when it cannot be copied.
        """
        if self._copy is None or self._settings is None or not self._settings.hold(source):
            self._copy = _reader(source) if isinstance(source, BaseModel) else _copied(source)
            self._settings = Settings(source)
        return self._copy

    def forget(self) -> None:
        """Drop the copy; the next use makes a new one."""
        self._copy = None


_copies: WeakKeyDictionary[Any, PrivateCopy] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def private_copy(source: Any) -> Iterator[Any]:
    """Lock and yield the shared private copy of a tokenizer or model of sentence-transformers."""
    with _guard:
        shared = _copies.get(source)
        if shared is None:
            shared = _copies[source] = PrivateCopy()
    with shared.lock:
        yield shared.of(source)


def forget_copy(source: Any) -> None:
    """Drop the private copy of a tokenizer or sentence-transformers model, after a change of the source in place."""
    with _guard:
        shared = _copies.get(source)
    if shared is not None:
        with shared.lock:
            shared.forget()


def _forget_all() -> None:
    global _guard
    _guard = threading.Lock()
    for shared in list(_copies.values()):  # a thread that used a copy when the process forked never releases its lock
        shared.lock = threading.RLock()
        shared.forget()


after_fork(_forget_all)


# -- settings -----------------------------------------------------------------------------------------------


class Settings:
    """Snapshot of the settings that decide how a tokenizer or model of sentence-transformers tokenises.

    It has the attributes of tokenizers and of the objects around them, containers among these, and the rules of fast
    tokenizers, but not the padding and truncation of the last call. Large containers, such as a vocabulary, are
    compared by length only.
    """

    def __init__(self, source: Any) -> None:
        """Take a snapshot. source: a tokenizer of transformers or a model of sentence-transformers."""
        self._source = ref(source)
        self._attributes: list[tuple[dict[str, Any], int, list[str], list[Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._large: list[tuple[Any, int]] = []
        self._backends: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._functions = _functions(source)
        if isinstance(source, BaseModel):
            self._containers.append((source._modules, dict(source._modules)))
            for module in list(source.children())[:1]:
                self._watch(module, _DEEPEST)
        else:
            self._watch(source, _DEEPEST)

    def hold(self, source: Any) -> bool:
        """Return whether `source` still has these settings; takes some 20 microseconds."""
        try:
            return bool(
                self._source() is source
                and self._functions == _functions(source)
                and all(
                    len(live) == size and [live.get(name) for name in names] == values
                    for live, size, names, values in self._attributes
                )
                and all(live == items for live, items in self._containers)
                and all(len(live) == size for live, size in self._large)
                and all(_rules(backend) == rules for backend, rules in self._backends)
            )
        except (RuntimeError, ValueError, TypeError):  # comparisons of arrays and tensors have no single truth value
            return False

    def _watch_attributes(self, owner: Any, names: list[str]) -> None:
        attributes = vars(owner)
        self._attributes.append((attributes, len(attributes), names, [attributes[name] for name in names]))

    def _watch(self, value: Any, depth: int) -> None:
        """Record an object whose attributes are settings, and such objects among its attributes."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        names = [name for name in vars(value) if not _REMEMBERED.fullmatch(name) and "_hooks" not in name]
        self._watch_attributes(value, names)
        backend = getattr(value, "_tokenizer", None)
        if hasattr(backend, "get_added_tokens_decoder"):
            self._backends.append((backend, _rules(backend)))
        for name in names:
            self._watch_value(vars(value)[name], depth - 1)

    def _watch_value(self, value: Any, depth: int) -> None:
        if isinstance(value, (dict, list, set)):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            if len(value) > _LARGEST:
                self._large.append((value, len(value)))
                return
            self._containers.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                self._watch_value(item, depth)
        elif depth > 0 and hasattr(value, "__dict__") and _tokenises(value):
            self._watch(value, depth)


def _functions(source: Any) -> dict[str, int]:
    """Return ids of functions that replace methods of a model; references would keep the model alive."""
    if not isinstance(source, BaseModel):
        return {}
    return {name: id(value) for name, value in vars(source).items() if callable(value)}


def _tokenises(value: Any) -> bool:
    """Return whether an object is part of a tokenizer or contains one, so that its attributes are settings."""
    if isinstance(value, (type, PreTrainedModel)):
        return False
    if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin, Module)):
        return True
    return type(value).__module__.partition(".")[0] in ("sentence_transformers", "transformers", "transformers_modules")


def _rules(backend: Any) -> tuple[Any, ...]:
    """Return the rules of a fast tokenizer's backend, for comparison."""
    model, added = backend.model, backend.get_added_tokens_decoder()
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return (
        [None if step is None else step.__getstate__() for step in steps],
        [getattr(model, name, None) for name in _OF_MODEL],
        backend.get_vocab_size(),
        repr(added) if len(added) <= _LARGEST else len(added),
    )


# -- copies -------------------------------------------------------------------------------------------------


def _copied(tokenizer: Any) -> Any:
    """Return a deep copy of a tokenizer; ConfigError when it cannot be copied."""
    try:
        return copy.deepcopy(tokenizer)
    except Exception as error:  # a tokenizer from outside transformers may raise anything
        raise _uncopyable(tokenizer, error) from error


def _uncopyable(tokenizer: Any, error: Exception) -> ConfigError:
    return ConfigError(
        f"the tokenizer {type(tokenizer).__name__} cannot be copied ({type(error).__name__}: {error!s:.120}), and a "
        "cache needs a copy of its own, since other calls of the same object would change its results; make it work "
        "with copy.deepcopy"
    )


def _reader(model: BaseModel) -> BaseModel:
    """Return a model that tokenises as `model` does, with a tokenizer of its own and shared weights."""
    reader: BaseModel = copy.copy(model)
    # the card refers to the model, which would then never be garbage collected
    reader.__dict__.pop("model_card_data", None)
    modules = dict(model._modules)
    if modules:
        name, first = next(iter(modules.items()))
        modules[name] = _input_module(first)
    reader.__dict__["_modules"] = modules
    return reader


def _input_module(module: Any) -> Any:
    """Return a copy of the module that tokenises; weights and the transformers models inside are shared."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            memo[id(inner)] = inner
        for tensor in (*inner._parameters.values(), *inner._buffers.values()):
            memo[id(tensor)] = tensor
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:  # such as a session of another runtime with the weights
        return _with_own_tokenizer(module, memo)


def _with_own_tokenizer(module: Any, memo: dict[int, Any]) -> Any:
    """Return a shallow copy of a module, with copied attributes where possible; ConfigError when a tokenizer is not."""
    copied = copy.copy(module)
    for name, value in vars(module).items():
        try:
            copied.__dict__[name] = copy.deepcopy(value, memo)
        except Exception as error:
            if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)) or hasattr(value, "encode_batch"):
                raise _uncopyable(value, error) from error
            copied.__dict__[name] = value
    return copied

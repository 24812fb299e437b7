"""Values that a module outside installed libraries reads: a change of any of them is noticed before the next call."""

from __future__ import annotations

import enum
import functools
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmcache.model.description.watch import ModelWatch

SCALE = 1.0
CONTEXT: ContextVar[float] = ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
OTHER = ModuleType("llmcache_tests_other")
OTHER.SCALE = 1.0  # type: ignore[attr-defined]


class Size(enum.Enum):
    SMALL = 1.0


@functools.lru_cache
def remembered() -> float:
    return SCALE


@functools.singledispatch
def dispatched(value: Any) -> Any:
    return value


def by_keyword(value: Tensor, *, scale: float = 1.0) -> Tensor:
    return value * scale


class Own(nn.Module):
    """A module with one setting `value`, which its subclasses read in their own way."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x)

    def work(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def own(work: Callable[[Any, Tensor], Tensor]) -> type[Own]:
    return type("Own", (Own,), {"work": work, "__module__": __name__})


def setting(module: Any, value: Any) -> None:
    module.value = value


def reads_import(self: Any, x: Tensor) -> Tensor:
    import llmcache_tests_other  # type: ignore[import-not-found]

    return x * llmcache_tests_other.SCALE  # type: ignore[no-any-return]


class WithClassMethod(Own):
    @classmethod
    def scale(cls) -> float:
        return 1.0

    def work(self, x: Tensor) -> Tensor:
        return x * self.scale()


class WithStaticMethod(Own):
    @staticmethod
    def scale() -> float:
        return 1.0

    def work(self, x: Tensor) -> Tensor:
        return x * self.scale()


class WithCachedProperty(Own):
    @functools.cached_property
    def scale(self) -> float:
        return 1.0

    def work(self, x: Tensor) -> Tensor:
        return x * type(self).scale.func(self)  # type: ignore[attr-defined,no-any-return]


def replaced(owner: Any, name: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda module, patch: patch.setattr(owner, name, value)


def became(value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda module, patch: setting(module, value)


def turned(module: Any, patch: pytest.MonkeyPatch) -> None:
    module.value.move_to_end("a") if isinstance(module.value, OrderedDict) else module.value.update(
        a=module.value.pop("a")
    )


Change = Callable[[Any, pytest.MonkeyPatch], Any]
CHANGES: dict[str, tuple[Own | type[Own], Change]] = {
    "True to 1": (own(lambda self, x: x if self.value is True else -x)(True), became(1)),
    "2 to 2.0": (own(lambda self, x: x * isinstance(self.value, int))(2), became(2.0)),
    "0.0 to -0.0": (own(lambda self, x: x * math.copysign(1, self.value))(0.0), became(-0.0)),
    "True to 1 in a list": (
        own(lambda self, x: x if self.value[0] is True else -x)([True]),
        lambda module, _: module.value.__setitem__(0, 1),
    ),
    "True to 1 in a tuple": (own(lambda self, x: x if self.value[0] is True else -x)((True,)), became((1,))),
    "True to 1 in a nested dict": (
        own(lambda self, x: x if self.value["a"][0] is True else -x)({"a": [True]}),
        lambda module, _: module.value["a"].__setitem__(0, 1),
    ),
    "a NumPy number to another type": (
        own(lambda self, x: x * isinstance(self.value, np.float32))(np.float32(2)), became(np.float64(2)),
    ),
    "the order of a dict": (own(lambda self, x: x * next(iter(self.value.values())))({"a": 1.0, "b": 2.0}), turned),
    "the order of an ordered dict": (
        own(lambda self, x: x * next(iter(self.value.values())))(OrderedDict(a=1.0, b=2.0)), turned,
    ),
    "the order of a namespace's dict": (
        own(lambda self, x: x * next(iter(self.value.table.values())))(SimpleNamespace(table={"a": 1.0, "b": 2.0})),
        lambda module, _: module.value.table.update(a=module.value.table.pop("a")),
    ),
    "keyword defaults": (
        own(lambda self, x: by_keyword(x)),
        lambda _, patch: patch.setattr(by_keyword, "__kwdefaults__", {"scale": 2.0}),
    ),
    "a keyword default in place": (
        own(lambda self, x: by_keyword(x)),
        lambda _, patch: patch.setitem(by_keyword.__kwdefaults__ or {}, "scale", 2.0),
    ),
    "a default of a library's function": (
        own(lambda self, x: nn.functional.normalize(x)),
        lambda _, patch: patch.setattr(nn.functional.normalize, "__defaults__", (1.0, 1, 1e-12, None)),
    ),
    "a library's function": (
        own(lambda self, x: x * float(np.float_power(2, 1))), replaced(np, "float_power", lambda a, b: 3.0),
    ),
    "a global behind functools.lru_cache": (
        own(lambda self, x: x * remembered()), replaced(sys.modules[__name__], "SCALE", 2.0),
    ),
    "a function of singledispatch": (
        own(lambda self, x: dispatched(x)), lambda _, patch: dispatched.register(Tensor)(lambda value: value * 2),
    ),
    "a module imported by the forward": (own(reads_import), replaced(OTHER, "SCALE", 2.0)),
    "a class method": (WithClassMethod(), replaced(WithClassMethod, "scale", classmethod(lambda cls: 2.0))),
    "a static method": (WithStaticMethod(), replaced(WithStaticMethod, "scale", staticmethod(lambda: 2.0))),
    "a cached property": (
        WithCachedProperty(), replaced(WithCachedProperty, "scale", functools.cached_property(lambda self: 2.0)),
    ),
    "the value of an enum": (
        own(lambda self, x: x * self.value.value)(Size.SMALL), replaced(Size.SMALL, "_value_", 2.0),
    ),
    "a context variable": (own(lambda self, x: x * CONTEXT.get()), lambda _, patch: CONTEXT.set(2.0)),
    "a value of the thread": (
        own(lambda self, x: x * getattr(LOCAL, "scale", 1.0)),
        lambda _, patch: patch.setattr(LOCAL, "scale", 2.0, raising=False),
    ),
    "a generator": (
        own(lambda self, x: x + torch.rand(1, generator=self.value))(torch.Generator().manual_seed(1)),
        lambda module, _: module.value.manual_seed(2),
    ),
    "a global by its name": (
        own(lambda self, x: x * globals()["SCALE"]), replaced(sys.modules[__name__], "SCALE", 2.0),
    ),
    "a global in an evaluated text": (
        own(lambda self, x: eval("x * SCALE")),  # noqa: S307
        replaced(sys.modules[__name__], "SCALE", 2.0),
    ),
    "an environment variable": (
        own(lambda self, x: x * float(os.environ.get("LLMCACHE_TESTS_SCALE", "1"))),
        lambda _, patch: patch.setenv("LLMCACHE_TESTS_SCALE", "2"),
    ),
    "a strided array as a whole": (
        own(lambda self, x: x * float(self.value[0]))(np.ones((300, 2), np.float32)[:, 0]),
        lambda module, _: module.value.fill(0.2),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, OTHER.__name__, OTHER)
    registry = dict(dispatched.registry)
    token = CONTEXT.set(1.0)
    yield
    CONTEXT.reset(token)
    if Tensor in dispatched.registry and Tensor not in registry:
        dispatched.register(Tensor)(registry[object])


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_of_what_own_code_reads_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, change = CHANGES[name]
    module = made if isinstance(made, nn.Module) else made()
    watch = ModelWatch(module, None)
    before = watch.identity()
    assert not watch.changed()
    change(module, monkeypatch)
    assert watch.changed()
    assert watch.identity().digest != before.digest


def test_an_equal_value_of_the_same_type_is_no_change() -> None:
    module = own(lambda self, x: x * self.value[0])([2.0, True, (1, 2)])
    watch = ModelWatch(module, None)
    before = watch.identity()
    module.value[:] = [float("2.0"), True, tuple(iter((1, 2)))]
    assert not watch.changed()
    assert watch.identity().digest == before.digest


def test_a_module_that_counts_its_own_calls_keeps_its_identity() -> None:
    class Counting(Own):
        def work(self, x: Tensor) -> Tensor:
            self.value += 1
            return x

    module = Counting(0)
    watch = ModelWatch(module, None)
    before = watch.identity()
    module(torch.ones(1))
    watch.changed()
    assert watch.identity().digest == before.digest

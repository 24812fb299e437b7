"""Descriptions of a live model have values of every kind that a forward reads, and none that it only writes."""

from __future__ import annotations

import sys
from array import array
from collections import ChainMap, UserDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.bert import modeling_bert

from llmcache.model.description.code import names_written_into
from llmcache.model.description.watch import ModelWatch

TABLE: dict[str, Any] = {"gain": 1.0, "deep": {"a": [1.0]}}
GAIN: ContextVar[float] = ContextVar("GAIN", default=1.0)
SEEN: list[Any] = []
SETTINGS = ModuleType("settings_of_a_user")
vars(SETTINGS).update(SCALE=1.0, TABLE={"a": [1.0]})
sys.modules["settings_of_a_user"] = SETTINGS


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


class Reader(nn.Module):
    """A module that reads values of every kind, and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.queue, self.bytes, self.numbers = deque([1.0]), bytearray(b"\1\2"), array("d", [1.0])
        self.space, self.chain, self.user = SimpleNamespace(gain=1.0), ChainMap({"gain": 1.0}), UserDict(gain=1.0)
        self.slotted = Slotted()
        self.records = np.array([(1.0, 2)], dtype=[("a", "f8"), ("b", "i4")])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(len(x))
        gain = TABLE["gain"] * TABLE["deep"]["a"][0] * GAIN.get() * SETTINGS.SCALE * SETTINGS.TABLE["a"][0]
        return torch.as_tensor(self.linear(x) * gain)


def put_into(holder: Any, name: str, value: Any) -> Callable[[Reader], None]:
    return lambda model: setattr(holder, name, value)


CHANGES: dict[str, Callable[[Reader], Any]] = {
    "queue": lambda model: model.queue.append(2.0),
    "item of a queue": lambda model: model.queue.__setitem__(0, 2.0),
    "bytes": lambda model: model.bytes.__setitem__(0, 7),
    "numbers": lambda model: model.numbers.__setitem__(0, 7.0),
    "namespace": lambda model: setattr(model.space, "gain", 2.0),
    "chain of mappings": lambda model: model.chain.__setitem__("gain", 2.0),
    "user's mapping": lambda model: model.user.__setitem__("gain", 2.0),
    "slot": lambda model: setattr(model.slotted, "gain", 2.0),
    "record": lambda model: model.records["a"].__setitem__(0, 2.0),
    "global table": lambda model: TABLE.__setitem__("gain", 2.0),
    "inside a global table": lambda model: TABLE["deep"]["a"].__setitem__(0, 2.0),
    "context variable": lambda model: GAIN.set(2.0),
    "another module's number": lambda model: vars(SETTINGS).__setitem__("SCALE", 2.0),
    "another module's table": lambda model: vars(SETTINGS)["TABLE"]["a"].__setitem__(0, 2.0),
    "function of torch replaced": lambda model: setattr(torch.nn.functional, "linear", lambda x, w, b: x),
    "function of transformers replaced": lambda model: setattr(
        modeling_bert, "eager_attention_forward", lambda *given: given[0]
    ),
    "hook of every module": lambda model: nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 2),
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    linear = torch.nn.functional.linear
    bert: Any = modeling_bert
    attention = bert.eager_attention_forward
    yield
    TABLE.update(gain=1.0, deep={"a": [1.0]})
    GAIN.set(1.0)
    vars(SETTINGS).update(SCALE=1.0, TABLE={"a": [1.0]})
    torch.nn.functional.linear = linear
    bert.eager_attention_forward = attention
    nn.modules.module._global_forward_hooks.clear()


def made(change: str) -> Any:
    if "transformers" in change or "every module" in change:
        torch.manual_seed(0)
        config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        return transformers.BertModel(config)
    return Reader()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_a_forward_reads_is_seen_and_named_and_decides_the_identity(change: str) -> None:
    model = made(change)
    watch = ModelWatch(model)
    before = watch.identity().digest
    assert not watch.changed()
    CHANGES[change](model)
    assert watch.changed()
    assert watch.changes(), "the change has a name"
    assert watch.identity().digest != before
    assert not watch.changed(), "a change is reported once"


@pytest.mark.parametrize("change", ["function of transformers replaced", "hook of every module"])
def test_what_changes_all_layers_changes_the_identity_of_the_first(change: str) -> None:
    model = made(change)
    watch = ModelWatch(model)
    before = watch.identity()
    CHANGES[change](model)
    assert watch.changed()
    after = watch.identity()
    assert before.layers[0] != after.layers[0]


def test_what_a_forward_writes_down_is_no_change() -> None:
    model = Reader()
    watch = ModelWatch(model)
    for _ in range(3):
        model(torch.ones(2, 2))
        assert not watch.changed()


def test_hooks_that_transformers_leaves_behind_are_no_change() -> None:
    model: Any = made("transformers")
    model.eval()
    watch = ModelWatch(model)
    before = watch.identity().digest
    ids = torch.arange(4)[None]
    model(input_ids=ids, output_hidden_states=True)
    model(input_ids=ids, output_attentions=True)
    watch.changed()
    assert watch.identity().digest == before


@pytest.mark.parametrize("move", ["share_memory", "clone", "contiguous copies"])
def test_storages_that_are_moved_are_read_where_they_are_and_are_no_change(move: str) -> None:
    model: Any = made("transformers")
    watch = ModelWatch(model)
    before = watch.identity().digest
    for _ in range(3):
        if move == "share_memory":
            model.share_memory()
        else:
            for one in model.parameters():
                one.data = one.data.clone() if move == "clone" else one.data.t().t().contiguous().clone()
        for _ in range(3):
            watch.changed()
        assert watch.verified()
        assert watch.identity().digest == before


def written(code: str) -> frozenset[str]:
    space: dict[str, Any] = {}
    exec(f"def function(x, k):\n    {code}", space)  # code of this test
    return names_written_into(space["function"].__code__)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("N.append(x)", {"N"}), ("N[k] = x", {"N"}), ("N[k][x] = 1", {"N"}), ("N[k].add(x)", {"N"}),
        ("N.last = x", {"N"}), ("N['n'] += 1", {"N"}), ("N.count += 1", {"N"}), ("del N[k]", {"N"}),
        ("N.setdefault(k, []).append(x)", {"N"}), ("x[k] = T[k]", set()), ("x[k] = x[k] * T['gain']", set()),
        ("return [T[one] for one in x]", set()), ("x.out = T", set()), ("x.append(T)", set()), ("x[T] = k", set()),
        ("x[T[k]] = k", set()), ("return T.gain", set()),
    ],
)  # fmt: skip
def test_only_containers_that_a_function_changes_are_its_notes(code: str, names: set[str]) -> None:
    assert written(code) == names

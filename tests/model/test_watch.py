"""Detection of changed weights: every way to change them is detected, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llmcache.model.description.watch import ModelWatch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Sequential(nn.BatchNorm1d(40), nn.GELU()), nn.Linear(40, 3))


def looked_at(one: nn.Module) -> ModelWatch:
    weights = ModelWatch(one)
    assert not weights.changed()
    assert not weights.changed()
    return weights


def _in_place(one: Any) -> None:
    with torch.no_grad():
        one[0].weight[1, 1] += 1


def _through_data(one: Any) -> None:
    one[2].weight.data += 1e-3


def _a_buffer_through_data(one: Any) -> None:
    one[1][0].running_mean.data -= 1


def _another_storage(one: Any) -> None:
    one[2].bias.data = one[2].bias.data.clone()


def _another_parameter(one: Any) -> None:
    one[2].bias = nn.Parameter(one[2].bias.detach().clone())


def _another_module(one: Any) -> None:
    one[1][1] = nn.Linear(40, 40)


def _a_module_less(one: Any) -> None:
    del one[1]


def _a_module_more(one: Any) -> None:
    one.append(nn.Linear(3, 3))


def _a_child_of_what_had_none(one: Any) -> None:
    one[1][1].add_module("adapter", nn.Linear(40, 2))


def _no_parameter(one: Any) -> None:
    one[0].bias = None


def _not_a_number(one: Any) -> None:
    one[0].bias.data[:] = torch.nan


def _zero_for_nan(one: Any) -> None:
    one[1][0].running_var.data[:] = 0


@pytest.mark.parametrize(
    "change",
    [
        _in_place, _through_data, _a_buffer_through_data, _another_module,
        _a_module_less, _a_module_more, _a_child_of_what_had_none, _no_parameter, _not_a_number, _zero_for_nan,
    ],
)  # fmt: skip
def test_every_change_is_noticed_once(change: Callable[[nn.Module], None]) -> None:
    one = model()
    inner: Any = one[1]
    inner[0].running_var[:] = torch.nan
    weights = looked_at(one)
    change(one)
    assert weights.changed()
    assert not weights.changed()


@pytest.mark.parametrize("change", [_another_storage, _another_parameter])
def test_other_tensors_with_the_same_numbers_are_no_change(change: Callable[[nn.Module], None]) -> None:
    one = model()
    weights = looked_at(one)
    change(one)
    assert not weights.changed()
    last: Any = one[2]
    last.bias.data += 1
    assert weights.changed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_through_data_is_noticed_in_every_dtype(dtype: torch.dtype) -> None:
    one = nn.Linear(1, 1)
    one.register_buffer("numbers", torch.arange(40).to(dtype))
    one.register_buffer("others", torch.zeros(3))
    weights = looked_at(one)
    one.numbers.data[0] = 7  # type: ignore[operator]
    assert weights.changed()
    assert not weights.changed()


def test_tensors_made_in_inference_mode_are_looked_at_too() -> None:
    with torch.inference_mode():
        one = model()
    weights = looked_at(one)
    with torch.inference_mode():
        one[0].weight[0] += 1  # type: ignore[index, operator]
    assert weights.changed()


def test_a_module_that_is_there_twice_or_in_a_circle_is_walked_once() -> None:
    shared = nn.Linear(4, 4)
    one = nn.Sequential(shared, shared)
    shared.__dict__["_modules"]["above"] = one
    weights = looked_at(one)
    shared.weight.data += 1
    assert weights.changed()


def test_a_module_without_weights_never_changes() -> None:
    weights = ModelWatch(nn.Identity())
    assert not weights.changed()
    assert weights.device == torch.device("cpu")


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert ModelWatch(nn.Linear(2, 2, device="cpu")).device == torch.device("cpu")

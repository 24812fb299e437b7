"""Tests of encodings: exact where the dtype can represent a value, within half a step elsewhere."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from llmcache.indexes.format.codec import (
    DTYPES,
    decode,
    encode,
    representable,
)

FLOAT_MAX = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149
BELOW_NORMAL = 2.0**-126 - 2.0**-149
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 65504.0, -65504.0, 2.0**-24, SMALLEST, -SMALLEST, BELOW_NORMAL]

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=finite, fill=st.nothing())


def there_and_back(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    stored, scale = encode(values, dtype)
    assert stored.dtype == np.uint8
    assert stored.shape == (len(values), values.shape[1] * DTYPES[dtype])
    assert stored.flags.c_contiguous
    assert scale.dtype == np.float32
    assert scale.shape == (len(values),)
    back = decode(stored.copy(), scale, dtype)
    assert back.dtype == np.float32
    assert back.shape == values.shape
    return back


def bits(values: NDArray[np.float32]) -> list[int]:
    return [int(bit) for bit in np.ascontiguousarray(values).view(np.uint32).ravel()]


def by_torch(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = torch.from_numpy(values.copy()).to(dtype).to(torch.float32).numpy()
    return rounded


def test_the_sizes_are_those_of_the_types() -> None:
    assert DTYPES == {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@given(tables)
def test_float32_comes_back_bit_for_bit(values: NDArray[np.float32]) -> None:
    assert bits(there_and_back(values, "float32")) == bits(values)


def test_float32_keeps_the_sign_of_zero_and_the_smallest_numbers() -> None:
    values = np.array([[*SPECIAL, FLOAT_MAX, -FLOAT_MAX]], np.float32)
    assert bits(there_and_back(values, "float32")) == bits(values)
    assert bits(values)[1] == 0x80000000
    assert bits(values)[8] == 1


def test_the_bytes_are_little_endian() -> None:
    values = np.array([[1.5, -2.25]], np.float32)
    assert encode(values, "float32")[0].tobytes() == struct.pack("<2f", 1.5, -2.25)
    assert encode(values, "float16")[0].tobytes() == struct.pack("<2e", 1.5, -2.25)
    assert encode(values, "bfloat16")[0].tobytes() == struct.pack("<2H", 0x3FC0, 0xC010)


def test_every_finite_float16_comes_back_bit_for_bit() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = every[np.isfinite(every)].astype(np.float32).reshape(-1, 64)
    assert values.size == 2 * 31 * 1024
    assert bits(there_and_back(values, "float16")) == bits(values)


def test_every_finite_bfloat16_comes_back_bit_for_bit() -> None:
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = every[np.isfinite(every)].reshape(-1, 256)
    assert values.size == 2 * 255 * 128
    assert representable(values, "bfloat16").all()
    assert bits(there_and_back(values, "bfloat16")) == bits(values)


@given(tables)
def test_bfloat16_rounds_as_torch_does(values: NDArray[np.float32]) -> None:
    assert bits(there_and_back(values, "bfloat16")) == bits(by_torch(values, torch.bfloat16))


def test_bfloat16_rounds_ties_to_even() -> None:
    ties = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x00008000]], np.uint32)
    values = ties.view(np.float32)
    expected = [0x3F800000, 0x3F820000, 0x3F810000, 0xBF800000, 0x00000000]
    assert bits(there_and_back(values, "bfloat16")) == expected
    assert bits(by_torch(values, torch.bfloat16)) == expected


@given(
    arrays.arrays(
        np.float32, (3, 7), elements=st.floats(min_value=-65504, max_value=65504, width=32), fill=st.nothing()
    )
)
def test_float16_rounds_as_torch_does(values: NDArray[np.float32]) -> None:
    assert bits(there_and_back(values, "float16")) == bits(by_torch(values, torch.float16))


@given(tables)
def test_int8_is_within_half_a_step(values: NDArray[np.float32]) -> None:
    values = values[representable(values, "int8")]
    stored, scale = encode(values, "int8")
    back = decode(stored.copy(), scale, "int8").astype(np.float64)
    peak = np.abs(values.astype(np.float64)).max(axis=1)
    # half a step, and what float32 cannot express: a few units in the last place of the peak, or a denormal
    step = np.maximum(peak / 127, 2.0**-126)
    error = np.abs(back - values.astype(np.float64)).max(axis=1)
    assert (error <= step / 2 + peak * 2.0**-20 + 2.0**-149).all()


def test_int8_uses_its_whole_range_in_every_row() -> None:
    values = np.array([[1.0, -0.5, 0.25], [1000.0, 10.0, -1000.0]], np.float32)
    stored, scale = encode(values, "int8")
    assert stored.view(np.int8).tolist() == [[127, -64, 32], [127, 1, -127]]
    np.testing.assert_allclose(scale, [1 / 127, 1000 / 127], rtol=1e-6)


@pytest.mark.parametrize("peak", [SMALLEST, 190 * SMALLEST, BELOW_NORMAL, 2.0**-120, 1e38])
def test_int8_keeps_signs_however_small_or_large_the_row(peak: float) -> None:
    values = np.array([[peak, -peak, 0.0, peak / 2]], np.float32)
    back = there_and_back(values, "int8").astype(np.float64)[0]
    assert np.isfinite(back).all()
    assert back[0] >= 0 >= back[1]
    assert back[0] == -back[1]
    assert back[2] == 0
    assert abs(back[0] - peak) <= max(peak / 254, 2.0**-126)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zeros(dtype: str) -> None:
    values = np.zeros((3, 5), np.float32)
    assert bits(there_and_back(values, dtype)) == [0] * 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (0, 0), (2, 0)])
def test_nothing_is_stored_as_nothing(dtype: str, shape: tuple[int, int]) -> None:
    stored, scale = encode(np.zeros(shape, np.float32), dtype)
    assert stored.shape == (shape[0], shape[1] * DTYPES[dtype])
    assert scale.shape == (shape[0],)
    assert decode(stored, scale, dtype).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32) * 10
    whole, scale = encode(values, dtype)
    for i in range(20):
        alone, own = encode(values[i : i + 1], dtype)
        assert alone.tobytes() == whole[i].tobytes()
        assert own[0] == scale[i]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_do_not_lie_side_by_side_are_stored_all_the_same(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal((8, 12)).astype(np.float32)
    turned = np.asfortranarray(values)
    assert encode(turned, dtype)[0].tobytes() == encode(values, dtype)[0].tobytes()
    assert encode(values[::2, ::3], dtype)[0].tobytes() == encode(values[::2, ::3].copy(), dtype)[0].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_changes_nothing_in_place(dtype: str) -> None:
    values = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    before = values.copy()
    stored, scale = encode(values, dtype)
    decode(stored.copy(), scale, dtype)
    assert bits(values) == bits(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_rows_without_nan_and_infinity_can_be_stored(dtype: str) -> None:
    values = np.ones((5, 4), np.float32)
    values[1, 3], values[2, 0], values[3, 1] = np.nan, np.inf, -np.inf
    assert representable(values, dtype).tolist() == [True, False, False, False, True]


def test_a_row_beyond_float16_cannot_be_stored_as_float16() -> None:
    values = np.array([[65504], [-65504], [65536], [-65536], [1e38]], np.float32)
    assert representable(values, "float16").tolist() == [True, True, False, False, False]
    for dtype in ("float32", "bfloat16", "int8"):
        assert representable(values, dtype).all()
    assert representable(np.array([[FLOAT_MAX, -FLOAT_MAX]], np.float32), "float32").all()


def test_a_row_that_bfloat16_would_round_to_infinity_cannot_be_stored_as_bfloat16() -> None:
    largest = np.array([0x7F7F0000], np.uint32).view(np.float32)[0]
    values = np.array([[largest], [-largest], [FLOAT_MAX], [-FLOAT_MAX]], np.float32)
    assert representable(values, "bfloat16").tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=tables)
def test_what_can_be_stored_comes_back_as_numbers(dtype: str, values: NDArray[np.float32]) -> None:
    kept = values[representable(values, dtype)]
    assert np.isfinite(there_and_back(kept, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=arrays.arrays(np.float32, (4, 3), elements=st.floats(width=32, allow_subnormal=True), fill=st.nothing()))
def test_a_row_with_a_value_that_is_no_number_is_never_storable(dtype: str, values: NDArray[np.float32]) -> None:
    assert not representable(values, dtype)[~np.isfinite(values).all(axis=1)].any()

"""Stored form of KV blocks: the model's own dtype, a shorter floating-point type, or int8 with a scale per head.

A bank of float16 or bfloat16 rounds each number by itself (`llmcache.indexes.format.codec`). Its int8 has one scale for
a whole row, here a block of tokens with all layers: one outlier would leave the other heads without precision. For
"int8" this module therefore chooses a scale for the keys and for the values of each head of each layer and token. The
bank is given whole numbers from -127 to 127, and stores them as they are: every token ends with the number 127, so that
the bank's own scale is exactly 1. The bank's format does not change, and its checksums cover the scales.

A token's row in the bank is, for S scales (those of the heads, kind after kind as in the record, then the state's):

    keys and values, a number each | state: high digits | state: low digits | scales: high | scales: low | 127

A final state has two digits to the base 255 per number, 16 bits in all, since it is the model's output for its token.
A scale is rounded up to a floating-point number with 8 bits after the leading one, which covers the range of float32;
as an integer it is below 65,025, again two digits. The scale of a state is a power of two. So the largest number of a
head is always 127 steps, and records that were restored are stored again without another rounding, as happens where a
shorter entry grows to a full block. A token with NaN or infinity is given as NaN, which no bank stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.decoders.kv_buffer import KVLayout
from llmcache.errors import ConfigError
from llmcache.indexes.format import codec
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import ALIGN, ROW

PREFIX = "prefix"
"""Name of the bank with a decoder's keys and values in the model's own dtype. Another dtype follows it after "-"."""
EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 1 / 127}
"""Distance of two neighbouring numbers of a stored type, relative to them; of int8, to the largest of its scale."""
RESULT_EPSILONS = {"float16": 2.0**-7, "bfloat16": 2.0**-4, "int8": 0.2}
"""Machine epsilons for audits of answers and log-likelihoods that were computed after rounded prefixes.

Measured with three Llamas of 260 thousand to 135 million parameters, log-likelihoods of single tokens differ from the
model's by up to 0.012, 0.10 and 0.29 nats; an audit allows four epsilons.
"""
_STEPS = 127  # of a key or value
_BASE = 255  # of two digits, each from -127 to 127
_MOST = _STEPS * _BASE + _STEPS  # largest number of two digits
_SHIFT = 15  # low bits of a float32 that a scale does not have
_TINY = np.float32(2.0**-120)  # smallest scale
_SOURCE = 32  # bytes of the source of a row: the key of the block before it


class Parts(NamedTuple):
    """Parts of stored tokens, arrays or tensors.

    numbers: [tokens, keys and values or more]. scales: of each head, float32 [tokens, heads]; None: the numbers are the
    keys and values themselves. states: [tokens, width].
    """

    numbers: Any
    states: Any
    scales: Any


@dataclass(frozen=True)
class KVEncoding:
    """Stored form of the records of one layout. dtype: of the bank."""

    shape: KVLayout
    dtype: str

    @classmethod
    def of(cls, shape: KVLayout, dtype: str = "auto") -> KVEncoding:
        """Return the encoding for a setting `CacheConfig.prefix_dtype`. ConfigError if it would save nothing."""
        own = shape.facts.dtype
        return cls(shape, stored_dtype(own, dtype))

    @property
    def exact(self) -> bool:
        """True if restored records are the model's, bit for bit."""
        return self.dtype == self.shape.facts.dtype

    @property
    def bank(self) -> str:
        """Name of the bank. Each dtype has its own, so that an opening without rounding never finds rounded blocks."""
        return PREFIX if self.exact else f"{PREFIX}-{self.dtype}"

    @cached_property
    def facts(self) -> BankFacts:
        """Facts of the bank."""
        width = self.shape.record
        if self.dtype == "int8":
            width += self.shape.width + 2 * (self._heads + 1) + 1
        return BankFacts(self.dtype, width, 2, 0)

    @cached_property
    def _heads(self) -> int:
        return sum(heads for heads, _ in self.shape.planes)

    @cached_property
    def _numbers(self) -> int:
        """Count of keys and values of a token."""
        return self.shape.record - self.shape.width

    @cached_property
    def _runs(self) -> list[tuple[slice, slice, int]]:
        """Numbers, scales and head dim of each kind of planes."""
        runs, at, head = [], 0, 0
        for (heads, dim), planes in self.shape.kinds.items():
            count = heads * len(planes)
            runs.append((slice(at, at + count * dim), slice(head, head + count), dim))
            at, head = at + count * dim, head + count
        return runs

    # -- storing --------------------------------------------------------------------------------------------

    def encode(self, records: Floats32) -> Floats32:
        """Return records as the bank gets them. records: float32 [tokens, record]. Returns float32 [tokens, width]."""
        if self.dtype != "int8":
            return records
        stored = np.empty((len(records), self.facts.width), np.float32)
        codes = np.empty((len(records), self._heads + 1), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # tokens with NaN or infinity become NaN below
            for numbers, scales, dim in self._runs:
                heads = records[:, numbers].reshape(len(records), -1, dim)
                steps = _rounded_up(np.abs(heads).max(axis=2) / np.float32(_STEPS))
                codes[:, scales] = steps.view(np.uint32) >> _SHIFT
                stored[:, numbers] = np.rint(heads / steps[:, :, None]).reshape(len(records), -1)
            states = records[:, self._numbers :]
            peaks = np.abs(states).max(axis=1, keepdims=True, initial=0.0)
            mantissas, exponents = np.frexp(np.maximum(peaks / np.float32(_MOST), _TINY))
            steps = np.ldexp(np.float32(1), exponents - (mantissas == 0.5)).astype(np.float32)
            codes[:, -1:] = steps.view(np.uint32) >> _SHIFT
            places = self._places
            stored[:, places[0]], stored[:, places[1]] = _digits(np.rint(states / steps))
            stored[:, places[2]], stored[:, places[3]] = _digits(codes - _MOST)
        stored[:, -1] = _STEPS
        stored[~np.isfinite(records).all(axis=1)] = np.nan
        return stored

    @cached_property
    def _places(self) -> tuple[slice, slice, slice, slice]:
        """High and low digits of the state, high and low digits of the scales."""
        ends = np.cumsum([self._numbers, *2 * [self.shape.width], *2 * [self._heads + 1]]).tolist()
        first, second, third, fourth = (slice(start, stop) for start, stop in pairwise(ends))
        return first, second, third, fourth

    # -- restoring ------------------------------------------------------------------------------------------

    def parts(self, stored: Floats32 | Tensor) -> Parts:
        """Return the parts of stored tokens. stored: [tokens, width] as read from the bank, on any device."""
        if self.dtype != "int8":
            return Parts(stored, stored[:, self._numbers :], None)
        if isinstance(stored, Tensor):
            stored = stored.float()
        scales = self._scales(stored)
        high, low = stored[:, self._places[0]], stored[:, self._places[1]]
        return Parts(stored, (high * _BASE + low) * scales[:, -1:], scales[:, :-1])

    def _scales(self, stored: Any) -> Any:
        """Return the scales of stored tokens, float32 [tokens, heads + 1]: of the heads, then of the state."""
        high, low = stored[:, self._places[2]], stored[:, self._places[3]]
        codes = high * _BASE + (low + _MOST)
        if isinstance(codes, Tensor):
            return (codes.to(torch.int32) << _SHIFT).view(torch.float32)
        return (codes.astype(np.uint32) << _SHIFT).view(np.float32)

    def decode(self, stored: Floats32) -> Floats32:
        """Return the records of stored tokens. stored: float32 [tokens, width]. Returns float32 [tokens, record]."""
        if self.dtype != "int8":
            return stored
        parts = self.parts(stored)
        records = np.empty((len(stored), self.shape.record), np.float32)
        for numbers, scales, dim in self._runs:
            heads = stored[:, numbers].reshape(len(stored), -1, dim)
            np.multiply(heads, parts.scales[:, scales, None], out=records[:, numbers].reshape(heads.shape))
        records[:, self._numbers :] = parts.states
        return records

    def rounded(self, records: Floats32) -> Floats32:
        """Return records as they would be restored after they were stored; float32 [tokens, record]."""
        stored, scale = codec.encode(self.encode(records), self.dtype)
        return self.decode(codec.decode(stored, scale, self.dtype))

    def errors(self, stored: Floats32) -> Floats32:
        """Return the largest rounding error of each number of stored tokens, float32 [tokens, record].

        stored: float32 [tokens, width].
        """
        if self.exact:
            return np.zeros((len(stored), self.shape.record), np.float32)
        if self.dtype != "int8":
            # half of the distance to the next number, of which the smallest is that of numbers without an exponent
            smallest = np.float32(2.0**-25 if self.dtype == "float16" else 0)
            return np.maximum(np.abs(stored) * np.float32(EPSILONS[self.dtype] / 2 * 1.001), smallest)
        steps = self._scales(stored)
        errors = np.empty((len(stored), self.shape.record), np.float32)
        for numbers, scales, dim in self._runs:
            errors[:, numbers] = np.repeat(steps[:, scales], dim, axis=1)
        errors[:, self._numbers :] = steps[:, -1:]
        return errors * np.float32(0.5 * 1.001)


def stored_dtype(own: str, dtype: str) -> str:
    """Return the dtype of the bank for a model of dtype `own` and a setting `prefix_dtype`. ConfigError if unfit."""
    if dtype in ("auto", own):
        return own
    if codec.DTYPES[dtype] >= codec.DTYPES[own]:
        raise ConfigError(
            f'prefix_dtype={dtype!r} takes as many bytes as the model\'s own {own}, and rounds; give "auto" or "int8"'
        )
    return dtype


def bytes_per_token(layout: KVLayout, dtype: str = "auto", block: int = 16) -> int:
    """Return the bytes that a store takes for one token of a prefix, in full KV blocks, rounded up.

    Includes scales, the token id, and the token's share of the block's record and source.
    dtype: setting `prefix_dtype`. block: tokens per KV block.
    """
    facts = KVEncoding.of(layout, dtype).facts
    payload = -(-block * facts.width * codec.DTYPES[facts.dtype] // ALIGN) * ALIGN
    return -(-(payload + ROW.itemsize + _SOURCE) // block) + 4


def _rounded_up(steps: Floats32) -> Floats32:
    """Round numbers from 0 on up to scales. Numbers near the smallest of float32 become `_TINY`, others are finite."""
    bits = np.maximum(steps, _TINY).view(np.uint32)
    return (((bits + ((1 << _SHIFT) - 1)) >> _SHIFT) << _SHIFT).view(np.float32)


def _digits(numbers: Floats32) -> tuple[Floats32, Floats32]:
    """Split whole numbers into two digits to the base 255, each from -127 to 127."""
    high = np.rint(numbers / np.float32(_BASE))
    return high, numbers - high * np.float32(_BASE)

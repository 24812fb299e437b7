"""Trial calls of a model before it is cached: their inputs and lengths, and comparison of results.

A trial compares the cache's answers with the model's, at several lengths. Some models compute differently beyond a
length in their configuration (a window, a block, the original context of rotary positions). Calls beyond the longest
length with equal answers are left to the model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmcache.errors import ConfigError
from llmcache.model.restoring import without_trace

BASE_LENGTHS = (7, 19)
"""Tokens of the first trials of every model."""
_NAMES = re.compile(r"window|block|chunk|local|bucket|lsh|capacity|segment|original_max_position")
_UNITS = re.compile(r"block|chunk|lsh|segment")
"""Names of sizes of parts. The number of parts may decide how a model computes them, so longer rows are tried."""
_LONGEST = 1 << 15
"""Tokens above which a number in a configuration is not tried."""
_SECONDS, _MOST_SECONDS = 2.0, 10.0
"""Least and greatest time for the trials of a model."""
_BY_LENGTH = {"dynamic", "longrope"}
"""Kinds of rotary positions whose frequencies depend on the length of the whole batch."""
_RELATIVE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Root mean square of a difference, relative to that of the values, up to which it counts as rounding."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A length from which a model may compute differently.

    name: of the number in the configuration. number: its value, in tokens. tokens: length of the rows to try.
    """

    name: str
    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Reach:
    """Longest rows for which the answers agreed. tokens: their length; None for any. reason: why not longer rows."""

    tokens: int | None = None
    reason: str = ""

    def refusal(self, tokens: int) -> str | None:
        """Return the reason why rows of this many tokens are left to the model; None if they are not."""
        if self.tokens is None or tokens <= self.tokens:
            return None
        return f"it has more than {self.tokens} tokens in a row, and {self.reason}"

    def within(self, tokens: int | None, reason: str) -> Reach:
        """Return the shorter of this reach and another."""
        if tokens is None or (self.tokens is not None and self.tokens <= tokens):
            return self
        return Reach(tokens, reason)


def length_marks(config: Any) -> list[Mark]:
    """Return the lengths in a configuration, shortest first: integers named window, block, chunk and the like.

    config: of transformers, or any object with `to_dict`; None has no marks.
    """
    marks: dict[int, Mark] = {}
    for name, number in _numbers(config.to_dict() if hasattr(config, "to_dict") else {}, ""):
        tokens = 12 * number + 5 if _UNITS.search(name.rpartition(".")[2]) else number + 5
        if not 2 <= number <= _LONGEST or not _NAMES.search(name):
            continue
        if number not in marks or marks[number].tokens < tokens:
            marks[number] = Mark(name, number, tokens)
    return sorted(marks.values(), key=lambda mark: mark.number)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield the integers inside nested dictionaries and lists, with their dotted names."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _numbers(each, f"{name}.{inner}" if name else str(inner))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def reach_of_positions(config: Any) -> Reach:
    """Return up to which length rotary positions do not depend on the length of the batch.

    It is one token less than the original context for dynamic scaling and long-context factors: at exactly that length
    the model may still use the frequencies of an earlier, longer call.
    """
    reach = Reach()
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    settings = [getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)]
    for parameters in _rope_parameters([each for each in settings if each]):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind not in _BY_LENGTH:
            continue
        context = parameters.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind == "dynamic" or context is None:
            context = min(number for number in (context, getattr(text, "max_position_embeddings", 1)) if number)
        reach = reach.within(int(context) - 1, f"its {kind} rotary positions change beyond {context}")
    return reach


def _rope_parameters(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the nested dictionaries that name a kind of rotary positions: one, or one for each kind of layers."""
    if isinstance(value, Mapping):
        if "rope_type" in value or "type" in value:
            yield value
        for each in value.values():
            yield from _rope_parameters(each)
    elif isinstance(value, list):
        for each in value:
            yield from _rope_parameters(each)


# -- running trials -----------------------------------------------------------------------------------------


Attempt = Callable[[int, Callable[[], bool]], float]
"""attempt(tokens, thorough) compares answers for rows of this length, and returns the seconds of one forward.

thorough: returns True while there is time for comparisons beside the most important ones. Raises `TooLong` when the
model fails for rows of this length, ConfigError when answers differ.
"""


def explored(lengths: Sequence[int], module: Module, trial: Attempt, *, effort: int) -> Reach:
    """Return the reach of a model, from trials at these lengths and at the lengths in its configuration.

    Each trial starts with the module as it is now and leaves no trace, since short rows change some models for good.
    Times are CPU times of the thread, so that other work on the machine changes no result.
    effort: forwards of a trial, to predict its time; trials that would take too long are left out.
    Raises the ConfigError of a trial at one of `lengths`.
    """
    config, device = getattr(module, "config", None), next(module.parameters(), torch.zeros(0)).device
    reach = reach_of_positions(config)
    seconds, longest, began = 0.0, 0, time.thread_time()

    def attempt(tokens: int, thorough: Callable[[], bool]) -> float:
        return without_trace(module, device, lambda: trial(tokens, thorough))

    def thorough() -> bool:
        return time.thread_time() - began < _SECONDS

    for tokens in (length if reach.tokens is None else min(length, reach.tokens) for length in lengths):
        if tokens <= longest or (longest and not thorough()):
            break
        try:
            seconds, longest = attempt(tokens, thorough), tokens
        except TooLong:
            if not longest:
                raise
            return reach
    budget = max(_SECONDS, min(_MOST_SECONDS, 40 * seconds)) + time.thread_time() - began
    for mark in length_marks(config):
        if reach.tokens is not None and mark.number > reach.tokens:
            break
        expected = effort * seconds * mark.tokens / longest
        if time.thread_time() - began + expected > budget:
            return reach.within(mark.number - 1, f"trials beyond its {mark.name} would take about {expected:.0f} s")
        try:
            seconds, longest = attempt(mark.tokens, lambda: False), mark.tokens
        except TooLong:
            break
        except ConfigError as error:
            return reach.within(mark.number - 1, f"beyond its {mark.name}: {error}")
    return reach


class TooLong(ConfigError):
    """Error of a trial: the model itself fails for rows of this length."""


def explained(error: Exception) -> str:
    """Return the type and first line of an error, as part of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


def drawn_ids(rows: int, tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """Return random token ids that are the same at every call; int64 [rows, tokens]."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)


def right_mask(lengths: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """Return a mask of rows that are padded on the right; int64 [rows, tokens]."""
    return (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long().to(device)


def vocabulary_of(module: Module) -> int:
    """Return the vocabulary size of a module; 2 if unknown."""
    embedding = embedding_of(module)
    config = getattr(module, "config", None)
    return int(getattr(embedding, "num_embeddings", 0) or getattr(config, "vocab_size", 0) or 2)


def embedding_of(module: Any) -> Any:
    """Return the token embedding of a module; None where it has none."""
    try:
        return module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


# -- comparing ----------------------------------------------------------------------------------------------


def rounding_of(module: Module, device: torch.device) -> torch.dtype:
    """Return the coarsest dtype that a module computes in, of its weights or of autocast.

    Quantised weights count as bfloat16.
    """
    kinds = {weight.dtype for weight in module.parameters()}
    if torch.is_autocast_enabled(device.type):
        kinds.add(torch.get_autocast_dtype(device.type))
    floats = {kind if kind.is_floating_point else torch.bfloat16 for kind in kinds}
    return max(floats, key=relative_rounding, default=torch.float32)


def relative_rounding(dtype: torch.dtype) -> float:
    """Return the relative noise of another batching in this dtype; for integer dtypes that of bfloat16."""
    return _RELATIVE.get(dtype, _RELATIVE[torch.bfloat16])


def unlike(found: Any, expected: Any, rounding: torch.dtype = torch.float64, floor: float = 0.0) -> str | None:
    """Describe how two tensors differ beyond rounding, shapes first; None if they do not.

    rounding: dtype that they were computed in, where it is coarser than their own. floor: difference that always counts
    as rounding, for sums of large numbers that cancel. Numbers that are not finite must be in the same places.
    """
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return None if type(found) is type(expected) else f"{type(found).__name__}, not {type(expected).__name__}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    if not expected.numel():
        return None
    if not expected.is_floating_point():
        return None if torch.equal(found, expected) else "other numbers"
    mine, theirs = found.double(), expected.double()
    finite = torch.isfinite(theirs)
    if not torch.equal(torch.isfinite(mine), finite):
        return "numbers that are not finite in other places"
    mine, theirs = mine[finite], theirs[finite]
    if not theirs.numel():
        return None
    apart, size = mine - theirs, float(theirs.square().mean().sqrt()) + 1e-12
    relative = max(relative_rounding(expected.dtype), relative_rounding(rounding))
    largest = float(apart.abs().max())
    limit = min(8 * relative * float(theirs.abs().max()), 64 * relative * size)
    if float(apart.square().mean().sqrt()) > max(floor, relative * size) or largest > max(8 * floor, limit):
        return f"numbers that are {largest:.2g} apart"
    return None

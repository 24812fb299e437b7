"""Attached models of every architecture that the installed transformers has, beside the same models uncached.

    python -m tests.architecture_fuzz [--only NAME ...] [--seed N]

For each configuration calls are drawn: lengths, padding, dtypes, batches, arguments, texts that are known and others.
Every result has to be the model's own within what re-batching changes, or the cache has to stand aside with a reason.
The table at the end counts configurations by what the cache did, and why.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from llmcache import CacheConfig, LLMCache
from llmcache.errors import LLMCacheError
from tests.tiny import SIDE, VOCABULARY, architectures, tiny_model

CALLS = 7
LENGTHS = (1, 2, 5, 7, 8, 9, 12, 13, 17, 24, 40)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 0.15}
"""Largest difference relative to the largest number that another batch may make."""


@dataclass
class Outcome:
    """What came of one configuration.

    reused: rows or tokens that came from the store. reasons: why others did not. calls, failed: how many were drawn,
    and for how many the model itself raised an error.
    """

    name: str
    reused: int = 0
    reasons: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    calls: int = 0
    failed: int = 0
    built: bool = True

    @property
    def kind(self) -> str:
        if not self.built:
            return "not built"
        return "served" if self.reused else "refused"


class _Reasons(logging.Handler):
    """Collects what a cache says about calls that go past it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "past the cache: " in text:
            self.said.append(text.partition("past the cache: ")[2])


@contextmanager
def reasons() -> Iterator[list[str]]:
    """Reasons that are logged while this is open."""
    handler, log = _Reasons(), logging.getLogger("llmcache")
    propagates, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield handler.said
    finally:
        log.removeHandler(handler)
        log.propagate = propagates


# -- drawing calls ------------------------------------------------------------------------------------------


class Drawn:
    """Calls of one model, drawn from a seed: rows come from a small pool, so that many come again."""

    def __init__(self, kind: str, model: Any, seed: str) -> None:
        self._kind, self._model = kind, model
        self._chance = random.Random(seed)
        self._parameters = signature(model.forward).parameters
        self._main = str(getattr(model, "main_input_name", "input_ids"))
        generator = np.random.default_rng(self._chance.randrange(1 << 30))
        first = generator.integers(4, VOCABULARY, max(LENGTHS)).tolist()
        self._pool = [first]
        for _ in range(3):
            shared = self._chance.randrange(0, 20)  # rows that begin alike
            self._pool.append(first[:shared] + generator.integers(4, VOCABULARY, max(LENGTHS) - shared).tolist())
        self._numbers = generator

    def calls(self) -> Iterator[dict[str, Any]]:
        """Arguments of one call after the other; some are given twice."""
        before: dict[str, Any] | None = None
        for _ in range(CALLS):
            if before is not None and self._chance.random() < 0.4:
                yield before
                continue
            before = self._text() if self._kind in ("encoder", "decoder", "encoder-decoder") else self._other()
            yield before

    def _text(self) -> dict[str, Any]:
        chance = self._chance
        lengths = [chance.choice(LENGTHS) for _ in range(chance.choice((1, 1, 2, 3, 4)))]
        if chance.random() < 0.3:
            lengths = lengths[:1] * len(lengths)
        rows = [chance.choice(self._pool)[:length] for length in lengths]
        columns = max(lengths)
        ids, mask = torch.zeros((2, len(rows), columns), dtype=torch.long)
        left = chance.random() < (0.5 if self._kind == "decoder" else 0.15)
        for i, row in enumerate(rows):
            here = slice(columns - len(row), columns) if left else slice(len(row))
            ids[i, here], mask[i, here] = torch.tensor(row), 1
        call: dict[str, Any] = {"input_ids": ids}
        if not mask.all() or chance.random() < 0.5:
            call["attention_mask"] = mask
        if self._kind == "encoder-decoder":
            call["decoder_input_ids"] = ids[:, : min(columns, 5)].clamp(min=3)
        return call | self._arguments(ids, mask)

    def _arguments(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """None or one further argument that the model's forward has."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        offered: dict[str, Any] = {
            "token_type_ids": (torch.arange(ids.shape[1])[None].expand_as(ids) % 2).clone(),
            "position_ids": positions,
            "use_cache": self._chance.choice((True, False)),
            "output_hidden_states": True,
            "return_dict": False,
            "labels": torch.where(mask.bool(), ids, -100),
            "logits_to_keep": 1,
        }
        if self._kind == "decoder":
            offered["is_causal"] = False
            offered["position_ids"] = self._chance.choice((positions, torch.arange(ids.shape[1])[None]))
        allowed = [name for name in offered if name in self._parameters or name == "is_causal"]
        if not allowed or self._chance.random() < 0.45:
            return {}
        name = self._chance.choice(allowed)
        return {name: offered[name]}

    def _other(self) -> dict[str, Any]:
        """Images, films or sound, some of which come again."""
        config = self._model.config
        shape: tuple[int, ...] = (3, SIDE, SIDE)
        if self._main == "pixel_values":
            side = getattr(config, "image_size", None) or SIDE
            high, wide = side if isinstance(side, (list, tuple)) else (side, side)
            channels, frames = int(getattr(config, "num_channels", 3)), getattr(config, "num_frames", None)
            shape = (channels, high, wide)
            shape = (frames, *shape) if frames and "video" in type(self._model).__name__.lower() else shape
        elif self._main == "input_features":
            shape = (getattr(config, "num_mel_bins", 16), 2 * getattr(config, "max_source_positions", 32))
        elif getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
            shape = (config.max_length, config.num_mel_bins)
        else:
            shape = (self._chance.choice((800, 1600)),)
        pool = torch.randn((3, *shape), generator=torch.Generator().manual_seed(int(np.prod(shape)) % 9973))
        some = [self._chance.randrange(3) for _ in range(self._chance.choice((1, 2, 3)))]
        return {self._main: pool[some].to(next(self._model.parameters()).dtype)}


# -- comparing ----------------------------------------------------------------------------------------------


def differences(found: Any, expected: Any, call: Mapping[str, Any], tolerance: float) -> list[str]:
    """What in a result is not the model's, on what the masks show."""
    mask = call.get("attention_mask")
    faults: list[str] = []
    in_cache = False

    def visible(tensor: Tensor) -> Tensor:
        if mask is not None and tensor.ndim >= 2 and tensor.shape[:2] == mask.shape:
            return tensor[mask.bool()]
        if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == (mask.shape[0], 1):  # of the last column
            return tensor[mask[:, -1:].bool()]
        columns = tensor.shape[2] if tensor.ndim == 4 else 0
        if mask is not None and in_cache and tensor.shape[0] == mask.shape[0] and 0 < columns <= mask.shape[1]:
            return tensor.transpose(1, 2)[mask[:, mask.shape[1] - columns :].bool()]  # of a window: the last ones
        return tensor

    def compare(mine: Any, theirs: Any, where: str) -> None:
        nonlocal in_cache
        if isinstance(theirs, Tensor) and isinstance(mine, Tensor):
            if mine.shape != theirs.shape:
                faults.append(f"{where}: {list(mine.shape)}, not {list(theirs.shape)}")
                return
            if not theirs.numel() or not theirs.is_floating_point():
                return
            one, other = visible(mine).double(), visible(theirs).double()
            if not one.numel():
                return
            far = float((one - other).abs().nan_to_num(0).max())
            if far > tolerance * max(float(other.abs().nan_to_num(0).max()), 1e-3):
                faults.append(f"{where}: {far:.3g} off, of {float(other.abs().max()):.3g}")
        elif hasattr(theirs, "layers") and hasattr(theirs, "get_seq_length"):
            if mine is None or len(mine.layers) != len(theirs.layers):
                faults.append(f"{where}: keys and values of other layers")
                return
            for number, (a, b) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
                in_cache = True
                for name in ("keys", "values"):
                    compare(getattr(a, name, None), getattr(b, name, None), f"{where}.{number}.{name}")
                in_cache = False
        elif isinstance(theirs, Mapping):
            if mine.keys() != theirs.keys():
                faults.append(f"{where}: {sorted(mine)}, not {sorted(theirs)}")
                return
            for name in theirs:
                compare(mine[name], theirs[name], f"{where}.{name}".lstrip("."))
        elif isinstance(theirs, (list, tuple)):
            if not isinstance(mine, (list, tuple)) or len(mine) != len(theirs):
                faults.append(f"{where}: another number of parts")
                return
            for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                compare(a, b, f"{where}.{number}")
        elif (mine is None) != (theirs is None):
            faults.append(f"{where}: {type(mine).__name__}, not {type(theirs).__name__}")

    compare(found, expected, "")
    return faults


def state_of(model: Any) -> dict[str, Any]:
    """Everything simple that a model holds: numbers, names, flags, buffers, its configuration, the random state."""
    state: dict[str, Any] = {"random": torch.get_rng_state().numpy().tobytes(), "config": str(model.config.to_dict())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "layers_are_rescaled":  # written with the weights, at the first forward after training
                continue
            if isinstance(value, (int, float, str, bool, tuple, list, type(None))):
                state[f"{name}.{key}"] = repr(value)
        for key, buffer in module._buffers.items():
            state[f"{name}.{key}"] = None if buffer is None else buffer.float().numpy().tobytes()
    return state


# -- one configuration --------------------------------------------------------------------------------------


def tried(kind: str, model_type: str, class_name: str, folder: Path, seed: int = 0) -> Outcome:
    """Draw calls for one configuration, and compare the attached model with one that nobody touches."""
    outcome = Outcome(f"{kind}-{model_type}")
    chance = random.Random(f"{outcome.name} {seed}")
    try:
        model, plain = tiny_model(model_type, class_name), tiny_model(model_type, class_name)
    except Exception as error:
        outcome.built, outcome.reasons = False, [f"{type(error).__name__}: {str(error)[:80]}"]
        return outcome
    sparse = any("expert" in name or "router" in name for name, _ in model.named_parameters())
    dtype = torch.float32 if sparse else chance.choice([torch.float32] * 7 + [torch.bfloat16, torch.float64])
    model, plain = model.to(dtype), plain.to(dtype)
    choices: list[Any] = ["output", "all", (0,)]
    layers = chance.choice(choices)
    with reasons() as said, LLMCache.open(folder, model, config=CacheConfig(layers=layers)) as cache:
        before = state_of(model)
        try:
            with cache.attached():
                pass
        except LLMCacheError as error:
            outcome.reasons.append(str(error).partition("layers: ")[2] or str(error))
        except Exception as error:
            outcome.faults.append(f"attaching raised {type(error).__name__}: {str(error)[:100]}")
            return outcome
        after = state_of(model)
        if before != after:
            changed = [name for name in after if after[name] != before.get(name)]
            outcome.faults.append(f"attaching changed {changed[:3]}")
        with nullcontext() if outcome.reasons else cache.attached():
            _compare_calls(outcome, kind, model, plain, model, f"{seed}", dtype)
        if outcome.failed == outcome.calls:
            outcome.built, outcome.reasons = False, ["the small model itself fails for every call"]
            return outcome
        counters = cache.stats().counters
        outcome.reused = (
            sum(one.hits for one in counters.layers.values()) + counters.prefix.restored + counters.answers_stored
        )
        outcome.reused += counters.prefix.shared
    outcome.reasons += said
    return outcome


def _compare_calls(
    outcome: Outcome, kind: str, model: Any, plain: Any, drawn_for: Any, seed: str, dtype: torch.dtype
) -> None:
    for call in Drawn(kind, drawn_for, f"{outcome.name} {seed}").calls():
        outcome.calls += 1
        expected = found = None
        failure = ""
        with torch.no_grad():
            try:
                torch.manual_seed(7)
                expected = plain(**_copied(call))
            except Exception as error:
                failure = type(error).__name__
                outcome.failed += 1
            try:
                torch.manual_seed(7)
                found = model(**_copied(call))
            except Exception as error:
                if not failure:
                    outcome.faults.append(f"{_described(call)} raised {type(error).__name__}: {str(error)[:120]}")
                continue
        if failure:
            outcome.faults.append(f"{_described(call)} raised nothing, and the model {failure}")
            continue
        faults = differences(found, expected, call, TOLERANCE[dtype])
        outcome.faults += [f"{_described(call)}: {fault}" for fault in faults[:2]]


def _copied(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}


def _described(call: Mapping[str, Any]) -> str:
    parts = []
    for name, value in call.items():
        if name == "attention_mask":
            side = "left" if not bool(value[:, 0].all()) else "right"
            parts.append(f"{value.sum(1).tolist()} {side}")
        else:
            parts.append(f"{name} {list(value.shape)}" if isinstance(value, Tensor) else f"{name}={value}")
    return ", ".join(parts)


def table(outcomes: list[Outcome]) -> list[str]:
    """Lines that count configurations by what the cache did, and calls and configurations by reason."""
    lines = [f"{count:>6} {kind}" for kind, count in sorted(Counter(one.kind for one in outcomes).items())]
    lines.append(f"{sum(one.calls for one in outcomes):>6} calls")
    for kind in ("refused", "served"):
        counted: Counter[str] = Counter()
        for one in outcomes:
            if one.kind == kind:
                counted.update({_short(reason) for reason in one.reasons})
        lines.append(f"reasons for calls past the cache, of configurations that were {kind}:")
        lines += [f"{count:>6} {reason}" for reason, count in counted.most_common()]
    return lines


def _short(reason: str) -> str:
    """A reason without its numbers and names."""
    words = "".join("N" if letter.isdigit() else letter for letter in reason)
    while "NN" in words:
        words = words.replace("NN", "N")
    return words.rpartition("by layers: ")[2][:110]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.architecture_fuzz", description="Attached models beside plain ones."
    )
    parser.add_argument("--only", nargs="*", default=None, help="names such as encoder-bert")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th configuration from the i-th on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet: Any = transformers.logging.set_verbosity_error
    quiet()
    torch.set_num_threads(1)
    outcomes = []
    first, _, every = options.part.partition("/")
    for kind, model_type, class_name in architectures()[int(first) :: int(every)]:
        if options.only and f"{kind}-{model_type}" not in options.only:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = tried(kind, model_type, class_name, Path(folder) / "store", options.seed)
        outcomes.append(outcome)
        seconds = time.perf_counter() - began
        sys.stdout.write(f"{outcome.kind:9} {outcome.name} ({class_name}) {seconds:.1f} s {outcome.reasons[:1]}\n")
        sys.stdout.writelines(f"  FAULT {fault}\n" for fault in outcome.faults)
        sys.stdout.flush()
    sys.stdout.write("\n".join(table(outcomes)) + "\n")
    return 1 if any(one.faults for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

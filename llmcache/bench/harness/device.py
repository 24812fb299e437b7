"""Timing on a device: queued work is finished before the clock is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmcache.bench.harness.turns import Measurement, Row, Turn, in_turn, steady


@dataclass(slots=True)
class Device:
    """Device of a measurement, and its time limit. name: "cuda" or "cpu". until: seconds of `time.monotonic`."""

    name: str
    until: float
    tiny: bool = False
    say: Callable[[str], None] = field(default=lambda _: None)

    @property
    def cuda(self) -> bool:
        """True on a GPU."""
        return self.name == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the models: bfloat16 where it is fast."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def over(self) -> bool:
        """True when the time limit has passed."""
        return time.monotonic() > self.until

    def settle(self) -> None:
        """Wait for all queued work."""
        if self.cuda:
            torch.cuda.synchronize()

    def rounds(
        self, actions: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1
    ) -> dict[str, Measurement]:
        """Time each action, in turn in every round; fewer rounds when the time is over. Ratios are to the first."""
        first = next(iter(actions))
        return self.in_turn([Turn(name, 1, steady(action), first) for name, action in actions.items()], repeats, warm)

    def in_turn(
        self, turns: Sequence[Turn], repeats: int, warm: int = 1, keep: int | None = 1
    ) -> dict[str, Measurement]:
        """Time contenders in turn; fewer rounds when the time is over."""
        return in_turn(turns, repeats, warm=warm, keep=keep, clock=self.clock, over=lambda: self.over)

    def clock(self) -> float:
        """Wait for all queued work, and read the clock. Returns seconds."""
        self.settle()
        return time.perf_counter()


def spread(seconds: Sequence[float]) -> Row:
    """Return median, least and most seconds, and the number of repeats."""
    return {
        "median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "repeats": len(seconds)
    }  # fmt: skip

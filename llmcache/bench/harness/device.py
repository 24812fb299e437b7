"""Timing on a device: queued work is finished before the clock is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Device:
    """Device of a measurement, and its time limit. name: "cuda" or "cpu". until: seconds of `time.monotonic`."""

    name: str
    until: float
    tiny: bool = False
    say: Callable[[str], None] = field(default=lambda _: None)

    @property
    def cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the models: bfloat16 where it is fast."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def settle(self) -> None:
        """Wait for all queued work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        self.settle()
        began = time.perf_counter()
        action()
        self.settle()
        return time.perf_counter() - began

    def rounds(
        self, actions: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1
    ) -> dict[str, list[float]]:
        """Time each action, in turn in every round; fewer rounds when the time is over. Returns seconds by name."""
        for _ in range(warm):
            for action in actions.values():
                action()
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(repeats):
            if number and self.over:
                break
            for name, action in actions.items():
                seconds[name].append(self.seconds(action))
        return seconds


def spread(seconds: list[float]) -> dict[str, Any]:
    """Return median, least and most seconds, and the number of repeats."""
    return {
        "median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "repeats": len(seconds)
    }  # fmt: skip


def against(base: list[float], seconds: list[float]) -> float:
    """Return the speed-up over the base: median over the rounds, each against the base of the same round."""
    return statistics.median(one / other for one, other in zip(base, seconds, strict=True))

"""Timing on a device: what is asked for has to be done before the clock is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Device:
    """Where a measurement runs, and until when. name: "cuda" or "cpu". until: seconds of `time.monotonic`."""

    name: str
    until: float
    tiny: bool = False
    said: Callable[[str], None] = field(default=lambda _: None)

    @property
    def cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the models: bfloat16 where it is fast."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def settle(self) -> None:
        """Wait for everything that was queued."""
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
        """Seconds of each action by name, round after round in turn; fewer rounds when the time is over."""
        for _ in range(warm):
            for action in actions.values():
                action()
        found: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(repeats):
            if number and self.over:
                break
            for name, action in actions.items():
                found[name].append(self.seconds(action))
        return found


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most, and how many."""
    return {
        "median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "repeats": len(seconds)
    }  # fmt: skip


def against(base: list[float], seconds: list[float]) -> float:
    """How many times as fast as the base: median over the rounds, each against the base of the same round."""
    return statistics.median(one / other for one, other in zip(base, seconds, strict=True))

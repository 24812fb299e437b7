"""Measure the model's speed on this machine: seconds per token, from the batches that this opening computes.

The seconds that are stored with entries were measured where they were computed, perhaps on another machine. They cannot
say whether a look-up pays here.
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_DOCUMENTS = 8
"""Smaller batches take longer for each token than those that near hits save; they are not counted."""
_TOKENS = 65_536  # after which what was measured counts half


class Pace:
    """Seconds per token of the model. probe: computes a few documents again; returns their tokens and the seconds."""

    def __init__(self, probe: Callable[[], tuple[int, float]] | None = None) -> None:
        self._probe = probe
        self._tokens = self._seconds = 0.0

    @property
    def known(self) -> bool:
        """True if anything was measured in this opening."""
        return self._tokens > 0

    def observe(self, documents: int, tokens: int, seconds: float) -> None:
        """Take note of a batch that was computed."""
        if documents < LEAST_DOCUMENTS or tokens <= 0:
            return
        weight = 0.5 ** (tokens / _TOKENS)
        self._tokens, self._seconds = weight * self._tokens + tokens, weight * self._seconds + seconds

    def measure(self) -> None:
        """Compute a few documents now, where nothing was measured yet."""
        if not self.known and self._probe is not None:
            self._tokens, self._seconds = self._probe()

    def seconds(self, tokens: int) -> float:
        """Seconds that the model takes for documents of so many tokens together; 0 where nothing is known."""
        return tokens * self._seconds / self._tokens if self.known else 0.0

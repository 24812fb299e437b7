"""Measure the model's speed on this machine: seconds per token, from the batches that this opening computes.

The seconds stored with entries may come from another machine, so they do not tell whether a look-up pays here.
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_DOCUMENTS = 8
"""Smallest batch that is counted: smaller ones take longer per token than the batches that near hits save."""
_HALF_LIFE = 65_536  # tokens


class Pace:
    """Moving average of the model's seconds per token.

    probe: recomputes a few documents; returns the number of their tokens and the seconds that took.
    """

    def __init__(self, probe: Callable[[], tuple[int, float]] | None = None) -> None:
        self._probe = probe
        self._tokens = self._seconds = 0.0

    @property
    def known(self) -> bool:
        """True if a batch was measured in this opening."""
        return self._tokens > 0

    def observe(self, documents: int, tokens: int, seconds: float) -> None:
        """Record a computed batch: its number of documents, its tokens in all, and the seconds."""
        if documents < LEAST_DOCUMENTS or tokens <= 0:
            return
        weight = 0.5 ** (tokens / _HALF_LIFE)
        self._tokens, self._seconds = weight * self._tokens + tokens, weight * self._seconds + seconds

    def measure(self) -> None:
        """Measure the model with the probe, unless a batch was measured already."""
        if not self.known and self._probe is not None:
            self._tokens, self._seconds = self._probe()

    def seconds(self, tokens: int) -> float:
        """Estimate the model's seconds for documents of this many tokens in all; 0 if nothing was measured."""
        return tokens * self._seconds / self._tokens if self.known else 0.0

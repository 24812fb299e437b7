"""Totals of a set of runs: documents by tier, seconds and drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TIERS = ("same text", "same tokens", "repeated in one call", "near", "computed")
"""How documents were answered, in the order in which charts stack them."""


@dataclass(frozen=True, slots=True)
class RunTotals:
    """Some runs together. tiers: documents by `TIERS`. The rest are seconds, and sums of drift."""

    documents: float
    tiers: tuple[float, ...]
    model_seconds: float
    own_seconds: float
    saved_seconds: float
    audits: float
    drift: float
    near_asked: float = 0
    near_taken: float = 0

    @classmethod
    def of(cls, counters: Mapping[str, float], asked: float = 0, taken: float = 0) -> RunTotals:
        """counters: as `Counters.as_dict` names them."""

        def get(name: str) -> float:
            return float(counters.get(name, 0))

        documents, misses, near = get("documents"), get("misses"), get("near")
        exact = max(0.0, documents - misses - near)
        text = min(exact, get("exact_text"))
        tokens = min(exact - text, get("exact_tokens"))
        return cls(
            documents, (text, tokens, exact - text - tokens, near, misses), get("model_seconds"),
            get("overhead_seconds"), get("saved_seconds"), get("audits"), get("audited_drift"), asked, taken,
        )  # fmt: skip

    @property
    def hit_rate(self) -> float:
        return 1 - self.tiers[-1] / self.documents if self.documents else 0.0

    @property
    def net_seconds(self) -> float:
        return self.saved_seconds - self.own_seconds

    @property
    def spent_seconds(self) -> float:
        return self.model_seconds + self.own_seconds

    @property
    def times(self) -> float:
        """How many times as long it would have taken without the cache."""
        return (self.model_seconds + self.saved_seconds) / self.spent_seconds if self.spent_seconds > 0 else 1.0

    @property
    def drift_of_all(self) -> float | None:
        """Expected drift of all results that near reuse was asked for, by the audits; None without one."""
        if not self.audits:
            return None
        served = self.near_taken / self.near_asked if self.near_asked else 1.0
        return self.drift / self.audits * served

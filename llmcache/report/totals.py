"""Totals of a set of runs: documents by tier, seconds and drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmcache.banks.counters import partly_answered

TIERS = ("same text", "same tokens", "repeated in one call", "near", "from states", "computed")
"""Names of the tiers, in the order in which charts stack them."""


@dataclass(frozen=True, slots=True)
class RunTotals:
    """Totals of a set of runs.

    documents: number of documents, rows of attached models, and prompts. tiers: their numbers by tier, in the order of
    `TIERS`; rows and prompts are counted by the shares of their layers or tokens that came from stored states, and
    that were computed. model_seconds, own_seconds: time of the model and of
    the cache. saved_seconds: model time that hits saved. audits: near hits recomputed. drift: sum of their drifts.
    near_asked: documents compared with their nearest entry. near_taken: documents that reused it.
    """

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
        """Make totals. counters: named as by `Counters.as_dict`. asked, taken: `near_asked` and `near_taken`."""

        def get(name: str) -> float:
            return float(counters.get(name, 0))

        documents, misses, near = get("documents"), get("misses"), get("near")
        others, partly = get("attached_rows") + get("prefix.prompts") + get("answers_stored"), partly_answered(counters)
        exact = max(0.0, documents - misses - near)
        text = min(exact, get("exact_text"))
        tokens = min(exact - text, get("exact_tokens"))
        repeats = min(exact - text - tokens, get("repeats"))
        states = exact - text - tokens - repeats + partly
        return cls(
            documents + others, (text, tokens, repeats, near, states, misses + others - partly), get("model_seconds"),
            get("overhead_seconds"), get("saved_seconds"), get("audits"), get("audited_drift"), asked, taken,
        )  # fmt: skip

    @property
    def hit_rate(self) -> float:
        """Share of documents that cost no model time; 0 without documents."""
        return 1 - self.tiers[-1] / self.documents if self.documents else 0.0

    @property
    def net_seconds(self) -> float:
        """Seconds saved minus those of the cache itself."""
        return self.saved_seconds - self.own_seconds

    @property
    def spent_seconds(self) -> float:
        """Seconds of the model and the cache."""
        return self.model_seconds + self.own_seconds

    @property
    def times(self) -> float:
        """Speed-up: time without the cache divided by time with it."""
        return (self.model_seconds + self.saved_seconds) / self.spent_seconds if self.spent_seconds > 0 else 1.0

    @property
    def drift_of_all(self) -> float | None:
        """Expected drift over all documents that near reuse looked up, by the audits; None without audits."""
        if not self.audits:
            return None
        reused = self.near_taken / self.near_asked if self.near_asked else 1.0
        return self.drift / self.audits * reused

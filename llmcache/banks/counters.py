"""Counters of a cache: documents by tier, rows by layer, prompt tokens by origin, and seconds.

This module imports neither torch nor FAISS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_GROUPS = ("layers", "prefix")  # fields of `Counters` that hold counters of their own


@dataclass(slots=True)
class LayerCounters:
    """Counters of one layer's bank; a row is one input of a forward pass.

    asked: rows looked up in this bank. hits: rows whose forward pass resumed after this layer. near: near matches of
    this layer's states. look_up_seconds: time to find keys. load_seconds: time to read states. saved_seconds: model
    time recorded when the reused states were computed.
    """

    asked: int = 0
    hits: int = 0
    near: int = 0
    look_up_seconds: float = 0.0
    load_seconds: float = 0.0
    saved_seconds: float = 0.0


@dataclass(slots=True)
class PrefixCounters:
    """Counters of a decoder's prefix cache. tokens = restored + shared + computed, in prompt tokens.

    restored: tokens whose KV blocks came from the store. shared: tokens computed once for several rows of a call.
    prompts: rows of the calls that went through the cache.
    bypassed: calls that were passed to the model without the cache. lookup_seconds: keys, look-ups, reading and
    copying. model_seconds: forward passes. store_seconds: storing.
    """

    calls: int = 0
    bypassed: int = 0
    forwards: int = 0
    prompts: int = 0
    tokens: int = 0
    restored: int = 0
    shared: int = 0
    computed: int = 0
    lookup_seconds: float = 0.0
    model_seconds: float = 0.0
    store_seconds: float = 0.0


@dataclass(slots=True)
class Counters:
    """Documents by tier, and seconds, of one opening. The store adds them up over openings.

    exact_text, exact_tokens: distinct documents found by the key of their text or of their tokens.
    repeats: later occurrences of a document in the same call.
    not_stored: computed but not stored (not finite, or the store could not be written).
    damaged: rows that failed their checksum.
    at_limit: distinct documents, tokenised in this opening, that reach the model's maximum length, so that their
        text may have been truncated. Documents found by their text are not tokenised, hence not counted.
    bypassed: documents passed to the model without the cache.
    attached_rows: rows of forward passes of attached models, without those of documents. attached_skipped: the same
        rows, each counted by the share of its layers that was skipped.
    answers_stored: prompts of `generate`, and choices and windows of `score` and `perplexity`, whose whole result was
        stored.
    left_alone: documents not looked up because loading takes longer than the model.
    audits: near hits that were recomputed. audited_drift: sum of their drifts. audit_seconds: approximate time.
    exact_audits: exact hits that were recomputed to check the store. exact_audit_seconds: time.
        exact_audit_largest: largest absolute difference seen, over all openings too.
        exact_mismatches: openings in which a difference exceeded rounding.
    near_asked: documents looked up by calibrated near reuse. near_seconds: time of these look-ups.
        near_saved_seconds: model time that the near hits saved, at the speed measured in this opening.
    overhead_seconds: time of everything except the model.
    saved_seconds: model time recorded when the reused results were computed.
    """

    documents: int = 0
    exact_text: int = 0
    exact_tokens: int = 0
    repeats: int = 0
    near: int = 0
    misses: int = 0
    not_stored: int = 0
    damaged: int = 0
    at_limit: int = 0
    bypassed: int = 0
    attached_rows: int = 0
    attached_skipped: float = 0.0
    answers_stored: int = 0
    left_alone: int = 0
    audits: int = 0
    audited_drift: float = 0.0
    near_asked: int = 0
    near_seconds: float = 0.0
    near_saved_seconds: float = 0.0
    audit_seconds: float = 0.0
    exact_audits: int = 0
    exact_audit_seconds: float = 0.0
    exact_audit_largest: float = 0.0
    exact_mismatches: int = 0
    model_seconds: float = 0.0
    overhead_seconds: float = 0.0
    store_seconds: float = 0.0
    saved_seconds: float = 0.0
    layers: dict[str, LayerCounters] = field(default_factory=dict)
    prefix: PrefixCounters = field(default_factory=PrefixCounters)

    def layer(self, name: str) -> LayerCounters:
        """Return the counters of the layer bank of this name; created at first use."""
        return self.layers.setdefault(name, LayerCounters())

    @property
    def requests(self) -> int:
        """Number of documents, rows of attached models, prompts, and results of prompts that were stored."""
        return self.documents + self.attached_rows + self.prefix.prompts + self.answers_stored

    @property
    def answered(self) -> float:
        """Requests that cost no model time, each counted by the share of its layers or tokens that did not."""
        return self.documents - self.misses + partly_answered(self.as_dict())

    def as_dict(self) -> dict[str, float]:
        """Return all counters by name, flat: a layer's as "layer-3.hits", the prefix cache's as "prefix.tokens"."""
        flat = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _GROUPS}
        groups: dict[str, Any] = dict(self.layers)
        if self.prefix.calls:
            groups["prefix"] = self.prefix
        return flat | {f"{name}.{k}": v for name, group in groups.items() for k, v in asdict(group).items()}


def partly_answered(counters: Mapping[str, float]) -> float:
    """Return the rows of attached models and the prompts, each counted by the share of its layers or tokens reused.

    counters: by name, as from `Counters.as_dict`.
    """
    tokens = counters.get("prefix.tokens", 0)
    reused = 1 - counters.get("prefix.computed", 0) / tokens if tokens else 0.0
    partly = counters.get("attached_skipped", 0) + max(0.0, reused) * counters.get("prefix.prompts", 0)
    return partly + counters.get("answers_stored", 0)


def layer_counters(lifetime: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group flat counters by layer bank. lifetime: counters by name, as from `Counters.as_dict`.

    Returns the fields of `LayerCounters` by name of the bank, the deepest layer last.
    """
    counted = [entry.name for entry in fields(LayerCounters)]
    names = {name.partition(".")[0] for name in lifetime if re.fullmatch(r"layer-\d+\.\w+", name)}
    ordered = sorted(names, key=lambda name: int(name.partition("-")[2]))
    return {name: {counter: lifetime.get(f"{name}.{counter}", 0) for counter in counted} for name in ordered}

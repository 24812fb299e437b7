"""Counters of what a cache did: documents by tier, rows by layer, prompt tokens by origin, and seconds.

Needs neither torch nor FAISS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class LayerCounters:
    """Rows of forward passes at one layer's bank. asked: looked up here. hits: entered after this layer.

    look_up_seconds: finding keys; load_seconds: reading states; saved_seconds: what the model took when it computed
    what was reused.
    """

    asked: int = 0
    hits: int = 0
    near: int = 0
    look_up_seconds: float = 0.0
    load_seconds: float = 0.0
    saved_seconds: float = 0.0


@dataclass(slots=True)
class PrefixCounters:
    """Tokens of a decoder's prompts. tokens = restored + shared + computed.

    restored: from the store. shared: with another row of the same call. bypassed: calls that went to the model itself.
    lookup_seconds: of keys, look-ups, reading and copying; model_seconds: of forwards; store_seconds: of storing.
    """

    calls: int = 0
    bypassed: int = 0
    forwards: int = 0
    tokens: int = 0
    restored: int = 0
    shared: int = 0
    computed: int = 0
    lookup_seconds: float = 0.0
    model_seconds: float = 0.0
    store_seconds: float = 0.0


@dataclass(slots=True)
class Counters:
    """Documents, by how they were answered, and seconds. Added up over openings by the store.

    exact_text, exact_tokens: distinct documents found in the bank. repeats: later occurrences inside one call.
    not_stored: computed, but not kept (not finite, or the store could not be written). damaged: rows that failed
    their checksum. at_limit: distinct documents, tokenised in this opening, that fill the model's maximum length,
    so that the end of the text may have been cut off (documents found by their text are not tokenised). bypassed:
    handed to the model past the cache. left_alone: not looked up, while loading takes longer than the model.
    audits: near hits that were recomputed; audited_drift: the sum of what they would have been off by;
    audit_seconds: about what that took. exact_audits: exact hits that were recomputed to check the store, in
    exact_audit_seconds; exact_audit_largest: the largest absolute difference seen in them, over openings too;
    exact_mismatches: openings in which a difference was more than rounding. near_asked: documents that calibrated
    near reuse looked up, near_seconds: what that took, near_saved_seconds: what the model takes here for what it
    gave, as measured in this opening.
    overhead_seconds: everything but the model.
    saved_seconds: what the model took when it computed what was reused now.
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
        """Counters of the bank of this name."""
        return self.layers.setdefault(name, LayerCounters())

    def as_dict(self) -> dict[str, float]:
        """All as numbers by name; those of a bank as "layer-3.hits", those of the beginnings as "prefix.tokens"."""
        flat = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("layers", "prefix")}
        groups: dict[str, Any] = dict(self.layers)
        if self.prefix.calls:
            groups["prefix"] = self.prefix
        return flat | {f"{name}.{k}": v for name, one in groups.items() for k, v in asdict(one).items()}


def layer_counters(lifetime: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The numbers of every layer's bank, by its name, out of "layer-3.hits" and the like; deepest last."""
    known = [one.name for one in fields(LayerCounters)]
    names = {name.partition(".")[0] for name in lifetime if re.fullmatch(r"layer-\d+\.\w+", name)}
    ordered = sorted(names, key=lambda name: int(name.partition("-")[2]))
    return {name: {one: lifetime.get(f"{name}.{one}", 0) for one in known} for name in ordered}

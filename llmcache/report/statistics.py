"""What a cache did and what its store holds. Needs neither torch nor FAISS."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmcache.banks.break_even import Decision
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.stats.counters import combined
from llmcache.indexes.store import Store
from llmcache.near.status import NearReport, near_reports


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


@dataclass(frozen=True, slots=True)
class BankStatistics:
    """One bank as the manifest has it. bytes are those of the bank's files; payload is activations alone."""

    namespace: str
    layer: str
    entries: int
    dtype: str
    width: int
    segments: int
    payload_bytes: int
    bytes: int
    index: str | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters, and what the store holds. lifetime: the counters of every opening of the store, this one included.
    near: of every namespace whose near reuse is calibrated. worth: of every bank that this opening has used, whether
    reuse from it pays. mismatch: what an audit of exact hits found to differ in this opening, "" for nothing.
    """

    generation: int
    counters: Counters
    lifetime: dict[str, float]
    banks: list[BankStatistics] = field(default_factory=list)
    index: str | None = None
    near: list[NearReport] = field(default_factory=list)
    worth: list[Decision] = field(default_factory=list)
    mismatch: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of documents of this opening that cost no model time; 0 before the first one."""
        return 1 - self.counters.misses / self.counters.documents if self.counters.documents else 0.0

    @property
    def net_seconds(self) -> float:
        """Seconds saved, less everything the cache itself took."""
        return self.counters.saved_seconds - self.counters.overhead_seconds

    def _repr_html_(self) -> str:
        from llmcache.report.notebook import as_html  # here, since it takes its words from the report

        return as_html(self)

    def as_dict(self) -> dict[str, Any]:
        near = [one.as_dict() for one in self.near]
        return {**asdict(self), "near": near, "hit_rate": self.hit_rate, "net_seconds": self.net_seconds}


def layer_counters(lifetime: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The numbers of every layer's bank, by its name, out of "layer-3.hits" and the like; deepest last."""
    known = [one.name for one in fields(LayerCounters)]
    names = {name.partition(".")[0] for name in lifetime if re.fullmatch(r"layer-\d+\.\w+", name)}
    ordered = sorted(names, key=lambda name: int(name.partition("-")[2]))
    return {name: {one: lifetime.get(f"{name}.{one}", 0) for one in known} for name in ordered}


def statistics(
    store: Store,
    counters: Counters,
    index: str | None = None,
    opened: str = "",
    states: Mapping[str, tuple[str, str]] | None = None,
    worth: Sequence[Decision] = (),
    mismatch: str = "",
) -> Statistics:
    """Statistics of an open store. opened, states: the namespace in use, and its near reuse, see `near_reports`."""
    lifetime = store.counters(without=store.writer)
    for name, value in counters.as_dict().items():
        lifetime[name] = combined(name, lifetime.get(name, 0), value)
    banks = [
        _bank(namespace, layer, facts)
        for namespace, space in sorted(store.manifest.namespaces.items())
        for layer, facts in sorted(space.banks.items())
    ]
    near = near_reports(store, lifetime, opened, states)
    return Statistics(store.manifest.generation, counters, lifetime, banks, index, near, list(worth), mismatch)


def _bank(namespace: str, layer: str, facts: BankFacts) -> BankStatistics:
    return BankStatistics(
        namespace=namespace,
        layer=layer,
        entries=sum(segment.live for segment in facts.segments),
        dtype=facts.dtype,
        width=facts.width,
        segments=len(facts.segments),
        payload_bytes=sum(segment.payload for segment in facts.segments),
        bytes=sum(file.size for file in facts.all_files),
        index=facts.index.kind if facts.index else None,
    )

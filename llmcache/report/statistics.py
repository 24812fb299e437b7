"""What a cache did and what its store holds. Needs neither torch nor FAISS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmcache.banks.break_even import Decision
from llmcache.banks.counters import Counters
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.stats.counters import combined
from llmcache.indexes.store import Store
from llmcache.near.status import NearReport, near_reports


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

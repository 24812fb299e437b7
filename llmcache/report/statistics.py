"""Statistics of a cache and of its store. This module imports neither torch nor FAISS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmcache import units
from llmcache.banks.break_even import Decision
from llmcache.banks.counters import Counters
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.stats.counters import combined
from llmcache.indexes.store import Store
from llmcache.near.status import NearReport, near_reports


@dataclass(frozen=True, slots=True)
class BankStatistics:
    """Figures of one bank, from the manifest. bytes: size of the bank's files. payload_bytes: activations alone."""

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
    """Statistics of one opening and its store.

    counters: counters of this opening. lifetime: counters of all openings of the store, this one included.
    index: kind of the index for near matches. near: report of every namespace with calibrated near reuse. worth: for
    every bank that this opening has used, the decision whether reuse pays. mismatch: mismatch that an audit of exact
    hits found in this opening, "" for none.
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
        """Share of this opening's requests that cost no model time; 0 before the first one.

        Requests are documents (or pairs), rows of attached models, each counted by the share of its layers that was
        skipped, and prompts of decoders, by the share of their tokens that was not computed.
        """
        return self.counters.answered / self.counters.requests if self.counters.requests else 0.0

    @property
    def net_seconds(self) -> float:
        """Seconds saved minus those of the cache itself."""
        return self.counters.saved_seconds - self.counters.overhead_seconds

    def __repr__(self) -> str:
        asked, entries = self.counters, sum(bank.entries for bank in self.banks)
        lines = [
            f"Statistics({units.count(asked.documents)} documents: {units.count(asked.misses)} computed, "
            f"{units.count(asked.near)} near; {units.count(asked.attached_rows)} rows of attached models, "
            f"{units.count(asked.prefix.prompts)} prompts; hit rate {self.hit_rate:.1%})"
            if asked.requests > asked.documents
            else f"Statistics({units.count(asked.documents)} documents: {units.count(asked.misses)} computed, "
            f"{units.count(asked.near)} near, hit rate {self.hit_rate:.1%})",
            f"model {units.duration(asked.model_seconds)}, cache {units.duration(asked.overhead_seconds)}, "
            f"saved {units.duration(asked.saved_seconds)}",
            f"store: {units.count(entries)} entries in {len(self.banks)} banks, "
            f"{units.size(sum(bank.bytes for bank in self.banks))}, generation {self.generation}",
        ]
        return "\n    ".join([*lines, self.mismatch] if self.mismatch else lines)

    def _repr_html_(self) -> str:
        from llmcache.report.notebook import as_html  # only notebooks need it

        return as_html(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        near = [report.as_dict() for report in self.near]
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
    """Collect statistics of an open store.

    counters: counters of this opening. index: kind of the index for near matches. opened, states: the namespace in use
    and the state of its near reuse, see `near_reports`. worth, mismatch: see `Statistics`.
    """
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

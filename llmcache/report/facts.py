"""What a report says: the counters, the record of runs, the calibration and the manifest of a store, put together."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmcache.banks.counters import Counters, layer_counters
from llmcache.banks.history import records
from llmcache.errors import ConfigError
from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.stats.runs import BINS, Record
from llmcache.indexes.store import Store
from llmcache.report.statistics import Statistics, statistics
from llmcache.report.totals import TIERS, RunTotals

_POINTS = 60


@dataclass(frozen=True, slots=True)
class Period:
    """A day, or a week or month where there are many. last: its last record's `entries` and `bytes`."""

    begin: datetime.date
    tally: RunTotals
    layers: dict[str, float]
    evicted: float
    entries: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True)
class Corpus:
    name: str
    runs: int
    tally: RunTotals

    @property
    def seconds_per_thousand(self) -> float:
        return 1000 * self.tally.spent_seconds / self.tally.documents if self.tally.documents else 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """Hits that the most used entries served. bytes: of these entries; hits: share of all; both ascending, [n]."""

    bytes: list[float]
    hits: list[float]
    uses: int

    def bytes_for(self, share: float) -> float:
        """Bytes of the entries that served this share of the hits."""
        return float(np.interp(share, self.hits, self.bytes))


@dataclass(frozen=True, slots=True)
class Facts:
    """A report's content. period: "day", "week" or "month". early: documents from before runs were recorded."""

    store: str
    models: list[str]
    made: float
    stats: Statistics
    total: RunTotals
    layers: dict[str, dict[str, float]]
    prefix: dict[str, float]
    period: str
    periods: list[Period]
    corpora: list[Corpus]
    asked: list[int]
    near: list[int]
    calibrations: dict[str, dict[str, Any]]
    forecasts: list[tuple[str, str, dict[str, float]]]
    kept: Kept | None
    evicted: float
    early: float
    price: float | None = None
    currency: str = "$"
    notes: list[str] = field(default_factory=list)

    @property
    def money(self) -> float | None:
        """What the seconds saved would have cost; None without a price."""
        return None if self.price is None else self.total.net_seconds / 3600 * self.price

    @property
    def entries(self) -> int:
        """Of all banks but those that hold no documents."""
        return sum(one.entries for one in self.stats.banks if one.layer != "fitted")

    def summary(self) -> dict[str, Any]:
        """The totals, for scripts."""
        total = self.total
        return {
            "store": self.store, "documents": total.documents, "hit_rate": total.hit_rate,
            "tiers": dict(zip(TIERS, total.tiers, strict=True)), "saved_seconds": total.saved_seconds,
            "net_seconds": total.net_seconds, "money": self.money, "price_per_hour": self.price,
            "days": len(self.periods) if self.period == "day" else None, "corpora": len(self.corpora),
            "audits": total.audits, "evicted_rows": self.evicted,
        }  # fmt: skip


def facts(store: Store, *, price: float | None = None, currency: str = "$") -> Facts:
    """What is known of an open store. price: of an hour of the machine. ConfigError for one that is none."""
    if price is not None and not 0 <= price < 1e9:
        raise ConfigError(f"the price of an hour is a number from 0 on, got {price}")
    if len(currency) > 8 or not currency.isprintable():
        raise ConfigError(f"a currency is a sign or a short word, got {currency!r:.40}")
    stats, runs = statistics(store, Counters()), records(store)
    counted = stats.lifetime
    period = _period(runs)
    recorded = _added(runs)
    if recorded.get("documents", 0) > counted.get("documents", 0):  # the file of a writer's counters was lost
        counted = recorded
    total = RunTotals.of(counted, *map(sum, (_bins(runs, "asked"), _bins(runs, "near"))))
    spaces = store.manifest.namespaces
    return Facts(
        store=store.folder.path.name, models=_models(store), made=time.time(), stats=stats, total=total,
        layers=layer_counters(counted),
        prefix={name[7:]: value for name, value in counted.items() if name.startswith("prefix.")},
        period=period, periods=_periods(runs, period), corpora=_corpora(runs), asked=_bins(runs, "asked"),
        near=_bins(runs, "near"),
        calibrations={
            name: dict(found) for name, one in sorted(spaces.items())
            if isinstance(found := one.config.get("calibration"), Mapping) and found
        },
        forecasts=[(str(one["day"]), str(one.get("corpus", "")), one["forecast"]) for one in runs if "forecast" in one],
        kept=_kept(store), evicted=sum(float(one.get("evicted_rows", 0)) for one in runs),
        early=max(0.0, total.documents - recorded.get("documents", 0)), price=price, currency=currency,
    )  # fmt: skip


def _models(store: Store) -> list[str]:
    names = {str(one.identity.get("name", "")) for one in store.manifest.namespaces.values()}
    return sorted({name.rstrip("/").rpartition("/")[2] or name for name in names if name})


def _date(record: Record) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(record["day"])
    except ValueError:  # 2026-02-31
        return None


def _period(runs: Sequence[Record]) -> str:
    days = [day for one in runs if (day := _date(one))]
    span = (max(days) - min(days)).days if days else 0
    return "day" if span < 93 else "week" if span < 730 else "month"


def _periods(runs: Sequence[Record], period: str) -> list[Period]:
    grouped: dict[datetime.date, list[Record]] = {}
    for one in runs:
        day = _date(one)
        if day is None:
            continue
        if period == "week":
            day -= datetime.timedelta(days=day.weekday())
        elif period == "month":
            day = day.replace(day=1)
        grouped.setdefault(day, []).append(one)
    return [_of_period(day, group) for day, group in sorted(grouped.items())]


def _of_period(day: datetime.date, group: Sequence[Record]) -> Period:
    counters = _added(group)
    asked, near = (sum(_bins(group, name)) for name in ("asked", "near"))
    layers = {name: one["hits"] for name, one in layer_counters(counters).items()}
    sized = [one for one in group if one.get("entries")]
    last = max(sized, key=lambda one: float(one.get("end", 0))) if sized else {}
    evicted = sum(float(one.get("evicted_rows", 0)) for one in group)
    return Period(day, RunTotals.of(counters, asked, near), layers, evicted, last.get("entries"), last.get("bytes"))


def _added(group: Sequence[Record]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in group:
        for name, value in one.get("counters", {}).items():
            total[name] = total.get(name, 0) + value
    return total


def _bins(runs: Sequence[Record], name: str) -> list[int]:
    total = np.zeros(BINS, np.int64)
    for one in runs:
        total += np.array(one.get(name, 0), np.int64)
    return [int(one) for one in total]


def _corpora(runs: Sequence[Record]) -> list[Corpus]:
    """By the seconds they took in all, slowest first."""
    grouped: dict[str, list[Record]] = {}
    for one in runs:
        if one.get("counters", {}).get("documents"):
            grouped.setdefault(str(one.get("corpus", "")), []).append(one)
    found = [
        Corpus(name, int(sum(float(one.get("runs", 1)) for one in group)), RunTotals.of(_added(group)))
        for name, group in grouped.items()
    ]
    return sorted(found, key=lambda one: -one.tally.spent_seconds)


def _kept(store: Store) -> Kept | None:
    """How many of the hits the most used entries served; None where nothing was read yet."""
    try:
        usage = eviction.candidates(store.folder, store.manifest).usage
    except (OSError, LLMCacheError):
        return None
    uses, nbytes = usage.uses.astype(np.float64), usage.nbytes.astype(np.float64)
    if not uses.sum():
        return None
    order = np.argsort(-uses / np.maximum(nbytes, 1), kind="stable")
    places = np.unique(np.linspace(0, len(order), _POINTS).astype(int))
    heaps = (np.concatenate([[0.0], np.cumsum(one[order])])[places] for one in (nbytes, uses))
    size, served = heaps
    return Kept(size.tolist(), (served / uses.sum()).tolist(), int(uses.sum()))

"""Facts of a report, from the counters, the history of runs, the calibrations and the manifest of a store."""

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
    """Totals of a day, week or month.

    begin: first day. layers: hits by layer bank. evicted: evicted entries. entries, bytes: size of the store at the
    end, None if it was not recorded.
    """

    begin: datetime.date
    tally: RunTotals
    layers: dict[str, float]
    evicted: float
    entries: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True)
class Corpus:
    """Totals of all runs over one corpus."""

    name: str
    runs: int
    tally: RunTotals

    @property
    def seconds_per_thousand(self) -> float:
        """Seconds spent per 1,000 documents."""
        return 1000 * self.tally.spent_seconds / self.tally.documents if self.tally.documents else 0.0


@dataclass(frozen=True, slots=True)
class UsageCurve:
    """Share of the hits against the size of the most used entries.

    bytes: size of these entries, ascending, [n]. hits: share of all hits that they served, [n]. uses: number of hits.
    """

    bytes: list[float]
    hits: list[float]
    uses: int

    def bytes_for(self, share: float) -> float:
        """Return the size of the most used entries that served this share of the hits, interpolated."""
        return float(np.interp(share, self.hits, self.bytes))


@dataclass(frozen=True, slots=True)
class Facts:
    """Content of a report.

    made: time of the report, seconds since the epoch. layers: counters by layer bank. prefix: counters of the prefix
    cache. period: "day", "week" or "month". asked, near: documents by bin of similarity to their nearest entry, all and
    those that reused it. calibrations: settings by namespace. forecasts: day, corpus, and forecast against result.
    early: documents from before runs were recorded. price: price per hour of the machine.
    """

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
    usage: UsageCurve | None
    evicted: float
    early: float
    price: float | None = None
    currency: str = "$"
    notes: list[str] = field(default_factory=list)

    @property
    def money(self) -> float | None:
        """Price of the net seconds saved; None without a price."""
        return None if self.price is None else self.total.net_seconds / 3600 * self.price

    @property
    def entries(self) -> int:
        """Number of entries in all banks except those without documents."""
        return sum(bank.entries for bank in self.stats.banks if bank.layer != "fitted")

    def summary(self) -> dict[str, Any]:
        """Return the totals as JSON values."""
        total = self.total
        return {
            "store": self.store, "documents": total.documents, "hit_rate": total.hit_rate,
            "tiers": dict(zip(TIERS, total.tiers, strict=True)), "saved_seconds": total.saved_seconds,
            "net_seconds": total.net_seconds, "money": self.money, "price_per_hour": self.price,
            "days": len(self.periods) if self.period == "day" else None, "corpora": len(self.corpora),
            "audits": total.audits, "evicted_rows": self.evicted,
        }  # fmt: skip


def facts(store: Store, *, price: float | None = None, currency: str = "$") -> Facts:
    """Collect the facts of an open store. price: price of an hour of the machine, in the currency.

    ConfigError for a price out of range, or a currency that is long or not printable.
    """
    if price is not None and not 0 <= price < 1e9:
        raise ConfigError(f"the price of an hour is a number from 0 on, got {price}")
    if len(currency) > 8 or not currency.isprintable():
        raise ConfigError(f"a currency is a sign or a short word of at most 8 characters, got {currency!r:.40}")
    stats, runs = statistics(store, Counters()), records(store)
    counted = stats.lifetime
    period = _period(runs)
    recorded = _sum_counters(runs)
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
            name: dict(calibration) for name, space in sorted(spaces.items())
            if isinstance(calibration := space.config.get("calibration"), Mapping) and calibration
        },
        forecasts=[(str(run["day"]), str(run.get("corpus", "")), run["forecast"]) for run in runs if "forecast" in run],
        usage=_usage(store), evicted=sum(float(run.get("evicted_rows", 0)) for run in runs),
        early=max(0.0, total.documents - recorded.get("documents", 0)), price=price, currency=currency,
    )  # fmt: skip


def _models(store: Store) -> list[str]:
    """Return the names of the models, without folders."""
    names = {str(space.identity.get("name", "")) for space in store.manifest.namespaces.values()}
    return sorted({name.rstrip("/").rpartition("/")[2] or name for name in names if name})


def _date(record: Record) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(record["day"])
    except ValueError:  # an impossible date, such as 2026-02-31
        return None


def _period(runs: Sequence[Record]) -> str:
    """Choose the unit of the charts' time axis by the span of the runs."""
    days = [day for run in runs if (day := _date(run))]
    span = (max(days) - min(days)).days if days else 0
    return "day" if span < 93 else "week" if span < 730 else "month"


def _periods(runs: Sequence[Record], period: str) -> list[Period]:
    grouped: dict[datetime.date, list[Record]] = {}
    for run in runs:
        day = _date(run)
        if day is None:
            continue
        if period == "week":
            day -= datetime.timedelta(days=day.weekday())
        elif period == "month":
            day = day.replace(day=1)
        grouped.setdefault(day, []).append(run)
    return [_period_totals(day, group) for day, group in sorted(grouped.items())]


def _period_totals(day: datetime.date, group: Sequence[Record]) -> Period:
    counters = _sum_counters(group)
    asked, near = (sum(_bins(group, name)) for name in ("asked", "near"))
    layers = {name: layer["hits"] for name, layer in layer_counters(counters).items()}
    sized = [run for run in group if run.get("entries")]
    last = max(sized, key=lambda run: float(run.get("end", 0))) if sized else {}
    evicted = sum(float(run.get("evicted_rows", 0)) for run in group)
    return Period(day, RunTotals.of(counters, asked, near), layers, evicted, last.get("entries"), last.get("bytes"))


def _sum_counters(group: Sequence[Record]) -> dict[str, float]:
    total: dict[str, float] = {}
    for run in group:
        for name, value in run.get("counters", {}).items():
            total[name] = total.get(name, 0) + value
    return total


def _bins(runs: Sequence[Record], name: str) -> list[int]:
    """Sum the histogram of this name ("asked" or "near") over runs."""
    total = np.zeros(BINS, np.int64)
    for run in runs:
        total += np.array(run.get(name, 0), np.int64)
    return [int(number) for number in total]


def _corpora(runs: Sequence[Record]) -> list[Corpus]:
    """Group runs by corpus. Returns the corpora by their total seconds, slowest first."""
    grouped: dict[str, list[Record]] = {}
    for run in runs:
        if run.get("counters", {}).get("documents"):
            grouped.setdefault(str(run.get("corpus", "")), []).append(run)
    corpora = [
        Corpus(name, int(sum(float(run.get("runs", 1)) for run in group)), RunTotals.of(_sum_counters(group)))
        for name, group in grouped.items()
    ]
    return sorted(corpora, key=lambda corpus: -corpus.tally.spent_seconds)


def _usage(store: Store) -> UsageCurve | None:
    """Compute the share of hits by size of the most used entries; None if no entry was used yet."""
    try:
        usage = eviction.candidates(store.folder, store.manifest).usage
    except (OSError, LLMCacheError):
        return None
    uses, nbytes = usage.uses.astype(np.float64), usage.nbytes.astype(np.float64)
    if not uses.sum():
        return None
    order = np.argsort(-uses / np.maximum(nbytes, 1), kind="stable")
    points = np.unique(np.linspace(0, len(order), _POINTS).astype(int))
    size, served = (np.concatenate([[0.0], np.cumsum(values[order])])[points] for values in (nbytes, uses))
    return UsageCurve(size.tolist(), (served / uses.sum()).tolist(), int(uses.sum()))

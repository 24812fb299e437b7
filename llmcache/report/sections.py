"""Charts of a report, made from its facts. Without data a function returns None, and the page shows a sentence."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from llmcache import units as words
from llmcache.indexes.stats.runs import BINS
from llmcache.report.charts import Chart, ChartShape, Mark, columns, scale, ticks
from llmcache.report.facts import Facts, Period
from llmcache.report.totals import TIERS

COLOURS = ("text", "tokens", "repeat", "near", "states", "computed")
"""CSS classes of the tiers, in the order of `TIERS`."""
_LOWEST = 0.3  # similarity at the left edge of the histogram, unless there are lower ones


def named(day: datetime.date, period: str) -> str:
    """Return the name of a day, week or month on an axis."""
    return day.strftime("%b %Y") if period == "month" else f"{day.day} {day:%b}"


def by_day(facts: Facts) -> Chart | None:
    """Documents by tier, one column per period."""
    periods = [period for period in facts.periods if period.tally.documents]
    if not periods:
        return None
    names = [named(period.begin, facts.period) for period in periods]
    chart = Chart(f"Documents by tier and {facts.period}", y_name="documents")
    values = ticks(max(period.tally.documents for period in periods))
    top = scale(chart, values, [words.short(value) for value in values])
    tooltips = [
        f"{name}: {words.count(period.tally.documents)} documents, {words.share(period.tally.hit_rate)} hits"
        for name, period in zip(names, periods, strict=True)
    ]
    columns(chart, names, [period.tally.tiers for period in periods], COLOURS, tooltips, top)
    chart.columns = [facts.period, "documents", *TIERS, "hit rate"]
    chart.rows = [
        [
            name,
            words.count(period.tally.documents),
            *map(words.count, period.tally.tiers),
            words.share(period.tally.hit_rate),
        ]
        for name, period in zip(names, periods, strict=True)
    ]
    return chart


def hit_rates(facts: Facts) -> Chart | None:
    """Hit rate over time."""
    periods = [period for period in facts.periods if period.tally.documents]
    if len(periods) < 2:
        return None
    chart = Chart("Hit rate over time", y_name="hits")
    scale(chart, [0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    points = _over_time(chart, facts, periods, [100 * period.tally.hit_rate for period in periods])
    chart.shapes.append(ChartShape("area", "exact wash", [(points[0][0], 0), *points, (points[-1][0], 0)]))
    chart.shapes.append(ChartShape("line", "exact", points))
    _last(chart, points[-1], words.share(periods[-1].tally.hit_rate), "exact")
    chart.columns = [facts.period, "documents", "hits"]
    chart.rows = [
        [named(period.begin, facts.period), words.count(period.tally.documents), words.share(period.tally.hit_rate)]
        for period in periods
    ]
    return chart


def saved(facts: Facts) -> Chart | None:
    """Seconds of the model, seconds of the cache, and seconds saved, by period."""
    periods = [period for period in facts.periods if period.tally.documents]
    if not periods:
        return None
    names = [named(period.begin, facts.period) for period in periods]
    chart = Chart(f"Time by {facts.period}: spent by the model, spent by the cache, saved", y_name="time")
    stacks = [(period.tally.model_seconds, period.tally.own_seconds, period.tally.saved_seconds) for period in periods]
    top = scale(chart, *_durations(max(map(sum, stacks))))
    tooltips = [
        f"{name}: model {words.duration(m)}, cache {words.duration(c)}, saved {words.duration(s)}"
        for name, (m, c, s) in zip(names, stacks, strict=True)
    ]
    columns(chart, names, stacks, ("computed", "own", "saved"), tooltips, top)
    chart.legend = [("computed", "the model computed"), ("own", "the cache itself took"), ("saved", "saved")]
    chart.columns = [facts.period, "model", "cache", "saved"]
    chart.rows = [[name, *map(words.duration, stack)] for name, stack in zip(names, stacks, strict=True)]
    return chart


def _durations(most: float) -> tuple[list[float], list[str]]:
    """Choose values and labels of an axis of seconds: round numbers of one unit."""
    size, unit = next(
        ((size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if most >= size), (1e-3, "ms")
    )
    values = ticks(most / size)
    return [size * value for value in values], [f"{value:g} {unit}" if value else "0" for value in values]


def _over_time(
    chart: Chart, facts: Facts, periods: Sequence[Period], values: Sequence[float]
) -> list[tuple[float, float]]:
    """Add the names of the periods to a chart. Returns the points of a line. values: in per cent of the height."""
    names = [named(period.begin, facts.period) for period in periods]
    columns(chart, names, [() for _ in periods], (), names, 1)
    slot = 100 / len(periods)
    return [((i + 0.5) * slot, value) for i, value in enumerate(values)]


def _last(chart: Chart, point: tuple[float, float], text: str, colour: str) -> None:
    """Add a dot for the last value, with its label below, inside the area under the line."""
    chart.dots.append(Mark(*point, text, colour))
    chart.labels.append(Mark(point[0], max(point[1] - 30, 4), text, colour, "left" if point[0] > 60 else "right"))


def tau_curve(calibration: Mapping[str, Any]) -> Chart | None:
    """Drift against the share of documents reused, with its upper bound and the budget, from a calibration."""
    curve = [
        point for point in calibration.get("curve") or ()
        if isinstance(point, Sequence) and len(point) == 4 and all(_number(value) for value in point)
    ]  # fmt: skip
    if len(curve) < 2:
        return None
    budget, hits, bound = (float(calibration.get(name) or 0) for name in ("budget", "hits", "bound"))
    points = sorted((hits_, drift, limit) for _, hits_, drift, limit in curve)
    top_x = ticks(100 * max(point[0] for point in points))
    # values far beyond the budget are of no interest, and would flatten the others
    most = max(3 * budget, max((point[1] for point in points if point[1] <= 3 * budget), default=budget))
    values = ticks(most)
    chart = Chart("Drift of all results against the share of documents reused", x_name="reused", y_name="drift")
    top = scale(chart, values, [words.share(value) for value in values])
    chart.x = [Mark(100 * value / top_x[-1], 0, f"{value:g} %", side=_edge(i, top_x)) for i, value in enumerate(top_x)]

    def line(place: int) -> list[tuple[float, float]]:
        return [
            (10_000 * point[0] / top_x[-1], 100 * point[place] / top) for point in points if point[place] <= 1.02 * top
        ]

    drift, limit = line(1), line(2)
    if not drift:
        return None
    chart.shapes += [
        ChartShape("rule", "budget", [(0, 100 * budget / top), (100, 100 * budget / top)]),
        ChartShape("line", "near thin", limit), ChartShape("line", "near", drift),
    ]  # fmt: skip
    chart.labels.append(Mark(1, 100 * budget / top, f"budget {words.share(budget)}", "budget", "right"))
    chart.legend = [("near", "drift measured"), ("near thin", f"upper bound{_confidence(calibration)}")]
    if calibration.get("threshold") is not None:
        chart.dots.append(Mark(10_000 * hits / top_x[-1], 100 * min(bound, top) / top, "chosen", "near"))
        chart.labels.append(
            Mark(10_000 * hits / top_x[-1], 100 * min(bound, 0.85 * top) / top, f"chosen: {words.share(hits)}", "near",
                 "left" if 100 * hits > 0.3 * top_x[-1] else "right")
        )  # fmt: skip
    chart.columns = ["threshold", "reused", "drift", "bound"]
    chart.rows = [[f"{point[0]:.3g}", *map(words.share, point[1:])] for point in curve]
    return chart


def _edge(place: int, values: Sequence[float]) -> str:
    return "right" if place == 0 else "left" if place == len(values) - 1 else "middle"


def _confidence(calibration: Mapping[str, Any]) -> str:
    level = calibration.get("confidence")
    return f" at {100 * level:g} % confidence" if _number(level) and level else ""


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def audits(facts: Facts, budget: float | None) -> Chart | None:
    """Drift over all results, estimated from the audits of each period, against the budget."""
    periods = [period for period in facts.periods if period.tally.audits]
    if not periods:
        return None
    drifts = [period.tally.drift_of_all or 0.0 for period in periods]
    values = ticks(max([*drifts, budget or 0.0, 1e-4]))
    chart = Chart("Drift found by audits over time", y_name="drift of all results")
    top = scale(chart, values, [words.share(value) for value in values])
    points = _over_time(chart, facts, periods, [100 * drift / top for drift in drifts])
    if budget:
        chart.shapes.append(ChartShape("rule", "budget", [(0, 100 * budget / top), (100, 100 * budget / top)]))
        chart.labels.append(Mark(1, 100 * budget / top, f"budget {words.share(budget)}", "budget", "right"))
    chart.shapes.append(ChartShape("line", "near", points))
    chart.dots = [Mark(*point, words.share(drift), "near") for point, drift in zip(points, drifts, strict=True)]
    chart.columns = [facts.period, "near matches recomputed", "their drift", "drift of all results"]
    chart.rows = [
        [named(period.begin, facts.period), words.count(period.tally.audits),
         words.share(period.tally.drift / period.tally.audits), words.share(drift)]
        for period, drift in zip(periods, drifts, strict=True)
    ]  # fmt: skip
    return chart


def similarities(facts: Facts) -> Chart | None:
    """Histogram of the documents' similarity to their nearest entry, with the documents that reused it."""
    if not any(facts.asked):
        return None
    first = next(i for i, count in enumerate(facts.asked) if count)
    first = min(first, int(_LOWEST * BINS)) if sum(facts.asked[: int(_LOWEST * BINS)]) else int(_LOWEST * BINS)
    asked, near = facts.asked[first:], facts.near[first:]
    chart = Chart("Similarity of documents to their nearest entry", x_name="similarity", y_name="documents")
    values = ticks(max(asked))
    top = scale(chart, values, [words.short(value) for value in values])
    slot = 100 / len(asked)
    for i, (all_, taken) in enumerate(zip(asked, near, strict=True)):
        low = (first + i) / BINS
        tooltip = f"{low:.2f} to {low + 1 / BINS:.2f}: {all_:,} documents, {taken:,} reused"
        left, right = i * slot + 0.12 * slot, (i + 1) * slot - 0.12 * slot
        taken = min(taken, all_)
        if taken:
            chart.shapes.append(ChartShape("bar", "near", [(left, 0), (right, 100 * taken / top)], tooltip))
        if all_ > taken:
            box = [(left, 100 * taken / top), (right, 100 * all_ / top)]
            chart.shapes.append(ChartShape("bar", "computed", box, tooltip))
    marks = [tick / 10 for tick in range(0, 11, 2 if first < 0.4 * BINS else 1) if tick / 10 >= first / BINS - 1e-9]
    chart.x = [
        Mark((value * BINS - first) * slot, 0, f"{value:.1f}", side=_edge(i, marks)) for i, value in enumerate(marks)
    ]
    chart.legend = [("near", "reused"), ("computed", "computed")]
    chart.columns = ["similarity from", "documents", "reused"]
    chart.rows = [
        [f"{(first + i) / BINS:.2f}", f"{all_:,}", f"{taken:,}"]
        for i, (all_, taken) in enumerate(zip(asked, near, strict=True)) if all_
    ]  # fmt: skip
    return chart


def memory(facts: Facts) -> Chart | None:
    """Share of the hits that a store with only the most used entries would have served, by its size."""
    usage = facts.usage
    if usage is None or len(usage.bytes) < 2 or usage.bytes[-1] <= 0:
        return None
    values = ticks(usage.bytes[-1])
    chart = Chart("Hits against the bytes of the entries that served them", x_name="most used entries", y_name="hits")
    scale(chart, [0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    top = values[-1]
    chart.x = [Mark(100 * value / top, 0, words.size(value), side=_edge(i, values)) for i, value in enumerate(values)]
    points = [(100 * size / top, 100 * hits) for size, hits in zip(usage.bytes, usage.hits, strict=True)]
    chart.shapes.append(ChartShape("area", "exact wash", [*points, (points[-1][0], 0), (0, 0)]))
    chart.shapes.append(ChartShape("line", "exact", points))
    at = usage.bytes_for(0.9)
    chart.dots.append(Mark(100 * at / top, 90, "90 % of the hits", "exact"))
    chart.shapes.append(ChartShape("line", "exact thin", [(100 * at / top, 0), (100 * at / top, 90)]))
    side = "right" if at < 0.55 * top else "left"
    chart.labels.append(Mark(100 * at / top, 7, f"90 %: {words.size(at)}", "exact", side))
    chart.columns = ["most used entries", "share of hits"]
    chart.rows = [[words.size(a), words.share(b)] for a, b in zip(usage.bytes, usage.hits, strict=True)]
    return chart


def growth(facts: Facts) -> Chart | None:
    """Size of the store over time."""
    periods = [period for period in facts.periods if period.bytes]
    if len(periods) < 2:
        return None
    sizes = [float(period.bytes or 0) for period in periods]
    values = ticks(max(sizes))
    chart = Chart("Bytes of the store over time", y_name="bytes")
    top = scale(chart, values, [words.size(value) for value in values])
    points = _over_time(chart, facts, periods, [100 * size / top for size in sizes])
    chart.shapes.append(ChartShape("area", "own wash", [(points[0][0], 0), *points, (points[-1][0], 0)]))
    chart.shapes.append(ChartShape("line", "own", points))
    _last(chart, points[-1], words.size(sizes[-1]), "own")
    chart.columns = [facts.period, "bytes", "entries"]
    chart.rows = [
        [named(period.begin, facts.period), words.size(size), words.count(period.entries or 0)]
        for period, size in zip(periods, sizes, strict=True)
    ]
    return chart


def layer_trend(facts: Facts, layer: str) -> list[float]:
    """Return a layer's hits by period in per cent of its best period, the heights of a small chart."""
    hits = [period.layers.get(layer, 0.0) for period in facts.periods]
    most = max(hits, default=0.0)
    return [100 * count / most for count in hits] if most else []

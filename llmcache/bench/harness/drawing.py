"""Plots of suite records, with matplotlib (the extra "plot")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from llmcache.errors import ConfigError
from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically


@dataclass(frozen=True, slots=True)
class Bars:
    """Bar chart of a record, one bar per row. rows: their name in the record. label, value: fields of a row."""

    rows: str
    label: tuple[str, ...]
    value: str
    unit: str
    logarithmic: bool = False

    def of(self, record: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
        """Return label, value, least and greatest value of each row that has a value."""
        bars = []
        for row in record.get(self.rows, []):
            value = row.get(self.value)
            if isinstance(value, (int, float)):
                label = ", ".join(str(row[name]) for name in self.label if row.get(name) not in (None, ""))
                quick, slow = row.get("quickest"), row.get("slowest")
                spread = (quick and row["documents"] / slow, slow and row["documents"] / quick) if quick else ()
                bars.append((label, float(value), *(spread or (float(value), float(value)))))
        return bars


def draw(record: Mapping[str, Any], bars: Bars, path: Path) -> None:
    """Draw bars with their spread, from the record alone. ConfigError without matplotlib, or when writing fails."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib; install llmcache[plot]") from None
    shown = bars.of(record)
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(shown)), layout="constrained")
    axes = figure.add_subplot(xlabel=bars.unit, title=f"{record['benchmark']} ({record['commit']})")
    labels = [f"{place + 1}. {label}" for place, (label, *_) in enumerate(shown)]  # labels may be equal
    values = [value for _, value, _, _ in shown]
    errors = [[max(0.0, v - low) for _, v, low, _ in shown], [max(0.0, high - v) for _, v, _, high in shown]]
    axes.barh(labels, values, xerr=errors, capsize=2, color="tab:blue")
    for place, value in enumerate(values):
        axes.annotate(f" {value:,.3g}" if value < 1000 else f" {value:,.0f}", (value, place), va="bottom", fontsize=7)
    if bars.logarithmic and min(values, default=0) > 0:
        axes.set_xscale("log")
    axes.invert_yaxis()
    try:
        drawn = BytesIO()
        figure.savefig(drawn, dpi=120, format="png")
        write_atomically(path, drawn.getvalue(), mode=ordinary_mode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None

"""Charts in per cent of the plot's area, so that shapes stretch with the page and text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ChartShape:
    """Shape of a chart.

    kind: "line", "area", "bar" or "rule". colour: CSS class of the page. points: (x, y) in per cent, y from the bottom.
    tooltip: text shown under the pointer.
    """

    kind: str
    colour: str
    points: list[tuple[float, float]]
    tooltip: str = ""

    @property
    def path(self) -> str:
        """SVG path through the points; closed for an area."""
        return "M" + "L".join(f"{x:.2f} {100 - y:.2f}" for x, y in self.points) + ("Z" if self.kind == "area" else "")


@dataclass(frozen=True, slots=True)
class Mark:
    """Text or dot at a position in per cent. side: side of the position with the text: "left", "right" or "middle"."""

    x: float
    y: float
    text: str
    colour: str = ""
    side: str = "middle"


@dataclass(slots=True)
class Chart:
    """Chart. description: text for screen readers. columns, rows: the numbers as a table."""

    description: str
    shapes: list[ChartShape] = field(default_factory=list)
    dots: list[Mark] = field(default_factory=list)
    labels: list[Mark] = field(default_factory=list)
    x: list[Mark] = field(default_factory=list)
    y: list[Mark] = field(default_factory=list)
    x_name: str = ""
    y_name: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)


def ticks(most: float, wanted: int = 4) -> list[float]:
    """Choose about `wanted` round numbers from 0 to the first that is not below `most`."""
    if not most > 0 or not math.isfinite(most):
        return [0.0, 1.0]
    raw = most / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(size * unit for size in (1, 2, 2.5, 5, 10) if size * unit >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def thinned(names: Sequence[str], most: int = 5) -> list[int]:
    """Choose the names to write below an axis, evenly spaced from the first on. Returns their indices."""
    return list(range(0, len(names), max(1, math.ceil((len(names) - 1) / (most - 1)))))


def columns(
    chart: Chart, names: Sequence[str], stacks: Sequence[Sequence[float]], colours: Sequence[str],
    tooltips: Sequence[str], top: float,
) -> None:  # fmt: skip
    """Add stacked columns and their names. stacks: [columns][parts]. colours: [parts]. top: value at the upper edge."""
    slot = 100 / len(names)
    width = min(0.72 * slot, 9.0)
    for place, parts in enumerate(stacks):
        left, bottom = (place + 0.5) * slot - width / 2, 0.0
        for part, colour in zip(parts, colours, strict=True):
            height = 100 * part / top if top else 0.0
            if height > 0:
                box = [(left, bottom), (left + width, bottom + height)]
                chart.shapes.append(ChartShape("bar", colour, box, tooltips[place]))
            bottom += height
    chart.x = [Mark((i + 0.5) * slot, 0, names[i], side=_side(i, len(names), slot)) for i in thinned(names)]


def _side(place: int, count: int, slot: float) -> str:
    """Choose the side of a name, so that names at the ends of a dense axis stay inside the plot."""
    if slot > 14 or 0 < place < count - 1:
        return "middle"
    return "right" if place == 0 else "left"


def scale(chart: Chart, values: Sequence[float], texts: Sequence[str]) -> float:
    """Add the grid lines and labels of the vertical axis. Returns the value at its top."""
    top = values[-1] or 1.0
    for value, text in zip(values, texts, strict=True):
        chart.shapes.insert(0, ChartShape("rule", "grid", [(0, 100 * value / top), (100, 100 * value / top)]))
        chart.y.append(Mark(0, 100 * value / top, text))
    return top

"""Figures of the experiments, with matplotlib (the extra "plot")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.records import rows
from llmcache.errors import ConfigError


def plot(record: Row, path: Path) -> None:
    """Draw a record into a file. ConfigError without matplotlib, or when writing fails."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib; install llmcache[plot]") from None
    every = rows(record)
    if not every:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    DRAWN[record["experiment"]](figure, every)
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be drawn: {error}") from None


def _groups(every: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in every:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _latency(figure: Any, every: Sequence[Row]) -> None:
    axes = figure.add_subplot(ylabel="times as fast as the model alone", yscale="log")
    groups = list(_groups(every, "model", "data"))
    methods = [name for name in dict.fromkeys(row["method"] for row in every) if name != "NoCache"]
    for place, method in enumerate(methods):
        mine = [row for row in every if row["method"] == method]
        at = [groups.index((row["model"], row["data"])) + (place - len(methods) / 2) * 0.18 for row in mine]
        ratio = [row["ratio"] for row in mine]
        below, above = ([abs(row[f"ratio_{end}"] - row["ratio"]) for row in mine] for end in ("least", "most"))
        axes.bar(at, ratio, 0.17, yerr=[below, above], label=method)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{model}\n{data}" for model, data in groups], fontsize=6)
    axes.legend(fontsize=7)


def _layers(figure: Any, every: Sequence[Row]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(
        panels, ("input", "state"), ("one fingerprint, tau rises", "the layer's own state"), strict=True
    ):
        for (model, data), mine in _groups(every, "model", "data").items():
            axes.plot(
                [row["layer"] + 1 for row in mine], [row[f"{kind}_hits"] for row in mine], label=f"{model}, {data}"
            )
        axes.set(xlabel="layer", ylabel="hits", title=title, ylim=(-0.02, 1.02))
    panels[0].legend(fontsize=6)


def _accuracy(figure: Any, every: Sequence[Row]) -> None:
    axes = figure.add_subplot(ylabel="accuracy")
    sets = list(dict.fromkeys(row["data"] for row in every))
    methods = list(dict.fromkeys(row["method"] for row in every))
    for place, method in enumerate(methods):
        mine = [row for row in every if row["method"] == method]
        at = [sets.index(row["data"]) + (place - len(methods) / 2) * 0.13 for row in mine]
        axes.bar(at, [row["accuracy"] for row in mine], 0.12, label=method)
    axes.set_xticks(range(len(sets)), sets)
    axes.legend(fontsize=7)


def _memory(figure: Any, every: Sequence[Row]) -> None:
    axes = figure.add_subplot(xlabel="bytes of the store", ylabel="hits", xscale="log")
    for (kept,), mine in _groups(every, "kept").items():
        axes.plot([row["bytes"] for row in mine], [row["hits"] for row in mine], marker="o", label=kept)
    axes.legend(fontsize=7)


def _tau(figure: Any, every: Sequence[Row]) -> None:
    panels = figure.subplots(1, 2)
    for axes, name, label in ((panels[0], "hits", "hits"), (panels[1], "drop", "accuracy lost")):
        for (data,), mine in _groups(every, "data").items():
            axes.plot([row["tau"] for row in mine], [row[name] for row in mine], marker=".", label=data)
        axes.axvspan(0.82, 0.88, color="grey", alpha=0.2, label="the paper's range")
        axes.set(xlabel="tau", ylabel=label)
    panels[1].axhline(0.005, color="black", linewidth=0.8)
    panels[0].legend(fontsize=7)


def _fingerprints(figure: Any, every: Sequence[Row]) -> None:
    axes = figure.add_subplot(xlabel="hits at 0.5 % changed labels, picked on one half and counted on the other")
    names = list(dict.fromkeys(row["fingerprint"] for row in every))[::-1]
    sets = list(dict.fromkeys(row["data"] for row in every))
    for place, data in enumerate(sets):
        mine = [row for row in every if row["data"] == data]
        at = [names.index(row["fingerprint"]) + (place - len(sets) / 2) * 0.35 for row in mine]
        axes.barh(at, [row["hits"] for row in mine], 0.33, label=data)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.legend(fontsize=7)


def _eviction(figure: Any, every: Sequence[Row]) -> None:
    axes = figure.add_subplot(xlabel="room, as a share of all bytes", ylabel="hits")
    replays = [row for row in every if row["kind"] == "replay" and row["tau"] is None]
    for (policy,), mine in _groups(replays, "policy").items():
        axes.plot([row["room"] for row in mine], [row["hits"] for row in mine], marker=".", label=policy)
    bound = {row["room"]: row["bound"] for row in replays}
    axes.plot(list(bound), list(bound.values()), "k--", linewidth=0.8, label="furthest next use (needs the future)")
    axes.legend(fontsize=7)


DRAWN: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "latency": _latency, "layers": _layers, "accuracy": _accuracy, "memory": _memory, "tau": _tau,
    "fingerprints": _fingerprints, "eviction": _eviction,
}  # fmt: skip

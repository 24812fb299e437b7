"""HTML of `Statistics` for notebooks: a sentence, a bar and a table, in the notebook's own text colours."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from llmcache import units as words
from llmcache.report.totals import TIERS, RunTotals

if TYPE_CHECKING:
    from llmcache.report.statistics import Statistics

_COLOURS = ("#2f6fd0", "#7fb0ee", "#1a9284", "#d0721a", "#a39320", "#8b93a1")  # readable on white and on black


def as_html(stats: Statistics) -> str:
    """Return HTML of the counters of an opening and of its store, and of the store's banks."""
    now, life = RunTotals.of(stats.counters.as_dict()), RunTotals.of(stats.lifetime)
    parts = [f"<b>{_headline(now)}</b>", _bar(now)]
    if life.documents > now.documents:
        net = words.duration(life.net_seconds)
        parts.append(f"<div>Since the store was made: {_headline(life)} {net} saved, net.</div>")
    rows = "".join(
        f"<tr><td>{escape(f'{bank.namespace} · {bank.layer}')}</td><td>{words.count(bank.entries)}</td>"
        f"<td>{words.size(bank.bytes)}</td><td>{escape(bank.dtype)}[{bank.width}]</td>"
        f"<td>{escape(bank.index or 'none')}</td></tr>"
        for bank in stats.banks
    )
    head = "".join(f"<th>{name}</th>" for name in ("bank", "entries", "on disk", "numbers", "index"))
    table = (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else "<div>The store is empty.</div>"
    )
    return f'<div class="llmcache-stats" style="max-width:46em;line-height:1.5">{"".join(parts)}{table}</div>'


def _headline(tally: RunTotals) -> str:
    if not tally.documents:
        return "Nothing was asked yet."
    return f"{words.share(tally.hit_rate)} of {words.count(tally.documents)} documents cost no model time."


def _bar(tally: RunTotals) -> str:
    if not tally.documents:
        return ""
    shown = [tier for tier in zip(TIERS, _COLOURS, tally.tiers, strict=True) if tier[2]]
    boxes = "".join(
        f'<span style="flex:{number / tally.documents:.5f} 1 0;min-width:2px;background:{colour}"></span>'
        for _, colour, number in shown
    )
    legend = " &nbsp; ".join(
        f'<span style="white-space:nowrap"><span style="color:{colour}">■</span> {name} '
        f"{words.share(number / tally.documents)}</span>"
        for name, colour, number in shown
    )
    times = f"model {words.duration(tally.model_seconds)}, cache {words.duration(tally.own_seconds)}, "
    return (
        f'<div style="display:flex;gap:2px;height:14px;border-radius:4px;overflow:hidden;margin:6px 0">{boxes}</div>'
        f"<div>{legend}</div><div>{times}saved {words.duration(tally.saved_seconds)}</div>"
    )

"""Tables of docs/paper.md, generated from the records: `python -m tests.readme_figures.paper_page [--check]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.records import read, rows
from llmcache.bench.paper.tables import BLOCKS, RULE, percent, points, table

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "paper.md"
RECORDS = ROOT / "data" / "bench" / "paper"
_BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def filled(page: str, records: Mapping[str, Row]) -> str:
    """Regenerate every marked block of the page from the records, by the name of the experiment."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{_table(found[2], records)}\n{found[3]}"

    return _BLOCK.sub(block, page)


def _table(name: str, records: Mapping[str, Row]) -> str:
    if name == "claims":
        return claims({experiment: rows(record) for experiment, record in records.items()})
    if name == "conditions":
        return conditions(records)
    if name not in records:
        return f"Not recorded yet: `llmcache bench paper --data DATA --models MODELS --only {name}`."
    return BLOCKS[name](rows(records[name]))


def conditions(records: Mapping[str, Row]) -> str:
    """Format the conditions of the records: one line for each experiment."""
    lines = ["| experiment | commit | torch | threads | load before, after | seconds | limit, repeats |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, record in records.items():
        parts = list(record["parts"].values())
        if not parts:
            continue
        loads = [load for part in parts for load in part["load"]]
        lines.append(
            f"| {name} | {_each(part['conditions']['commit'] for part in parts)} "
            f"| {_each(part['conditions']['torch'] for part in parts)} "
            f"| {_each(part['conditions']['threads'] for part in parts)} | {min(loads):.1f} to {max(loads):.1f} "
            f"| {sum(part['seconds'] for part in parts):.0f} "
            f"| {_each(part['limit'] or 'none' for part in parts)}, {_each(part['repeats'] for part in parts)} |"
        )
    return "\n".join(lines)


def _each(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


# -- the claims ---------------------------------------------------------------------------------------

Measured = Mapping[str, Sequence[Row]]


def claims(measured: Measured) -> str:
    """Format the paper's claims beside the measurements; "not recorded" where there is no record."""
    return table(
        [
            "claimed",
            "measured by the paper's rule",
            "the same results from a cache of final outputs",
            "measured by ours",
        ],
        [
            _fastest(measured, None),
            _fastest(measured, "BERT-base"),
            _lower_layers(measured),
            _loss(measured),
            _range(measured),
        ],
    )


def _fastest(measured: Measured, model: str | None) -> list[str]:
    """Return the best speed-up of a first pass over the corpora, with its agreement."""
    claim = "2.4 times as fast on BERT-base" if model else "up to 3.1 times as fast"
    cells = []
    for method in (RULE, "DocCache", "LLMCache, ours"):
        mine = [row for row in measured.get("latency", ()) if row["method"] == method and model in (None, row["model"])]
        if not mine:
            cells.append("not recorded")
            continue
        best = max(mine, key=lambda row: row["ratio"])
        changed = 1 - (best["agreement"] if best.get("agreement") is not None else 1)
        slowest = min(row["ratio"] for row in mine)
        cells.append(
            f"{best['ratio']:.1f} ({best['model']}, {best['data']}), {percent(changed)} of the decisions changed; "
            f"elsewhere down to {slowest:.2f}"
        )
    return [claim, *cells]


def _lower_layers(measured: Measured) -> list[str]:
    """Return the hits in the lowest third of the layers, from the corpus with fewest to that with most."""
    mine = [row for row in measured.get("layers", ()) if row["layer"] < max(1, row["of"] // 3)]
    if not mine:
        return ["92 % hits in lower layers", *["not recorded"] * 3]
    spans = []
    for kind in ("input_hits", "state_hits"):
        least, *_, most = sorted(mine, key=lambda row: row[kind]) * 2
        spans.append(f"{percent(least[kind])} ({least['data']}) to {percent(most[kind])} ({most['data']})")
    text = f"{spans[0]} by the input; {spans[1]} by the layer's own state"
    return ["92 % hits in lower layers", text, "the same hits, by the input", "see the accuracy table"]


def _loss(measured: Measured) -> list[str]:
    """Return the accuracy lost, from the least to the most over the corpora."""
    cells = []
    for kind in ("the paper's rule", "ours, calibrated"):
        mine = [row for row in measured.get("accuracy", ()) if row["method"].startswith(kind)]
        if not mine:
            cells.append("not recorded")
            continue
        ordered = sorted(mine, key=lambda row: row["drop"])
        ends = [f"{points(row['drop'])} points ({row['data']})" for row in (ordered[0], ordered[-1])]
        cells.append(f"{ends[0]} to {ends[1]}, at tau 0.82 to 0.88" if "tau" in mine[0] else " to ".join(ends))
    return ["less than 0.5 % of accuracy lost", cells[0], "the same", cells[1]]


def _range(measured: Measured) -> list[str]:
    """Return the lowest tau of each corpus from which on at most half a point of accuracy is lost."""
    cells = []
    for data in dict.fromkeys(row["data"] for row in measured.get("tau", ())):
        mine = sorted((row for row in measured["tau"] if row["data"] == data), key=lambda row: -row["tau"])
        safe = None
        for row in mine:
            if row["drop"] > 0.005:
                break
            safe = row
        cells.append(
            f"{data}: none" if safe is None else f"{data}: from {safe['tau']:.2f} on ({percent(safe['hits'])} hits)"
        )
    return ["tau of 0.82 to 0.88", "; ".join(cells) or "not recorded", "the same", "chosen per model and corpus"]


# -- the command --------------------------------------------------------------------------------------


def recorded(folder: Path = RECORDS) -> dict[str, Row]:
    """Read the records of a folder, by name, in the order of the experiments."""
    records = {name: read(folder / f"{name}.json") for name in BLOCKS}
    return {name: record for name, record in records.items() if record is not None and record["parts"]}


def main(arguments: Sequence[str], say: Callable[[str], object] = lambda line: sys.stderr.write(f"{line}\n")) -> int:
    """Write the page; with --check only compare it with the records. Returns exit code 1 when they differ."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, recorded())
    if "--check" in arguments:
        if before != after:
            say("docs/paper.md is not what the records say; run python -m tests.readme_figures.paper_page")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tables of docs/paper.md, generated from the records: `python -m llmcache.bench.paper.page [--check]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcache.bench.harness.turns import Row
from llmcache.bench.paper.records import read, rows
from llmcache.bench.paper.tables import BLOCKS, claims

ROOT = Path(__file__).parent.parent.parent.parent
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
            say("docs/paper.md is not what the records say; run python -m llmcache.bench.paper.page")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The figures of README.md and docs/benchmarks.md, generated from the recorded runs so that they cannot disagree.

`python -m tests.readme_figures` writes the text between the two markers of each page. `--check` only compares
that text with the records; a test calls it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcache.errors import ConfigError, LLMCacheError
from tests.readme_figures.passages import PASSAGES, Passages
from tests.readme_figures.summary import SUMMARY

BEGIN = "<!-- made by `python -m tests.readme_figures`; write in tests/readme_figures/passages.py -->"
END = "<!-- the end of what is made -->"


class RecordFolder(Mapping[str, Any]):
    """Recorded runs of a folder by name, each read at first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            path = self._folder / f"{name}.json"
            if not path.exists():
                raise KeyError(name)
            try:
                self._read[name] = json.loads(path.read_bytes())
            except ValueError:
                raise ConfigError(f"{path} is no JSON; record it again") from None
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob("*.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def section(records: Mapping[str, Any], passages: Passages = PASSAGES) -> str:
    """Join the passages whose records exist. ConfigError when a record lacks a field that its passage needs."""
    parts = []
    for names, passage in passages:
        if any(name not in records for name in names):
            continue
        try:
            parts.append(passage(records).strip())
        except (KeyError, IndexError, StopIteration, TypeError) as error:
            raise ConfigError(
                f"the passage on {', '.join(names) or 'what was recorded'} does not fit its record ({error!r}); "
                "record it again, or change tests/readme_figures/passages.py"
            ) from None
    return "\n\n".join(part for part in parts if part)


def replaced(text: str, made: str) -> str:
    """Put `made` between the markers of a text. ConfigError unless the text has each marker once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"the page needs the lines {BEGIN!r} and {END!r}, once each, around its figures")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write or check both pages. Returns exit code 0 when they agree with the records, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.readme_figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page would change")
    parser.add_argument("--records", type=Path, default=Path("data/bench"), help="folder of recorded runs")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="page with the summary")
    parser.add_argument("--benchmarks", type=Path, default=Path("docs/benchmarks.md"), help="page with all figures")
    options = parser.parse_args()
    records = RecordFolder(options.records)
    pages = {options.readme: SUMMARY, options.benchmarks: PASSAGES}
    try:
        texts = {page: page.read_text(encoding="utf-8") for page in pages}
        made = {page: replaced(text, section(records, pages[page])) for page, text in texts.items()}
    except (LLMCacheError, OSError) as error:
        sys.stderr.write(f"figures: {error}\n")
        return 1
    changed = [page for page in pages if made[page] != texts[page]]
    for page in changed:
        if options.check:
            sys.stderr.write(f"figures: {page} is not what {options.records} gives; run {parser.prog}\n")
        else:
            page.write_text(made[page], encoding="utf-8")
    return int(bool(options.check and changed))

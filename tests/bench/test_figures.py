"""The figures of README.md and docs/benchmarks.md are what the recorded runs give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmcache.bench.competitors.names import (
    ALONE,
    DISKCACHE,
    GPTCACHE,
    OURS,
)
from llmcache.errors import ConfigError
from tests.conftest import ROOT
from tests.readme_figures import figures
from tests.readme_figures.figures import (
    BEGIN,
    END,
    RecordFolder,
    replaced,
    section,
)
from tests.readme_figures.markdown import table, times
from tests.readme_figures.passages import PASSAGES


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.readme_figures", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_pages_say_what_the_records_say() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_a_record_that_changes_changes_its_table_and_nothing_else(tmp_path: Path) -> None:
    page, records = tmp_path / "benchmarks.md", tmp_path / "bench"
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    records.mkdir()
    for path in (ROOT / "data" / "bench").glob("*.json"):
        (records / path.name).write_bytes(path.read_bytes())
    record = json.loads((records / "index-100000.json").read_bytes())
    record["rows"][-1]["recall_noisy"] = 0.123
    (records / "index-100000.json").write_text(json.dumps(record))
    arguments = ("--records", records, "--readme", readme, "--benchmarks", page)
    checked = run("--check", *arguments)
    assert (checked.returncode, checked.stderr.count("\n")) == (1, 1)
    assert "is not what" in checked.stderr
    assert page.read_text(encoding="utf-8") == text, "a check changes nothing"
    assert run(*arguments).returncode == 0
    changed = [
        (one, other)
        for one, other in zip(text.splitlines(), page.read_text(encoding="utf-8").splitlines(), strict=True)
        if one != other
    ]
    assert len(changed) == 1
    assert changed[0][1].startswith("| hnsw | 0.123 |")
    assert run("--check", *arguments).returncode == 0


def test_every_table_of_the_figures_is_made() -> None:
    """No table stands under "Figures" outside of the markers."""
    for page in ("README.md", "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        under = text.partition("\n## Figures\n")[2].partition("\n## ")[0]
        assert under.strip().startswith(BEGIN)
        assert under.strip().endswith(END)


def test_a_passage_without_its_records_is_left_out(tmp_path: Path) -> None:
    made = section(RecordFolder(tmp_path))
    assert "FAISS indexes" not in made
    assert "Ratios carry over" in made
    assert "FAISS indexes" in section(RecordFolder(ROOT / "data" / "bench"))


def test_a_record_that_does_not_fit_its_passage_is_named(tmp_path: Path) -> None:
    (tmp_path / "index-100000.json").write_text('{"rows": [{"index": "flat"}]}')
    with pytest.raises(ConfigError, match="the passage on index-100000 does not fit its record"):
        section(RecordFolder(tmp_path))
    (tmp_path / "index-100000.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        section(RecordFolder(tmp_path))


def test_hits_of_rivals_are_shown_as_they_are_recorded() -> None:
    def row(name: str, rate: float, ratio: float) -> dict[str, Any]:
        return {"name": name, "per_second": rate, "ratio": ratio, "difference": 1.5e-7}

    rows = [row(ALONE, 530.4, 1), row(OURS, 246_361, 464.6), row(DISKCACHE, 61_234, 115.5)]
    record = {"rows": [*rows, {"name": GPTCACHE, "skipped": "not installed: gptcache"}]}
    (exact,) = (passage for _, passage in PASSAGES if passage.__name__ == "exact")
    made = exact({"hit-banking77": record})
    assert "| LLMCache, exact | 246,000 (465) |" in made
    assert "| exact text on diskcache | 61,234 (115) |" in made or "| exact text on diskcache | 61,234 (116) |" in made
    assert "| GPTCache (FAISS + SQLite) | not measured |" in made
    assert "1.5e-07" in made
    assert exact({}) == ""


def test_text_around_the_markers_stays() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    for wrong in ("no markers", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ConfigError, match="needs the lines"):
            replaced(wrong, "new")


def test_numbers_and_tables_are_written_in_one_way() -> None:
    assert [times(value) for value in (0.97, 1.147, 9.994, 12.34, 441.3, 1234.5)] == [
        "0.97", "1.15", "9.99", "12.3", "441", "1,234",
    ]  # fmt: skip
    assert table(["", "b"], [["c", "d"]]) == "| | b |\n|---|---|\n| c | d |"


def test_a_missing_readme_is_one_line(tmp_path: Path) -> None:
    done = run("--readme", tmp_path / "README.md")
    assert done.returncode == 1
    assert done.stderr.startswith("figures: ")
    assert done.stderr.count("\n") == 1
    assert figures.main.__doc__

"""What the wheel holds, and what the package shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llmcache

ROOT = Path(__file__).parent.parent
FOLDERS = {"llmcache": "llmcache", "indexes": "llmcache/indexes", "cli": "llmcache/cli", "data": "llmcache/data"}
"""Folders of the source tree, and where the wheel has them."""
DATA = {"demo.jsonl", "demo_tomorrow.jsonl"}
PAGE = {"page.html", "chart.html", "style.css"}


def sources(folder: Path) -> list[Path]:
    """Python files below a folder, without those that are reached through a link."""
    inside = [folder / name for name in os.listdir(folder) if not (folder / name).is_symlink()]
    return [path for path in inside if path.suffix == ".py"] + [
        path for one in inside if one.is_dir() for path in sources(one)
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a clean copy, so that no old build/ folder leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            source / folder,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_exactly_the_source_files(wheel: set[str]) -> None:
    expected = {"llmcache/py.typed"}
    for folder, package in FOLDERS.items():
        expected |= {f"{package}/{path.relative_to(ROOT / folder)}" for path in sources(ROOT / folder)}
    expected |= {f"llmcache/report/{name}" for name in PAGE}
    assert wheel == expected | {f"llmcache/data/{name}" for name in DATA}


def test_the_wheel_claims_only_the_llmcache_name(wheel: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel} == {"llmcache"}


def test_the_public_door_is_what_it_says() -> None:
    for name in llmcache.__all__:
        assert getattr(llmcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        _ = llmcache.Cache


def test_the_version_is_the_same_everywhere() -> None:
    assert f'version = "{llmcache.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"[{llmcache.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_imports_what_exists(page: str) -> None:
    for line in (ROOT / page).read_text("utf-8").split("\n"):
        found = re.fullmatch(r"\s*(from llmcache[\w.]* import [\w, ]+|import llmcache[\w.]*)\s*(#.*)?", line)
        if found:
            exec(found[1], {})

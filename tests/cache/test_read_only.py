"""Tests of read-only stores: hits are served, misses are computed but not stored, and nothing is written."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.errors import ConfigError, LLMCacheError
from llmcache.indexes.errors import SnapshotNotFound, StoreFenced
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.store import Store
from tests.indexes.test_environment import mounted

KNOWN = [f"the parcel {i} is known" for i in range(30)]
MIXED = [*KNOWN[:10], *(f"the parcel {i} is new" for i in range(15)), "a text beside", "a text beside"]


@pytest.fixture
def store(tmp_path: Path, model: SentenceTransformer) -> Path:
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(KNOWN)
    return tmp_path / "store"


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and bytes of every file, by name."""
    files = [one for one in sorted(path.rglob("*")) if one.is_file()]
    return {str(one.relative_to(path)): (one.stat().st_mtime_ns, one.read_bytes()) for one in files}


def _encode(cache: LLMCache) -> np.ndarray:
    return np.asarray(cache.encode(MIXED))


def _run(cache: LLMCache) -> np.ndarray:
    return np.array([result.output for result in cache.run(MIXED)])


def _attached(cache: LLMCache) -> np.ndarray:
    with cache.attached():
        return np.asarray(cache.encode(MIXED))


@pytest.mark.parametrize("use", [_encode, _run, _attached])
@pytest.mark.parametrize("commit_seconds", [60.0, 1e-9])
@pytest.mark.parametrize("background", [True, False])
def test_what_is_known_is_served_what_is_new_is_computed_and_no_file_changes(
    store: Path,
    model: SentenceTransformer,
    use: Callable[[LLMCache], np.ndarray],
    commit_seconds: float,
    background: bool,
) -> None:
    before = everything(store)
    config = CacheConfig(commit_seconds=commit_seconds, background=background)
    with LLMCache.open(store, model, config=config, read_only=True) as cache:
        assert cache.read_only
        for _ in range(2):
            np.testing.assert_allclose(use(cache), model.encode(MIXED), atol=1e-5)
        cache.commit()
        counters = cache.stats().counters
    assert counters.exact_text >= 20
    assert counters.not_stored > 0
    assert everything(store) == before


def test_the_files_of_a_read_only_run_are_those_of_a_run_that_stores(
    store: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    for name, read_only in (("a", True), ("b", False)):
        with LLMCache.open(store, model, read_only=read_only) as cache:
            for resume in (False, True):
                Pipeline(cache).write(MIXED, tmp_path / f"{name}-{resume}.npy", resume=resume)
    a, b = (np.load(tmp_path / f"{name}-{resume}.npy") for name, resume in (("a", True), ("b", False)))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_store_that_is_only_read_refuses_what_would_have_to_be_written(
    store: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no namespace 'other'"):
        LLMCache.open(store, model, namespace="other", read_only=True)
    with pytest.raises(SnapshotNotFound):
        LLMCache.open(tmp_path / "nowhere", model, read_only=True)
    assert not (tmp_path / "nowhere").exists()
    with LLMCache.open(store, model, read_only=True) as cache:
        with pytest.raises(ConfigError, match="read-only"):
            cache.calibrate(budget=0.1, drift="cosine")
        with pytest.raises(StoreFenced, match="read_only=True"):
            cache.rebuild()
    opened = Store.open(store, read_only=True)
    with pytest.raises(StoreFenced, match="open the store again where it can be written"):
        opened.commit()
    opened.close()


def test_a_folder_that_cannot_be_written_is_only_read_with_one_warning(
    store: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(store)
    monkeypatch.setattr(Folder, "writable", lambda self: False)
    config = CacheConfig(commit_seconds=1e-9)
    with caplog.at_level(logging.WARNING, "llmcache"), LLMCache.open(store, model, config=config) as cache:
        for _ in range(3):
            np.testing.assert_allclose(_encode(cache), model.encode(MIXED), atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        f"{store} cannot be written: what is computed is not kept"
    ]
    assert everything(store) == before


@pytest.mark.parametrize("gone", [(), ("idx", "stat")])
def test_the_command_line_runs_from_a_folder_that_is_mounted_read_only(
    store: Path, tmp_path: Path, model: SentenceTransformer, gone: tuple[str, ...]
) -> None:
    for name in gone:
        subprocess.run(["rm", "-r", str(store / name)], check=True)
    (tmp_path / "corpus.txt").write_text("\n".join(MIXED))
    out, environment = tmp_path / "out.npy", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with mounted(tmp_path / "view", "--bind", str(store)) as view:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)

        def command(*arguments: str) -> subprocess.CompletedProcess[str]:
            whole = [
                sys.executable,
                "-c",
                "from llmcache.cli.main import main; main()",
                *arguments,
                "--store",
                str(view),
            ]
            return subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)

        done = command("run", str(tmp_path / "corpus.txt"), "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be written: what is computed is not kept") == 1
        assert "Traceback" not in done.stderr
        if not gone:
            asked = command("run", str(tmp_path / "corpus.txt"), "--out", str(out), "--read-only")
            assert (asked.returncode, asked.stderr.strip()) == (0, "")
            refused = command("warm", str(tmp_path / "corpus.txt"))
            assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (1, 2)
    np.testing.assert_allclose(np.load(out), model.encode(MIXED), atol=1e-5)


def test_a_disk_that_fills_up_during_a_run_fails_no_run_and_is_counted(
    store: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llmcache.cli.shared.engine import opened

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with opened("local", None, str(store), None) as cache:
        monkeypatch.setattr(Folder, "write", full)
        cache.encode(MIXED)
    assert cache.stats().counters.not_stored == len(set(MIXED) - set(KNOWN))
    assert sum("No space left" in record.getMessage() for record in caplog.records) == 1
    monkeypatch.undo()
    with LLMCache.open(store, model) as broken:
        broken.encode(MIXED)
        monkeypatch.setattr(Folder, "write", full)
        with pytest.raises(LLMCacheError, match="No space left"):
            broken.commit()  # an explicit commit raises
